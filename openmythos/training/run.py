"""A run's folder: what a training writes, and how to find one's way in it.

run/settings.json       model, training, corpus and tokenizer, as they were at the start
run/tokenizer.json
run/train.bin           tokenised text, made anew from it where missing
run/validation.bin
run/metrics.jsonl       one line a step, and one a measurement
run/step-00000120/      checkpoints
run/model/              the finished model, for `openmythos.load`, with how long its training's
                        windows were and whether its gate is trained in training.json
run/.openmythos.lock    which process trains the run, while one does
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmythos.config import CONFIG_FILE, MythosConfig
from openmythos.errors import CheckpointError, ConfigError
from openmythos.files import write_atomically
from openmythos.numbers import at_least
from openmythos.training.settings import (
    Finish,
    Log,
    OptimizerConfig,
    Precision,
    Source,
    TrainConfig,
)

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos
    from openmythos.training.tokenizer import Tokenizer

SETTINGS = "settings.json"
MODEL = "model"
TOKENIZER = "tokenizer.json"
"""Of the finished model's files, the one that is written last."""
TRAINED = "training.json"
"""In a model's folder, `{"length": tokens in a window of its training, "gate": whether its halting
gate was trained}`; models from before that was kept have no `gate`."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a run was started with."""

    model: MythosConfig
    train: TrainConfig
    source: Source
    """Where the text comes from."""
    start_from: str | None = None
    """The folder of the model whose weights it started from; None: fresh weights."""

    def save(self, run: Path) -> None:
        """Write `settings.json`."""
        content = {
            "model": json.loads(self.model.to_json()),
            "train": dataclasses.asdict(self.train),
            "source": self.source.as_json(),
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
            source = Source.from_json(content["source"])
            start = content.get("start_from")  # runs from before it was kept have none
            return cls(model, train_config(content["train"]), source, start)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} must be a whole settings file, but: {error}") from error


def check_folder(folder: Path, name: str = "run") -> None:
    """Refuse a folder that cannot be written into; one that is not there will be made.

    Args:
        folder: what a run, or a model, is to be written into.
        name: what it is called where it was given.

    Raises:
        ConfigError: a file stands in its place, or the system does not let us write.
    """
    # Path.exists would raise where a folder above may not be looked into.
    there = os.path.exists
    nearest = next(place for place in (folder, *folder.absolute().parents) if there(place))
    if not nearest.is_dir():
        what = "" if nearest == folder else f"{nearest} "
        raise ConfigError(
            f"{name}={folder} must be a folder, and {what}is a file: choose another path"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name}={folder} must be a folder that can be written to, and {nearest} cannot: "
            "choose another, or change its permissions"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfMachine:
    """What a run may be given anew when it goes on; None: as before.

    It is what the machine needs, and what is measured and written besides the steps.
    """

    accumulation: int | None = None
    checkpoint_activations: bool | None = None
    threads: int | None = None
    save_every: int | None = None
    keep: int | None = None
    log: Log | None = None
    precision: Precision | None = None
    evaluate_every: int | None = None
    evaluate_tokens: int | None = None
    gate_steps: int | None = None
    finish: Finish | None = None

    def applied(self, train: TrainConfig) -> TrainConfig:
        """Return a training with these settings in place of its own.

        Raises:
            ConfigError: they do not fit it.
        """
        given = {name: x for name, x in dataclasses.asdict(self).items() if x is not None}
        return dataclasses.replace(train, **given)

    @classmethod
    def of(cls, train: TrainConfig) -> OfMachine:
        """Return those of a training."""
        return cls(**{field.name: getattr(train, field.name) for field in dataclasses.fields(cls)})


def finished(run: Path) -> bool:
    """Whether a run has written all of its model, the last thing that it does."""
    return (run / MODEL / TOKENIZER).is_file()


def unfinished(folder: Path) -> bool:
    """Whether a folder is a run without a finished model, as a kill while it is written leaves."""
    return (folder / SETTINGS).is_file() and not finished(folder)


def model_in(folder: Path) -> Path:
    """Return where a folder's model lies: in its `model`, as a finished run's, or in itself."""
    model = folder / MODEL
    return model if model.is_dir() and not unfinished(folder) else folder


def run_of(folder: Path) -> Path:
    """Return the run that a checkpoint lies in; any other folder as it is."""
    from openmythos.training.checkpoint import is_checkpoint

    return folder.parent if is_checkpoint(folder) else folder


def config_in(folder: Path) -> MythosConfig:
    """Return the config of a model, of a run or of one of its checkpoints.

    Raises:
        CheckpointError: the folder holds none of these, or a damaged one.
    """
    model, run = model_in(folder), run_of(folder)
    if not (model / CONFIG_FILE).is_file() and (run / SETTINGS).is_file():
        return Settings.load(run).model
    return MythosConfig.load(model)


def settings_of(folder: Path) -> Settings | None:
    """Return the settings of the run that a folder is or lies in; None: of no run.

    Args:
        folder: of a model, of a run, or of what is in a run: its model or a checkpoint.

    Raises:
        CheckpointError: they are damaged.
    """
    folder = folder.resolve()  # a relative path may have no name of its own
    run = folder.parent if folder.name == MODEL else run_of(folder)
    return Settings.load(run) if (run / SETTINGS).is_file() else None


def trained_length(folder: Path) -> int | None:
    """Return how many tokens a window had in the training of a folder's model; None: not known.

    Args:
        folder: as for `settings_of`.

    Raises:
        CheckpointError: what should say it is damaged.
    """
    if (folder / TRAINED).is_file():
        return _kept(folder / TRAINED)[0]
    settings = settings_of(folder)
    return None if settings is None else settings.train.length


def gate_trained(folder: Path) -> bool | None:
    """Return whether the halting gate of a folder's model was trained; None: not known.

    Args:
        folder: as for `settings_of`. Checkpoints have an untrained one: its training comes last.

    Raises:
        CheckpointError: what should say it is damaged.
    """
    model = model_in(folder)
    if (model / TRAINED).is_file():
        return _kept(model / TRAINED)[1]
    written = model.name == MODEL and model.is_dir()
    settings = None if written else settings_of(folder)
    return None if settings is None or settings.start_from is not None else False


def keep_trained_length(folder: Path, length: int, *, gate: bool | None = None) -> None:
    """Write into a model's folder how many tokens a window of its training had.

    Args:
        folder: the model's.
        length: the tokens.
        gate: whether its halting gate was trained; None: not known.

    Raises:
        CheckpointError: the file cannot be written.
    """
    kept = {"length": length} | ({} if gate is None else {"gate": gate})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / TRAINED, (json.dumps(kept) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"folder={folder} must be writable: {error}") from error


def _kept(path: Path) -> tuple[int, bool | None]:
    try:
        kept = json.loads(path.read_bytes())
        length, gate = kept["length"], kept.get("gate")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f'{path} must be {{"length": tokens}}, but: {error!r}. Mend or delete it'
        ) from error
    if not at_least(length, 1):
        raise CheckpointError(f"{path} has {length=}, must have 1 or more: mend or delete it")
    if gate not in (None, True, False):
        raise CheckpointError(f"{path} has {gate=}, must have true or false: mend or delete it")
    return int(length), gate


def train_config(fields: dict[str, Any]) -> TrainConfig:
    """Build a `TrainConfig` from what `dataclasses.asdict` made of one."""
    return TrainConfig(**{**fields, "optimizer": OptimizerConfig(**fields["optimizer"])})


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

    run = run_of(folder)
    settings = Settings.load(run)
    if (newest := checkpoint.latest(run) if run == folder else folder) is None:
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
