"""The loop: gradients through its window, work that is saved, and what it writes down."""

import pytest
import torch
from torch.testing import assert_close

from openmythos.config import MythosConfig
from openmythos.model.attention import ATTENTION
from openmythos.model.injection import INJECTION
from openmythos.model.transformer import OpenMythos
from tests.tiny import some_ids, some_loops, tiny

# float64, the same sums in another order; gradients of these losses are near 100.
EXACT = {"rtol": 0, "atol": 1e-9}


def gradients(model, *losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(out):
    return out.logits.square().sum()


def row_counts(model):
    """Count rows at each core layer from now on."""
    rows = []

    def count(layer, inputs, output):
        rows.append(output[0].numel() // output[0].shape[-1])

    for layer in model.core.layers:
        layer.register_forward_hook(count)
    return rows


@pytest.mark.parametrize("window", [None, 1, 2, 9])
@pytest.mark.parametrize("depths", [(2, 5, 1), (4, 4, 4), (11, 1, 2)])
def test_sequences_of_any_depth_in_a_batch_are_each_as_alone(window, depths):
    model, token_ids = tiny(lora_rank=2, dtype=torch.float64).train(), some_ids(3, 4)
    out = model(token_ids, torch.tensor(depths), backprop_loops=window)
    together = gradients(model, loss_of(out))
    alone = [
        model(token_ids[b : b + 1], depth, backprop_loops=window) for b, depth in enumerate(depths)
    ]
    assert_close(out.logits, torch.cat([one.logits for one in alone]), **EXACT)
    assert_close(together, gradients(model, *map(loss_of, alone)), **EXACT)
    assert out.loops.tolist() == [[depth] * 4 for depth in depths]
    for loop, loads in enumerate(out.loads):
        assert torch.equal(loads, sum(one.loads[loop] for one in alone if loop < len(one.loads)))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    ("loops", "window"), [("by sequence", None), ("by sequence", 2), ("by token", None)]
)
def test_padding_has_no_part_in_gradients_and_loads(loops, window, attention, checkpointing):
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    model = tiny(attention=attention, lora_rank=2, core_layers=1, dtype=torch.float64).train()
    model.core.checkpointing = checkpointing
    token_ids, options = some_ids(3, 5), {"backprop_loops": window}
    depths = torch.tensor([2, 5, 3]) if loops == "by sequence" else some_loops(3, 5)
    out = model(token_ids, depths, mask=mask, **options)
    together = gradients(model, out.logits[mask].square().sum())
    alone = [
        model(
            token_ids[b : b + 1, real],
            depths[b : b + 1] if depths.ndim == 1 else depths[b : b + 1, real],
            **options,
        )
        for b, real in enumerate(mask)
    ]
    assert_close(together, gradients(model, *map(loss_of, alone)), **EXACT)
    assert torch.equal(out.loads.sum(0), sum(one.loads.sum(0) for one in alone))


@pytest.mark.parametrize("window", [None, 2])
def test_the_first_state_has_the_same_gradient_whatever_the_shape_of_loops(window):
    bare = {"injection": "none", "core_output": "none"}
    model, token_ids = tiny(h0="e", dtype=torch.float64, **bare).train(), some_ids(2, 4)
    first = torch.randn(2, 4, 24, dtype=torch.float64, requires_grad=True)
    found = []
    for loops in (2, torch.tensor([2, 2]), torch.full((2, 4), 2)):
        window_too = window if not isinstance(loops, torch.Tensor) or loops.ndim < 2 else None
        own = gradients(model, loss_of(model(token_ids, loops, backprop_loops=window_too)))
        assert own["embed.weight"].abs().max() > 1
        out = model(token_ids, loops, h0=first, backprop_loops=window_too)
        found.append((own, torch.autograd.grad(loss_of(out), first)))
    assert_close(found[1], found[0], **EXACT)
    assert_close(found[2], found[0], **EXACT)


@pytest.mark.parametrize("loops", ["all", "by sequence", "by token", "rule"])
def test_the_states_of_some_loops_are_those_of_all(loops):
    model, token_ids = tiny(dtype=torch.float64), some_ids(2, 4)
    budget = {"by sequence": some_loops(2), "by token": some_loops(2, 4)}.get(loops, 5)
    rule = {"halting": "delta", "threshold": 0.5} if loops == "rule" else {}
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            every = model(token_ids, budget, return_states=True, **rule).states
            some = model(token_ids, budget, return_states=(4, 2), **rule).states
        assert torch.equal(some, every[[1, 3]])


@pytest.mark.parametrize("shape", ["all", "by sequence"])
def test_loops_before_the_window_are_a_constant(shape):
    model, token_ids = tiny(experts=0, dtype=torch.float64).train(), some_ids(2, 4)
    loops, window, early = 5, 2, 3
    budget = loops if shape == "all" else torch.tensor([loops, loops])
    out = model(token_ids, budget, backprop_loops=window)
    with torch.no_grad():
        h = model(token_ids, early, return_states=True).states[-1]
    two_phases = model(token_ids, window, h0=h)
    assert_close(out.logits, two_phases.logits, **EXACT)
    assert_close(gradients(model, loss_of(out)), gradients(model, loss_of(two_phases)), **EXACT)


def test_a_wide_window_is_the_whole_gradient():
    model, token_ids = tiny(dtype=torch.float64).train(), some_ids(2, 4)
    whole = gradients(model, loss_of(model(token_ids, 4)))
    assert_close(gradients(model, loss_of(model(token_ids, 4, backprop_loops=4))), whole, **EXACT)
    assert_close(gradients(model, loss_of(model(token_ids, 4, backprop_loops=99))), whole, **EXACT)


def test_loops_per_token_have_the_gradient_of_finite_differences():
    model, token_ids = tiny(experts=0, lora_rank=2, dtype=torch.float64), some_ids(2, 4)
    loops = some_loops(2, 4)
    found = gradients(model, loss_of(model(token_ids, loops)))
    for name in ("core.layers.0.attention.qkv.weight", "core.injection.weight", "embed.weight"):
        weight, direction = model.get_parameter(name), torch.randn_like(found[name])
        with torch.no_grad():
            losses = []
            for shift in (1e-6, -2e-6):
                weight += shift * direction
                losses.append(loss_of(model(token_ids, loops)))
            weight += 1e-6 * direction
        slope = (losses[0] - losses[1]) / 2e-6
        # Central differences in float64 of a loss near 1e3: 1e-7 from rounding, less from shape.
        assert_close((found[name] * direction).sum(), slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_loops_per_token_that_are_all_alike_are_one_number_of_loops(attention):
    model, token_ids = tiny(attention=attention, dtype=torch.float64), some_ids(2, 4)
    per_token, one = model(token_ids, torch.full((2, 4), 3)), model(token_ids, 3)
    assert_close(per_token.logits, one.logits, **EXACT)
    assert torch.equal(per_token.loads, one.loads)
    assert_close(gradients(model, loss_of(per_token)), gradients(model, loss_of(one)), **EXACT)


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_parameter_that_asks_for_a_gradient_gets_one(attention):
    # The gate asks for none before `train_gate`; a loop over processes waits for all that ask.
    model = tiny(attention=attention, lora_rank=2, router_loops=3, q_latent=14, qk_bias=False)
    loss_of(model(some_ids(2, 4), 4, backprop_loops=2)).backward()
    asking = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == asking
    assert not any(name.startswith("core.gate.") for name in asking)


@pytest.mark.filterwarnings("ignore")  # the compiler tells what it does not follow
def test_a_compiled_core_runs_any_number_of_loops():
    model = tiny(core_layers=1, prelude_layers=0, coda_layers=0, experts=0).train()
    token_ids, depths = some_ids(1, 4), [(3, 2), (2, 2)]
    plain = [model(token_ids, loops, backprop_loops=window).logits for loops, window in depths]
    model.core.compile(backend="eager")
    for expected, (loops, window) in zip(plain, depths, strict=True):
        logits = model(token_ids, loops, backprop_loops=window).logits
        assert logits.equal(expected)
        assert logits.requires_grad
    torch._dynamo.reset()


@pytest.mark.parametrize("loops", ["all", "window", "by sequence", "by token", "rule"])
def test_recomputing_activations_changes_neither_gradients_nor_loads(loops):
    model, token_ids = tiny(lora_rank=2, dtype=torch.float64).train(), some_ids(2, 4)
    budget = {"by sequence": some_loops(2), "by token": some_loops(2, 4)}.get(loops, 4)
    options = {"window": {"backprop_loops": 2}, "rule": {"halting": "delta", "threshold": 0.5}}
    found = []
    for model.core.checkpointing in (False, True):
        out = model(token_ids, budget, **options.get(loops, {}))
        found.append((out.logits.detach(), out.loads, gradients(model, loss_of(out))))
    assert_close(*found, rtol=0, atol=0)


def test_adapters_alone_can_learn_with_loops_per_token():
    model, token_ids = tiny(lora_rank=2, dtype=torch.float64), some_ids(2, 4)
    whole = gradients(model, loss_of(model(token_ids, some_loops(2, 4))))
    adapters = model.adapter_parameters()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapters)
        parameter.grad = None
    alone = gradients(model, loss_of(model(token_ids, some_loops(2, 4))))
    assert set(alone) == set(adapters)
    assert_close(alone, {name: whole[name] for name in adapters}, **EXACT)


def test_work_is_done_for_running_sequences_alone():
    model = tiny(experts=0)
    rows = row_counts(model)
    model(some_ids(3, 4), torch.tensor([2, 5, 1]), backprop_loops=2)
    assert sum(rows) == 2 * 4 * (2 + 5 + 1)
    rows.clear()
    with torch.no_grad():
        loops = some_loops(3, 4)
        model(some_ids(3, 4), loops)
    assert sum(rows) == 2 * int(loops.sum())


@pytest.mark.parametrize("loops", ["all", "by sequence", "by token"])
def test_the_core_is_called_once_whatever_the_depths(loops):
    model, calls = tiny(), []
    model.core.register_forward_hook(lambda *_: calls.append(1))
    budget = {"by sequence": some_loops(2), "by token": some_loops(2, 7)}.get(loops, 4)
    window = 2 if loops != "by token" else None
    model(some_ids(), budget, backprop_loops=window)
    assert len(calls) == 1


@pytest.mark.parametrize("loops", ["all", "by sequence", "by token"])
def test_states_and_routing_are_noted_with_and_without_gradient(loops):
    model, token_ids = tiny(dtype=torch.float64), some_ids(2, 4)
    budget = {"by sequence": some_loops(2), "by token": some_loops(2, 4)}.get(loops, 5)
    per_token = torch.as_tensor(budget)
    per_token = per_token.unsqueeze(1) if per_token.ndim == 1 else per_token
    plain = model(token_ids, budget)
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            out = model(token_ids, budget, return_states=True, return_routing=True)
        assert out.states.shape == (5, 2, 4, 24)
        assert_close(out.logits, plain.logits, **EXACT)
        for loop, choice in enumerate(out.routing):
            assert torch.equal(choice[0, ..., 0] >= 0, (per_token > loop).expand(2, 4))
            if loop:
                left = (per_token <= loop).expand(2, 4)
                assert torch.equal(out.states[loop][left], out.states[loop - 1][left])


@pytest.mark.parametrize("loops", ["all", "window", "by sequence", "by token", "rule"])
def test_the_routing_of_a_call_given_back_reproduces_its_logits(loops):
    model, token_ids = tiny(dtype=torch.float64), some_ids(2, 4)
    budget = {"by sequence": some_loops(2), "by token": some_loops(2, 4)}.get(loops, 5)
    options = {"window": {"backprop_loops": 2}, "rule": {"halting": "delta", "threshold": 0.5}}
    out = model(token_ids, budget, return_routing=True, **options.get(loops, {}))
    assert len(out.routing) == int(out.loops.max())
    for layer in model.core.experts_layers():
        layer.router.balance += 1000 * torch.arange(5)  # the routers would now choose otherwise
    again = model(token_ids, budget, routing=out.routing, **options.get(loops, {}))
    assert_close(again.logits, out.logits, **EXACT)
    assert torch.equal(again.loads, out.loads)
    assert not torch.allclose(model(token_ids, budget).logits, out.logits)


@pytest.mark.parametrize("budget", [4, torch.tensor([4, 3])])
def test_a_token_that_had_left_goes_on_with_the_experts_it_had_last(budget):
    model, token_ids = tiny(dtype=torch.float64), some_ids(2, 4)
    had = torch.tensor([[1, 2, 3, 1], [3, 1, 1, 2]])
    routing = model(token_ids, had, return_routing=True).routing
    again = model(token_ids, 4, routing=routing, return_routing=True)
    for b, t in [(0, 0), (0, 1), (1, 3)]:
        last = routing[int(had[b, t]) - 1, :, b, t]
        assert all(torch.equal(loop[:, b, t], last) for loop in again.routing[int(had[b, t]) :])
    filled = again.routing[: len(routing)]
    given = model(token_ids, budget, routing=filled).logits
    assert_close(model(token_ids, budget, routing=routing).logits, given, **EXACT)


def test_the_last_loops_routing_serves_all_later_loops():
    model, token_ids = tiny(dtype=torch.float64), some_ids(2, 4)
    routing = model(token_ids, 2, return_routing=True).routing
    longer = torch.cat([routing, routing[1:].expand(3, -1, -1, -1, -1)])
    for budget in (5, torch.tensor([5, 4])):
        short = model(token_ids, budget, routing=routing).logits
        assert_close(short, model(token_ids, budget, routing=longer).logits, **EXACT)


@pytest.mark.parametrize("loops", ["all", "by sequence", "by token", "rule"])
@pytest.mark.parametrize("gradient", [False, True])
def test_loads_of_each_loop_sum_to_the_experts_its_tokens_chose(loops, gradient):
    model, token_ids = tiny(experts_per_token=3), some_ids(3, 4)
    budget = {"by sequence": some_loops(3), "by token": some_loops(3, 4)}.get(loops, 5)
    options = {"halting": "delta", "threshold": 0.5} if loops == "rule" else {}
    with torch.set_grad_enabled(gradient):
        out = model(token_ids, budget, **options)
    assert out.loads.shape == (int(out.loops.max()), 2, 5)
    for loop, loads in enumerate(out.loads):
        assert loads.sum(-1).tolist() == [3 * int((out.loops > loop).sum())] * 2


def test_a_dense_core_has_no_loads_and_nothing_to_balance():
    model = tiny(experts=0)
    assert model(some_ids()).loads is None
    model.core.rebalance(None)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("loops", [1, 3, 12])
def test_every_loop_in_the_window_gets_gradient(attention, loops):
    model, window, states = tiny(attention=attention, spread=0), min(loops, 8), []

    def note(injection, inputs, u):
        if u.requires_grad:
            u.retain_grad()
            states.append(u)

    model.core.injection.register_forward_hook(note)
    loss_of(model(some_ids(2, 8), loops, backprop_loops=window)).backward()
    norms = [float(u.grad.norm()) for u in states]
    assert len(norms) == window
    # A = 0.447 alone would leave 0.447^7 = 0.004 of it after 8 loops.
    assert min(norms) > 0.003 * max(norms)


def rms(h):
    return float(h.square().mean().sqrt())


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    ("scale", "seed"),
    [("nano", 0), ("nano", 1), ("nano", 2), ("tiny", 0), ("tiny", 1), ("small", 0)],
)
def test_at_the_start_the_state_settles_and_depth_matters(scale, seed, attention):
    config = MythosConfig.preset(scale).replace(attention=attention)
    model = OpenMythos(config, seed=seed)
    token_ids = some_ids(1, 8, vocab=config.vocab_size, seed=seed)
    with torch.no_grad():
        out = model(token_ids, 64, return_states=True)
        shallow, deep = (model.decode(out.states[loop - 1]) for loop in (1, 8))
    sizes = [rms(out.states[loop - 1]) for loop in (8, 16, 64)]
    assert max(sizes) <= 1.25 * min(sizes)
    assert max(sizes) <= 3 * rms(out.states[0])
    assert rms(deep - shallow) >= 0.1 * float(deep.std())


