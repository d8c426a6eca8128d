"""The claims: a name for each, and how one is reproduced. Free of torch until one is run.

A claim is a file of this folder whose docstring is the claim, with

    TITLE                            what it is called
    SEEDS                            seeds of the full form
    cells(quick=, seeds=)            its trainings and measurements, `Cell`s, the main ones first
    conclude(results) -> Section     sentences, tables and expectations, from the numbers alone
    draw_figure(results) -> Figure

and a row here.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openmythos.errors import InputError

if TYPE_CHECKING:
    from openmythos.evidence.cells import Result
    from openmythos.evidence.report import Section


class Row(NamedTuple):
    """A claim in the list of all."""

    line: str
    hours: float
    """Of one core, for everything with as many seeds as the claim asks for."""


CLAIMS = {
    "depth-extrapolation": Row(
        "Chains deeper than any in training are solved with more loops.", hours=14.0
    ),
    "adaptive-computation": Row(
        "Tokens that need more thought take more loops; the rest is saved.", hours=4.5
    ),
    "shipped-models": Row(
        "What the models inside the package can do, and what they cannot.", hours=0.7
    ),
    "parameter-efficiency": Row(
        "A looped model reads as a plain one of 1.69 times its parameters.", hours=69.0
    ),
    "test-time-scaling": Row(
        "Text reads no worse with far more loops than in training.", hours=2.5
    ),
    "systematic-generalisation": Row(
        "Facts seen only alone, never inside a chain, work in chains.", hours=12.0
    ),
    "stability": Row("High learning rates and 1,024 loops do not break the loop.", hours=6.0),
    "routing": Row(
        "A token takes different experts at each loop, and it matters which.", hours=9.0
    ),
}


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """How a claim is reproduced."""

    quick: bool = False
    """A small form, in minutes, that shows the shape only."""
    seeds: int | None = None
    """Of the main trainings. Default: the claim's own number."""
    only: str = ""
    """Run only the cells whose names start so; the report takes all that have results."""
    published: Path | None = None
    """A folder of figures and pages, as `out`, whose results count as done."""
    work: Path = Path("runs/evidence")
    """Where trainings keep checkpoints and results."""
    out: Path | None = None
    """Where figures and pages go. Default: `work`; of a quick form, `quick` in it."""

    @property
    def pages(self) -> Path:
        """Where figures and pages go."""
        if self.out is not None:
            return self.out
        return self.work / "quick" if self.quick else self.work


@dataclass(frozen=True)
class Written:
    """What a reproduction leaves."""

    section: Section
    files: list[Path]
    missing: list[str]
    """Cells of the claim that have no result yet."""


def claim(name: str) -> Any:
    """Import a claim's file.

    Raises:
        InputError: there is no such claim.
    """
    if name not in CLAIMS:
        raise InputError(f"claim={name!r} must be one of {', '.join(CLAIMS)}")
    return import_module(f"openmythos.evidence.{name.replace('-', '_')}")


def reproduce(name: str, how: Reproduction, say: Callable[[str], None]) -> Written:
    """Run what has no result yet, and write the claim's figures, picture and pages.

    Raises:
        InputError: no such claim, no seed, or no cell starts with `only`.
        CheckpointError: kept results were made with other settings, or published ones are damaged.
    """
    from openmythos.evidence.cells import read_result, run_cells, take_results
    from openmythos.evidence.report import (
        read_claim,
        with_machines,
        with_missing,
        write_claim,
        write_pages,
    )
    from openmythos.training.figures import save

    module = claim(name)
    if how.quick and how.seeds is not None:
        raise InputError(f"seeds={how.seeds} must be left out of a quick form, which has one")
    seeds = module.SEEDS if how.seeds is None else how.seeds
    if seeds < 1:
        raise InputError(f"seeds={seeds} must be 1 or more")
    how = dataclasses.replace(how, seeds=seeds)
    cells = module.cells(quick=how.quick, seeds=seeds)
    chosen = [cell for cell in cells if cell.name.startswith(how.only)]
    if not chosen:
        names = ", ".join(cell.name for cell in cells)
        raise InputError(f"only={how.only!r} must begin one of {names}")
    _keep_others(how, name, {cell.name for cell in cells})
    say(cost(name, how))
    work = how.work / ("quick" if how.quick else "full") / name
    if how.published is not None:
        taken = take_results(read_claim(how.published, name)["results"], cells, work)
        say(f"{len(taken)} of {len(cells)} results are taken from {how.published}")
    run_cells(chosen, work, say)
    found = {cell.name: read_result(work / cell.name, cell) for cell in cells}
    results: dict[str, Result] = {key: value for key, value in found.items() if value is not None}
    missing = [key for key, value in found.items() if value is None]
    section = with_machines(module.conclude(results), results)
    section = with_missing(section, list(found), missing)
    says = {"claim": name, "command": command(name, how), "cost": cost(name, how)}
    content = {**says, "results": results}
    picture = save(module.draw_figure(results), how.pages / "evidence" / f"{name}.png")
    files = [write_claim(how.pages, name, content, section), picture]
    files += write_pages(how.pages, list(CLAIMS))
    return Written(section, files, missing)


def _keep_others(how: Reproduction, name: str, cells: Collection[str]) -> None:
    """Raise `InputError` where figures would be written over that hold results of other cells."""
    from openmythos.evidence.report import figures, read_claim

    if not figures(how.pages, name).is_file():
        return
    others = sorted(set(read_claim(how.pages, name)["results"]) - set(cells))
    if others:
        raise InputError(
            f"out={str(how.pages)!r} must not hold results that would be lost, but has "
            f"{', '.join(others)}: ask for as many seeds, or for another folder"
        )


def command(name: str, how: Reproduction) -> str:
    """Return the command that gives these figures."""
    parts = ["openmythos", "evidence", name]
    if how.quick:
        return shlex.join([*parts, "--quick"])
    if how.seeds is not None:
        parts += ["--seeds", str(how.seeds)]
    return shlex.join(parts)


def cost(name: str, how: Reproduction) -> str:
    """Return how long a claim takes."""
    if how.quick:
        return "A few minutes."
    return (
        f"About {CLAIMS[name].hours:g} hours of one core for all of it; with `--quick` a few "
        "minutes, for its shape only."
    )
