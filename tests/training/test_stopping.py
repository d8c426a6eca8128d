"""A run that ends before its last step: asked to, without learning, or for want of room."""

import contextlib
import errno
import math
import os
import signal
from types import SimpleNamespace

import pytest
from training.small_runs import start

from openmythos.errors import CheckpointError, ConfigError
from openmythos.training import checkpoint
from openmythos.training import metrics as metrics_module
from openmythos.training.metrics import metrics
from openmythos.training.trainer import Stopped, Trainer

needs_hangup = pytest.mark.skipif(os.name == "nt", reason="has no such signal")


class Late(Trainer):
    """Is asked to stop just after its first look whether it is."""

    @property
    def _stop(self):
        self.looks = getattr(self, "looks", 0) + 1
        return self.looks > 1

    @_stop.setter
    def _stop(self, _):
        pass


def test_whoever_is_asked_to_stop_at_any_moment_saves_first(tmp_path, text):
    trainer = start(tmp_path, text, save_every=100, evaluate_every=100)
    trainer.__class__ = Late
    with pytest.raises(Stopped):
        trainer.fit()
    assert 0 < trainer.step < 8
    assert checkpoint.step_of(checkpoint.latest(tmp_path)) == trainer.step


def test_a_stop_asked_for_at_the_last_checkpoint_ends_before_the_measurement(
    tmp_path, text, monkeypatch
):
    trainer = start(tmp_path, text, steps=2)
    save = trainer.save

    def asked(score):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(score)

    monkeypatch.setattr(trainer, "save", asked)
    with pytest.raises(Stopped):
        trainer.fit()
    assert trainer.step == 2
    assert not any("validation" in line for line in metrics(tmp_path))


@contextlib.contextmanager
def handling_hangups(handler):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def hang_up_at_step(number):
    def report(line):
        if line["step"] == number:
            for _ in range(2):  # the terminal's, and its shell's
                os.kill(os.getpid(), signal.SIGHUP)

    return report


@needs_hangup
def test_a_terminal_that_goes_ends_a_run_with_a_checkpoint(tmp_path, text):
    trainer = start(tmp_path, text)
    with handling_hangups(signal.SIG_DFL), pytest.raises(Stopped):
        trainer.fit(hang_up_at_step(1))
    assert trainer.step == checkpoint.step_of(checkpoint.latest(tmp_path)) == 2


@needs_hangup
def test_a_hangup_that_is_ignored_stays_so(tmp_path, text):
    trainer = start(tmp_path, text)
    with handling_hangups(signal.SIG_IGN):
        trainer.fit(hang_up_at_step(1))
    assert trainer.step == 8


def not_finite_from(trainer, step):
    """Let all gradients of a matrix be infinite from a step on."""
    weight = trainer.model.core.layers[0].feed_forward.w_out
    weight.register_hook(lambda g: g * math.inf if trainer.step >= step else g)


def test_a_run_whose_gradients_stay_not_finite_ends_and_is_not_finished(tmp_path, text):
    trainer = start(tmp_path, text, steps=40, keep=20, evaluate_every=100)
    not_finite_from(trainer, 5)
    sentence = (
        r"step=24 must have a finite gradient, as none of the last 20 steps had: train anew with "
        r"lower rates than muon_lr=0.02 and adam_lr=0.004; the last good checkpoint is "
        r".*step-00000003 from before"
    )
    with (
        pytest.warns(UserWarning, match="step 5 was skipped: its gradient is no finite number"),
        pytest.raises(ConfigError, match=sentence),
    ):
        trainer.fit()
    assert [line["skipped"] for line in metrics(tmp_path)][:6] == [0, 0, 0, 0, 0, 1]
    assert not (tmp_path / "model").exists()


def test_a_short_run_that_learned_nothing_is_not_finished_either(tmp_path, text):
    trainer = start(tmp_path, text, steps=2)
    not_finite_from(trainer, 0)
    with (
        pytest.warns(UserWarning, match="step 0 was skipped"),
        pytest.raises(ConfigError, match="step=1 must .*; there is no checkpoint from before"),
    ):
        trainer.fit()


def test_a_few_skipped_steps_are_told_once_and_passed_over(tmp_path, text):
    trainer = start(tmp_path, text, steps=30, save_every=100, evaluate_every=100)
    weight = trainer.model.core.layers[0].feed_forward.w_out
    weight.register_hook(lambda g: g * math.inf if trainer.step % 3 else g)
    with pytest.warns(UserWarning, match="was skipped") as told:
        trainer.fit()
    assert len(told) == 1
    assert trainer.optimizers.skipped == 20


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "mend that")]
)
def test_where_metrics_cannot_be_written_what_is_learned_is_kept(
    tmp_path, text, monkeypatch, number, advice
):
    trainer = start(tmp_path, text, save_every=100)
    append, lines = metrics_module._append, []

    def failing(path, line):
        lines.append(line)
        if len(lines) == 4:  # the first is empty
            raise OSError(number, os.strerror(number))
        append(path, line)

    monkeypatch.setattr(metrics_module, "_append", failing)
    sentence = rf"must take its metrics.jsonl, but: {os.strerror(number)}. To go on, {advice} and"
    with pytest.raises(CheckpointError, match=sentence):
        trainer.fit()
    assert checkpoint.step_of(checkpoint.latest(tmp_path)) == trainer.step == 3


@pytest.mark.parametrize("ends", [Stopped, None])
def test_tensorboard_is_closed_however_a_run_ends(tmp_path, text, monkeypatch, ends):
    told = []
    board = SimpleNamespace(add_scalar=lambda *_: None, close=lambda: told.append("closed"))
    monkeypatch.setattr(metrics_module, "_tensorboard", lambda *_: board)
    monkeypatch.setattr("openmythos.training.start.check_tensorboard", lambda: None)
    trainer = start(tmp_path, text, steps=2, log="tensorboard")
    trainer._stop = ends is Stopped
    with contextlib.suppress(Stopped):
        trainer.fit()
    assert told == ["closed"]
    assert (tmp_path / "model").exists() == (ends is None)


def test_a_run_without_a_step_is_not_said_to_be_no_run(tmp_path, text):
    start(tmp_path / "run", text)
    with pytest.raises(CheckpointError, match="this run has none before its first step"):
        next(metrics(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="it is not a training run"):
        next(metrics(tmp_path / "nowhere"))
