"""A run that goes on: what it takes over, what may be given anew, and what is told of it."""

import dataclasses

import pytest
import torch
from training.small_runs import same, start, stopped

from openmythos.errors import CheckpointError
from openmythos.training import checkpoint
from openmythos.training.metrics import metrics
from openmythos.training.run import OfMachine, Settings, gate_trained
from openmythos.training.settings import OptimizerConfig
from openmythos.training.start import open_run


@pytest.fixture
def altered(monkeypatch):
    """Return a function that changes the state that checkpoints are read with."""
    load = checkpoint.load

    def change(drop=(), **now):
        def changed(folder):
            found = load(folder)
            state = {name: x for name, x in found.state.items() if name not in drop}
            return dataclasses.replace(found, state=state | now)

        monkeypatch.setattr(checkpoint, "load", changed)

    return change


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_goes_on_in_the_dtype_that_it_began_in(tmp_path, text, monkeypatch, dtype):
    other = {torch.bfloat16: torch.float32, torch.float32: torch.bfloat16}[dtype]
    choice = "openmythos.training.optimizer.orthogonal_dtype"
    monkeypatch.setattr(choice, lambda _: dtype)
    run = stopped(tmp_path, text)
    monkeypatch.setattr(choice, lambda _: other)  # as another processor would choose
    assert open_run(run).optimizers.orthogonal_dtype == dtype


def test_a_checkpoint_from_before_the_dtype_was_kept_goes_on(tmp_path, text, altered):
    run = stopped(tmp_path, text)
    altered(drop=("orthogonal", "device"))
    trainer = open_run(run)
    assert trainer.step == 1
    assert trainer.optimizers.orthogonal_dtype is not None


def test_without_muon_there_is_no_such_dtype(tmp_path, text):
    run = stopped(tmp_path, text, optimizer=OptimizerConfig(matrices="adamw"))
    assert open_run(run).optimizers.orthogonal_dtype is None


def test_another_kind_of_device_is_told(tmp_path, text, altered):
    run = stopped(tmp_path, text)
    altered(device="tpu")
    with pytest.warns(UserWarning, match="was written with device tpu, and this is .*: the run"):
        open_run(run)


def test_what_changes_no_step_can_be_given_anew(tmp_path, text):
    whole, run = tmp_path / "whole", stopped(tmp_path / "cut", text)
    start(whole, text).fit()
    given = OfMachine(evaluate_every=2, gate_steps=2, finish="best")
    open_run(run, of_machine=given).fit()
    kept = Settings.load(run).train
    assert (kept.evaluate_every, kept.gate_steps, kept.finish) == (2, 2, "best")
    measured = [x["step"] for x in metrics(run) if "validation" in x and "final" not in x]
    assert measured == [1, 3, 5, 7]
    assert [x["loss"] for x in metrics(run) if "loss" in x] == [
        x["loss"] for x in metrics(whole) if "loss" in x
    ]


def test_scores_on_other_text_are_said_not_to_compare(tmp_path, text):
    run = stopped(tmp_path, text)
    with pytest.warns(UserWarning, match="evaluate_tokens=32 for 64: what is measured on the way"):
        open_run(run, of_machine=OfMachine(evaluate_tokens=32))


def test_a_finished_run_can_be_given_a_gate(tmp_path, text):
    start(tmp_path, text, steps=2).fit()
    assert gate_trained(tmp_path) is False
    open_run(tmp_path, of_machine=OfMachine(gate_steps=2)).fit()
    assert gate_trained(tmp_path) is True
    assert any("gate" in line for line in metrics(tmp_path))


def test_another_precision_is_told_and_stays(tmp_path, text):
    run = stopped(tmp_path, text)
    with pytest.warns(UserWarning, match="precision=bf16 for fp32: the run goes on, but by round"):
        trainer = open_run(run, of_machine=OfMachine(precision="bf16"))
    trainer.prepare()
    assert trainer.machine.precision == "bf16"
    assert trainer.compiled is False
    trainer._stop = True
    trainer.one_step()
    trainer.save()
    again = open_run(run)  # without a warning
    assert again.machine.precision == "bf16"
    assert again.machine.reason == "as before"


def test_the_precision_that_was_decided_may_be_named(tmp_path, text):
    run = stopped(tmp_path, text)
    open_run(run, of_machine=OfMachine(precision="fp32"))


def test_a_run_that_recomputes_can_do_without(tmp_path, text):
    run = stopped(tmp_path / "cut", text, checkpoint_activations=True)
    trainer = open_run(run, of_machine=OfMachine(checkpoint_activations=False))
    assert not trainer.model.core.checkpointing
    trainer.fit()
    start(tmp_path / "whole", text, checkpoint_activations=True).fit()
    assert same(run, tmp_path / "whole")


@pytest.mark.parametrize("whose", ["its", "the finished"])
def test_steps_that_cannot_change_any_more_name_the_way_out(tmp_path, text, whose):
    run = tmp_path / "my run"
    steady = OptimizerConfig(warmup_steps=1, decay_share=1.0)
    if whose == "its":
        start(run, text, steps=3, optimizer=steady).fit()
    else:
        stopped(run, text, steps=3, optimizer=steady)
    sentence = rf"; to train {whose} model further, start another run with --start-from '{run}'$"
    with pytest.raises(CheckpointError, match=sentence):
        open_run(run, steps=12)
