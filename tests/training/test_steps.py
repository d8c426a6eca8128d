"""What a step of a run is given: its text, depths, window and noise, and what it leaves alone."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from training.small_runs import start

from openmythos.training import measured
from openmythos.training import trainer as trainer_module
from openmythos.training.depth import sample_loops
from openmythos.training.metrics import metrics
from openmythos.training.token_file import TokenFile


def noise(seed, sample):
    word = int(np.random.SeedSequence([seed, int(sample)]).generate_state(1)[0])
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(word)) * math.sqrt(2 / 5)


@pytest.fixture
def calls(monkeypatch):
    """Return a function that lets a trainer's model tell what it is called with."""

    def listen(trainer):
        told, forward = [], trainer.model.forward

        def telling(*given, **how):
            told.append((*given, how))
            return forward(*given, **how)

        monkeypatch.setattr(trainer.model, "forward", telling)
        return told

    return listen


def test_each_step_has_the_text_depths_window_and_noise_of_its_samples(tmp_path, text, calls):
    model, seed = {"h0": "noise", "mean_loops": 4}, 5
    trainer = start(tmp_path, text, model, seed=seed, accumulation=2, backprop_loops=3)
    told, file = calls(trainer), TokenFile(tmp_path / "train.bin")
    for _ in range(2):
        trainer.one_step()
    assert len(told) == 4
    for number, (token_ids, loops, how) in enumerate(told):
        samples = np.arange(2) + 2 * number
        step = number // 2
        wanted = file.batch(samples, 16, seed=seed)
        assert token_ids.tolist() == wanted[:, :-1].tolist()
        drawn = sample_loops("poisson", 4, seed=seed, step=step, indices=samples)
        assert torch.as_tensor(loops).expand(2).tolist() == drawn.tolist()
        assert how["backprop_loops"] == 3
        assert how["h0"].equal(torch.stack([noise(seed, sample) for sample in samples]))


@pytest.mark.parametrize("window", [None, 1])
def test_loops_without_a_gradient_change_it_and_not_the_loss(tmp_path, text, window):
    how = {"depth": "fixed", "steps": 1}
    whole = start(tmp_path / "whole", text, **how).one_step()
    cut = start(tmp_path / "cut", text, **how, backprop_loops=window).one_step()
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert (cut["gradient_norm"] == whole["gradient_norm"]) == (window is None)


@pytest.mark.parametrize("recomputed", [False, True])
def test_checkpointed_layers_run_again_in_the_backward_pass(tmp_path, text, recomputed):
    trainer = start(tmp_path, text, depth="fixed", checkpoint_activations=recomputed)
    ran = []
    layer = trainer.model.core.layers[0].attention
    layer.register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    trainer.one_step()
    assert len(ran) == (4 if recomputed else 2)  # loops


def test_accumulation_changes_nothing_but_rounding(tmp_path, text):
    runs = [tmp_path / f"{parts}" for parts in (1, 2, 4)]
    for parts, run in zip((1, 2, 4), runs, strict=True):
        start(run, text, steps=3, accumulation=parts).fit()
    for key in ("loss", "gradient_norm", "load_max_over_mean"):
        one, *others = ([x[key] for x in metrics(run) if "loss" in x] for run in runs)
        for other in others:
            assert_close(torch.tensor(other), torch.tensor(one), atol=1e-4, rtol=1e-4)


def test_a_step_that_is_not_finite_changes_no_weight_and_no_balance(tmp_path, text):
    trainer = start(tmp_path / "run", text, steps=3)
    trainer.one_step()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert any(name.endswith("router.balance") and t.any() for name, t in before.items())
    trainer.model.core.layers[0].feed_forward.w_out.register_hook(lambda g: g * math.inf)
    line = trainer.one_step()
    assert (line["skipped"], trainer.step) == (1, 2)
    for name, tensor in trainer.model.state_dict().items():
        assert tensor.equal(before[name]), name


def test_the_gate_learns_from_training_text_that_the_last_steps_did_not_have(tmp_path, text):
    trainer = start(tmp_path, text, seed=3)
    wanted = TokenFile(tmp_path / "train.bin").batch(range(4, 8), 16, seed=4)
    given = trainer._gate_batch(1)
    assert given.token_ids.tolist() == wanted[:, :-1].tolist()
    assert given.targets.tolist() == wanted[:, 1:].tolist()


@pytest.mark.parametrize(("precision", "wanted"), [("fp32", False), ("bf16", True)])
def test_held_out_text_is_measured_in_the_precision_of_the_training(
    tmp_path, text, monkeypatch, precision, wanted
):
    trainer = start(tmp_path, text, precision=precision)
    trainer.prepare()
    seen, forward = [], trainer.model.forward

    def looking(*given, **how):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(*given, **how)

    monkeypatch.setattr(trainer.model, "forward", looking)
    trainer._evaluate(64)
    trainer.one_step()
    assert set(seen) == {wanted}


def test_no_measurement_takes_more_sequences_than_a_part_of_a_step(tmp_path, text, calls):
    how = {"batch_size": 12, "gate_steps": 2, "steps": 1}
    runs = {
        parts: start(tmp_path / f"{parts}", text, **how, accumulation=parts) for parts in (1, 6)
    }
    told = {parts: calls(trainer) for parts, trainer in runs.items()}
    for trainer in runs.values():
        trainer.fit()
    assert max(len(ids) for ids, *_ in told[1]) == 12
    assert max(len(ids) for ids, *_ in told[6]) == 2
    after = [[x for x in metrics(trainer.run) if "loss" not in x] for trainer in runs.values()]
    for one, other in zip(*after, strict=True):
        assert other.keys() == one.keys()
        for key in {"validation", "gate"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-4)
        if "state_rms" in one:
            assert other["state_rms"] == pytest.approx(one["state_rms"], rel=1e-4)
            assert other["expert_share"][0][0] == pytest.approx(one["expert_share"][0][0])


def test_a_step_that_takes_many_sequences_does_not_measure_more_than_before(tmp_path, text):
    trainer = start(tmp_path, text, batch_size=64)
    assert trainer._at_once(trainer_module.MEASURED_BATCH) == 8
    assert trainer._at_once(trainer_module.GATE_BATCH) == measured.WINDOWS == 4
