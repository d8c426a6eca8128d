"""Halting rules against plain loops; and that an exit saves work and changes nothing else."""

from functools import partial
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openmythos.config import HaltingKind
from openmythos.model.attention import ATTENTION
from openmythos.model.halting import HALTING, LearnedExit, make_rule, with_thresholds
from tests.reference import RULES, Reference
from tests.tiny import in_parts, some_ids, some_loops, tiny

# A loose one, one at which tokens of these tiny models leave at different loops, and a strict one.
THRESHOLDS = {
    "gate": (0.2, 0.5, 0.9),
    "delta": (5.0, 0.6, 0.05),
    "kl": (5.0, 0.05, 0.005),
    "act": (0.2, 0.9, 0.99),
}
BUDGET = 7


def model_for(rule, **changes):
    changes = {"core_layers": 1, **changes}
    model = tiny(learned_act=rule == "act", lora_rank=2, spread=0.5, **changes)
    if rule == "act":
        with torch.no_grad():
            model.core.act.bias.fill_(-1.5)
    return model


def how(rule):
    return {"halting": rule, "threshold": THRESHOLDS[rule][1]}


def reference(model, rule, token_ids, loops=BUDGET):
    budget = torch.as_tensor(loops).expand(token_ids.shape)
    expected = Reference(model)(token_ids, budget, rule=partial_rule(rule))
    assert min(one.margin for one in expected.rules) > 1e-3  # relative, far above fp32's rounding
    assert expected.margin > 1e-4  # of the choice of experts
    return expected


def partial_rule(rule):
    return partial(RULES[rule], threshold=THRESHOLDS[rule][1])


def test_every_rule_of_the_table_has_a_name_a_plain_version_and_thresholds():
    assert tuple(HALTING) == get_args(HaltingKind)
    assert set(RULES) == set(THRESHOLDS) == set(HALTING) - {"none"}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_knows_its_bound(rule):
    model = model_for(rule)
    assert model.rule(rule, 0.25).threshold == 0.25
    assert model.rule(rule).threshold > 0
    assert model.rule("none") is None


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_rows_with_thresholds_of_their_own_leave_as_by_rules_of_their_own(rule):
    model, generator = model_for(rule), torch.Generator().manual_seed(0)
    thresholds = torch.tensor(THRESHOLDS[rule]).repeat(8)
    states = torch.randn(4, len(thresholds), model.config.hidden_size, generator=generator)
    states = states.cumsum(0)  # later loops move less
    last = torch.zeros(len(thresholds), dtype=torch.bool)

    def by(asked):
        memory, said = asked.start(len(last), states[0]), []
        for before, after in pairwise(states):
            fires, memory = asked.decide(before, after, memory, last)
            said.append(fires)
        return torch.stack(said)

    alone = {t: by(model.rule(rule, t)) for t in THRESHOLDS[rule]}
    together = by(with_thresholds(model.rule(rule, THRESHOLDS[rule][0]), thresholds))
    for row in range(len(thresholds)):
        own = alone[THRESHOLDS[rule][row % len(THRESHOLDS[rule])]]
        assert torch.equal(together[:, row], own[:, row])
    assert any(said.any() for said in alone.values())
    assert not torch.equal(*list(alone.values())[::2])  # thresholds matter


@pytest.mark.parametrize("rule", [rule for rule in RULES if HALTING[rule].row_by_row])
@pytest.mark.parametrize("width", [7, 50, 1000])
def test_a_rule_that_decides_row_by_row_does_so_to_the_bit(rule, width):
    asked = make_rule(rule, None, {}, lambda h: h)
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 40, width, generator=generator)
    pairs = zip(before.split(1), after.split(1), strict=True)
    alone = [asked.decide(*pair, (), None)[1] for pair in pairs]
    for count in range(1, 41):
        _, together = asked.decide(before[:count], after[:count], (), None)
        for row, parts in enumerate(alone[:count]):
            assert all(torch.equal(x[row], y[0]) for x, y in zip(together, parts, strict=True))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("rule", "gate_size"), [*((rule, 32) for rule in RULES), ("gate", 0)])
