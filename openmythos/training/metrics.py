"""A run's `metrics.jsonl`, one line a step and one a measurement: written, read, and cut.

With `log="tensorboard"` its lines go there too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openmythos.errors import CheckpointError, ConfigError
from openmythos.files import NO_ROOM, write_atomically
from openmythos.training.run import SETTINGS
from openmythos.training.settings import Log

METRICS = "metrics.jsonl"

Report = Callable[[dict[str, Any]], None]
"""Told of every step and every measurement: the lines of `metrics.jsonl`."""


@contextlib.contextmanager
def writing(
    run: Path, log: Log, step: int, report: Report, rescue: Callable[[], object]
) -> Iterator[Report]:
    """Give what adds a line to a run's metrics, and hands it on to `report`.

    Args:
        run: its folder.
        log: where the lines go besides.
        step: the run's next.
        report: told of every line.
        rescue: called before an error that a line cannot be written.

    Raises:
        CheckpointError: the disk is full or refuses.
    """

    def write(line: dict[str, Any]) -> None:
        try:
            _append(run / METRICS, metrics_line(line))
        except OSError as error:
            rescue()
            raise _unwritten(run, error) from error
        if board is not None:
            for name, value in scalars(line):
                board.add_scalar(name, value, line["step"])
        report(line)

    try:
        _append(run / METRICS, "")
    except OSError as error:
        raise _unwritten(run, error) from error
    board = _tensorboard(run, step) if log == "tensorboard" else None
    try:
        yield write
    finally:
        if board is not None:
            board.close()


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:  # opened anew, so that none is left half-open
        file.write(line)


def _unwritten(run: Path, error: OSError) -> CheckpointError:
    advice = "free some space" if error.errno in NO_ROOM else "mend that"
    return CheckpointError(
        f"run={run} must take its {METRICS}, but: {error.strerror or error}. To go on, {advice} "
        "and resume; what is written of the run is intact"
    )


def metrics(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `metrics.jsonl`, NaN where one has null; a torn one is passed over."""
    path = run / METRICS
    if not path.is_file():
        what = "it is not a training run"
        if (run / SETTINGS).is_file():
            what = "this run has none before its first step is finished; let it train"
        raise CheckpointError(f"run={run} must hold {METRICS}: {what}")
    for line in path.read_bytes().splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and "step" in found:
            yield _every_number(found, lambda number: math.nan if number is None else number)


def metrics_line(line: dict[str, Any]) -> str:
    """Return a line for `metrics.jsonl`: null stands for NaN and infinity, which JSON has not."""
    finite = _every_number(
        line, lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
    )
    return json.dumps(finite, allow_nan=False) + "\n"


def _every_number(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {name: _every_number(part, change) for name, part in value.items()}
    if isinstance(value, list):
        return [_every_number(part, change) for part in value]
    return change(value)


def cut_metrics(run: Path, step: int) -> None:
    """Forget the metrics of steps that a resumed run will make again."""
    if (run / METRICS).is_file():
        kept = [
            metrics_line(line)
            for line in metrics(run)
            if line["step"] < step and not {"final", "gate"} & set(line)
        ]
        try:
            write_atomically(run / METRICS, "".join(kept).encode())
        except OSError as error:
            raise _unwritten(run, error) from error


def scalars(line: dict[str, Any], under: str = "") -> Iterator[tuple[str, float]]:
    """Yield a line's numbers by path, as `validation/4`, but for the step and the last line's mark.

    A list's numbers are named by their places. Those of the last line, which is of all held-out
    text, are no points of the curves before: `final/validation/4`.
    """
    if line.get("final"):
        line, under = {name: value for name, value in line.items() if name != "final"}, "final/"
    for name, value in line.items():
        if isinstance(value, list):
            value = {str(place): part for place, part in enumerate(value)}
        if isinstance(value, dict):
            yield from scalars(value, f"{under}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{under}{name}", value


def check_tensorboard() -> None:
    """Raise `ConfigError` where tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("log='tensorboard' needs the package: pip install tensorboard")


def _tensorboard(run: Path, step: int) -> Any:
    """A writer that hides what an earlier process told of `step` and later ones."""
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=step)
