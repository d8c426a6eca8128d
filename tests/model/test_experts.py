"""Mixture of experts: every path equals a loop over tokens, and the router can be balanced."""

import pytest
import torch
from torch.testing import assert_close

from openmythos.config import MythosConfig
from openmythos.errors import InputError
from openmythos.model import experts as module
from openmythos.model.experts import Experts, Router
from openmythos.model.grouped import _rounded, grouped_mm
from openmythos.model.transformer import cross_entropy
from tests.tiny import SIZES, shake, some_ids, tiny

LOOP = torch.tensor(0)


def layer(dtype=torch.float32, **changes):
    config = MythosConfig(**{**SIZES, "core_layers": 1, **changes})
    experts = Experts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    experts.router.balance += torch.arange(-2, config.experts - 2) * 7
    return experts.to(dtype), config


def one_by_one(experts, config, x):
    """A loop over tokens and their experts, in torch for its gradients."""
    rows = []
    for row in x:
        affinity = (experts.router.weight @ row).sigmoid()
        score = (affinity + experts.router.balance * config.balance_rate).tolist()
        best = sorted(range(config.experts), key=lambda i: -score[i])[: config.experts_per_token]
        y = torch.zeros_like(row)
        for i in best:
            inner = row @ experts.w_in[i]
            if config.feed_forward == "swiglu":
                gate, up = inner.chunk(2)
                inner = gate * gate.sigmoid() * up
            else:
                inner = inner.clamp(min=0) ** 2
            weight = config.routed_scale * affinity[i] / affinity[best].sum()
            y = y + weight * (inner @ experts.w_out[i])
        if experts.shared is not None:
            y = y + experts.shared(row[None], LOOP)[0]
        rows.append(y)
    return torch.stack(rows)


