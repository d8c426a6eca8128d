"""Derivatives beyond the backward pass: second ones, those of `torch.func`, and forward mode."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from openmythos.model.attention import ATTENTION
from openmythos.model.feed_forward import FEED_FORWARD, swiglu
from openmythos.model.transformer import cross_entropy
from tests.tiny import some_ids, tiny

IDS = some_ids(2, 6)
SHAPES = {
    **{f"{kind}, dense": {"attention": kind, "experts": 0} for kind in ATTENTION},
    **{f"{kind}, experts": {"feed_forward": kind} for kind in FEED_FORWARD},
    "experts of an odd width": {"expert_size": 7},
    "loops of their own": {"lora_rank": 2, "router_loops": 2, "norm": "sandwich"},
}


def learning(shape, dtype=torch.float64):
    model = tiny(dtype=dtype, **SHAPES[shape])
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model, parameters):
    out = functional_call(model, parameters, (IDS[:, :-1], 2))
    return cross_entropy(out.logits, IDS[:, 1:]).mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hessians_product_with_a_vector_is_that_of_finite_differences(shape):
    model, parameters = learning(shape)
    values = list(parameters.values())
    generator = torch.Generator().manual_seed(1)
    vector = [0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in values]

    def gradient(shift, **options):
        moved = {n: p + shift * v for (n, p), v in zip(parameters.items(), vector, strict=True)}
        return torch.autograd.grad(loss_of(model, moved), values, **options)

    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
        first = gradient(0, create_graph=True)
        along = sum((g * v).sum() for g, v in zip(first, vector, strict=True))
        product = torch.autograd.grad(along, values)
        step = 1e-5
        differences = [
            (after - before) / (2 * step)
            for after, before in zip(gradient(step), gradient(-step), strict=True)
        ]
    # Central differences in float64: 1e-16 / 1e-5 of the gradient from rounding, 1e-10 from shape.
    for name, mine, expected in zip(parameters, product, differences, strict=True):
        assert_close(mine, expected, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_of_torch_func_is_that_of_the_backward_pass(shape, dtype):
    model, parameters = learning(shape, dtype)
    expected = torch.autograd.grad(loss_of(model, parameters), parameters.values())
    given = {name: p.detach() for name, p in parameters.items()}
    found = grad(lambda changed: loss_of(model, changed))(given)
    # Sums of products near 1 in another order.
    atol = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    assert_close(dict(found), dict(zip(parameters, expected, strict=True)), rtol=0, atol=atol)


def test_swiglu_has_all_derivatives_of_the_plain_formula():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x,))
    assert torch.autograd.gradgradcheck(swiglu, (x,))


WAYS = ("a call", "loops for each token", "a cache", "a readout")


def logits_of(way, model, h0):
    """Logits that depend on the first state, or on the state that is read out."""
    if way == "a readout":
        return model.readout(h0)
    loops = torch.tensor([[3, 1, 2, 2], [1, 2, 3, 1]]) if way == "loops for each token" else 3
    cache = model.new_cache(batch_size=2) if way == "a cache" else None
    return model(IDS[:, :4], loops, h0=h0, cache=cache).logits


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("experts", [0, 5])
def test_forward_mode_gives_the_derivative_of_finite_differences(experts, way, gradient):
    model = tiny(hidden_size=32, experts=experts)  # a width that the native code takes
    h0, along = torch.randn(2, 2, 4, 32)
    with torch.no_grad():
        exact, step = copy.deepcopy(model).double(), 1e-6 * along.double()
        ends = [logits_of(way, exact, h0.double() + part) for part in (step, -step)]
        expected = (ends[0] - ends[1]) / 2e-6
    with (
        torch.set_grad_enabled(gradient),
        sdpa_kernel(SDPBackend.MATH),  # torch's fused attention has no derivative in forward mode
        forward_ad.dual_level(),
    ):
        logits = logits_of(way, model, forward_ad.make_dual(h0, along))
        tangent = forward_ad.unpack_dual(logits).tangent
        assert tangent is not None
        # fp32: some 1e-6 of sums near 1, through a few tens of operations.
        assert_close(tangent.double(), expected, rtol=1e-3, atol=1e-3)
