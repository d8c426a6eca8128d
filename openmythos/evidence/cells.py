"""The cells of a claim: trainings and measurements that stand alone, resume, and are kept.

A claim is a grid of cells. Each writes its result once, whole or not at all, so that an
interrupted grid goes on where it stopped and a report can be made of the cells there are.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from openmythos.errors import CheckpointError
from openmythos.files import write_atomically
from openmythos.model.files import WEIGHTS_FILE
from openmythos.training.machine import device_name

SETTINGS, RESULT = "settings.json", "result.json"
"""In a cell's folder, beside its checkpoints."""

Result = dict[str, Any]
"""What a cell measured, as JSON has it."""

Say = Callable[[str], None]

Value = TypeVar("Value")


@dataclass(frozen=True)
class Cell:
    """One training or measurement of a claim."""

    name: str
    """Unique within the claim, a folder's name: `looped-3/seed-0`."""
    settings: dict[str, Any]
    """All that decides the result, as JSON has it; a kept result of other settings is refused."""
    run: Callable[[Path, Say], Result]
    """Given a folder for checkpoints and a function to report with."""
    trains: bool = True
    """Whether it trains, on the GPU where there is one; what only measures runs on the CPU."""
    needs: str | None = None
    """Package, by the name it is imported by, that it reads; where that is not installed, it does
    not run."""


def run_cells(cells: Iterable[Cell], work: Path, say: Say) -> dict[str, Result]:
    """Run the cells that have no result yet and can run here; return all results by name.

    Args:
        cells: in the order to run.
        work: each cell's folder is made in it.
        say: told of progress, a line each time.

    Returns:
        Results as JSON gives them back, whether they were kept or have just been measured.

    Raises:
        CheckpointError: a kept result was made with other settings, or what an interrupted run
            left.
    """
    results = {}
    for cell in cells:
        folder = work / cell.name
        kept = read_result(folder, cell)
        if kept is None and cell.needs is not None and not installed(cell.needs):
            say(f"{cell.name}: does not run, since {cell.needs} is not installed")
            continue
        if kept is None:
            _begin(folder, cell)
            started = time.perf_counter()
            measured = cell.run(folder, _prefixed(say, cell.name))
            where = {"torch": torch.__version__, "device": device_name() if cell.trains else "cpu"}
            kept = as_json({"settings": cell.settings, **where, **measured})
            kept.setdefault("seconds", time.perf_counter() - started)
            _keep(folder, kept)
        results[cell.name] = kept
    return results


def _begin(folder: Path, cell: Cell) -> None:
    """Write the settings beside the checkpoints, so that no other run goes on from these."""
    path, settings = folder / SETTINGS, as_json(cell.settings)
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise CheckpointError(
            f"{path} must be of the settings asked for, as its folder's checkpoints are: delete "
            "the folder to begin anew, or choose another --work"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(settings, indent=1) + "\n").encode())


def take_results(known: Mapping[str, Result], cells: Iterable[Cell], work: Path) -> list[str]:
    """Keep results that were measured elsewhere; return the names of the cells that took one.

    Args:
        known: results by the names of their cells.
        cells: those that have no result in `work` and whose settings are those of the known one
            take it.
        work: of `run_cells`.
    """
    taken = []
    for cell in cells:
        folder, result = work / cell.name, known.get(cell.name)
        if result is None or not _is_of(result, cell) or (folder / RESULT).is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        _keep(folder, result)
        taken.append(cell.name)
    return taken


def installed(package: str) -> bool:
    """Whether a package is there that a cell needs; it is not imported."""
    return importlib.util.find_spec(package) is not None


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of a model's weights, for the settings of what is measured on them.

    Raises:
        CheckpointError: the folder has none.
    """
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise CheckpointError(f"{weights} must exist: {folder} is not a model's folder")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def read_result(folder: Path, cell: Cell) -> Result | None:
    """Return a cell's kept result, None where it has not finished.

    Raises:
        CheckpointError: it was made with other settings, or is damaged.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} must be JSON ({error}): delete it to run again") from error
    if not _is_of(result, cell):
        raise CheckpointError(
            f"{path} must be of the settings asked for: delete its folder to run it again, or "
            "choose another --work"
        )
    return result


def _is_of(result: Result, cell: Cell) -> bool:
    return bool(result.get("settings") == as_json(cell.settings))


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings or figures as JSON gives them back: tuples are lists, and all keys text."""
    kept: dict[str, Any] = json.loads(json.dumps(values))
    return kept


def by_number(kept: Mapping[str, Value]) -> dict[int, Value]:
    """Return a mapping that JSON gave back, whose keys were whole numbers, with these."""
    return {int(number): value for number, value in kept.items()}


def _keep(folder: Path, result: Result) -> None:
    write_atomically(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())


def _prefixed(say: Say, name: str) -> Say:
    return lambda line: say(f"{name}: {line}")