PATHS = {
    "few rows": (3, {}),
    "one row": (1, {}),
    "grouped": (23, {}),
    "odd width": (23, {"expert_size": 7}),
    "odd hidden": (23, {"hidden_size": 30, "head_dim": 4}),
    "empty experts": (5, {"experts": 40}),
    "all chosen": (9, {"experts": 3, "experts_per_token": 3}),
    "one chosen": (9, {"experts_per_token": 1}),
    "relu2": (9, {"feed_forward": "relu2"}),
    "no shared": (9, {"shared_experts": 0, "routed_scale": 2.5}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", PATHS)
def test_outputs_and_gradients_equal_a_loop_over_tokens(path, dtype):
    rows, changes = PATHS[path]
    experts, config = layer(dtype, **changes)
    x = torch.randn(rows, config.hidden_size, dtype=dtype, requires_grad=True)
    upstream, found = torch.randn(rows, config.hidden_size, dtype=dtype), []
    for compute in (lambda: experts(x, LOOP)[0], lambda: one_by_one(experts, config, x)):
        experts.zero_grad()
        x.grad = None
        y = compute()
        y.backward(upstream)
        grads = {name: p.grad.clone() for name, p in experts.named_parameters()}
        found.append((y.detach(), x.grad.clone(), grads))
    assert_close(*found, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the path of decoding
        assert_close(experts(x, LOOP)[0], found[1][0], rtol=1e-5, atol=1e-5)


def test_few_rows_take_the_path_of_decoding(monkeypatch):
    experts, config = layer()
    monkeypatch.setattr(module, "grouped_linear", None)  # would fail where it is called
    with torch.no_grad():
        experts(torch.randn(1, 1, config.hidden_size), LOOP)


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_the_chosen_experts_come_back_in_the_shape_of_the_rows(shape):
    experts, config = layer()
    x = torch.randn(*shape, config.hidden_size)
    y, chosen = experts(x, LOOP)
    assert y.shape == x.shape
    assert chosen.shape == (*shape, 2)


def test_given_experts_are_weighted_by_their_own_affinities():
    experts, config = layer()
    x, given = torch.randn(4, config.hidden_size), torch.tensor([[0, 1], [4, 2], [3, 0], [1, 2]])
    y, chosen = experts(x, LOOP, given)
    assert torch.equal(chosen, given)
    experts.router.balance = torch.zeros(5, dtype=torch.int32)
    for row in range(4):  # a bias that forces the same choice
        experts.router.balance.zero_()
        experts.router.balance[given[row]] = 1000
        assert_close(experts(x[row : row + 1], LOOP)[0][0], y[row], rtol=1e-5, atol=1e-5)


def test_weights_are_shares_of_the_chosen_affinities_and_ignore_the_bias():
    experts, config = layer(dtype=torch.float64)
    x = torch.randn(6, config.hidden_size, dtype=torch.float64)
    chosen, weights = experts.router(x, LOOP)
    affinity = (x @ experts.router.weight.T).sigmoid().gather(1, chosen)
    assert_close(weights, affinity / affinity.sum(1, keepdim=True))
    assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))


def test_weights_are_finite_where_all_affinities_round_to_zero():
    experts, config = layer()
    with torch.no_grad():
        experts.router.weight.fill_(-100.0)
    x = torch.ones(3, config.hidden_size, requires_grad=True)
    y, _ = experts(x, LOOP)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def test_training_balances_a_skewed_router_within_200_steps():
    model, token_ids = tiny(core_layers=1, experts=8, spread=0).train(), some_ids(16, 9)
    with torch.no_grad():  # two experts that every token likes
        model.core.layers[0].feed_forward.router.weight[:2] += 3
        model.embed.weight += 0.1
    optimizer, ratios = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(200):
        out = model(token_ids[:, :-1], 2)
        optimizer.zero_grad()
        cross_entropy(out.logits, token_ids[:, 1:]).mean().backward()
        optimizer.step()
        model.core.rebalance(out.loads)
        loads = out.loads.sum((0, 1)).double()
        ratios.append(float(loads.max() / loads.mean()))
        if max(ratios[-20:]) < 1.5:
            break
    assert ratios[0] > 2
    assert max(ratios[-20:]) < 1.5


def test_a_bias_moves_one_step_towards_the_mean_and_lifts_who_gets_too_little():
    router = Router(MythosConfig(**SIZES))
    router.rebalance(torch.tensor([10, 0, 5, 4, 6]))
    assert router.balance.tolist() == [-1, 1, 0, 1, -1]
    router.rebalance(torch.tensor([5, 5, 5, 5, 5]))
    assert router.balance.tolist() == [-1, 1, 0, 1, -1]


def test_rebalancing_counts_all_loops_together_layer_by_layer():
    model = tiny(core_layers=2)
    loads = torch.tensor([[[9, 0, 0, 0, 1], [2, 2, 2, 2, 2]], [[0, 0, 10, 0, 0], [4, 2, 2, 1, 1]]])
    model.core.rebalance(loads)
    balance = [layer.router.balance.tolist() for layer in model.core.experts_layers()]
    assert balance == [[-1, 1, -1, 1, 1], [-1, 0, 0, 1, 1]]


def test_loads_of_parts_that_differ_in_depth_add_up_to_those_of_the_whole():
    whole, parted = tiny(), tiny()
    token_ids, depths = some_ids(4, 5), torch.tensor([2, 5, 1, 1])
    whole.core.rebalance(whole(token_ids, depths).loads)
    parts = zip(token_ids.split(2), depths.split(2), strict=True)
    loads = [parted(ids, loops).loads.sum(0, keepdim=True) for ids, loops in parts]
    parted.core.rebalance(sum(loads))
    assert_close(dict(whole.named_buffers()), dict(parted.named_buffers()))
    assert any(layer.router.balance.any() for layer in whole.core.experts_layers())


NO_LOADS = {
    "none": (None, {}, r"loads has shape None, must be \(loops, \*\(2, 5\)\), as out.loads"),
    "no loops": (torch.ones(2, 5), {}, r"loads has shape \(2, 5\), must be \(loops"),
    "other experts": (torch.ones(3, 2, 4), {}, r"loads has shape \(3, 2, 4\), must be \(loops"),
    "of a dense core": (torch.ones(3, 2, 5), {"experts": 0}, "a core without experts: leave them"),
}


@pytest.mark.parametrize("case", NO_LOADS)
def test_loads_that_are_not_the_cores_are_refused(case):
    loads, changes, sentence = NO_LOADS[case]
    with pytest.raises(InputError, match=sentence):
        tiny(**changes).core.rebalance(loads)


def test_the_bias_survives_a_cast_to_bf16():
    router = Router(MythosConfig(**SIZES))
    router.balance += torch.tensor([1001, -3003, 257, 1, 0], dtype=torch.int32)
    assert router.bfloat16().balance.tolist() == [1001, -3003, 257, 1, 0]
    assert router.balance.dtype == torch.int32


def test_operations_stated_are_those_of_the_chosen_and_shared_experts():
    experts, c = layer(shared_experts=3)
    one = 2 * 3 * c.hidden_size * c.expert_size
    assert experts.flops() == 2 * 5 * c.hidden_size + 2 * one + 3 * one


def ends_of(*counts):
    return torch.tensor(counts).cumsum(0).int()


@pytest.mark.parametrize("counts", [(3, 0, 2, 1), (0, 0, 6, 0), (6, 0, 0, 0)])
def test_the_grouped_product_has_the_gradient_of_finite_differences(counts):
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(grouped_mm, (x, weights, ends_of(*counts)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 7])
def test_the_grouped_product_is_a_product_for_each_group(dtype, width):
    x, weights = torch.randn(6, 8, dtype=dtype), torch.randn(4, 8, width, dtype=dtype)
    expected = [rows @ w for rows, w in zip(x.split((3, 0, 2, 1)), weights, strict=True)]
    # bf16 rounds each sum to 2^-8 of numbers near 4.
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    found = grouped_mm(x, weights, ends_of(3, 0, 2, 1))
    assert_close(found, torch.cat(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("counts", [(37, 0, 18, 5), (3, 60, 0, 0), (0, 0, 0, 19)])
def test_grouped_products_in_bf16_round_rows_up_without_mixing_experts(counts):
    """Rows of other experts fall into a rounded product: they must not reach its result."""
    rows = sum(counts)
    x, weights = torch.randn(rows, 8).bfloat16(), torch.randn(4, 8, 16).bfloat16()
    grad = torch.randn(rows, 16).bfloat16()
    last = max(expert for expert, count in enumerate(counts) if count)
    other = sum(counts[:last])
    x[:other] = torch.inf
    x.requires_grad_()
    weights.requires_grad_()
    y = grouped_mm(x, weights, ends_of(*counts))
    y.backward(grad)
    own, own_grad, w = x[other:].detach().float(), grad[other:].float(), weights[last].float()
    assert_close(y[other:].float(), own @ w, rtol=2e-2, atol=2e-2)
    assert_close(x.grad[other:].float(), own_grad @ w.T, rtol=2e-2, atol=4e-2)
    assert_close(weights.grad[last].float(), own.T @ own_grad, rtol=2e-2, atol=8e-2)
    absent = [expert for expert, count in enumerate(counts) if not count]
    assert (weights.grad[absent] == 0).all()


def test_rows_of_products_in_bf16_take_few_sizes():
    sizes = [_rounded(rows) for rows in range(1, 4097)]
    assert all(rows <= size <= rows * 9 / 8 for rows, size in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 8 * 12


def test_the_grouped_product_takes_no_rows():
    out = grouped_mm(torch.randn(0, 8), torch.randn(3, 8, 4), ends_of(0, 0, 0))
    assert out.shape == (0, 4)


def test_the_grouped_products_gradient_may_be_an_expanded_tensor():
    x = torch.randn(6, 8, requires_grad=True)
    weights = torch.randn(4, 8, 8, requires_grad=True)
    grouped_mm(x, weights, ends_of(3, 0, 2, 1)).sum().backward()
    expected = torch.cat([weights[i].sum(1).expand(n, 8) for i, n in enumerate((3, 0, 2, 1))])
    assert_close(x.grad, expected.detach())
    assert (weights.grad[1] == 0).all()


def test_the_grouped_product_has_a_shape_on_meta_and_passes_torchs_own_check():
    on_meta = (torch.empty(shape, device="meta") for shape in ((6, 8), (4, 8, 5), (4,)))
    assert grouped_mm(*on_meta).shape == (6, 5)
    x = torch.randn(6, 8, requires_grad=True)
    weights = torch.randn(4, 8, 8, requires_grad=True)
    for width in (8, 7):
        torch.library.opcheck(
            grouped_mm,
            (x, weights[..., :width], ends_of(3, 0, 2, 1)),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_autocast_multiplies_experts_in_its_dtype_and_routes_in_fp32():
    experts, config = layer()
    x = torch.randn(5, config.hidden_size)
    exact, chosen = experts(x, LOOP)
    with torch.autocast("cpu", torch.bfloat16):
        y, same = experts(x, LOOP)
        _, weights = experts.router(x, LOOP)
    assert torch.equal(chosen, same)
    assert weights.dtype == torch.float32
    assert not torch.equal(y.float(), exact)
    assert_close(y.float(), exact, rtol=0.05, atol=0.05)  # bf16 keeps 3 digits


def test_experts_see_the_loop_in_their_shared_part_alone():
    model = tiny(lora_rank=2, spread=0)
    experts = model.core.layers[0].feed_forward
    x = torch.randn(3, 24)
    before = [experts(x, torch.tensor(loop))[0] for loop in (0, 1)]
    assert torch.equal(*before)
    shake(model)
    after = [experts(x, torch.tensor(loop))[0] for loop in (0, 1)]
    assert not torch.allclose(*after)
