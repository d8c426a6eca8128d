"""The claims' trainings: they learn, and resume to the bit."""

import dataclasses
import math

import pytest
import torch
from tiny import tiny

from openmythos.errors import CheckpointError
from openmythos.evidence.fit import IGNORE, Batch, FitConfig, _asked, _with_defaults, fit
from openmythos.training import checkpoint
from openmythos.training.settings import OptimizerConfig

FAST = FitConfig(steps=8, save_every=3, optimizer=OptimizerConfig(matrices="adamw", warmup_steps=1))


def copying(step):
    """Say again what stands there: easy, so that a few steps show."""
    torch.manual_seed(step)
    token_ids = torch.randint(0, 5, (4, 6))
    targets = token_ids.clone()
    targets[:, 0] = IGNORE
    return Batch(token_ids, targets, 1 + step % 2)


class InterruptedTrainingError(Exception):
    pass


def test_a_training_learns(tmp_path):
    losses = []
    config = dataclasses.replace(FAST, steps=60, report_every=20)
    fit(tiny(), copying, config, tmp_path, report=lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path):
    def until(stop):
        def batch(step):
            if step == stop:
                raise InterruptedTrainingError
            return copying(step)

        return batch

    told = {"whole": [], "cut": []}

    def teller(name):
        return lambda step, loss: told[name].append((step, loss))

    whole, cut = tiny(), tiny()
    config = dataclasses.replace(FAST, report_every=4)
    fit(whole, copying, config, tmp_path / "whole", report=teller("whole"))
    with pytest.raises(InterruptedTrainingError):
        fit(cut, until(5), config, tmp_path / "cut")
    assert checkpoint.latest(tmp_path / "cut").name == "step-00000003"
    again = tiny()
    fit(again, copying, config, tmp_path / "cut", report=teller("cut"))
    assert told["cut"] == told["whole"]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_other_settings_are_refused(tmp_path):
    fit(tiny(), copying, FAST, tmp_path)
    with pytest.raises(CheckpointError, match="must hold a training with these settings"):
        fit(tiny(), copying, dataclasses.replace(FAST, seed=1), tmp_path)


def test_a_setting_that_was_removed_since_is_passed_over(tmp_path):
    asked = _asked(tiny(), FAST, (), "")
    older = {**asked, "fit": {**asked["fit"], "levels": 1}}
    assert _with_defaults(older) == asked


def test_another_text_is_refused(tmp_path):
    fit(tiny(), copying, FAST, tmp_path, text="one")
    with pytest.raises(CheckpointError, match="must hold a training with these settings"):
        fit(tiny(), copying, FAST, tmp_path, text="another")


def test_loops_may_differ_between_tokens(tmp_path):
    def batch(step):
        token_ids, targets, _ = copying(step)
        return Batch(token_ids, targets, torch.randint(1, 4, token_ids.shape))

    losses = []
    config = dataclasses.replace(FAST, steps=40, report_every=20)
    fit(tiny(), batch, config, tmp_path, report=lambda step, loss: losses.append(loss))
    assert losses[-1] < losses[0]


def test_a_watcher_sees_every_step_and_may_end_the_training(tmp_path):
    seen = []

    def watch(step, loss, gradient):
        seen.append(step)
        assert loss > 0
        assert gradient > 0
        return step < 5

    model, before = tiny(), tiny()
    fit(model, copying, FAST, tmp_path, watch=watch)
    assert seen == [1, 2, 3, 4, 5]
    assert checkpoint.latest(tmp_path).name == "step-00000003"
    assert not torch.equal(model.embed.weight, before.embed.weight)
    again = []
    fit(tiny(), copying, FAST, tmp_path, watch=lambda *step: again.append(step[0]) or True)
    assert again == [4, 5, 6, 7, 8]


def test_frozen_parts_stay_as_they_were(tmp_path):
    model, before = tiny(), tiny()
    fit(model, copying, FAST, tmp_path, frozen=("router", "prelude"))
    for (name, parameter), start in zip(model.named_parameters(), before.parameters(), strict=True):
        held = ".router." in name or name.startswith(("prelude.", "core.gate."))
        assert torch.equal(parameter, start) == held, name
    with pytest.raises(CheckpointError, match="must hold a training with these settings"):
        fit(tiny(), copying, FAST, tmp_path)


@pytest.mark.parametrize("finite", [True, False])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(tmp_path, finite):
    def loss(model, batch):
        out = model(batch.token_ids, batch.loops)
        return out.logits.square().mean() * (1 if finite else math.inf), out.loads

    model, before = tiny(), tiny()
    fit(model, copying, dataclasses.replace(FAST, steps=1), tmp_path, loss=loss)
    balances = {name for name in model.state_dict() if name.endswith("router.balance")}
    assert balances
    moved = {n for n, t in model.state_dict().items() if not t.equal(before.state_dict()[n])}
    assert moved & balances if finite else not moved
