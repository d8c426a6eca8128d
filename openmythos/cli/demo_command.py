"""See the models inside the package at work, then train one of your own on real text.

Examples:
    openmythos demo
    openmythos demo --train no
    openmythos demo --train yes --fresh --prompt 'Elizabeth'

In seconds: the shipped language model writes, the shipped reasoner solves a chain of 40 hops where
its training had 20, and the depth curve is drawn. Then, if you like (without a terminal to ask, it
does), it trains the preset `nano` (1.2 M parameters) on the novel and the messages of presidents
that come with the package: about four minutes on two cores. An interrupted training goes on where
it stopped; a finished one shows its results at once.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openmythos.cli.process import program
from openmythos.config import MythosConfig
from openmythos.errors import ConfigError, InputError
from openmythos.training.run import SETTINGS, check_folder, finished
from openmythos.training.settings import CorpusName, OptimizerConfig, Source, TrainConfig

if TYPE_CHECKING:
    from openmythos.inference.language_model import LanguageModel
    from openmythos.training.trainer import Trainer

MODEL = MythosConfig.preset("nano")
CORPUS: CorpusName = "embedded"
RECIPE = TrainConfig(
    steps=640,
    batch_size=4,
    length=256,
    backprop_loops=2,
    gate_steps=40,
    save_every=100,
    evaluate_every=160,
    evaluate_tokens=4096,
    optimizer=OptimizerConfig(muon_lr=0.03, adam_lr=8e-3),
)
"""Chosen in 6 TFLOP of training, by bits per byte at 4 loops on the first held-out 16 k tokens:
batches of 8, all loops with gradient and rates of 0.02 and 4e-3 gave 1.772; batches of 4, 1.708;
gradient through the last two loops, which buys a quarter more steps, 1.709; rates of 0.03 and
8e-3, 1.733; all three, 1.645. Then a vocabulary of 1024 gave 1.663, a decay over 0.8, 1.651."""

RULE = "-" * 72
OPENING = "Fellow citizens of the Senate and of the House of Representatives:"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos demo`."""

    run: Path = Path("runs/demo")
    """Folder of the demo's run."""

    train: Literal["ask", "yes", "no"] = "ask"
    """Train a model, too? Without a terminal to ask at, `ask` means yes."""

    fresh: bool = False
    """Delete the run that is there, and train anew."""

    prompt: str = "Mr. Darcy looked at Elizabeth, and"
    """Text that the model goes on with."""

    max_new_tokens: int = 60
    """Tokens of each text."""

    steps: int = RECIPE.steps
    """Optimizer steps of a fresh run; fewer for a quicker and worse model."""


def run(settings: Settings) -> None:
    """Show the shipped models; train, or take the finished run; then show what it does."""
    from openmythos.cli.shipped_demo import show

    dataclasses.replace(RECIPE, steps=settings.steps)  # refused before anything is shown
    if settings.max_new_tokens < 1:
        raise InputError(f"max_new_tokens={settings.max_new_tokens} must be 1 or more")
    check_folder(settings.run)
    if settings.fresh:
        _check_deletable(settings.run)
    show(settings.run / "plots", OPENING, settings.max_new_tokens)
    if not _training_wanted(settings):
        return
    if settings.fresh:
        _delete(settings.run)
    if finished(settings.run):
        print(f"The demo in {settings.run} is finished; {program()} demo --fresh trains anew.")
    else:
        _train(settings)
    _show(settings)


def _training_wanted(settings: Settings) -> bool:
    if settings.train != "ask":
        return settings.train == "yes"
    if not sys.stdin.isatty() or finished(settings.run):
        return True
    answer = input(f"\n{RULE}\nTrain a small model of your own now, about four minutes? [Y/n] ")
    return answer.strip().lower() in ("", "y", "yes")


def _delete(run: Path) -> None:
    """Delete a run, and nothing that is not one."""
    _check_deletable(run)
    if run.exists():
        shutil.rmtree(run)


def _check_deletable(run: Path) -> None:
    if run.exists() and not (run / SETTINGS).is_file():
        raise ConfigError(f"run={run} must be a training run to be deleted: choose another folder")


def _train(settings: Settings) -> None:
    from openmythos.cli.progress import Progress
    from openmythos.training.start import open_run, start_run
    from openmythos.training.trainer import Stopped

    trainer: Trainer
    if (settings.run / SETTINGS).is_file():
        trainer = open_run(settings.run)
        print(f"Going on with the demo in {settings.run}, at step {trainer.step}.")
    else:
        print("Training a recurrent-depth transformer on a novel and messages of presidents.")
        recipe = dataclasses.replace(RECIPE, steps=settings.steps)
        trainer = start_run(settings.run, MODEL, recipe, source=Source(corpus=CORPUS))
    with Progress(trainer) as progress:
        try:
            trainer.fit(progress.report)
        except Stopped:
            progress.say(f"stopped after step {trainer.step}: {program()} demo goes on from there")
            raise KeyboardInterrupt from None


