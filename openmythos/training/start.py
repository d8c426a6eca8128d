"""Starting a run and opening one again: from settings and text to a trainer."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import shutil
import warnings
from pathlib import Path

from openmythos.config import MythosConfig
from openmythos.errors import CheckpointError, ConfigError, DataError
from openmythos.model.transformer import OpenMythos
from openmythos.training import checkpoint
from openmythos.training.compiled import check_compiler
from openmythos.training.corpus import (
    TRAINING,
    VALIDATION,
    Corpus,
    check_size,
    open_corpus,
    open_text,
    prepare,
)
from openmythos.training.memory import check_fits
from openmythos.training.metrics import METRICS, check_tensorboard
from openmythos.training.resuming import check_unchanged, tell_given
from openmythos.training.run import (
    MODEL,
    SETTINGS,
    TOKENIZER,
    OfMachine,
    Settings,
    check_folder,
    finished,
    train_config,
)
from openmythos.training.run_lock import RunLock
from openmythos.training.settings import Source, TrainConfig, decay_begins, same_until
from openmythos.training.threads import check_threads
from openmythos.training.token_file import TokenFile
from openmythos.training.tokenizer import Tokenizer
from openmythos.training.trainer import Trainer


def start_run(
    run: Path,
    model: MythosConfig,
    train: TrainConfig,
    *,
    source: Source,
    tokenizer: Path | None = None,
    start_from: Path | None = None,
) -> Trainer:
    """Read the text, make or take a tokenizer, write the run's folder, return its trainer.

    Args:
        run: a folder that holds no run yet.
        model: the shape; its vocab_size becomes the tokenizer's.
        train: the training.
        source: of the text.
        tokenizer: a `tokenizer.json`; default: learned from the training documents.
        start_from: a model's folder whose weights and tokenizer to start from.

    Raises:
        MythosError: something does not fit. Of a folder made for the run nothing is left; in
            one that was there, tokens and tokenizer may be new.
    """
    check_folder(run)
    _check_new(run)
    if start_from is None:
        _check_together(train, model)
    if train.log == "tensorboard":
        check_tensorboard()
    if train.threads is not None:
        check_threads(train.threads)
    check_compiler(train.compile)
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
        _check_together(train, model)
    made, lock = _make(run), RunLock(run)
    lock.take()
    _check_new(run)  # another process may have been quicker, and its run is not ours to delete
    try:
        training, validation = prepare(corpus, tokens, run, least_tokens=least)
        tokens.save(run / TOKENIZER)
        start_name = None if start_from is None else str(start_from)
        settings = Settings(model, train, _remembered(source), start_name)
        trainer = Trainer(
            run, settings, tokens, training, validation, lock=lock, split=corpus.split
        )
        if start is not None:
            _take_weights(trainer, start)
        checkpoint.remove_leftovers(run)
        if start is not None:
            trainer.save()  # before it is a run: a resume must not start from fresh weights
        settings.save(run)
    except BaseException:
        # Nothing is left of a run that did not start, or it would keep the next from starting.
        for folder in [run] if made else run.glob("step-*"):
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        raise
    return trainer


def open_run(
    run: Path, *, steps: int | None = None, of_machine: OfMachine | None = None
) -> Trainer:
    """Return the trainer of an existing run, at its newest whole checkpoint.

    Its text is not opened where its tokens are whole, and may have changed or gone.

    Args:
        run: its folder.
        steps: a new number of steps, for a run whose learning rate has not begun to decay; the
            run then is, to the bit, one that was started with this number. Where that one would
            choose otherwise whether to compile its layers, it is so but for rounding, and warned.
        of_machine: settings in place of the run's own; warned where they change its rounding, or
            what its measurements compare with.

    Raises:
        MythosError: the folder is no run, another process trains it, or something in it does not
            fit.
    """
    settings = Settings.load(run)
    check_folder(run)
    if of_machine is not None and of_machine.threads is not None:
        check_threads(of_machine.threads)
    train = (of_machine or OfMachine()).applied(settings.train)
    if steps is not None:
        train = dataclasses.replace(train, steps=steps)
    if train.log == "tensorboard":
        check_tensorboard()
    lock = RunLock(run)
    lock.take()
    try:
        settings_now = dataclasses.replace(settings, train=train)
        trainer = _opened(run, settings_now, lock, other_steps=steps is not None)
        if train != settings.train:
            trainer.settings.save(run)
    except BaseException:
        lock.release()
        raise
    if steps is not None:
        _tell_compiling(trainer)
    return trainer


def _opened(run: Path, settings: Settings, lock: RunLock, *, other_steps: bool) -> Trainer:
    """The trainer of a run that goes on with these settings."""
    check_fits(settings.model, settings.train)
    tokens = Tokenizer.load(run)
    newest = checkpoint.latest(run)
    text: str | None = None
    if newest is not None:  # before anything is tokenised anew
        state = checkpoint.state_of(newest)
        text = state["text"]
        check_unchanged(state, newest, tokenizer=tokens.fingerprint)
    found = _kept_tokens(run, tokens, text)
    if found is None:
        corpus = _open(settings.source)
        if newest is not None:
            check_unchanged(state, newest, text=corpus.fingerprint)
        least = max(settings.train.tokens_per_step, settings.train.length + 1)
        found = prepare(corpus, tokens, run, least_tokens=least)
    if newest is not None:
        before = train_config(state["train"])
        if other_steps:
            _check_until(run, checkpoint.step_of(newest), before, settings.train)
        tell_given(state, settings.train)
    trainer = Trainer(run, settings, tokens, *found, lock=lock)
    if not trainer.resume() and settings.start_from is not None:
        raise CheckpointError(
            f"run={run} must have a checkpoint, as it began with the weights of "
            f"{settings.start_from}: start it anew with --start-from"
        )
    return trainer


def _kept_tokens(
    run: Path, tokens: Tokenizer, text: str | None
) -> tuple[TokenFile, TokenFile] | None:
    """A run's tokens, where both sides are whole, of its tokenizer and of one text.

    Args:
        run: its folder.
        tokens: its tokenizer.
        text: fingerprint of its text, as its checkpoint has it; None: it has no checkpoint.
    """
    try:
        training, validation = TokenFile(run / TRAINING), TokenFile(run / VALIDATION)
    except DataError:  # missing, or damaged: `prepare` tells which, and mends or refuses
        return None
    text = training.source_fingerprint if text is None else text
    both = (training, validation)
    return both if all(side.comes_from(text, tokens.fingerprint) for side in both) else None


def _tell_compiling(trainer: Trainer) -> None:
    """Warn where a run of the new number of steps would choose otherwise whether to compile."""
    choice, chosen = trainer.config.compile, trainer.compiled
    if choice != "auto" or chosen is None or chosen == trainer.compiling_pays(choice):
        return
    stay, others = ("compiled", "not compiled") if chosen else ("not compiled", "compiled")
    warnings.warn(
        f"until={trainer.config.steps}: layers stay {stay}, and those of a run started with this "
        f"number would be {others}: its weights differ by rounding",
        stacklevel=3,
    )


def _make(run: Path) -> bool:
    """Make a folder; return whether it was not there before."""
    try:
        run.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _check_new(run: Path) -> None:
    """Refuse a folder with a run in it, or with what is left of one."""
    if (run / SETTINGS).exists():
        raise ConfigError(
            f"run={run} holds a run already: resume it with --resume {shlex.quote(str(run))}, or "
            "choose another folder"
        )
    left = itertools.chain(run.glob("step-*"), run.glob(METRICS), run.glob(MODEL))
    if (found := next(left, None)) is not None:
        raise ConfigError(
            f"run={run} must hold nothing of another run, and holds {found.name}: choose another "
            "folder, or delete what is there"
        )


def _check_until(run: Path, step: int, before: TrainConfig, now: TrainConfig) -> None:
    """Refuse a new number of steps where it would change steps that the run has taken."""
    if not same_until(step, dataclasses.replace(now, steps=before.steps), now):
        begins = min(decay_begins(before), decay_begins(now))
        raise CheckpointError(
            f"until={now.steps} must be left out at step {step}: the learning rate decays from "
            f"step {begins:g} on, and only before can the number of steps ({before.steps}) change; "
            f"to train {'its' if finished(run) else 'the finished'} model further, start another "
            f"run with --start-from {shlex.quote(str(run))}"
        )


def _check_together(train: TrainConfig, model: MythosConfig) -> None:
    """Refuse a training that the model cannot have, or that does not fit into memory."""
    check_fits(model, train)
    if train.length > model.max_length:
        raise ConfigError(
            f"length={train.length} must be at most the model's max_length={model.max_length}"
        )
    if model.learned_act and train.backprop_loops is not None:
        raise ConfigError(
            f"backprop_loops={train.backprop_loops} must be left out with learned_act: exits are "
            "learnt from all loops"
        )
    if train.train == "adapters" and not model.lora_rank:
        raise ConfigError("train='adapters' must go with lora_rank of 1 or more: there are none")


def _open(source: Source) -> Corpus:
    if source.text is not None:
        return open_text(source.text, field=source.field, held_out=source.held_out)
    assert source.corpus is not None
    return open_corpus(source.corpus)


def _remembered(source: Source) -> Source:
    """A relative path would mean another file when the run is resumed from elsewhere."""
    if source.text is None:
        return source
    return dataclasses.replace(source, text=source.text.resolve())


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
