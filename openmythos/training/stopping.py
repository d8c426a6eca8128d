"""What ends a training before its last step: a signal, or gradients that stay not finite."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from openmythos.errors import ConfigError
from openmythos.training import checkpoint
from openmythos.training.settings import TrainConfig

MOST_SKIPPED = 20
"""Steps in a row without a finite gradient after which a training ends: it changes nothing."""

HANGUP = "SIGHUP"
"""Sent where the terminal goes, by it and by its shell; not every system has it."""


@contextlib.contextmanager
def on_signals(ask: Callable[[str], None]) -> Iterator[None]:
    """Call `ask` with the name of each signal that would end the process, and then as before.

    A hang-up that is ignored, as under nohup, stays so. Where this is not the main thread, signals
    are another's.
    """
    wanted = {"SIGINT", "SIGTERM", HANGUP}
    numbers = [number for number in signal.Signals if number.name in wanted]

    def ignored(number: signal.Signals) -> bool:
        return number.name == HANGUP and signal.getsignal(number) == signal.SIG_IGN

    def handle(number: int, _: FrameType | None) -> None:
        ask(signal.Signals(number).name)

    try:
        before = {
            number: signal.signal(number, handle) for number in numbers if not ignored(number)
        }
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def diverged(run: Path, step: int, skipped: int, config: TrainConfig) -> ConfigError:
    """Return what is said of a training whose last steps had no finite gradient.

    Args:
        run: its folder.
        step: the last one, 0-based.
        skipped: how many were skipped, up to that step.
        config: its rates.
    """
    good = checkpoint.latest(run, until=step + 1 - skipped)
    where = "there is no checkpoint" if good is None else f"the last good checkpoint is {good}"
    return ConfigError(
        f"step={step} must have a finite gradient, as none of the last {skipped} steps had: train "
        f"anew with lower rates than muon_lr={config.optimizer.muon_lr} and "
        f"adam_lr={config.optimizer.adam_lr}; {where} from before"
    )
