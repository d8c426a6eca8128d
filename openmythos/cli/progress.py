"""The progress bar of a training run."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from openmythos.cli.process import discard_stdout
from openmythos.training.running_mean import RunningMean
from openmythos.training.settings import TrainConfig, schedule

if TYPE_CHECKING:
    from openmythos.training.trainer import Trainer

SMOOTHED = ("loss", "bits_per_byte", "tokens_per_second", "peak_share")
SMOOTHING = 0.9
BAR = 12  # columns of the bar
TIME = 8  # of the time left, with the space before it
FEW = 20
"""Where more than one step of so many was skipped, the end says so."""
WIDE = 100
"""Columns of a terminal that has room for the bar beside all figures."""
MUCH_LOWER = 0.9
"""Share of the rates asked for below which the highest that are reached are worth naming."""


class Shown(Console):
    """A console that goes quiet where nobody reads it any more, and lets the training go on.

    So it is behind `| head`, and when the terminal goes.
    """

    def on_broken_pipe(self) -> None:
        """Say no more; rich would end the process."""
        self.quiet = True
        discard_stdout()

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            if error.errno != errno.EIO:  # what a terminal that is gone answers
                raise
            self.on_broken_pipe()


class Progress:
    """Shows loss, bits per byte, speed, share of the machine's peak, time left."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.console = Shown()
        whole = Column(no_wrap=True)
        self.bar = RichProgress(
            TextColumn("step {task.completed}/{task.total}", table_column=whole),
            *([BarColumn(bar_width=BAR)] if self.console.width >= WIDE else []),
            TextColumn("{task.description}", table_column=whole),
            TimeRemainingColumn(compact=True, table_column=whole),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=trainer.config.steps, completed=trainer.step)
        self.means = {name: RunningMean(SMOOTHING) for name in SMOOTHED}
        self.announced = False
        self.told: tuple[int, dict[str, float]] | None = None  # the last measurement

    def __enter__(self) -> Progress:
        model, config = self.trainer.model, self.trainer.config
        count = sum(p.numel() for p in model.parameters())
        self.say(
            f"{count / 1e6:.2f} M parameters, {self.trainer.training.tokens:,} tokens to train on, "
            f"{self.trainer.validation.tokens:,} held out, {config.tokens_per_step:,} a step; "
            f"in {self.trainer.run}"
        )
        readings = config.steps * config.tokens_per_step / self.trainer.training.tokens
        self.say(f"{config.steps:,} steps read the text {_about(readings)} times")
        if (slow := _never_warm(config)) is not None:
            self.say(slow)
        if self.trainer.split is not None:  # the text was opened, as at the start of a run
            self.say(
                f"text: {self.trainer.split}; {self.trainer.training.bytes:,} bytes to train on, "
                f"{self.trainer.validation.bytes:,} held out"
            )
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def report(self, line: dict[str, Any]) -> None:
        """Take one line of the run's metrics."""
        if not self.announced and self.trainer.machine is not None:
            machine = self.trainer.machine
            compiled = "; layers are compiled" if self.trainer.compiled else ""
            self.say(
                f"precision {machine.precision} ({machine.reason}); matrix products peak at "
                f"{machine.peak / 1e9:.0f} GFLOP/s here{compiled}"
            )
            self.announced = True
        if "validation" in line:
            self._measured(line)
        elif "gate" in line:
            gate = line["gate"]
            self.say(
                f"gate: threshold {gate['threshold']}, {gate['mean_loops']:.2f} of "
                f"{gate['budget']} loops a token on average, loss {gate['loss']:.4f} nats; with "
                f"all {gate['budget']} loops for every token {gate['full_loss']:.4f}"
            )
        else:
            self._step(line)

    def _measured(self, line: dict[str, Any]) -> None:
        now = (line["step"], line["validation"])
        if now == self.told:  # the start of the text was all of it
            return
        self.told = now
        depths = "  ".join(f"{loops}: {bits:.4f}" for loops, bits in line["validation"].items())
        whole = line.get("final") or self.trainer.measures_all
        text = "all held-out text" if whole else "start of the held-out text"
        self.say(f"step {line['step'] + 1}: {text}, bits per byte by loops  {depths}")
        if (act := line.get("act")) is not None:
            self.say(
                f"with its own exits {act['bits_per_byte']:.4f}, after {act['mean_loops']:.2f} of "
                f"{act['budget']} loops"
            )

    def _step(self, line: dict[str, Any]) -> None:
        now = {name: mean.add(line[name]) for name, mean in self.means.items()}
        figures = [
            f"loss {now['loss']:.3f}",
            *([f"{line['skipped']} skipped"] if line["skipped"] else []),
            f"{now['bits_per_byte']:.3f} bits/byte",
            f"{now['tokens_per_second']:,.0f} tokens/s",
            f"{now['peak_share']:.0%} of peak",
        ]
        done, steps = line["step"] + 1, self.trainer.config.steps
        shown = _fitting(figures, self._room(steps))
        self.bar.update(self.task, completed=done, description=shown)
        if done == steps or (not self.console.is_terminal and done % 50 == 0):
            self.say("  ".join([f"step {done}/{steps}", *figures]))
        if done == steps and line["skipped"] * FEW > steps:
            self.say(
                f"{line['skipped']} of {steps} steps were skipped, because their gradients were no "
                "finite numbers: what was learned is little. Train with a lower rate"
            )
        if done == steps:
            self.say("all steps are taken; measuring on the held-out text")

    def _room(self, steps: int) -> int:
        """Columns that the figures may take beside the step, the bar and the time left."""
        width = self.console.width
        return width - len(f"step {steps}/{steps} ") - TIME - (BAR + 1) * (width >= WIDE)


def _about(times: float) -> str:
    """A number that is long only where it is large."""
    return f"{times:,.0f}" if times >= 10 else f"{times:.2g}"


def _never_warm(config: TrainConfig) -> str | None:
    """Say that the learning rates do not get as high as they are given; None: they do."""
    given = config.optimizer
    rising = range(min(config.steps, given.warmup_steps + 1))
    peak = max(schedule(step, config.steps, given) for step in rising)
    if peak >= MUCH_LOWER:
        return None
    return (
        f"the learning rates reach {peak:.0%} of those given: {given.warmup_steps} of the "
        f"{config.steps} steps warm up; give fewer with --optimizer.warmup-steps"
    )


def _fitting(figures: Sequence[str], room: int) -> str:
    """Join figures from the first on, as many as there is room for, and the first in any case."""
    count = len(figures)
    while count > 1 and len("  ".join(figures[:count])) > room:
        count -= 1
    return "  ".join(figures[:count])
