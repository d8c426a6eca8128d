import dataclasses
import math
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from openmythos.config import AttentionKind, FeedForwardKind, MythosConfig
from openmythos.errors import CheckpointError, ConfigError
from openmythos.model.adapters import LoopLinear
from openmythos.model.experts import Experts
from openmythos.model.transformer import OpenMythos
from openmythos.training.optimizer import (
    LR_FACTORS,
    Muon,
    build_optimizers,
    clip_gradients,
    group_of,
    orthogonal_dtype,
    orthogonalise,
)
from openmythos.training.settings import OptimizerConfig, schedule

SHAPES = [(24, 40), (40, 24), (16, 16), (24, 40)]


def parameters(*shapes, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes]


def give_gradients(named_or_list, seed):
    random = torch.Generator().manual_seed(seed)
    for p in named_or_list:
        p.grad = torch.randn(p.shape, generator=random).to(p.dtype)


def in_steps(optimizer, params, steps=4):
    for step in range(steps):
        give_gradients(params, seed=100 + step)
        optimizer.step()


def without_rounding_to_bfloat16(monkeypatch):
    """Lets torch's Muon orthogonalise in float32, so that two programs can agree closely."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())


@pytest.mark.parametrize("adjust_lr", LR_FACTORS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_equals_torchs_on_matrices(monkeypatch, adjust_lr, nesterov, weight_decay):
    without_rounding_to_bfloat16(monkeypatch)
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    settings = {"lr": 0.03, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    in_steps(Muon(ours, **settings, adjust_lr=adjust_lr), ours)
    in_steps(torch.optim.Muon(theirs, **settings, adjust_lr_fn=adjust_lr), theirs)
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q, rtol=0, atol=5e-6)  # of weights near 1, and updates of 0.03 each
    assert (ours[0] - parameters(*SHAPES)[0]).abs().max() > 0.01


def test_muon_in_bfloat16_equals_torchs_to_bfloat16s_precision():
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    in_steps(Muon(ours, lr=0.03, dtype=torch.bfloat16), ours)
    in_steps(torch.optim.Muon(theirs, lr=0.03), theirs)
    for p, q in zip(ours, theirs, strict=True):
        # Entries of an update are at most 1.2; 2^-8 of that for each of 4 steps, and 5 products.
        assert_close(p, q, rtol=0, atol=4 * 5 * 0.03 * 1.2 * 2**-8)


def test_defaults_are_torchs():
    ours = Muon(parameters((3, 4))).defaults
    theirs = torch.optim.Muon(parameters((3, 4))).defaults
    for key in ("lr", "weight_decay", "momentum", "nesterov"):
        assert ours[key] == theirs[key]


def test_momentum_survives_bfloat16_gradients_without_nesterov():
    (p,) = parameters((8, 12), dtype=torch.bfloat16)
    optimizer = Muon([p], nesterov=False, momentum=0.5)
    p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    assert_close(optimizer.state[p]["momentum_buffer"], torch.full_like(p, 1.0))


@pytest.mark.parametrize("adjust_lr", LR_FACTORS)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_stack_of_experts_is_updated_like_its_matrices_one_by_one(adjust_lr, shape):
    (stack,) = parameters((5, *shape))
    # A Linear lies (out, in) and a stack (experts, in, out).
    singles = [torch.nn.Parameter(expert.detach().T.clone()) for expert in stack]
    together = Muon([stack], lr=0.05, adjust_lr=adjust_lr)
    apart = Muon(singles, lr=0.05, adjust_lr=adjust_lr)
    for step in range(3):
        give_gradients([stack], seed=step)
        for single, gradient in zip(singles, stack.grad, strict=True):
            single.grad = gradient.T.clone()
        together.step()
        apart.step()
    assert_close(stack, torch.stack([single.T for single in singles]), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("shape", "split"),
    [((30, 18), (0, (18, 6, 6))), ((18, 30), (1, (20, 10))), ((4, 10, 24), (2, (12, 12)))],
)
def test_fused_matrices_are_updated_like_their_pieces(shape, split):
    axis, sizes = split
    (fused,) = parameters(shape)
    pieces = [torch.nn.Parameter(p.clone()) for p in fused.detach().split(sizes, dim=axis)]
    together = Muon([{"params": [fused], "split": split}], lr=0.05)
    apart = Muon(pieces, lr=0.05)
    for step in range(3):
        give_gradients([fused], seed=step)
        for piece, gradient in zip(pieces, fused.grad.split(sizes, dim=axis), strict=True):
            piece.grad = gradient.clone()
        together.step()
        apart.step()
    assert_close(fused, torch.cat(list(pieces), dim=axis), rtol=0, atol=5e-6)


@pytest.mark.parametrize("split", [None, (2, (6, 6))])
def test_experts_without_tokens_keep_weights_and_momentum(split):
    (stack,) = parameters((5, 8, 12))
    optimizer = Muon([{"params": [stack], "split": split}], weight_decay=0.5, lr=0.1)
    in_steps(optimizer, [stack], steps=2)
    before, momentum = stack.detach().clone(), optimizer.state[stack]["momentum_buffer"].clone()
    give_gradients([stack], seed=9)
    stack.grad[[1, 4]] = 0.0
    optimizer.step()
    moved = [bool((stack[i] != before[i]).any()) for i in range(5)]
    assert moved == [True, False, True, True, False]
    moved = (optimizer.state[stack]["momentum_buffer"] != momentum).flatten(1).any(dim=1)
    assert moved.tolist() == [True, False, True, True, False]


def test_busy_experts_move_the_same_whether_others_rest_or_not():
    (all_busy,), (some_rest,) = parameters((5, 8, 12)), parameters((5, 8, 12))
    give_gradients([all_busy], seed=1)
    some_rest.grad = all_busy.grad.clone()
    some_rest.grad[2] = 0.0
    Muon([all_busy]).step()
    Muon([some_rest]).step()
    busy = [0, 1, 3, 4]
    assert_close(some_rest[busy], all_busy[busy], rtol=0, atol=1e-6)


def test_a_stack_nobody_used_and_a_parameter_without_gradient_stay():
    stack, matrix = parameters((3, 4, 6), (5, 7))
    before = [p.detach().clone() for p in (stack, matrix)]
    stack.grad = torch.zeros_like(stack)
    Muon([stack, matrix]).step()
    assert_close([stack.detach(), matrix.detach()], before, rtol=0, atol=0)


@pytest.mark.parametrize("matrices", [1, 3, 50])
def test_orthogonalised_matrices_have_singular_values_near_1(matrices):
    x = torch.randn(matrices, 100, 140)  # 50 of these take more than one call
    y = orthogonalise(x, torch.float64)
    values = torch.linalg.svdvals(y)
    # The quintic maps values above 1e-2 of the largest into this band (Jordan et al. 2024).
    assert values.min() > 0.6
    assert values.max() < 1.3
    one_by_one = torch.cat([orthogonalise(single[None], torch.float64) for single in x])
    assert_close(y, one_by_one, rtol=0, atol=1e-12)
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    assert torch.einsum("nij,nij->n", y, u @ v).min() > 0.9 * 0.7 * 100


def test_orthogonalisation_is_in_a_type_that_this_machine_multiplies_fast():
    assert orthogonal_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert orthogonal_dtype(torch.device("meta")) == torch.float32


NAMES = {
    # name: (shape, optimizer, weight decay)
    "embed.weight": ((64, 24), "adamw", False),
    "prelude.0.attention_norm.weight": ((24,), "adamw", False),
    "prelude.0.attention.qkv.weight": ((40, 24), "muon", True),
    "prelude.0.attention.qkv.bias": ((40,), "adamw", False),
    "prelude.0.attention.q_norm.weight": ((8,), "adamw", False),
    "prelude.0.attention.qk_scale": ((5, 8), "adamw", False),
    "prelude.0.attention.qk_bias": ((5, 8), "adamw", False),
    "prelude.0.attention.out.weight": ((24, 24), "muon", True),
    "prelude.0.feed_forward.w_in.weight": ((96, 24), "muon", True),
    "prelude.0.feed_forward.w_out.weight": ((24, 48), "muon", True),
    "core.layers.0.attention.q_down.weight": ((12, 24), "muon", True),
    "core.layers.0.attention.q_up.weight": ((24, 12), "muon", True),
    "core.layers.0.attention.kv_down.weight": ((12, 24), "muon", True),
    "core.layers.0.attention.kv_up.weight": ((48, 8), "muon", True),
    "core.layers.0.attention.gate.weight": ((12, 24), "muon", True),
    "core.layers.0.attention.head_mix": ((6, 6), "muon", True),
    "core.layers.0.attention.lora.out.up": ((3, 24, 2), "adamw", True),
    "core.layers.0.attention.q_lora.down.weight": ((2, 24), "adamw", True),
    "core.layers.0.feed_forward.router.weight": ((5, 24), "adamw", True),
    "core.layers.0.feed_forward.experts.w_in": ((5, 24, 16), "muon", True),
    "core.layers.0.feed_forward.experts.w_out": ((5, 8, 24), "muon", True),
    "core.layers.0.feed_forward.shared.w_in.weight": ((16, 24), "muon", True),
    "core.layers.0.feed_forward.shared.w_out.weight": ((24, 8), "muon", True),
    "core.injection.B": ((24, 24), "adamw", False),
    "core.injection.p": ((24,), "adamw", False),
    "core.gate.weight": ((1, 24), "adamw", True),
    "core.gate.bias": ((1,), "adamw", False),
    "core_norm.weight": ((24,), "adamw", False),
    "core_output.weight": ((24, 24), "adamw", False),
    "coda.0.attention.qkv.weight": ((40, 24), "muon", True),
    "coda.0.feed_forward.w_in.weight": ((96, 24), "muon", True),
    "head.weight": ((64, 24), "adamw", True),
}
SPLITS = {
    "prelude.0.attention.qkv.weight": (0, [24, 8, 8]),
    "coda.0.attention.qkv.weight": (0, [24, 8, 8]),
    "core.layers.0.feed_forward.experts.w_in": (2, [8, 8]),
}


def named_parameters():
    return list(zip(NAMES, parameters(*(shape for shape, _, _ in NAMES.values())), strict=True))


def build(named, **changes):
    config = dataclasses.replace(OptimizerConfig(), **changes)
    return build_optimizers(named, config, fused_splits=SPLITS, dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_its_group(name):
    shape, optimizer, decays = NAMES[name]
    assert group_of(name, torch.empty(shape)) == (optimizer, decays)


@pytest.mark.parametrize("attention", get_args(AttentionKind))
@pytest.mark.parametrize("feed_forward", get_args(FeedForwardKind))
def test_muon_takes_the_models_linear_maps_and_experts_and_nothing_else(attention, feed_forward):
    config = MythosConfig.preset("nano").replace(
        attention=attention, feed_forward=feed_forward, lora_rank=2
    )
    with torch.device("meta"):
        model = OpenMythos(config)
    named, splits = dict(model.named_parameters()), model.fused_splits()
    matrices = {name for name, p in named.items() if group_of(name, p).optimizer == "muon"}
    wanted = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, LoopLinear)}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            wanted |= {f"{name}.w_in", f"{name}.w_out"}
    assert matrices == wanted
    assert splits.keys() <= matrices
    build_optimizers(named.items(), OptimizerConfig(), fused_splits=splits)


def test_every_parameter_is_in_exactly_one_group_with_its_settings():
    named = named_parameters()
    optimizers = build(named, muon_lr=0.5, adam_lr=0.25, weight_decay=0.125)
    seen = []
    for optimizer in optimizers.optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                (name,) = [name for name, q in named if q is p]
                seen.append(name)
                _, kind, decays = NAMES[name]
                assert isinstance(optimizer, Muon if kind == "muon" else torch.optim.AdamW)
                assert group["lr"] == (0.5 if kind == "muon" else 0.25)
                assert group["weight_decay"] == (0.125 if decays else 0.0)
                if kind == "muon":
                    split = group["split"] and (group["split"][0], list(group["split"][1]))
                    assert split == SPLITS.get(name)
    assert sorted(seen) == sorted(NAMES)


def test_frozen_parameters_are_left_out():
    named = named_parameters()
    for name, p in named:
        p.requires_grad_("lora" in name)
    optimizers = build(named)
    assert [type(o) for o in optimizers.optimizers] == [torch.optim.AdamW]
    give_gradients([p for name, p in named if "lora" in name], seed=1)
    optimizers.step()
    assert {key.rpartition(".")[0] for key in optimizers.state_tensors()} - {""} == {
        name for name in NAMES if "lora" in name
    }


def test_state_comes_back_by_name_bit_for_bit_in_any_order_of_the_parameters():
    named = named_parameters()
    optimizers = build(named)
    for step in range(2):
        give_gradients([p for _, p in named], seed=step)
        optimizers.step()
    optimizers.skipped = 3
    resumed = build(reversed(named_parameters()))
    resumed.load_state_tensors(optimizers.state_tensors())
    before, after = optimizers.state_tensors(), resumed.state_tensors()
    assert before.keys() == after.keys()
    assert len(before) == 1 + sum(1 if kind == "muon" else 3 for _, kind, _ in NAMES.values())
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert torch.equal(value, after[key])


def test_an_uninterrupted_and_a_resumed_run_end_with_equal_bits():
    def run(steps, interrupted_at):
        named = named_parameters()
        optimizers = build(named)
        for step in range(steps):
            if step == interrupted_at:
                saved = {key: value.clone() for key, value in optimizers.state_tensors().items()}
                weights = {name: p.detach().clone() for name, p in named}
                named = [(name, torch.nn.Parameter(weights[name])) for name, _ in named]
                optimizers = build(named)
                optimizers.load_state_tensors(saved)
            optimizers.set_lr(schedule(step, steps, OptimizerConfig(warmup_steps=2)))
            give_gradients([p for _, p in named], seed=step)
            if step % 2:
                dict(named)["core.layers.0.feed_forward.experts.w_in"].grad[1] = 0.0
            optimizers.step()
        return [p.detach() for _, p in named]

    for p, q in zip(run(6, interrupted_at=None), run(6, interrupted_at=3), strict=True):
        assert torch.equal(p, q)


def test_a_loaded_state_does_not_share_memory_with_what_it_came_from():
    named = named_parameters()
    optimizers = build(named)
    give_gradients([p for _, p in named], seed=0)
    optimizers.step()
    saved = {key: value.clone() for key, value in optimizers.state_tensors().items()}
    copies = {key: value.clone() for key, value in saved.items()}
    optimizers.load_state_tensors(saved)
    optimizers.step()
    assert all(torch.equal(saved[key], copies[key]) for key in saved)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(poison):
    named = named_parameters()
    optimizers = build(named)
    give_gradients([p for _, p in named], seed=0)
    optimizers.step()
    before = {name: p.detach().clone() for name, p in named}
    state = {key: value.clone() for key, value in optimizers.state_tensors().items()}
    named[3][1].grad.flatten()[0] = poison
    assert not math.isfinite(optimizers.step())
    assert all(torch.equal(p, before[name]) for name, p in named)
    after = optimizers.state_tensors()
    assert all(torch.equal(after[key], state[key]) for key in after if key != "skipped")
    assert optimizers.skipped == 1


def test_gradients_are_clipped_to_a_global_norm_which_is_returned_unclipped():
    a, b = parameters((3, 4), (5,))
    give_gradients([a, b], seed=2)
    norm = torch.cat([a.grad.flatten(), b.grad]).norm().item()
    assert norm > 1.5
    before = a.grad.clone()
    assert clip_gradients([a, b], 0.0) == pytest.approx(norm)
    assert torch.equal(a.grad, before)
    assert clip_gradients([a, b], 1.5) == pytest.approx(norm)
    assert torch.cat([a.grad.flatten(), b.grad]).norm().item() == pytest.approx(1.5, rel=1e-5)
    assert_close(a.grad, before * (1.5 / norm), rtol=1e-5, atol=0)
    assert clip_gradients([a, b], 100.0) == pytest.approx(1.5, rel=1e-5)


def test_set_lr_scales_what_was_configured_and_not_what_was_set():
    optimizers = build(named_parameters(), muon_lr=0.5, adam_lr=0.25)
    for scale in (0.5, 0.1, 1.0):
        optimizers.set_lr(scale)
        rates = {g["lr"] for o in optimizers.optimizers for g in o.param_groups}
        assert rates == {0.5 * scale, 0.25 * scale}


def test_zero_grad_forgets_gradients():
    named = named_parameters()
    optimizers = build(named)
    give_gradients([p for _, p in named], seed=0)
    optimizers.zero_grad()
    assert all(p.grad is None for _, p in named)


def test_the_schedule_rises_stays_and_falls():
    config = OptimizerConfig(warmup_steps=4, decay_share=0.5)
    scales = [schedule(step, 20, config) for step in range(20)]
    assert scales[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert scales[4:11] == [1.0] * 7
    assert scales[11:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert schedule(20, 20, config) == schedule(99, 20, config) == 0.0


def test_the_schedule_without_warm_up_and_decay_is_constant():
    config = OptimizerConfig(warmup_steps=0, decay_share=0.0)
    assert [schedule(step, 3, config) for step in range(3)] == [1.0, 1.0, 1.0]


def matrix():
    return parameters((4, 6))


BAD = {
    "a learning rate of 0": (
        lambda: OptimizerConfig(muon_lr=0.0),
        ConfigError,
        r"muon_lr=0.0 must be above 0: the default is 0.02",
    ),
    "a NaN": (
        lambda: OptimizerConfig(adam_lr=math.nan),
        ConfigError,
        "adam_lr=nan must be a",
    ),
    "momentum of 1": (lambda: OptimizerConfig(momentum=1.0), ConfigError, "momentum=1.0 must be"),
    "negative clip": (lambda: OptimizerConfig(clip=-1.0), ConfigError, "clip=-1.0 must be 0 or"),
    "decay_share": (lambda: OptimizerConfig(decay_share=2.0), ConfigError, "decay_share=2.0 must"),
    "negative lr": (lambda: Muon(matrix(), lr=-1.0), ConfigError, "lr=-1.0 must be 0 or more"),
    "a vector": (lambda: Muon(parameters((4,))), ConfigError, r"shape=\(4,\) must have two axes"),
    "sizes": (
        lambda: Muon([{"params": matrix(), "split": (0, (2, 3))}]),
        ConfigError,
        r"split=\(0, \(2, 3\)\) must name one of the axes \(0, 1\) of shape=\(4, 6\)",
    ),
    "the expert axis": (
        lambda: Muon([{"params": parameters((4, 6, 8)), "split": (0, (2, 2))}]),
        ConfigError,
        r"must name one of the axes \(1, 2\)",
    ),
    "no parameters": (
        lambda: build_optimizers([], OptimizerConfig()),
        ConfigError,
        "parameters=0 must be 1 or more",
    ),
    "a matrix nobody knows": (
        lambda: group_of("mixer.weight", torch.empty(3, 4)),
        ConfigError,
        "parameter=mixer.weight must have a word of openmythos.training.optimizer.GROUPS",
    ),
    "another model's state": (
        lambda: build(named_parameters()).load_state_tensors({"x.weight.step": torch.tensor(1.0)}),
        CheckpointError,
        "optimizer state=x.weight.step must belong to a trained parameter of this model",
    ),
    "another shape": (
        lambda: build(named_parameters()).load_state_tensors(
            {"coda.0.attention.qkv.weight.momentum_buffer": torch.zeros(3, 4)}
        ),
        CheckpointError,
        r"optimizer state of coda.0.attention.qkv.weight=.*\(3, 4\).* must be .*\(40, 24\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_one_sentence(case):
    call, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        call()
