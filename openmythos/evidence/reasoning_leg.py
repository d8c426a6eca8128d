"""The reasoning side of parameter efficiency: chains of 20 hops at several sizes.

The looped model is the one-layer core of the depth claim, with the loops that validation chains
ask for. The plain ones have its task, supervision and seed, 1.69 and 5 times its parameters, twice
its steps and two learning rates, of which validation chains choose.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from openmythos.evidence.cells import Cell, Result, Say
from openmythos.evidence.depth_extrapolation import LOOPED, SOLVED
from openmythos.evidence.hop_training import (
    FRESH,
    LOOPS,
    TASK,
    TRAINED_HOPS,
    VALIDATION,
    HopTraining,
    measure,
)
from openmythos.evidence.plain import plain_sizes
from openmythos.evidence.report import Expectation, table

MODEL = LOOPED["core-1"]
RATIOS = (1.69, 5.0)
RATES = (0.01, 0.02)
"""Muon's, for the plain models."""

NAME = "hops-looped"


def plain_of(ratio: float, looped: HopTraining) -> HopTraining:
    """Return a plain transformer of `ratio` times the parameters, and twice the steps."""
    sizes = plain_sizes(looped.config, ratio, inner=looped.feed_forward_size)
    return dataclasses.replace(
        looped,
        plain_layers=sizes.layers,
        feed_forward_size=sizes.feed_forward_size,
        steps=2 * looped.steps,
    )


def cells(looped: HopTraining = MODEL) -> list[Cell]:
    """The looped model, and each plain one at each rate."""
    made = [_cell(NAME, looped)]
    for ratio in RATIOS:
        plain = plain_of(ratio, looped)
        for rate in RATES:
            training = dataclasses.replace(plain, muon_lr=rate)
            made.append(_cell(f"hops-plain-{ratio:g}x-lr-{rate:g}", training))
    return made


def _cell(name: str, training: HopTraining) -> Cell:
    def run(folder: Path, say: Say) -> Result:
        model, took = training.train(folder, say)
        say("measuring")
        depths = (1,) if training.plain_layers else LOOPS
        curve = measure(model, VALIDATION, TRAINED_HOPS, depths, seed=training.seed)
        enough = [loops for loops, right in curve.items() if right >= SOLVED]
        best = max(curve, key=lambda loops: (curve[loops], -loops))
        loops = enough[0] if enough else best
        fresh = measure(model, FRESH, TRAINED_HOPS, [loops], seed=training.seed, count=1024)[loops]
        return took | {"loops": loops, "validation": curve[loops], "fresh": fresh}

    settings = {**training.as_json(), "measured": list(LOOPS), "solved": SOLVED}
    return Cell(f"{name}/seed-{training.seed}", settings, run)


def chosen(results: dict[str, Result]) -> dict[str, Result]:
    """Return the looped model's result and the better rate's of each plain one, by name."""
    rows: dict[str, Result] = {}
    for cell, result in results.items():
        name = cell.split("/")[0].split("-lr-")[0]
        if not name.startswith("hops-"):
            continue
        if name not in rows or result["validation"] > rows[name]["validation"]:
            rows[name] = result
    return rows


def tables(results: dict[str, Result]) -> list[str]:
    """Return the leg's table, if any of it was run."""
    rows = [
        [
            name.removeprefix("hops-"),
            f"{run['parameters'] / 1e6:.2f} M",
            f"{run['fresh']:.3f}",
            str(run["loops"]),
            f"{run['flops']:.1e}",
        ]
        for name, run in chosen(results).items()
    ]
    head = [f"{TRAINED_HOPS} hops", "parameters", "right", "loops", "training FLOPs"]
    return [table(head, rows)] if rows else []


def sentences(results: dict[str, Result]) -> list[str]:
    """Say how the looped model stands against the plain ones."""
    rows = chosen(results)
    looped = rows.pop(NAME, None)
    if looped is None or not rows:
        return []
    others = "; ".join(
        f"a plain one of {run['parameters'] / looped['parameters']:.3g} times its parameters, "
        f"trained with {run['flops'] / looped['flops']:.2f} times its operations, "
        f"{run['fresh']:.3f}" + (", which is chance" if run["fresh"] < 2 / TASK.entities else "")
        for run in rows.values()
    )
    sentence = (
        f"On chains of {TRAINED_HOPS} hops a looped model of {looped['parameters'] / 1e6:.2f} M "
        f"parameters answers {looped['fresh']:.3f} right; {others} (one seed)."
    )
    return [sentence]


def expectations(results: dict[str, Result]) -> list[Expectation]:
    """Wanted: no plain model of the sizes tried answers more chains right."""
    rows = chosen(results)
    looped = rows.pop(NAME, None)
    if looped is None:
        return []
    return [_expectation(name.removeprefix("hops-"), looped, run) for name, run in rows.items()]


def _expectation(name: str, looped: dict[str, Any], run: dict[str, Any]) -> Expectation:
    return Expectation(
        f"{TRAINED_HOPS} hops: right, looped against {name}",
        f"≥ {run['fresh']:.3f}",
        f"{looped['fresh']:.3f}",
        looped["fresh"] >= run["fresh"],
    )
