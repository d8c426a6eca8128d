"""Draw a training run: PNGs of its metrics, in RUN/plots.

Example:
    openmythos plot runs/nano

Draws the loss over the steps, bits per byte against loops, the spectral radius of the injection,
the size of the state after each loop, and the load of the experts at each loop. Works while the
run is going on, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos plot`."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a training run."""

    out: Path | None = None
    """Folder to draw into. Default: RUN/plots."""

    json: bool = False
    """Print the files' paths as JSON."""


def run(settings: Settings) -> None:
    """Read the metrics and draw."""
    from openmythos.training.metrics import metrics
    from openmythos.training.plots import plot_run

    lines = list(metrics(settings.run))
    folder = settings.out or settings.run / "plots"
    files = plot_run(lines, folder, settings.run.resolve().name)
    if settings.json:
        print(json.dumps({"files": [str(file) for file in files]}))
        return
    for file in files:
        print(file)
