"""The claim on stability, its part on depth: the size of the state at many loops."""

from __future__ import annotations

import math
from typing import Any

from openmythos.evidence.cells import Result
from openmythos.evidence.report import table
from openmythos.evidence.stress_rows import KINDS, RECIPES, Row, Rows

Sizes = dict[Any, float | None]
"""The state's size by loops; None where it is not finite."""

DEPTHS = (1, 8, 64, 512, 1024)
"""Loops in the table."""


def sentences(rows: Rows, untrained: Result | None) -> list[str]:
    """How the state grows from the trained depth to the deepest."""
    found = {kind: row for (recipe, kind), row in rows.items() if recipe == "stress"}
    parts = [
        f"{KINDS[kind]} {_times(most)}"
        for kind, row in found.items()
        if (most := _trained_growth(row)) is not None
    ]
    said = []
    if parts:
        runs = [run for row in found.values() for run in row.all_runs if run["states"]]
        deepest, trained = deepest_of(runs[0]["states"]), runs[0]["trained_loops"]
        said.append(
            f"From {trained} loops to {deepest:,}, the state of models trained under stress grows "
            f"at most by these factors: {'; '.join(parts)}."
        )
    if untrained is not None:
        first, deepest = untrained["trained_loops"], deepest_of(untrained["states"]["stress/lti"])
        factors = [
            f"{KINDS[kind]} {_times(growth(untrained['states'][f'stress/{kind}'], first, deepest))}"
            for kind in KINDS
        ]
        said.append(f"Untrained, from {first} to {deepest:,}: {'; '.join(factors)}.")
    return said


def growth(states: Sizes, first: int, last: int) -> float:
    """Return the state's size at `last` loops over that at `first`; infinite where not finite."""
    sizes = {int(loops): size for loops, size in states.items()}
    before, after = sizes[first], sizes[last]
    return math.inf if before is None or after is None else after / before


def deepest_of(states: Sizes) -> int:
    """Return the most loops measured."""
    return max(map(int, states))


def _trained_growth(row: Row) -> float | None:
    """The worst growth from the trained depth to the deepest, of runs that stayed finite."""
    found = [
        growth(run["states"], run["trained_loops"], deepest_of(run["states"]))
        for run in row.all_runs
        if run["states"] is not None
    ]
    return max(found) if found else None


def _times(factor: float) -> str:
    return "until it overflows" if math.isinf(factor) else f"{factor:.2f}"


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
    measured = [{int(n): size for n, size in states.items()} for states in found]
    cells = []
    for depth in DEPTHS:
        sizes = [states[depth] for states in measured if depth in states]
        finite = [size for size in sizes if size is not None]
        largest = f"{max(finite):.3g}" if finite else ""
        cells.append(largest if len(finite) == len(sizes) else "not finite")
    return cells
