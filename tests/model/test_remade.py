"""Values made again in the backward pass: the same gradients, less kept."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from openmythos.model.feed_forward import swiglu
from openmythos.model.norm import rms_norm
from openmythos.model.remade import remade
from tests.tiny import some_ids, tiny


def parts():
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5, 16), (16, 16), (8, 8))
    return [torch.randn(s, generator=generator, requires_grad=True) for s in shapes]


def plain(x, w_in, w_out):
    return F.linear(swiglu(F.linear(x, w_in)), w_out)


class Lean:
    """The same with the activation made again, which it counts."""

    def __init__(self):
        self.made = 0

    def __call__(self, x, w_in, w_out):
        wide = F.linear(x, w_in)

        def make():
            self.made += 1
            return swiglu(wide)

        inner = swiglu(wide)
        self.inner = weakref.ref(inner)
        with remade(inner, make):
            y = F.linear(inner, w_out)
            return y + F.linear(inner, w_out * 2)  # kept twice


def gradients(call, given):
    y = call(*given)
    gc.collect()
    return torch.autograd.grad(y.square().sum(), given)


def test_gradients_have_the_same_bits_and_the_value_is_gone_in_between():
    def twice(x, w_in, w_out):
        inner = swiglu(F.linear(x, w_in))
        return F.linear(inner, w_out) + F.linear(inner, w_out * 2)

    lean, given = Lean(), parts()
    y = lean(*given)
    assert lean.inner() is None  # nothing keeps it
    found = torch.autograd.grad(y.square().sum(), given)
    assert lean.made == 1
    for ours, theirs in zip(found, gradients(twice, given), strict=True):
        assert torch.equal(ours, theirs)


def test_a_second_backward_pass_makes_it_once_more():
    lean, given = Lean(), parts()
    y = lean(*given).square().sum()
    first = torch.autograd.grad(y, given, retain_graph=True)
    second = torch.autograd.grad(y, given)
    assert lean.made == 2
    assert all(map(torch.equal, first, second))


def test_nothing_is_made_without_gradient_or_inside_checkpointing():
    lean, given = Lean(), parts()
    with torch.no_grad():
        lean(*given)
    found = gradients(lambda *x: checkpoint(lean, *x, use_reentrant=False), given)
    assert lean.made == 0
    assert all(map(torch.equal, found, gradients(Lean(), given)))


def test_a_weight_changed_before_the_backward_pass_is_refused():
    x, w_in, w_out = parts()
    y = Lean()(x, w_in, w_out).sum()
    with torch.no_grad():
        w_out.add_(1)
    with pytest.raises(RuntimeError, match=r"changed in place .*version 1, expected 0"):
        y.backward()


@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
def test_a_model_learns_the_same(kind, monkeypatch):
    token_ids = some_ids(2, 16)

    def learned():
        model = tiny(feed_forward=kind, lora_rank=2)
        model(token_ids, 3).logits.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    lean = learned()
    monkeypatch.setattr("openmythos.model.remade._hooked", lambda: True)  # all is kept
    whole = learned()
    assert lean.keys() == whole.keys()
    assert all(torch.equal(lean[name], whole[name]) for name in whole)


def test_a_norm_has_the_second_derivative_of_the_plain_formula():
    x, weight = torch.randn(2, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)

    def plain(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    second = []
    for norm in (lambda x, weight: rms_norm(x, weight, 1e-6), plain):
        values = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        first = torch.autograd.grad(norm(*values).exp().sum(), values, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        second.append(torch.autograd.grad(penalty, values))
    for mine, expected in zip(*second, strict=True):
        torch.testing.assert_close(mine, expected)
