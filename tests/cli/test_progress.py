"""The line that a training shows of itself: what counts stays readable in a narrow terminal."""

import dataclasses
import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from openmythos.cli import progress
from openmythos.cli.progress import Progress
from openmythos.training.settings import OptimizerConfig, TrainConfig

LINE = {"loss": 7.1234, "bits_per_byte": 2.9, "tokens_per_second": 12345.0, "peak_share": 0.45}


@pytest.fixture
def terminal(monkeypatch):
    """Return the progress of a run in a terminal of so many columns."""

    def make(width=300, steps=300, measures_all=False):
        console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
        monkeypatch.setattr(progress, "Shown", lambda: console)
        config = TrainConfig(steps=steps, batch_size=4, length=16)
        return Progress(
            SimpleNamespace(
                model=torch.nn.Linear(2, 2),
                config=config,
                step=0,
                machine=None,
                measures_all=measures_all,
            )
        )

    return make


@pytest.fixture
def shown(terminal):
    """Return what a terminal of so many columns shows of the last step but one."""

    def show(width, steps=300, skipped=0):
        made = terminal(width, steps)
        made.report({"step": steps - 2, "skipped": skipped, **LINE})
        with made.console.capture() as captured:
            made.console.print(made.bar.get_renderable())
        return captured.get()

    return show


@pytest.mark.parametrize("steps", [300, 100_000])
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_step_and_loss_are_whole_on_one_line_in_any_terminal(shown, width, steps):
    line = shown(width, steps).rstrip()
    assert line.startswith(f"step {steps - 1}/{steps} ")
    assert " loss 7.123" in line
    assert "\n" not in line
    assert "…" not in line
    assert len(line) <= width


def test_a_wider_terminal_shows_more(shown):
    assert "bits/byte" not in shown(40)
    assert "2.900 bits/byte" in shown(60)
    assert "12,345 tokens/s" in shown(80)
    assert all(part in shown(120) for part in ("━", "12,345 tokens/s", "45% of peak"))


def test_skipped_steps_come_before_the_figures_that_a_narrow_terminal_drops(shown):
    assert "loss 7.123  2 skipped" in shown(60, skipped=2)


def entered(made, split=None):
    made.trainer.run, made.trainer.split = "runs/a", split
    made.trainer.training = SimpleNamespace(tokens=900, bytes=4000)
    made.trainer.validation = SimpleNamespace(tokens=90, bytes=400)
    with made:
        pass
    return made


@pytest.mark.parametrize(
    ("steps", "times"), [(3, "0.21"), (14, "1"), (100, "7.1"), (100_000, "7,111")]
)
def test_how_often_the_text_is_read_is_told_at_the_start(terminal, steps, times):
    said = entered(terminal(steps=steps)).console.file.getvalue()
    assert f"\n{steps:,} steps read the text {times} times\n" in said


@pytest.mark.parametrize(
    ("steps", "warmup", "share"), [(300, 20, None), (10, 20, "40%"), (30, 20, "86%"), (5, 0, None)]
)
def test_rates_that_a_short_run_never_reaches_are_told(terminal, steps, warmup, share):
    made = terminal(steps=steps)
    optimizer = OptimizerConfig(warmup_steps=warmup)
    made.trainer.config = dataclasses.replace(made.trainer.config, optimizer=optimizer)
    said = entered(made).console.file.getvalue()
    assert ("warm up" in said) == (share is not None)
    assert share is None or f"the learning rates reach {share} of those given" in said


@pytest.mark.parametrize("split", ["2 of 40 documents are held out", None])
def test_a_run_that_starts_says_how_its_text_was_divided(terminal, split):
    made = entered(terminal(), split)
    said = f"text: {split}; 4,000 bytes to train on, 400 held out"
    assert (said in made.console.file.getvalue()) == (split is not None)
    assert "None" not in made.console.file.getvalue()


def test_a_measurement_says_how_much_of_the_text_it_took(terminal):
    point, end = {"1": 3.0, "8": 2.5}, {"1": 3.1, "8": 2.6}
    made = terminal()
    made.report({"step": 7, "validation": point})
    made.report({"step": 7, "validation": end, "final": True})
    first, second = made.console.file.getvalue().splitlines()
    assert (
        first == "step 8: start of the held-out text, bits per byte by loops  1: 3.0000  8: 2.5000"
    )
    assert second == "step 8: all held-out text, bits per byte by loops  1: 3.1000  8: 2.6000"


def test_a_measurement_of_all_is_told_once(terminal):
    made = terminal(measures_all=True)
    made.report({"step": 7, "validation": {"1": 3.0}})
    made.report({"step": 7, "validation": {"1": 3.0}, "final": True})
    assert made.console.file.getvalue() == (
        "step 8: all held-out text, bits per byte by loops  1: 3.0000\n"
    )
    made.report({"step": 3, "validation": {"1": 3.0}, "final": True})  # an earlier step was best
    assert made.console.file.getvalue().endswith(
        "step 4: all held-out text, bits per byte by loops  1: 3.0000\n"
    )


def test_the_gates_loss_stands_beside_that_of_all_loops(terminal):
    made = terminal()
    gate = {"threshold": 0.5, "mean_loops": 3.25, "budget": 8, "loss": 2.5, "full_loss": 2.4}
    made.report({"step": 8, "gate": gate})
    assert made.console.file.getvalue() == (
        "gate: threshold 0.5, 3.25 of 8 loops a token on average, loss 2.5000 nats; with all 8 "
        "loops for every token 2.4000\n"
    )


def test_one_step_that_was_skipped_does_not_hide_the_loss_of_those_after_it(terminal):
    made = terminal(steps=60)
    for step in range(60):
        loss = float("nan") if step == 3 else 2.0
        made.report({"step": step, "skipped": int(step >= 3), **LINE, "loss": loss})
    assert "step 60/60  loss 2.000  1 skipped" in made.console.file.getvalue()


def test_the_figures_of_a_short_run_are_not_those_of_its_first_step(terminal):
    made = terminal(steps=10)
    for step in range(10):
        made.report({"step": step, "skipped": 0, **LINE, "loss": 10.0 - step})
    shown = float(made.console.file.getvalue().split("loss ")[1].split()[0])
    assert shown < 5  # 6.49 if the first counted as all before it


@pytest.mark.parametrize(("skipped", "told"), [(2, False), (40, True)])
def test_the_end_of_a_run_that_skipped_many_steps_says_so(terminal, skipped, told):
    made = terminal(steps=60)
    made.report({"step": 59, "skipped": skipped, **LINE})
    assert ("were skipped" in made.console.file.getvalue()) == told