class Gated(torch.nn.Module):
    """u = sigmoid(W e) h + e: what multiplies h is each token's own."""

    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, width))

    def prepare(self, e):
        return e, torch.nn.functional.linear(e, self.weight).sigmoid()

    def forward(self, h, drive, carry):
        return carry * h + drive


def test_an_injection_may_multiply_each_tokens_state_by_its_own(monkeypatch):
    monkeypatch.setitem(INJECTION, "add", Gated)
    model, token_ids = tiny(injection="add", dtype=torch.float64), some_ids(3, 8)
    mask = torch.arange(8) < torch.tensor([[8], [5], [7]])
    states = model(token_ids, 4, mask=mask, return_states=True).states
    for loops in (torch.tensor([2, 4, 3]), torch.tensor([[2], [4], [3]]).expand(3, 8)):
        for gradient in (False, True):
            for window in (None, 1)[: 3 - loops.ndim]:
                with torch.set_grad_enabled(gradient):
                    out = model(token_ids, loops, mask=mask, backprop_loops=window)
                for row, depth in enumerate((2, 4, 3)):
                    alone = model.decode(states[depth - 1], mask=mask)
                    assert_close(out.logits[row, mask[row]], alone[row, mask[row]], **EXACT)


def test_rows_of_other_sequences_never_mix():
    model, token_ids = tiny(dtype=torch.float64), some_ids(3, 4)
    for budget in (3, some_loops(3), some_loops(3, 4)):
        changed = token_ids.clone()
        changed[1] = (changed[1] + 1) % 50
        before, after = model(token_ids, budget).logits, model(changed, budget).logits
        assert_close(before[[0, 2]], after[[0, 2]], **EXACT)
        assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("attention", ATTENTION)
def test_no_token_sees_a_later_one(attention):
    model, token_ids = tiny(attention=attention, dtype=torch.float64), some_ids(2, 6)
    changed = token_ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 50
    loops = some_loops(2, 6)
    for budget, options in ((3, {}), (loops, {}), (7, {"halting": "delta", "threshold": 0.5})):
        before, after = (model(ids, budget, **options).logits for ids in (token_ids, changed))
        assert_close(before[:, :4], after[:, :4], **EXACT)
