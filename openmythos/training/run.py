"""A run's folder: what a training writes, and how to find one's way in it.

run/settings.json       model, training, corpus and tokenizer, as they were at the start
run/tokenizer.json
run/train.bin           tokenised text, made anew where it is missing or of other text
run/validation.bin
run/metrics.jsonl       one line a step, and one a measurement
run/step-00000120/      checkpoints
run/model/              the finished model, for `openmythos.load`
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmythos.config import MythosConfig
from openmythos.errors import CheckpointError, ConfigError
from openmythos.files import write_atomically
from openmythos.training.settings import OptimizerConfig, TrainConfig

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos
    from openmythos.training.tokenizer import Tokenizer

SETTINGS = "settings.json"
METRICS = "metrics.jsonl"
MODEL = "model"
TOKENIZER = "tokenizer.json"
"""Of the finished model's files, the one that is written last."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a run was started with."""

    model: MythosConfig
    train: TrainConfig
    source: dict[str, Any]
    """Where the text came from: corpus or path, field, share held out."""
    start_from: str | None = None
    """The folder of the model whose weights it started from; None: fresh weights."""

    def save(self, run: Path) -> None:
        """Write `settings.json`."""
        content = {
            "model": json.loads(self.model.to_json()),
            "train": dataclasses.asdict(self.train),
            "source": self.source,
            "start_from": self.start_from,
        }
        write_atomically(run / SETTINGS, (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def load(cls, run: Path) -> Settings:
        """Read `settings.json`.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = run / SETTINGS
        if not path.is_file():
            raise CheckpointError(f"run={run} must hold {SETTINGS}: it is not a training run")
        try:
            content = json.loads(path.read_bytes().decode())
            model = MythosConfig.from_json(json.dumps(content["model"]), str(path))
            source = content["source"]
            if not ("corpus" in source or {"text", "field", "held_out"} <= set(source)):
                raise ValueError("source must name a corpus or a text")
            start = content.get("start_from")  # runs from before it was kept have none
            return cls(model, train_config(content["train"]), source, start)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} must be a whole settings file, but: {error}") from error


def check_folder(run: Path) -> None:
    """Refuse a folder that a run cannot be written into; one that is not there will be made.

    Raises:
        ConfigError: a file stands in its place, or the system does not let us write.
    """
    # Path.exists would raise where a folder above may not be looked into.
    there = os.path.exists
    nearest = next(place for place in (run, *run.absolute().parents) if there(place))
    if not nearest.is_dir():
        what = "" if nearest == run else f"{nearest} "
        raise ConfigError(f"run={run} must be a folder, and {what}is a file: choose another path")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run={run} must be a folder that can be written to, and {nearest} cannot: choose "
            "another, or change its permissions"
        )


def finished(run: Path) -> bool:
    """Whether a run has written all of its model, the last thing that it does."""
    return (run / MODEL / TOKENIZER).is_file()


def unfinished(folder: Path) -> bool:
    """Whether a folder is a run without a finished model, as a kill while it is written leaves."""
    return (folder / SETTINGS).is_file() and not finished(folder)


def train_config(fields: dict[str, Any]) -> TrainConfig:
    """Build a `TrainConfig` from what `dataclasses.asdict` made of one."""
    return TrainConfig(**{**fields, "optimizer": OptimizerConfig(**fields["optimizer"])})


def metrics(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `metrics.jsonl`; a torn one is passed over."""
    path = run / METRICS
    if not path.is_file():
        raise CheckpointError(f"run={run} must hold {METRICS}: it is not a training run")
    for line in path.read_bytes().splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and "step" in found:
            yield found


def cut_metrics(run: Path, step: int) -> None:
    """Forget the metrics of steps that a resumed run will make again."""
    if (run / METRICS).is_file():
        kept = [
            json.dumps(line) + "\n"
            for line in metrics(run)
            if line["step"] < step and not {"final", "gate"} & set(line)
        ]
        write_atomically(run / METRICS, "".join(kept).encode())


def load_from_run(folder: Path) -> tuple[OpenMythos, Tokenizer]:
    """Return the model of a run's last whole checkpoint, and its tokenizer.

    Args:
        folder: of the run, or of the checkpoint in it that is wanted.

    Raises:
        CheckpointError: the folder is no run, or has no checkpoint yet.
    """
    import torch

    from openmythos.model.files import fill
    from openmythos.model.transformer import OpenMythos
    from openmythos.training import checkpoint
    from openmythos.training.tokenizer import Tokenizer

    chosen = folder if checkpoint.is_checkpoint(folder) else None
    run = folder if chosen is None else folder.parent
    settings = Settings.load(run)
    if (newest := chosen or checkpoint.latest(run)) is None:
        raise CheckpointError(f"run={run} must have a checkpoint: train it further")
    with torch.device("meta"):
        model = OpenMythos(settings.model)
    found, tokenizer = checkpoint.load(newest), Tokenizer.load(run)
    if found.state["tokenizer"] != tokenizer.fingerprint:
        raise CheckpointError(
            f"{run / TOKENIZER} must be the one that {newest} was trained with: put it back"
        )
    fill(model, found.tensors["model"], str(newest))
    return model.eval(), tokenizer
