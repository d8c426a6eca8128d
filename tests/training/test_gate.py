"""The gate's training: what it learns from, and what it says of its threshold."""

import pytest
import torch
from torch.testing import assert_close

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
