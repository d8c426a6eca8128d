"""The claim on stability, its part on depth: the size of the state at many loops."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_CEILING, Context

from openmythos.config import InjectionKind
from openmythos.evidence.cells import Result, by_number
from openmythos.evidence.report import rounded_up, table
from openmythos.evidence.stress_rows import KINDS, RECIPES, Row, Rows

Sizes = dict[str, float | None]
"""The state's size by loops; None where it is not finite."""

DEPTHS = (1, 8, 64, 512, 1024)
"""Loops in the table."""


def sentences(rows: Rows, untrained: Result | None) -> list[str]:
    """How the state grows from the trained depth to the deepest."""
    found = {kind: row for (recipe, kind), row in rows.items() if recipe == "stress"}
    measured = [run for row in found.values() for run in row.all_runs if run["states"]]
    said = []
    if measured:
        trained, deepest = measured[0]["trained_loops"], deepest_of(measured[0]["states"])
        most = {kind: worst_growth(row.all_runs) for kind, row in found.items()}
        best = {kind: worst_growth(row.at_best_rate) for kind, row in found.items()}
        lost = {kind: _lost(row) for kind, row in found.items()}
        said.append(
            f"From {trained} loops to {deepest:,}, the state of models trained under stress grows "
            f"at most, over all rates, by these factors: {_each(most, _times)}."
        )
        said.append(f"At each one's best rate, at most: {_each(best, _times)}.")
        said.append(
            f"Read after {deepest:,} loops instead of {trained}, text costs the model of each "
            f"one's best rate so many nats a token more: {_each(lost, _nats)}."
        )
    if untrained is not None:
        first, deepest = untrained["trained_loops"], deepest_of(untrained["states"]["stress/lti"])
        factors = [
            f"{KINDS[kind]} {_times(growth(untrained['states'][f'stress/{kind}'], first, deepest))}"
            for kind in KINDS
        ]
        said.append(f"Untrained, from {first} to {deepest:,}, at most: {'; '.join(factors)}.")
    return said


def growth(states: Sizes, first: int, last: int) -> float:
    """Return the state's size at `last` loops over that at `first`; infinite where not finite."""
    sizes = by_number(states)
    before, after = sizes[first], sizes[last]
    return math.inf if before is None or after is None else after / before


def deepest_of(states: Sizes) -> int:
    """Return the most loops measured."""
    return max(by_number(states))


def worst_growth(runs: Sequence[Result]) -> float | None:
    """Return the most that a state grows from the trained depth to the deepest.

    None where no run stayed finite in training.
    """
    found = [
        growth(run["states"], run["trained_loops"], deepest_of(run["states"]))
        for run in runs
        if run["states"] is not None
    ]
    return max(found) if found else None


def _lost(row: Row) -> float | None:
    """Mean nats a token that the deepest loop reads worse by than the trained one, at best rate."""
    found = [
        _finite(losses[max(losses)]) - _finite(losses[run["trained_loops"]])
        for run in row.at_best_rate
        if (losses := by_number(run["losses"] or {}))
    ]
    return statistics.fmean(found) if found else None


def _finite(value: float | None) -> float:
    return math.inf if value is None else value


def _each(values: Mapping[InjectionKind, float | None], worded: Callable[[float], str]) -> str:
    return "; ".join(
        f"{KINDS[kind]} {worded(value)}" for kind, value in values.items() if value is not None
    )


def _times(factor: float) -> str:
    """A factor that the growth does not exceed, to two digits where it is large."""
    if math.isinf(factor):
        return "until it overflows"
    if factor < 1000:
        return rounded_up(factor, 2)
    two_digits = Context(prec=2, rounding=ROUND_CEILING)
    return f"{float(two_digits.create_decimal(repr(factor))):.1e}"


def _nats(more: float) -> str:
    return f"{more:+.3f}" if math.isfinite(more) else "no finite number"


def sizes_table(rows: Rows, untrained: Result | None) -> str:
    """The size of the state at some depths, before and after training."""
    lines = []
    for recipe in RECIPES:
        for kind in KINDS:
            measured = {} if untrained is None else untrained["states"]
            if states := measured.get(f"{recipe}/{kind}"):
                lines.append([recipe, KINDS[kind], "untrained", *_at_depths([states])])
            if (row := rows.get((recipe, kind))) is not None:
                found = [run["states"] for run in row.all_runs if run["states"] is not None]
                if found:
                    lines.append([recipe, KINDS[kind], "trained", *_at_depths(found)])
    head = ["size of the state (largest of the runs)", "injection", "model", "loops: 1"]
    return table([*head, *(f"{n:,}" for n in DEPTHS[1:])], lines) if lines else ""


def _at_depths(found: list[Sizes]) -> list[str]:
    """The largest size of several models at each depth; nothing where a depth was not measured."""
    measured = [by_number(states) for states in found]
    cells = []
    for depth in DEPTHS:
        sizes = [states[depth] for states in measured if depth in states]
        finite = [size for size in sizes if size is not None]
        largest = f"{max(finite):.3g}" if finite else ""
        cells.append(largest if len(finite) == len(sizes) else "not finite")
    return cells
