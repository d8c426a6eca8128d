"""The cells of a claim: trainings and measurements that stand alone, resume, and are kept.

A claim is a grid of cells. Each writes its result once, whole or not at all, so that an
interrupted grid goes on where it stopped and a report can be made of the cells there are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openmythos.errors import CheckpointError
from openmythos.files import write_atomically

Result = dict[str, Any]
"""What a cell measured, as JSON has it."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One training or measurement of a claim."""

    name: str
    """Unique within the claim, a folder's name: `looped-3/seed-0`."""
    settings: dict[str, Any]
    """All that decides the result, as JSON has it; a kept result of other settings is refused."""
    run: Callable[[Path, Say], Result]
    """Given a folder for checkpoints and a function to report with."""


def run_cells(cells: Iterable[Cell], work: Path, say: Say) -> dict[str, Result]:
    """Run the cells that have no result yet; return all results by name.

    Args:
        cells: in the order to run.
        work: each cell's folder is made in it.
        say: told of progress, a line each time.

    Raises:
        CheckpointError: a kept result was made with other settings.
    """
    results = {}
    for cell in cells:
        folder = work / cell.name
        kept = read_result(folder, cell)
        if kept is None:
            folder.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            measured = cell.run(folder, _prefixed(say, cell.name))
            kept = {"settings": cell.settings, "torch": torch.__version__, **measured}
            kept.setdefault("seconds", time.perf_counter() - started)
            write_atomically(folder / "result.json", (json.dumps(kept, indent=1) + "\n").encode())
        results[cell.name] = kept
    return results


def read_result(folder: Path, cell: Cell) -> Result | None:
    """Return a cell's kept result, None where it has not finished.

    Raises:
        CheckpointError: it was made with other settings, or is damaged.
    """
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} must be JSON ({error}): delete it to run again") from error
    if result.get("settings") != json.loads(json.dumps(cell.settings)):
        raise CheckpointError(
            f"{path} must be of the settings asked for: delete its folder to run it again, or "
            "choose another --work"
        )
    return result


def _prefixed(say: Say, name: str) -> Say:
    return lambda line: say(f"{name}: {line}")
