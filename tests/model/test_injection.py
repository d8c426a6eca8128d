"""The injection: A below 1 in floating point, whatever training does to its raw values."""

import itertools
import math
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from openmythos.config import InjectionKind
from openmythos.model.injection import INJECTION, LTI, Injection
from openmythos.model.rope import rope_table
from openmythos.model.span import Place, Span
from tests.tiny import some_ids, tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDEST = [-1e4, -1e3, -100.0, -30.0, -15.0, -1.0, 0.0, 1.0, 8.0, 30.0, 100.0, 1e3, 1e4]


def test_the_table_has_a_class_for_every_name_of_the_config():
    assert tuple(INJECTION) == get_args(InjectionKind)
    assert all(isinstance(made(8), Injection) for made in INJECTION.values())


def lti(values, dtype):
    """An injection whose channels hold every pair of `values` as raw step and rate."""
    step, rate = torch.tensor(list(itertools.product(values, values))).T
    module = LTI(len(step))
    with torch.no_grad():
        module.weight.copy_(torch.eye(len(step)))
        module.decay.step.copy_(step)
        module.decay.rate.copy_(rate)
    return module.to(dtype)


def raw_gradients(module, dtype):
    """Gradients of A alone, and of u over one loop."""
    module.zero_grad()
    module.A.sum().backward()
    alone = module.decay.step.grad.clone(), module.decay.rate.grad.clone()
    width = len(module.decay.step)
    drive, carry = module.prepare(torch.ones(1, width, dtype=dtype))
    u = module(torch.ones(1, width), drive, carry)
    assert u.isfinite().all()
    module.zero_grad()
    u.sum().backward()
    return alone, (module.decay.step.grad, module.decay.rate.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_is_from_0_to_below_1_and_gradients_are_finite_for_any_raw_value(dtype):
    module = lti(WIDEST, dtype)
    for a in (module.A, module.A.to(dtype), module.A.to(torch.bfloat16)):
        assert (a >= 0).all()
        assert (a < 1).all()
    assert float(module.spectral_radius()) < 1
    for gradients in raw_gradients(module, dtype):
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_channel_is_dead_between_raw_values_of_minus_15_and_8(dtype):
    (step, rate), _ = raw_gradients(lti(torch.linspace(-15, 8, 12).tolist(), dtype), dtype)
    assert (step != 0).all()
    assert (rate != 0).all()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stays_below_1_after_steps_of_rate_1000(dtype, sign):
    module = lti([-3.0, 0.0, 3.0], dtype)
    learned = module.decay if dtype == torch.float16 else module  # B itself overflows in fp16
    optimizer = torch.optim.SGD(learned.parameters(), lr=1e3)
    for _ in range(20):
        optimizer.zero_grad()
        drive, carry = module.prepare(torch.ones(1, 9, dtype=dtype))
        h = torch.ones(1, 9)
        for _ in range(8):
            h = module(h, drive, carry)
        (sign * h.sum()).backward()
        optimizer.step()
        assert (module.A >= 0).all()
        assert (module.A < 1).all()


def test_a_is_one_function_in_every_dtype():
    exact = lti(WIDEST, torch.float64).A
    for dtype in DTYPES[:3]:
        module = lti(WIDEST, dtype)
        assert module.decay.step.dtype == torch.float32
        assert_close(module.A, exact.float(), rtol=1e-4, atol=1e-7)


def test_the_largest_a_is_that_of_the_floor():
    assert_close(lti([-1e4], torch.float64).A.item(), math.exp(-(2.0**-8)))


def test_raw_values_survive_a_cast_there_and_back():
    module = lti([0.1, 0.7], torch.float32)
    before = module.A
    assert torch.equal(module.bfloat16().float().A, before)


def test_a_starts_where_parcaes_does():
    injection = tiny(spread=0).core.injection
    assert_close(injection.A, torch.full((24,), math.sqrt(0.2)))
    assert torch.equal(injection.weight, torch.eye(24))


def test_the_input_term_is_bounded_by_8():
    module = lti(WIDEST, torch.float32)
    drive, _ = module.prepare(torch.ones(1, len(WIDEST) ** 2))
    assert (drive >= 0).all()
    assert (drive <= 8).all()


@pytest.mark.parametrize("injection", INJECTION)
def test_the_spectral_radius_is_that_of_the_map_on_h(injection):
    module = tiny(injection=injection, dtype=torch.float64).core.injection
    drive, carry = module.prepare(torch.zeros(24, 24, dtype=torch.float64))
    matrix = module(torch.eye(24, dtype=torch.float64), drive, carry)
    expected = torch.linalg.eigvals(matrix.detach()).abs().max()
    assert float(module.spectral_radius()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("injection", INJECTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_stays_wide_whatever_the_weights_are(injection, dtype):
    model = tiny(injection=injection, h0="e", experts=0, dtype=dtype)
    out = model(some_ids(1, 3), 2, return_states=True)
    assert out.states.dtype == torch.float32
    assert out.logits.dtype == dtype


def test_without_injection_and_loops_the_model_is_a_plain_transformer():
    plain = {"injection": "none", "h0": "e", "core_output": "none", "prelude_norm": False}
    model = tiny(mean_loops=1, experts=0, **plain)
    x = model.embed(some_ids(1, 4)) * 24**0.5
    span = Span.fresh(1, 4, None, x.device)
    rope = rope_table(torch.arange(4)[None], 8, 1e4, "half", x.dtype).per_head()
    for layer in [*model.prelude, *model.core.layers, *model.coda]:
        x, _ = layer(x, rope, torch.tensor(0), Place(span))
    assert_close(model(some_ids(1, 4)).logits, model.readout(x))