def test_every_rule_exits_where_plain_loops_do(rule, gate_size, attention):
    model = model_for(rule, attention=attention, gate_size=gate_size).double()
    token_ids = some_ids(2, 6)
    expected = reference(model, rule, token_ids)
    assert len(set(expected.loops.flatten().tolist())) > 1  # there is something to compare
    with torch.no_grad():
        out = model(token_ids, BUDGET, return_states=True, **how(rule))
    assert out.loops.tolist() == expected.loops.tolist()
    assert_close(out.logits, torch.from_numpy(expected.logits), rtol=0, atol=1e-10)
    assert_close(out.states, torch.from_numpy(expected.states), rtol=0, atol=1e-10)
    if rule == "act":
        ponder = torch.tensor([one.ponder for one in expected.rules]).view(2, 6)
        assert_close(out.ponder, ponder.double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("rule", RULES)
def test_exits_are_the_same_with_cache_without_batched_alone_and_chunked(rule, attention):
    model, token_ids = model_for(rule, attention=attention), some_ids(2, 6)
    expected = reference(model, rule, token_ids)
    logits, loops = torch.from_numpy(expected.logits).float(), torch.from_numpy(expected.loops)
    size = logits.abs().max()

    def check(out_logits, out_loops, rows=slice(None)):
        assert torch.equal(out_loops, loops[rows])
        assert_close(out_logits, logits[rows], rtol=0, atol=1e-4 * float(size))

    with torch.no_grad():
        out = model(token_ids, BUDGET, **how(rule))
        check(out.logits, out.loops)
        for row in range(2):
            alone = model(token_ids[row : row + 1], BUDGET, **how(rule))
            check(alone.logits, alone.loops, slice(row, row + 1))
        for sizes in ((6,), (2, 1, 3), (1,) * 6):
            cache = model.new_cache(batch_size=2, max_length=6)
            check(*in_parts(model, token_ids, sizes, BUDGET, cache, **how(rule)))
        left = torch.tensor([[False] * 2 + [True] * 4, [True] * 6])
        padded = model(
            torch.cat([token_ids[:, :2], token_ids[:, :4]], 1)[:1],
            BUDGET,
            mask=left[:1],
            **how(rule),
        )
        check(padded.logits[:, 2:], padded.loops[:, 2:], (slice(1), slice(4)))


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"act"}))
def test_the_loops_a_rule_took_given_as_budgets_reproduce_its_logits(rule):
    model, token_ids = model_for(rule).double(), some_ids(2, 6)
    with torch.no_grad():
        out = model(token_ids, BUDGET, return_routing=True, **how(rule))
        again = model(token_ids, out.loops, routing=out.routing)
    assert_close(again.logits, out.logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_for_each_token_bounds_its_loops(rule):
    model, token_ids, budget = model_for(rule).double(), some_ids(2, 6), some_loops(2, 6)
    expected = Reference(model)(token_ids, budget, rule=partial_rule(rule))
    with torch.no_grad():
        out = model(token_ids, budget, **how(rule))
    assert (out.loops <= budget).all()
    assert out.loops.tolist() == expected.loops.tolist()
    assert_close(out.logits, torch.from_numpy(expected.logits), rtol=0, atol=1e-10)


class RowCounter:
    """Rows that pass each core layer, counted at the layer itself."""

    def __init__(self, model):
        self.model, self.rows, self.hooks = model, [], []

    def __enter__(self):
        for layer in self.model.core.layers:
            self.hooks.append(layer.register_forward_hook(self.count))
        return self

    def count(self, layer, inputs, output):
        self.rows.append(output[0].numel() // output[0].shape[-1])

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [None, (6,), (3, 1, 1, 1)])
def test_a_token_that_has_left_passes_no_layer_any_more(rule, sizes):
    model, token_ids = model_for(rule, core_layers=2, experts=0), some_ids(2, 6)
    with torch.no_grad(), RowCounter(model) as counter:
        if sizes is None:
            loops = model(token_ids, BUDGET, **how(rule)).loops
        else:
            cache = model.new_cache(batch_size=2, max_length=6)
            _, loops = in_parts(model, token_ids, sizes, BUDGET, cache, **how(rule))
    assert sum(counter.rows) == 2 * int(loops.sum())
    assert int(loops.sum()) < BUDGET * 12


def test_padding_passes_no_layer_where_tokens_leave_one_by_one():
    model, token_ids = model_for("delta", experts=0), some_ids(2, 6)
    mask = torch.tensor([[False] * 4 + [True] * 2, [True] * 6])
    with torch.no_grad(), RowCounter(model) as counter:
        loops = model(token_ids, BUDGET, mask=mask, **how("delta")).loops
    assert sum(counter.rows) == int(loops.sum())


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return made


@pytest.mark.parametrize("gradient", [False, True])
def test_a_budget_that_no_token_needs_takes_no_memory(gradient):
    model, token_ids = model_for("delta"), some_ids(2, 3)
    with torch.set_grad_enabled(gradient), Largest() as largest:
        out = model(token_ids, 10**6, halting="delta", threshold=5.0)
    assert out.loops.max() < 10
    assert largest.numbers < 10**5


@pytest.mark.parametrize("rule", RULES)
def test_with_gradient_exits_and_logits_are_the_same(rule):
    model, token_ids = model_for(rule).double(), some_ids(2, 6)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    for options in ({}, {"mask": mask}):
        with torch.no_grad():
            removed = model(token_ids, BUDGET, return_routing=True, **options, **how(rule))
        held = model(token_ids, BUDGET, return_routing=True, **options, **how(rule))
        assert held.logits.requires_grad
        assert torch.equal(held.loops, removed.loops)
        assert torch.equal(held.loads, removed.loads)
        real = options.get("mask", torch.ones_like(token_ids, dtype=torch.bool))
        assert torch.equal(held.routing[:, :, real], removed.routing[:, :, real])
        assert_close(held.logits[real], removed.logits[real], rtol=0, atol=1e-11)


def test_the_ponder_cost_has_the_gradient_of_finite_differences():
    model, token_ids = model_for("act", experts=0).double(), some_ids(2, 4)
    bias = model.core.act.bias

    def loss():
        out = model(token_ids, BUDGET, **how("act"))
        return out.ponder.sum() + out.logits.square().mean(), out.loops

    value, loops = loss()
    value.backward()
    with torch.no_grad():
        values = []
        for shift in (1e-6, -2e-6):
            bias += shift
            value, moved = loss()
            assert torch.equal(moved, loops)  # otherwise the cost jumps
            values.append(float(value))
    # Central differences in float64: relative error near 1e-16 / 1e-6 plus 1e-12.
    assert float(bias.grad.sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


class Graves:
    """The rule `act` alone, fed with exit probabilities of our choice."""

    def __init__(self, threshold):
        self.rule = make_rule("act", threshold, {"act": self.probability}, lambda h: h)

    def probability(self, before, after):
        return self.logit

    def run(self, probabilities, states):
        """`probabilities` (loops, rows) and `states` (loops, rows, hidden)."""
        memory, ended = self.rule.start(states.shape[1], states[0]), []
        for loop, (p, h) in enumerate(zip(probabilities, states, strict=True)):
            self.logit = p.logit()
            last = torch.full(p.shape, loop + 1 == len(states))
            exits, memory = self.rule.decide(h, h, memory, last)
            ended.append(exits)
        return self.rule.output(h, memory), self.rule.ponder(memory), torch.stack(ended)


@pytest.mark.parametrize("threshold", [0.5, 0.99, 1.0])
@pytest.mark.parametrize("budget", [1, 2, 5, 40])
def test_weights_of_act_sum_to_1_at_every_budget(threshold, budget):
    p = torch.rand(budget, 30) * torch.linspace(0.01, 1, 30)
    ones = torch.ones(budget, 30, 3)
    output, _, ended = Graves(threshold).run(p, ones)
    assert_close(output, ones[0], rtol=0, atol=1e-6)
    assert (ended.sum(0) == 1).all()  # every row ends once


def test_act_is_graves_example_by_hand():
    p = torch.tensor([[0.2], [0.3], [0.6], [0.9]])
    states = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(4, 1, 1)
    output, ponder, ended = Graves(0.99).run(p, states)
    assert output.item() == pytest.approx(0.2 * 1 + 0.3 * 10 + 0.5 * 100)
    assert ponder.item() == pytest.approx(3 + 0.5)  # three loops, and what is left at the third
    assert ended.flatten().tolist() == [False, False, True, False]
    output, ponder, _ = Graves(0.99).run(p[:2], states[:2])  # the budget ends first
    assert output.item() == pytest.approx(0.2 * 1 + 0.8 * 10)
    assert ponder.item() == pytest.approx(2 + 0.8)


def test_a_token_runs_one_loop_more_than_where_its_rule_fired():
    model = model_for("gate")
    with torch.no_grad():
        model.core.gate.weight.zero_()
        model.core.gate.bias.fill_(20.0)  # fires at once
        for budget, taken in ((1, 1), (2, 2), (6, 2)):
            out = model(some_ids(2, 3), budget, halting="gate")
            assert (out.loops == taken).all()


def test_a_gate_that_was_never_trained_does_not_fire():
    model = tiny(spread=0)
    assert (model(some_ids(), 5, halting="gate").loops == 5).all()


def test_the_gates_default_threshold_is_the_one_it_was_trained_to():
    model, token_ids = model_for("gate"), some_ids(2, 6)
    model.core.gate.threshold.fill_(0.3)
    with torch.no_grad():
        default = model(token_ids, BUDGET, halting="gate").loops
        assert torch.equal(default, model(token_ids, BUDGET, halting="gate", threshold=0.3).loops)
        assert not torch.equal(
            default, model(token_ids, BUDGET, halting="gate", threshold=0.9).loops
        )


def test_learned_exits_decide_alike_whatever_the_model_is_cast_to():
    exit_ = LearnedExit(8)
    exit_.threshold.fill_(0.999)
    before = {name: t.clone() for name, t in exit_.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert_close(dict(exit_.to(dtype).state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("gate_size", [0, 32])
def test_autocast_changes_no_exit(gate_size):
    exit_ = tiny(gate_size=gate_size).core.gate
    before, after = torch.randn(2, 40, 24)
    with torch.no_grad():
        expected = exit_(before, after)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(exit_(before, after), expected)


def logits_with(distribution):
    return torch.tensor([distribution]).log()


def test_kl_is_of_the_later_distribution_from_the_earlier():
    # Of (0.99, 0.01) from (0.5, 0.5) it is 0.64 nats; the other way round 1.61.
    even, sure = logits_with([0.5, 0.5]), logits_with([0.99, 0.01])
    rule = make_rule("kl", 1.0, {}, lambda h: h)
    assert rule.decide(even, sure, (), None)[0].item()
    assert not rule.decide(sure, even, (), None)[0].item()


def test_kl_of_logits_in_half_precision_is_computed_in_fp32():
    before = torch.randn(20, 50).bfloat16()
    after = (before + 0.05 * torch.randn(20, 50)).bfloat16()
    logs = [x.double().log_softmax(-1) for x in (before, after)]
    exact = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)  # near 1e-3; bf16 has 3e-3 of a log
    for row, nats in enumerate(exact.tolist()):
        for threshold, fires in ((1.01 * nats, True), (0.99 * nats, False)):
            rule = make_rule("kl", threshold, {}, lambda h: h)
            said, _ = rule.decide(before[row : row + 1], after[row : row + 1], (), None)
            assert said.item() == fires


def test_hidden_units_tell_what_no_linear_exit_can():
    # An answer is clear where the state points far along some axis, either way.
    states = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    clear = (states[:, 0].abs() > states[:, 1].abs()).float()

    def right(size):
        exit_ = LearnedExit(8, size)
        exit_.start_anew()
        optimizer = torch.optim.AdamW(exit_.parameters(), lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            logits = exit_(torch.zeros_like(states), states)
            F.binary_cross_entropy_with_logits(logits, clear).backward()
            optimizer.step()
        return float(((logits > 0) == clear.bool()).float().mean())

    assert right(0) < 0.6
    assert right(32) > 0.9


@pytest.mark.parametrize("rule", RULES)
def test_no_threshold_makes_tokens_leave_after_more_loops_than_a_stricter_one(rule):
    # A gate that demands more certainty, or a state that must be quieter, stays longer.
    model, token_ids = model_for(rule), some_ids(12, 1)
    with torch.no_grad():
        outs = [model(token_ids, BUDGET, halting=rule, threshold=t) for t in THRESHOLDS[rule]]
    loops = np.stack([out.loops.numpy() for out in outs])
    assert (np.diff(loops, axis=0) >= 0).all()
    assert loops[0].sum() < loops[-1].sum()
