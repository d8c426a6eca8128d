"""The rows of the claim on stability: one injection under one recipe, at all rates and seeds."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from openmythos.config import InjectionKind
from openmythos.evidence.cells import Result
from openmythos.evidence.stress_training import Recipe

OURS: InjectionKind = "lti"
KINDS: dict[InjectionKind, str] = {
    OURS: "ours (A h + B e)",
    "free": "a free diagonal (a h + B e)",
    "add": "h + e",
    "linear": "one matrix (W [h, e])",
}
RECIPES: tuple[Recipe, ...] = ("stress", "full")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WITHIN = 0.1
"""Nats above a row's best rate up to which a rate is usable; and below the loss by frequencies
from which a training has learnt something."""


class Row(NamedTuple):
    """One injection under one recipe."""

    recipe: Recipe
    kind: InjectionKind
    runs: dict[float, list[Result]]
    """By rate."""

    @property
    def losses(self) -> dict[float, float]:
        """Mean loss over seeds at the rates where every seed stayed finite."""
        return {
            rate: statistics.fmean(run["loss"] for run in runs)
            for rate, runs in self.runs.items()
            if all(run["loss"] is not None for run in runs)
        }

    @property
    def best(self) -> float:
        """The lowest mean loss over rates; infinite where every rate diverged."""
        return min(self.losses.values(), default=math.inf)

    @property
    def at_best_rate(self) -> list[Result]:
        """The runs at the rate with the lowest mean loss; none where every rate diverged."""
        losses = self.losses
        return self.runs[min(losses, key=losses.__getitem__)] if losses else []

    @property
    def usable(self) -> list[float]:
        """Rates where every seed learnt, and the mean ends within `WITHIN` of the best one's."""
        return [
            rate
            for rate, loss in self.losses.items()
            if loss <= self.best + WITHIN and all(map(learns, self.runs[rate]))
        ]

    @property
    def all_runs(self) -> list[Result]:
        """All runs, whatever their rate."""
        return [run for runs in self.runs.values() for run in runs]

    @property
    def failed(self) -> list[Result]:
        """Runs that were not finite, or learnt nothing."""
        return [run for run in self.all_runs if not learns(run)]

    @property
    def complete(self) -> bool:
        """Whether every rate has a result."""
        return set(self.runs) >= set(RATES)


Rows = dict[tuple[Recipe, InjectionKind], Row]


def learns(run: Result) -> bool:
    """Return whether a run ended finite and clearly better than by frequencies of tokens."""
    return run["loss"] is not None and run["loss"] <= run["frequencies"] - WITHIN


def rows_of(results: dict[str, Result]) -> Rows:
    """Return the rows that have results, ours first."""
    rows: Rows = {}
    for recipe in RECIPES:
        for kind in KINDS:
            runs: dict[float, list[Result]] = {}
            for name, run in results.items():
                if name.startswith(f"{recipe}/{kind}/"):
                    runs.setdefault(run["rate"], []).append(run)
            if runs:
                rows[recipe, kind] = Row(recipe, kind, dict(sorted(runs.items())))
    return rows


class Gap(NamedTuple):
    """Our loss minus an alternative's, at the rate where ours fares worst."""

    kind: InjectionKind
    rate: float
    nats: float


def worst_gaps(rows: Rows, ours: Row) -> list[Gap]:
    """Return, for each alternative, where ours compares worst; a diverged alternative is beaten."""
    gaps = []
    for (recipe, kind), row in rows.items():
        if recipe != ours.recipe or kind == OURS:
            continue
        pairs = [
            Gap(kind, rate, ours.losses.get(rate, math.inf) - loss)
            for rate, loss in row.losses.items()
            if rate in ours.runs
        ]
        if pairs:
            gaps.append(max(pairs, key=lambda gap: gap.nats))
    return gaps


def largest_radius(row: Row) -> float:
    """Return the largest spectral radius at any step of any run; infinite where not finite."""
    found = [run["largest_radius"] for run in row.all_runs]
    return max(math.inf if radius is None else radius for radius in found)
