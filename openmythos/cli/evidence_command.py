"""Reproduce a claim: its trainings, its controls, its figures.

Examples:
    openmythos evidence                             # lists the claims and their hours
    openmythos evidence depth-extrapolation --quick # minutes; shows the shape
    openmythos evidence depth-extrapolation         # hours; the published figures
    openmythos evidence routing --published docs    # only what docs/evidence does not have

Trainings run on the GPU where there is one, keep checkpoints in --work, and go on where they were
stopped. The figures, as JSON and PNG, the page with every claim's numbers and the gallery go to
--out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from openmythos.cli.flags import refuse_unused, typed
from openmythos.evidence.claims import CLAIMS, Reproduction, reproduce
from openmythos.training.threads import check_threads


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos evidence`."""

    claim: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[CLAIM]")] = None
    """Which claim. Default: list them."""

    quick: bool = False
    """A small form, in minutes, that shows the shape and proves nothing."""

    seeds: int | None = None
    """Seeds of the main trainings. Default: as many as the claim asks for; --quick has one."""

    only: str = ""
    """Run only the trainings whose names start so; the report takes all that are there."""

    published: Path | None = None
    """Folder of figures and pages, as of --out, whose results are taken where the settings are the
    same: to add seeds or rows to `docs` without running the others again."""

    work: Path = Path("runs/evidence")
    """Folder of checkpoints and results, kept between calls."""

    out: Path | None = None
    """Folder of figures and pages. Default: --work, or quick in it with --quick."""

    threads: int | None = None
    """CPU threads. Default: as many as torch takes."""

    json: bool = False
    """Print what was measured, as OUT/evidence/CLAIM.json has it, and nothing else."""

    typed: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Names of the flags that were typed, whatever their values."""


def defaults(arguments: Sequence[str]) -> Settings:
    """Settings that know which flags were typed."""
    return Settings(typed=typed(arguments))


def run(settings: Settings) -> None:
    """Reproduce, or list what can be."""
    if settings.claim is None:
        refuse_unused(settings.typed, settings.typed, "without a CLAIM: the list is all there is")
        print("Claims that are put to the test; docs/evidence.md says what held and what not.\n")
        for name, row in CLAIMS.items():
            print(f"{name:<26}{row.line} About {row.hours:g} hours of one core.")
        return
    how = Reproduction(
        quick=settings.quick,
        seeds=settings.seeds,
        only=settings.only,
        published=settings.published,
        work=settings.work,
        out=settings.out,
    )
    if settings.threads is not None:
        check_threads(settings.threads)
        import torch

        torch.set_num_threads(settings.threads)
    say = _silent if settings.json else _say
    written = reproduce(settings.claim, how, say)
    from openmythos.evidence.report import as_markdown, read_claim

    if settings.json:
        print(json.dumps(read_claim(how.pages, settings.claim)))
        return
    print(f"\n{as_markdown(written.section)}")
    for file in written.files:
        print(file)
    if written.missing:
        print(f"not run yet: {', '.join(written.missing)}")


def _say(line: str) -> None:
    print(line, flush=True)


def _silent(line: str) -> None:
    pass