def _show(settings: Settings) -> None:
    from openmythos.inference.language_model import load
    from openmythos.training.metrics import metrics

    lines = list(metrics(settings.run))
    ppmd = _ppmd()
    _show_depths(lines, ppmd)
    lm = load(settings.run)
    _write(lm, lines, settings)
    _draw(lines, ppmd, settings.run)
    print(_what_next(settings.run))


def _ppmd() -> float | None:
    """PPMd's figure on the held-out text, given the training text: the same split."""
    from openmythos.training.corpus import open_corpus
    from openmythos.training.ppmd import bits_per_byte

    corpus = open_corpus(CORPUS)
    return bits_per_byte(corpus.validation_documents(), corpus.training_documents())


def _depths(lines: list[dict[str, Any]]) -> dict[int, float]:
    """Bits per byte of all held-out text by loops, as measured at the end."""
    last = next(line for line in reversed(lines) if line.get("final"))
    return {int(loops): bits for loops, bits in last["validation"].items()}


def _gate(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((line["gate"] for line in reversed(lines) if "gate" in line), None)


def _show_depths(lines: list[dict[str, Any]], ppmd: float | None) -> None:
    from openmythos.cli.loop_colours import writable

    depths, block = _depths(lines), writable("█", "#")
    print(f"\n{RULE}\nBits per byte of held-out text (fewer are better), by loops of the core:\n")
    best = min(depths.values())
    most = max([*depths.values(), ppmd or 0.0])
    rows = {f"{loops:>2} {'loop' if loops == 1 else 'loops'}": x for loops, x in depths.items()}
    if ppmd is not None:
        rows["PPMd"] = ppmd
    for name, bits in rows.items():
        bar = block * round(30 * bits / most)
        print(f"  {name:<8}  {bits:.4f}  {bar}{'  best' if bits == best else ''}")
    if ppmd is not None:
        print("\n  PPMd is a compressor that has read the training text too, and goes on learning.")


def _write(lm: LanguageModel, lines: list[dict[str, Any]], settings: Settings) -> None:
    mean = lm.model.config.mean_loops
    _say(lm, settings, f"One loop a token, after {settings.prompt!r}", loops=1)
    _say(lm, settings, f"{mean} loops a token, the trained depth", loops=mean)
    gate = _gate(lines)
    if gate is not None:
        title = f"At most {gate['budget']} loops: the gate decides how many each token takes"
        _say(lm, settings, title, loops=gate["budget"], gate=True)


def _say(
    lm: LanguageModel, settings: Settings, title: str, *, loops: int, gate: bool = False
) -> None:
    from openmythos.cli.loop_colours import LoopColours, colours_wanted

    print(f"\n{RULE}\n{title}:\n")
    colours = LoopColours(loops, gate and colours_wanted())
    sys.stdout.write(settings.prompt)
    pieces = lm.stream(
        settings.prompt,
        max_new_tokens=settings.max_new_tokens,
        loops=loops,
        halting="gate" if gate else "none",
        temperature=0.7,
        seed=1,
    )
    for piece in pieces:
        sys.stdout.write(colours.paint(piece))
        sys.stdout.flush()
    print()
    if gate:
        print(f"\n{colours.legend()}")


def _draw(lines: list[dict[str, Any]], ppmd: float | None, run: Path) -> None:
    from openmythos.training.figures import save
    from openmythos.training.plots import depth_curve, plot_run

    plots = run / "plots"
    files = plot_run(lines, plots, run.name)
    references = {} if ppmd is None else {"PPMd, given the training text": ppmd}
    figure = depth_curve(_depths(lines), f"{run.name}: held-out text", references=references)
    files.append(save(figure, plots / "against_ppmd.png"))
    print(f"\n{RULE}\nPictures in {plots}: {', '.join(file.name for file in files)}")


def _what_next(run: Path) -> str:
    named, openmythos = shlex.quote(str(run)), program()
    return f"""
Try next:

  {openmythos} generate {named} --prompt 'It is' --loops 16 --halting gate --show-loops
  {openmythos} chat {named}
  {openmythos} eval {named} --corpus embedded --loops 1 2 3 4 8 32 --halting gate
  {openmythos} info nano

Then train on text of your own, PATH: a .txt, .jsonl or .parquet file, or a folder of them.

  {openmythos} train --text PATH --preset tiny --steps 2000 --run runs/mine"""
