"""A core whose state has lanes: against its equation, and nearly the plain core at the start."""

import dataclasses

import pytest
import torch
from tiny import some_ids, tiny
from torch.testing import assert_close

from openmythos import OpenMythos
from openmythos.evidence.laned import Laned, further_parameters
from openmythos.evidence.text_training import TextTraining
from openmythos.model.injection import FLOOR
from openmythos.model.span import Place, Span

CONFIG = tiny(core_layers=2, lora_rank=0).config


def shaken(lanes):
    """A model in float64 all of whose lanes' numbers differ."""
    model = Laned(CONFIG, lanes, seed=1).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.core.named_parameters():
            if (name.endswith("_scale") and "." not in name) or name.startswith("decays"):
                parameter += torch.randn(parameter.shape, generator=generator).double() / 2
    return model


def by_the_equation(model, token_ids, loops):
    """The same with a loop over lanes and their pairs."""
    core, (batch, sequence) = model.core, token_ids.shape
    span = Span.fresh(batch, sequence, None, token_ids.device)
    rope = model._rope(span, None)
    e = model.before_core(token_ids, rope, iter([Place(span)] * len(model.prelude)))
    drive, first = core.injection.prepare(e)
    a = [first] + [
        torch.exp(-(FLOOR + (1 + d.step.exp()).log() * (1 + d.rate.exp()).log()))
        for d in core.decays
    ]
    n = core.lanes
    rows = core.mix_scale.view(n, n).exp()
    h = [torch.zeros_like(e) for _ in range(n)]
    for loop in range(loops):
        u = [a[i] * h[i] + drive for i in range(n)]
        x = sum(core.read_scale[i] * u[i] for i in range(n))
        y = x
        for layer in core.layers:
            y, _ = layer(y, rope, torch.tensor(loop), Place(span), None)
        h = [
            sum(rows[i, j] / rows[i].sum() * u[j] for j in range(n)) + core.write_scale[i] * (y - x)
            for i in range(n)
        ]
    out = sum(core.out_scale[i] * h[i] for i in range(n))
    return model.readout(model.after_core(out, rope, iter([Place(span)] * len(model.coda))))


@pytest.mark.parametrize("lanes", [2, 3])
def test_lanes_are_what_the_equation_says(lanes):
    model = shaken(lanes)
    token_ids = torch.randint(CONFIG.vocab_size, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert_close(model(token_ids, 4).logits, by_the_equation(model, token_ids, 4))


def test_at_the_start_a_model_is_nearly_the_one_without_lanes():
    token_ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        plain = OpenMythos(CONFIG, seed=1)(token_ids, 3).logits.log_softmax(-1)
        laned = Laned(CONFIG, 2, seed=1)(token_ids, 3).logits.log_softmax(-1)
    apart = (laned.exp() * (laned - plain)).sum(-1)
    assert 0 < float(apart.max()) < 0.01


@pytest.mark.parametrize("wanted", [True, [1, 3]], ids=["every loop", "two of them"])
def test_states_are_kept_as_of_a_call_that_ends_there(wanted):
    model = shaken(2)
    token_ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        kept = model(token_ids, 4, return_states=wanted).states
        loops = [1, 2, 3, 4] if wanted is True else wanted
        for state, count in zip(kept, loops, strict=True):
            assert_close(model.decode(state), model(token_ids, count).logits)


def test_every_lane_learns_and_the_linear_part_stays_below_one():
    model = Laned(CONFIG, 3)
    model(torch.arange(8).view(1, 8), 3).logits.square().sum().backward()
    parts = model.core.named_parameters()
    own = {name: part for name, part in parts if "scale" in name or "decay" in name}
    assert all(parameter.grad is not None for parameter in own.values())
    assert float(model.core.read_scale.grad[2].abs()) > 0
    lanes = torch.stack(model.core.carries(model.core.injection.A))
    linear = model.core.mixing().unsqueeze(-1) * lanes.unsqueeze(0)  # (lanes, lanes, hidden)
    assert float(torch.linalg.eigvals(linear.detach().permute(2, 0, 1)).abs().max()) < 1


def test_a_row_with_lanes_counts_them_and_others_keep_their_settings():
    training = TextTraining(shape={"hidden_size": 16, "core_layers": 1}, vocab_size=270)
    laned = dataclasses.replace(training, lanes=2)
    assert "lanes" not in training.as_json()
    assert laned.as_json()["lanes"] == 2
    more = sum(p.numel() for p in laned.new_model().parameters()) - sum(
        p.numel() for p in training.new_model().parameters()
    )
    assert more == further_parameters(training.config, 2) > 0
    assert laned.costs()["parameters"] - training.costs()["parameters"] == more


@pytest.mark.parametrize(
    "how",
    [{"loops": torch.tensor([2, 1])}, {"halting": "delta"}, {"loops": torch.full((2, 7), 2)}],
    ids=["by sequence", "exits", "by token"],
)
def test_calls_that_lanes_cannot_serve_are_refused(how):
    model = Laned(tiny(experts=0).config, 2)
    with pytest.raises(NotImplementedError, match="one number of loops, without a cache or exits"):
        model(some_ids(), **how)
