"""Native products and attention, at widths that what some processors have for them takes.

Everything runs in plain vectors and, where the processor has them, with products of bytes and on
matrix tiles.
"""

import copy
import os
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch.testing import assert_close

from openmythos.model.int8 import Int8Weight
from openmythos.model.native import build
from openmythos.model.native.linear import linear
from openmythos.model.quantised import quantise
from tests.model.test_native import written
from tests.tiny import some_ids, tiny

pytestmark = pytest.mark.skipif(build.library() is None, reason="there is no C compiler")

WIDTHS = {
    "hidden_size": 128,
    "num_heads": 4,
    "head_dim": 32,
    "expert_size": 64,
    "feed_forward_size": 192,
    "kv_latent": 64,
    "rope_dim": 32,
    "nope_dim": 32,
    "value_dim": 64,
    "max_length": 1280,
}


@pytest.fixture(autouse=True, params=["plain", "digits", "tiles"])
def way(request):
    """How products are made."""
    code = build.library()
    used = {"plain": 1, "digits": code.use_digits(request.param == "digits")}
    used["tiles"] = code.use_tiles(request.param == "tiles")
    try:
        if not used[request.param]:
            pytest.skip(f"this processor has no {request.param}, or the system does not let us")
        yield request.param
    finally:
        code.use_digits(1)
        code.use_tiles(1)


def most_error(kind, way):
    """Of a product, in units of its row's RMS: rows of int8 weights have 16 bits as digits."""
    return 1.5e-4 if (kind, way) == ("int8", "digits") else 3e-5


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(kind, outputs, inputs):
    """Weights of a kind, and the same in fp64."""
    weight = random(outputs, inputs, seed=1)
    if kind == "int8":
        scale = weight.abs().amax(dim=1) / 127
        numbers = (weight / scale[:, None]).round().to(torch.int8)
        return Int8Weight(numbers, scale), numbers.double() * scale[:, None].double()
    made = weight.to({"fp32": torch.float32, "bf16": torch.bfloat16}[kind])
    return made, made.double()


KINDS = pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
SIZES = [(64, 64), (256, 128), (80, 192), (100, 64), (67, 32), (64, 40), (65, 1216)]
"""Whole blocks of outputs, parts of them, widths that are not taken, and more than one sum has."""


@torch.inference_mode()
@KINDS
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_products_are_those_of_fp64_and_each_rows_own(kind, outputs, inputs, way):
    weight, exact = matrix(kind, outputs, inputs)
    x = random(33, inputs) * torch.logspace(-3, 3, 33)[:, None]
    for rows in (1, 2, 3, 5, 6, 7, 8, 9, 16, 17, 33):
        found = linear(x[:rows], weight)
        wanted = x[:rows].double() @ exact.T
        size = wanted.square().mean(-1, keepdim=True).sqrt()
        assert ((found - wanted) / size).abs().max() < most_error(kind, way)
        for row in range(rows):
            assert linear(x[row : row + 1], weight).equal(found[row : row + 1])


@torch.inference_mode()
@KINDS
def test_rows_that_are_zero_tiny_or_not_finite(kind, way):
    weight, exact = matrix(kind, 128, 64)
    x = random(7, 64)
    x[1], x[2, 3], x[3, 5] = 0, torch.inf, torch.nan
    x[4] *= 1e-30
    x[5] *= 1e30
    found = linear(x, weight)
    assert (found[1] == 0).all()
    assert not found[2].isfinite().any()
    assert found[3].isnan().all()
    for row in (0, 4, 5, 6):
        wanted = x[row].double() @ exact.T
        error = (found[row] - wanted) / wanted.square().mean().sqrt()
        assert error.abs().max() < most_error(kind, way)


@torch.inference_mode()
@pytest.mark.parametrize("inputs", [512, 1216])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_of_int8_do_not_overflow(inputs, sign):
    numbers = torch.full((5, inputs), 127, dtype=torch.int8) * sign
    numbers[1] = -128
    x = torch.full((3, inputs), 0.1)
    x[1] *= -1
    x[2, ::2] *= -1
    found = linear(x, Int8Weight(numbers, torch.ones(5)))
    assert_close(found.double(), x.double() @ numbers.double().T, rtol=1e-5, atol=1e-3)


MODELS = pytest.mark.parametrize(
    "model",
    [
        {},
        {"attention": "mla", "router_loops": 3},
        {"kv_heads": 4, "experts": 0, "feed_forward": "relu2"},
        {"attention": "mla", "q_latent": 64, "experts_per_token": 3},
    ],
    ids=str,
)


def made(kind, model):
    model = tiny(**{**WIDTHS, **model})
    return quantise(model) if kind == "int8" else model.bfloat16() if kind == "bf16" else model


@torch.inference_mode()
@KINDS
@MODELS
def test_parts_of_a_text_give_the_bits_of_the_whole(kind, model):
    model = made(kind, model)
    whole, _ = written(model, 3, batch=1, parts=(41,))
    for parts in ((20, 21), (1, 7, 33), (1,) * 41):
        assert written(model, 3, batch=1, parts=parts)[0].equal(whole)


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_a_long_text_in_bf16_is_that_of_fp32(attention):
    """Longer than what tiles add up at a time."""
    narrow = tiny(**WIDTHS, attention=attention, experts=0).bfloat16()
    exact = copy.deepcopy(narrow).float()
    found = []
    for model in (exact, narrow):
        cache = model.new_cache(batch_size=1, max_length=1100)
        for part in some_ids(1, 1100).split(50, dim=1):
            out = model(part, 2, cache=cache)
        found.append(out.logits.float())
    assert_close(found[1], found[0], rtol=0.02, atol=0.02)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells how much is there")
def test_threads_leave_no_memory_behind():
    weight, _ = matrix("int8", 64, 4096)
    x = random(64, 4096)

    @torch.inference_mode()
    def multiply():
        linear(x, weight)

    def pages():
        return int(Path("/proc/self/statm").read_text().split()[1])

    def in_threads(count):
        for _ in range(count):
            thread = Thread(target=multiply)
            thread.start()
            thread.join()

    in_threads(10)
    before = pages()
    in_threads(100)
    assert (pages() - before) * os.sysconf("SC_PAGE_SIZE") < 10 * 2**20  # each needs half of one
