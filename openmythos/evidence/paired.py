"""Rows of trainings by seed, and what lies between two rows: paired differences, with an interval.

Trainings of one seed read their text in one order, so much of a seed's luck is common to the rows
and leaves the difference. Three seeds are few: the interval is Student's, and wide.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from openmythos.evidence.cells import Result

Runs = dict[int, Result]
"""A row's results by seed."""

STUDENT = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantile 0.975 by the number of values, from one; more than ten are taken as ten."""


class Interval(NamedTuple):
    """A mean and its 95 % interval, by Student's t; infinite for one value."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.mean:+.4f} (one seed)"
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})"

    @property
    def verdict(self) -> str:
        """Whether the first row is better, where less is better."""
        if self.high <= 0:
            return "better, and the interval shows it"
        if self.low > 0:
            return "worse, and the interval shows it"
        side = "at or below" if self.mean <= 0 else "above"
        why = "one seed does" if math.isinf(self.high) else "the interval does"
        return f"{side}, but {why} not settle it"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values and its 95 % interval."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, -math.inf, math.inf)
    error = statistics.stdev(values) / math.sqrt(count)
    half = STUDENT[min(count, len(STUDENT)) - 1] * error
    return Interval(mean, mean - half, mean + half)


def rows_of(results: Mapping[str, Result], prefixes: tuple[str, ...] = ("",)) -> dict[str, Runs]:
    """Return the rows whose cells, `NAME/seed-0`, begin with one of `prefixes`; default: all."""
    rows: dict[str, Runs] = {}
    for cell, result in results.items():
        name, _, seed = cell.partition("/seed-")
        if name.startswith(prefixes):
            rows.setdefault(name, {})[int(seed)] = result
    return rows


def runs_of(results: Mapping[str, Result], name: str) -> list[Result]:
    """Return the results of one row, whatever its cells are told apart by."""
    return [result for cell, result in results.items() if cell.split("/")[0] == name]


def first_of(results: Mapping[str, Result], name: str) -> tuple[str, Result]:
    """Return the first cell of a row that has some, by name: the one that is drawn of it."""
    return next((cell, run) for cell, run in results.items() if cell.split("/")[0] == name)


def mean(runs: Runs, key: str) -> float:
    """Return a figure's mean over the seeds."""
    return statistics.fmean(run[key] for run in runs.values())


def common_seeds(rows: Mapping[str, Runs], *names: str) -> list[int]:
    """Return the seeds that all these rows have, none where a row is missing."""
    return sorted(set.intersection(*(set(rows.get(name, {})) for name in names)))


def difference(rows: Mapping[str, Runs], name: str, other: str, key: str) -> Interval | None:
    """Return a row's figure minus another's, paired by seed; None where no seed has both."""
    pairs = [(rows[name][s], rows[other][s]) for s in common_seeds(rows, name, other)]
    return interval([one[key] - two[key] for one, two in pairs]) if pairs else None
