"""The whole model against plain loops, and what a call promises as a whole."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from openmythos.model.attention import ATTENTION
from openmythos.model.feed_forward import FEED_FORWARD
from openmythos.model.injection import INJECTION
from tests.reference import Reference
from tests.tiny import some_ids, some_loops, tiny

# Two float64 computations of the same sums in another order: 1e3 operations of relative error
# 1e-16 in a row, times logits of size 10.
EXACT = {"rtol": 0, "atol": 1e-11}

VARIANTS = {
    "default": {},
    "dense": {"experts": 0},
    "no shared expert": {"shared_experts": 0},
    "two shared experts": {"shared_experts": 2, "routed_scale": 2.5, "balance_rate": 0.1},
    "one expert": {"experts": 1, "experts_per_token": 1},
    "lora": {"lora_rank": 2, "lora_loops": 2},
    "a router for each loop": {"router_loops": 3},
    "lora dense": {"lora_rank": 2, "experts": 0},
    "no qk norm": {"qk_norm": False},
    "interleaved": {"rope_pairing": "interleaved", "rope_base": 100.0},
    "query latent": {"q_latent": 14, "lora_rank": 2},
    "untied": {"tie_head": False, "logit_scale": 0.5, "embedding_scale": 2.0},
    "bare": {"prelude_norm": False, "final_norm": False, "core_output": "none"},
    "norms": {"loop_norm": True, "core_output": "norm", "h0": "e"},
    "no prelude or coda": {"prelude_layers": 0, "coda_layers": 0},
    "deep": {"prelude_layers": 2, "coda_layers": 2, "core_layers": 3, "experts": 0},
    "one head": {"num_heads": 1, "kv_heads": 1},
}


def assert_equals_reference(model, token_ids, loops, **options):
    per_token = torch.as_tensor(loops).expand(token_ids.shape)
    expected = Reference(model)(token_ids, per_token)
    with torch.no_grad():
        out = model(token_ids, loops, return_states=True, **options)
    assert_close(out.logits, torch.from_numpy(expected.logits), **EXACT)
    assert_close(out.states, torch.from_numpy(expected.states), **EXACT)
    assert out.loops.tolist() == expected.loops.tolist()


def balanced(model):
    """Give the routers' biases values, so that choice and weight are not by the same number."""
    for layer in model.core.experts_layers():
        layer.router.balance += torch.arange(-2, len(layer.router.balance) - 2)
    return model


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_what_plain_loops_compute(attention, variant):
    model = balanced(tiny(attention=attention, dtype=torch.float64, **VARIANTS[variant]))
    assert_equals_reference(model, some_ids(batch=2, sequence=5), 4)


@pytest.mark.parametrize("injection", INJECTION)
@pytest.mark.parametrize("norm", ["pre", "peri", "sandwich"])
def test_every_injection_and_norm_is_what_plain_loops_compute(injection, norm):
    model = tiny(injection=injection, norm=norm, dtype=torch.float64, h0="e")
    assert_equals_reference(model, some_ids(batch=1, sequence=4), 3)


@pytest.mark.parametrize("feed_forward", FEED_FORWARD)
@pytest.mark.parametrize("experts", [0, 4])
def test_every_feed_forward_is_what_plain_loops_compute(feed_forward, experts):
    model = tiny(feed_forward=feed_forward, experts=experts, dtype=torch.float64)
    assert_equals_reference(model, some_ids(batch=1, sequence=4), 3)


def test_queries_and_keys_have_the_bias_of_the_config():
    model = tiny(qk_bias=True, dtype=torch.float64)
    assert_equals_reference(model, some_ids(batch=1, sequence=4), 3)


@pytest.mark.parametrize("attention", ATTENTION)
def test_loops_for_each_token_are_what_plain_loops_compute(attention):
    model = tiny(attention=attention, lora_rank=2, dtype=torch.float64)
    assert_equals_reference(model, some_ids(2, 6), some_loops(2, 6))


def test_loops_for_each_sequence_are_those_of_its_tokens():
    model, token_ids = tiny(dtype=torch.float64), some_ids(3, 5)
    loops = torch.tensor([2, 5, 1])
    expected = Reference(model)(token_ids, loops.unsqueeze(1).expand(3, 5))
    out = model(token_ids, loops)
    assert_close(out.logits, torch.from_numpy(expected.logits), **EXACT)
    assert out.loops.tolist() == expected.loops.tolist()


@pytest.mark.parametrize("attention", ATTENTION)
def test_fp32_agrees_with_float64_to_1e_4(attention):
    model, token_ids = tiny(attention=attention, lora_rank=2), some_ids(2, 5)
    expected = Reference(model)(token_ids, np.full((2, 5), 4))
    assert expected.margin > 1e-4  # no choice of experts hangs on rounding
    size = np.abs(expected.logits).max()
    logits = model(token_ids, 4).logits
    assert_close(logits.double(), torch.from_numpy(expected.logits), rtol=0, atol=1e-4 * size)
    assert_close(logits.double(), model.double()(token_ids, 4).logits, rtol=0, atol=1e-4 * size)


def test_given_first_states_are_the_first_states():
    model, token_ids = tiny(dtype=torch.float64), some_ids(2, 4)
    h0 = torch.randn(2, 4, 24, dtype=torch.float64)
    expected = Reference(model)(token_ids, np.full((2, 4), 3), h0=h0)
    assert_close(model(token_ids, 3, h0=h0).logits, torch.from_numpy(expected.logits), **EXACT)


def test_the_default_is_the_mean_number_of_loops():
    model, token_ids = tiny(mean_loops=2), some_ids()
    assert torch.equal(model(token_ids).logits, model(token_ids, 2).logits)


