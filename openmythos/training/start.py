"""Starting a run and opening one again: from settings and text to a trainer."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path
from typing import Any

from openmythos.config import MythosConfig
from openmythos.errors import CheckpointError, ConfigError
from openmythos.model.transformer import OpenMythos
from openmythos.training import checkpoint
from openmythos.training.corpus import Corpus, check_size, open_corpus, open_text, prepare
from openmythos.training.memory import check_fits
from openmythos.training.run import SETTINGS, Settings, check_folder, train_config
from openmythos.training.settings import TrainConfig, decay_begins, same_until
from openmythos.training.tokenizer import Tokenizer
from openmythos.training.trainer import Trainer, check_tensorboard, check_unchanged


def start_run(
    run: Path,
    model: MythosConfig,
    train: TrainConfig,
    *,
    source: dict[str, Any],
    tokenizer: Path | None = None,
    start_from: Path | None = None,
) -> Trainer:
    """Read the text, make or take a tokenizer, write the run's folder, return its trainer.

    Args:
        run: a folder that holds no run yet.
        model: the shape; its vocab_size becomes the tokenizer's.
        train: the training.
        source: `{"corpus": name}`, or `{"text": path, "field": ..., "held_out": ...}`.
        tokenizer: a `tokenizer.json`; default: learned from the training documents.
        start_from: a model's folder whose weights and tokenizer to start from.

    Raises:
        MythosError: something does not fit. Of a folder made for the run nothing is left; in
            one that was there, tokens and tokenizer may be new.
    """
    check_folder(run)
    if (run / SETTINGS).exists():
        raise ConfigError(
            f"run={run} holds a run already: resume it with --resume {shlex.quote(str(run))}, or "
            "choose another folder"
        )
    if start_from is None:
        check_fits(model)
        _check_length(train, model)
    if train.log == "tensorboard":
        check_tensorboard()
    corpus = _open(source)
    least = max(train.tokens_per_step, train.length + 1)
    check_size(corpus, least)
    tokens = _tokenizer(corpus, model, tokenizer, start_from)
    start = None
    if start_from is None:
        model = model.replace(vocab_size=tokens.vocab_size)
    else:
        start = OpenMythos.from_pretrained(start_from)
        model = _extended(start.config, model, tokens, start_from)
        _check_length(train, model)
    if train.train == "adapters" and not model.lora_rank:
        raise ConfigError("train='adapters' must go with lora_rank of 1 or more: there are none")
    made = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        training, validation = prepare(corpus, tokens, run, least_tokens=least)
        tokens.save(run / "tokenizer.json")
        start_name = None if start_from is None else str(start_from)
        settings = Settings(model, train, _remembered(source), start_name)
        trainer = Trainer(run, settings, tokens, training, validation)
        if start is not None:
            _take_weights(trainer, start)
        checkpoint.remove_leftovers(run)
        if start is not None:
            trainer.save()  # before it is a run: a resume must not start from fresh weights
        settings.save(run)
    except BaseException:
        if made:  # nothing is left of a run that did not start
            shutil.rmtree(run, ignore_errors=True)
        raise
    return trainer


def open_run(run: Path, *, steps: int | None = None) -> Trainer:
    """Return the trainer of an existing run, at its newest whole checkpoint.

    Args:
        run: its folder.
        steps: a new number of steps, for a run whose learning rate has not begun to decay; the
            run then is, to the bit, one that was started with this number.

    Raises:
        MythosError: the folder is no run, or something in it does not fit.
    """
    settings = Settings.load(run)
    check_folder(run)
    check_fits(settings.model)
    if steps is not None:
        train = dataclasses.replace(settings.train, steps=steps)
        settings = dataclasses.replace(settings, train=train)
    tokens = Tokenizer.load(run)
    least = max(settings.train.tokens_per_step, settings.train.length + 1)
    corpus = _open(settings.source)
    newest = checkpoint.latest(run)
    if newest is not None:  # before anything is tokenised anew
        state = checkpoint.state_of(newest)
        check_unchanged(state, newest, tokenizer=tokens.fingerprint, text=corpus.fingerprint)
        if steps is not None:
            _check_until(checkpoint.step_of(newest), train_config(state["train"]), settings.train)
    training, validation = prepare(corpus, tokens, run, least_tokens=least)
    trainer = Trainer(run, settings, tokens, training, validation)
    if not trainer.resume() and settings.start_from is not None:
        raise CheckpointError(
            f"run={run} must have a checkpoint, as it began with the weights of "
            f"{settings.start_from}: start it anew with --start-from"
        )
    if steps is not None:
        settings.save(run)
    return trainer


def _check_until(step: int, before: TrainConfig, now: TrainConfig) -> None:
    """Refuse a new number of steps where it would change steps that the run has taken."""
    if not same_until(step, dataclasses.replace(now, steps=before.steps), now):
        begins = min(decay_begins(before), decay_begins(now))
        raise CheckpointError(
            f"until={now.steps} must be left out at step {step}: the learning rate decays from "
            f"step {begins:g} on, and only before can the number of steps ({before.steps}) change"
        )


def _check_length(train: TrainConfig, model: MythosConfig) -> None:
    if train.length > model.max_length:
        raise ConfigError(
            f"length={train.length} must be at most the model's max_length={model.max_length}"
        )


def _open(source: dict[str, Any]) -> Corpus:
    if "corpus" in source:
        return open_corpus(source["corpus"])
    return open_text(source["text"], field=source["field"], held_out=source["held_out"])


def _remembered(source: dict[str, Any]) -> dict[str, Any]:
    """A relative path would mean another file when the run is resumed from elsewhere."""
    if "text" not in source:
        return source
    return {**source, "text": str(Path(source["text"]).resolve())}


def _tokenizer(
    corpus: Corpus, model: MythosConfig, given: Path | None, start_from: Path | None
) -> Tokenizer:
    if start_from is not None and given is not None:
        raise ConfigError("tokenizer must be left out with start_from, which brings its own")
    if start_from is not None:
        if not start_from.is_dir():
            raise ConfigError(f"start_from={start_from} must be the folder of a model")
        return Tokenizer.load(start_from)
    if given is not None:
        return Tokenizer.load(given)
    return Tokenizer.train(corpus.training_documents(), vocab_size=model.vocab_size)


def _extended(
    start: MythosConfig, wanted: MythosConfig, tokens: Tokenizer, folder: Path
) -> MythosConfig:
    """The shape of a model to start from, with the adapters that are wanted."""
    if tokens.vocab_size > start.vocab_size:
        raise CheckpointError(f"{folder}: its tokenizer does not fit its model")
    loops = wanted.open().lora_loops  # None where nobody asked
    if not start.lora_rank:
        return start.replace(lora_rank=wanted.lora_rank, lora_loops=loops)
    for name, value in {"lora_rank": wanted.lora_rank, "lora_loops": loops}.items():
        own = getattr(start, name)
        if value not in (None, own):
            raise ConfigError(
                f"{name}={value} must be {own}, as in start_from={folder}: its adapters have that "
                "shape"
            )
    return start


def _take_weights(trainer: Trainer, start: OpenMythos) -> None:
    """Start from a model's weights; adapters it does not have stay as initialised."""
    own = dict(trainer.model.state_dict())
    added = {name: t for name, t in own.items() if ".lora." in name}
    tensors = {**added, **start.to(trainer.device).state_dict()}
    trainer.model.load_state_dict(tensors)
