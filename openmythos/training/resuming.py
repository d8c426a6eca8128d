"""What must be as it was for a run to go on from its checkpoint, and what is told if it is not."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from openmythos.config import MythosConfig
from openmythos.errors import CheckpointError
from openmythos.training.run import OfMachine, Settings, train_config
from openmythos.training.settings import TrainConfig, same_until


def check_settings(now: Settings, state: dict[str, Any], step: int, where: Path) -> None:
    """Refuse settings that would change the steps which a checkpoint has behind it.

    Args:
        now: those of the run that goes on.
        state: the checkpoint's.
        step: the checkpoint's.
        where: its folder.

    Raises:
        CheckpointError: one is another than it was.
    """
    before = train_config(state["train"])  # with the fields that have come since
    before = OfMachine.of(now.train).applied(before)
    if same_until(step, before, now.train):
        before = now.train
    model = MythosConfig.from_json(json.dumps(state["model"]))
    for mine, theirs in ((now.model, model), (now.train, before)):
        then = dataclasses.asdict(theirs)
        for name, value in dataclasses.asdict(mine).items():
            if then[name] != value:
                raise CheckpointError(
                    f"{name}={value!r} must be {then[name]!r}, as in {where}: "
                    "resume with the settings that the run was started with"
                )


def check_unchanged(state: dict[str, Any], where: Path, **now: str) -> None:
    """Raise `CheckpointError` where text or tokenizer are not those of a checkpoint's state."""
    for what, fingerprint in now.items():
        if state[what] != fingerprint:
            raise CheckpointError(
                f"{what}={fingerprint[:12]} must be {state[what][:12]}, as in {where}: "
                f"the {what} has changed since; put the old one back, or start a new run"
            )


def tell_machine(state: dict[str, Any], where: Path, **now: str) -> None:
    """Warn where a checkpoint was written with another torch, or on another kind of device."""
    for what, this in now.items():
        if (then := state.get(what, this)) != this:
            warnings.warn(
                f"{where} was written with {what} {then}, and this is {this}: the run goes on, but "
                "not to the bit as it would have",
                stacklevel=2,
            )


def tell_given(state: dict[str, Any], now: TrainConfig) -> None:
    """Warn of settings given anew that make a run another one by rounding, or mix its scores."""
    before, threads = train_config(state["train"]), state["threads"]
    decided = state["precision"]  # None: not yet
    anew = decided is not None and now.precision not in (before.precision, decided)
    pairs: dict[str, tuple[Any, Any]] = {
        "accumulation": (before.accumulation, now.accumulation),
        "threads": (threads, now.threads or threads),
        "precision": (decided, now.precision if anew else decided),
    }
    changed = [f"{name}={new} for {old}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        warnings.warn(
            f"{', '.join(changed)}: the run goes on, but by rounding not to the bit as it would "
            "have",
            stacklevel=2,
        )
    if before.evaluate_tokens != now.evaluate_tokens:
        warnings.warn(
            f"evaluate_tokens={now.evaluate_tokens} for {before.evaluate_tokens}: what is measured "
            "on the way, and which checkpoint is best by it, no longer compares with before",
            stacklevel=2,
        )