@pytest.mark.parametrize("loops", ["all", "by sequence", "by token", "rule"])
def test_decoding_the_states_gives_the_logits_of_every_depth(loops):
    model, token_ids = tiny(), some_ids(2, 5)
    budget = {"by sequence": some_loops(2), "by token": some_loops(2, 5)}.get(loops, 4)
    options = {"halting": "delta", "threshold": 0.5} if loops == "rule" else {}
    out = model(token_ids, budget, return_states=True, **options)
    assert_close(model.decode(out.states[-1]), out.logits)
    if loops == "all":
        for loop, h in enumerate(out.states):
            assert_close(model.decode(h), model(token_ids, loop + 1).logits)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("loops", ["all", "by sequence", "by token"])
def test_padding_changes_nothing_of_what_it_pads(attention, gradient, loops):
    model, token_ids = tiny(attention=attention), some_ids(3, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    budget = {"by sequence": torch.tensor([2, 4, 3]), "by token": some_loops(3, 6)}.get(loops, 4)
    with torch.set_grad_enabled(gradient):
        out = model(token_ids, budget, mask=mask)
        for b, real in enumerate(mask):
            own = budget
            if isinstance(budget, torch.Tensor):
                own = budget[b : b + 1] if budget.ndim == 1 else budget[b : b + 1, real]
            alone = model(token_ids[b : b + 1, real], own)
            # Sums over more or fewer keys, the rest of them zero: rounding of logits near 10.
            assert_close(out.logits[b : b + 1, real], alone.logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(out.loops[b : b + 1, real], alone.loops)
    assert (out.loops[~mask] == 0).all()
    assert out.loads.sum((0, 2)).tolist() == [int(out.loops.sum()) * 2] * 2


def test_a_sequence_of_padding_alone_spoils_no_other():
    model, token_ids = tiny(), some_ids(2, 4)
    mask = torch.tensor([[True] * 4, [False] * 4])
    for budget, options in ((3, {}), (some_loops(2, 4), {}), (3, {"halting": "delta"})):
        out = model(token_ids, budget, mask=mask, **options)
        own = budget if isinstance(budget, int) else budget[:1]
        alone = model(token_ids[:1], own, **options)
        assert_close(out.logits[:1], alone.logits, rtol=1e-4, atol=1e-4)
        assert out.logits.isfinite().all()


def test_shifted_positions_leave_logits_alone_and_stretched_ones_do_not():
    # Rotary embedding knows differences of positions only.
    model, token_ids = tiny(dtype=torch.float64), some_ids(2, 5)
    places = torch.arange(5).expand(2, 5)
    plain = model(token_ids, 3).logits
    shifted = model(token_ids, 3, positions=places + torch.tensor([[7], [300]])).logits
    assert_close(shifted, plain, rtol=0, atol=1e-9)
    assert not torch.allclose(model(token_ids, 3, positions=places * 2).logits, plain, atol=1e-2)


@pytest.mark.parametrize("loops", ["by sequence", "by token", "rule"])
def test_positions_follow_their_tokens_when_some_leave_the_core(loops):
    model, token_ids = tiny(dtype=torch.float64), some_ids(3, 5)
    budget = {"by sequence": torch.tensor([1, 4, 2]), "by token": some_loops(3, 5)}.get(loops, 6)
    options = {"halting": "delta", "threshold": 0.7} if loops == "rule" else {}
    positions = torch.arange(5) * 2 + torch.tensor([[0], [3], [9]])
    out = model(token_ids, budget, positions=positions, **options)
    for b in range(3):
        own = budget if isinstance(budget, int) else budget[b : b + 1]
        alone = model(token_ids[b : b + 1], own, positions=positions[b : b + 1], **options)
        assert_close(out.logits[b : b + 1], alone.logits, rtol=0, atol=1e-10)


def test_weights_depend_on_the_seed_and_each_tensors_name_alone():
    one, other = (
        tiny(spread=0).state_dict(),
        tiny(spread=0, core_layers=3, coda_layers=0).state_dict(),
    )
    shared = set(one) & set(other)
    assert len(shared) > 20
    assert all(torch.equal(one[name], other[name]) for name in shared)
    matrix = "core.layers.0.attention.qkv.weight"
    assert not torch.equal(one[matrix], tiny(spread=0, seed=1).state_dict()[matrix])
    assert not torch.equal(one[matrix], one["core.layers.1.attention.qkv.weight"])


@pytest.mark.parametrize("injection", INJECTION)
def test_weights_made_on_meta_are_those_made_at_once(injection):
    at_once = tiny(spread=0, injection=injection, lora_rank=2, learned_act=True)
    with torch.device("meta"):
        model = type(at_once)(at_once.config)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().fill_(7)
    model.reset_parameters()
    assert model.head.weight is model.embed.weight
    assert_close(dict(model.state_dict()), dict(at_once.state_dict()), rtol=0, atol=0)


def test_encoding_gives_what_enters_the_loop():
    model, token_ids, seen = tiny(h0="e"), some_ids(), []
    handle = model.core.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(token_ids, 1)
    handle.remove()
    assert model.encode(token_ids).equal(seen[0])
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    assert_close(model.encode(token_ids, mask=mask)[0, 3:], model.encode(token_ids[:1, 3:])[0])


def test_states_after_more_loops_than_ran_are_the_last():
    model, token_ids = tiny(), some_ids()
    rule = {"halting": "delta", "threshold": 0.5}
    every = model(token_ids, 9, return_states=True, **rule).states
    assert len(every) < 9
    assert model(token_ids, 9, return_states=[2, 9], **rule).states.equal(every[[1, -1]])
    budget = some_loops(2, 7)
    deepest = int(budget.max())
    states = model(token_ids, budget, return_states=True).states
    assert model(token_ids, budget, return_states=[deepest + 2]).states[0].equal(states[-1])
