"""The gate's training: what it learns from, and what it says of its threshold."""

import pytest
import torch
from torch.testing import assert_close

from openmythos.errors import InputError
from openmythos.model.transformer import cross_entropy
from openmythos.training import gate
from openmythos.training.gate import CHANCES, Labelled, train_gate
from tests.tiny import some_ids, tiny


def asked_of(seed):
    token_ids = some_ids(3, 8, seed=seed)
    return Labelled(token_ids, token_ids.roll(1, 1))


def test_a_gate_reports_what_its_threshold_was_measured_to_do():
    model = tiny(experts=0, gate_size=4)
    held_out = [asked_of(1), asked_of(2)]
    report = train_gate(model, asked_of, held_out, steps=2, budget=4, margin=5.0, cost=-9.0)
    assert report.threshold == CHANCES[-1]  # none keeps to such a cost
    loss = loops = right = 0.0
    with torch.no_grad():
        for asked in held_out:
            out = model(asked.token_ids, 4, halting="gate", threshold=report.threshold)
            loss += float(cross_entropy(out.logits, asked.targets).mean()) / 2
            loops += float(out.loops.double().mean()) / 2
            right += float((out.logits.argmax(-1) == asked.targets).double().mean()) / 2
    assert report.loss == pytest.approx(loss)
    assert report.mean_loops == pytest.approx(loops)
    assert report.accuracy == pytest.approx(right)


@pytest.mark.parametrize(
    ("limits", "chosen"),
    [
        ({"cost": -9.0}, CHANCES[-1]),
        ({"cost": 9.0}, CHANCES[0]),
        ({"lost_accuracy": -1.0}, CHANCES[-1]),
        ({"lost_accuracy": 1.0}, CHANCES[0]),
        ({"cost": -9.0, "lost_accuracy": 1.0}, CHANCES[-1]),  # it keeps to both
    ],
)
def test_a_threshold_is_the_lowest_that_costs_no_more_than_it_may(limits, chosen):
    model = tiny(experts=0, gate_size=4)
    report = train_gate(model, asked_of, [asked_of(1)], steps=1, budget=4, margin=5.0, **limits)
    assert report.threshold == chosen == pytest.approx(float(model.core.gate.threshold))


@pytest.mark.parametrize("training", [True, False])
def test_held_out_text_may_come_once_and_the_model_keeps_its_mode(training):
    model, every = tiny(experts=0, gate_size=4).train(training), [asked_of(1), asked_of(2)]
    reports = [
        train_gate(model, asked_of, held_out, steps=1, budget=3)
        for held_out in (every, iter(every))
    ]
    assert reports[0] == reports[1]
    assert {module.training for module in model.modules()} == {training}
    assert not any(parameter.requires_grad for parameter in model.core.gate.parameters())


def padded(seed):
    asked = asked_of(seed)
    return Labelled(asked.token_ids, asked.targets.index_fill(1, torch.tensor([3]), -100))


@pytest.mark.parametrize(
    ("batch", "held_out", "sentence"),
    [
        (asked_of, [], "held_out holds nothing, must hold text to choose the threshold on"),
        (asked_of, [asked_of(1), padded(2)], "held_out has the target -100, must have token ids"),
        (
            padded,
            [asked_of(1)],
            r"batch\(0\) has the target -100, must have token ids from 0 to 49",
        ),
    ],
    ids=["nothing", "held out", "batch"],
)
def test_what_a_gate_cannot_learn_from_is_refused_before_work(batch, held_out, sentence):
    model = tiny(experts=0, gate_size=4).train()
    model.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(InputError, match=sentence):
        train_gate(model, batch, held_out, steps=1, budget=3)
    assert model.training


@pytest.mark.parametrize("h0", ["zeros", "e"])
def test_a_gate_learns_from_the_first_state_that_it_will_see(h0):
    model, asked = tiny(experts=0, h0=h0), asked_of(0)
    seen = []
    handle = model.core.gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        states, _ = gate._trajectory(model, asked, 2)
        model(asked.token_ids, 2, halting="gate", threshold=0.999)
    handle.remove()
    assert_close(states[0].flatten(0, 1), seen[0])


@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
def test_sequences_in_parts_give_the_gate_what_the_batch_gives(at_once):
    model, asked = tiny(experts=0, gate_size=4), asked_of(0)
    ran = []
    handle = model.register_forward_pre_hook(lambda _, given: ran.append(len(given[0])))
    parts = gate._trajectory(model, asked, 3, at_once)
    assert max(ran) == min(at_once, 3)
    handle.remove()
    for part, whole in zip(parts, gate._trajectory(model, asked, 3), strict=True):
        assert_close(part, whole)
