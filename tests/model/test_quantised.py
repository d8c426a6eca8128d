"""Int8 matrices against their equation, and int8 models against what they stand for."""

import copy
import io

import pytest
import torch
from tiny import in_parts, some_ids, some_loops, tiny
from torch.nn import functional as F
from torch.testing import assert_close

from openmythos.errors import CheckpointError, InputError
from openmythos.inference.generate import generate
from openmythos.inference.sampling import Sampling
from openmythos.inference.thinking import Thinking
from openmythos.model import int8
from openmythos.model.adapters import LoopLinear
from openmythos.model.attention import ATTENTION
from openmythos.model.experts import Experts
from openmythos.model.grouped import gathered_mm, grouped_mm
from openmythos.model.halting import HALTING
from openmythos.model.int8 import FEW_ROWS, Int8Weight, pack
from openmythos.model.quantised import matrices, quantise

# Every inner width is a multiple of 16, so that torch's int8 product takes all matrices.
WIDE = {"hidden_size": 32, "feed_forward_size": 48, "kv_latent": 16, "value_dim": 8, "num_heads": 6}
BF16 = 2.0**-8  # largest relative error of rounding to bf16
# Four times the sum of some 30 roundings to bf16, of logits near 1, as in test_types.py.
ROUNDING = 0.09

needs_int8_product = pytest.mark.skipif(
    int8._int8_mm is None, reason="no quick int8 product on this machine"
)


@pytest.fixture
def exact(monkeypatch):
    """Products as on a machine without an int8 one: the fp32 matrix is made."""
    monkeypatch.setattr(int8, "_int8_mm", None)


@pytest.fixture
def int8_products(monkeypatch):
    """The shapes that the int8 product was given; a plain one where the machine has none."""
    shapes, real = [], int8._int8_mm

    def product(x, numbers, scales):
        shapes.append((*x.shape, numbers.shape[0]))
        if real is not None:
            return real(x, numbers, scales)
        return ((x.float() @ numbers.float().t()) * scales).bfloat16()

    monkeypatch.setattr(int8, "_int8_mm", product)
    return shapes


def matrix(*shape, tails=3.0):
    """Heavy-tailed, with a row of zeros, one of tiny and one of huge numbers."""
    w = torch.distributions.StudentT(tails).sample(shape)
    w[..., 1, :] = 0
    w[..., 2, :] *= 1e-30
    w[..., 3, :] *= 1e30
    return w if len(shape) == 2 else w.mT.contiguous()


def model_of(**changes):
    return tiny(**{**WIDE, **changes}, spread=0.1)


def in_float64(model):
    """The model that an int8 model stands for, as independent plain fp64 tensors."""
    wide = copy.deepcopy(model).double()
    assert not any(isinstance(p, Int8Weight) for p in wide.parameters())
    return wide


@pytest.mark.parametrize("shape", [(24, 40), (5, 24, 16)])
def test_a_weight_is_wrong_by_at_most_half_a_scale(shape):
    w = matrix(*shape)
    packed = pack("w", w)
    scale, back = packed.scale.double(), packed.numbers.double() * packed.scale.double()
    # w / scale is rounded to fp32 before it is rounded to int8: 127 * 2^-24.
    assert ((w.double() - back).abs() <= scale * (0.5 + 127 * 2.0**-24)).all()
    assert packed.numbers.dtype == torch.int8
    assert packed.scale.numel() == w[:, 0].numel()  # (out,), or (experts, out)
    largest = packed.numbers.abs().amax(-2 if w.ndim == 3 else -1)
    zeros = (w == 0).all(-2 if w.ndim == 3 else -1)
    assert (largest == torch.where(zeros, 0, 127)).all()  # every output uses all of int8


def test_int8_numbers_become_themselves_again():
    packed = pack("w", matrix(24, 40))
    again = pack("w", packed.dense())
    assert torch.equal(again.numbers, packed.numbers)
    assert_close(again.scale, packed.scale)


@needs_int8_product
@pytest.mark.parametrize("shape", [(48, 32), (10, 64), (3, 16)])
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS])
def test_the_int8_product_rounds_activations_and_result_to_bf16_and_nothing_else(shape, rows):
    packed, x = pack("w", torch.randn(shape)), torch.randn(rows, shape[1])
    with torch.no_grad():
        y = F.linear(x, packed).double()
    exact = x.bfloat16().double() @ packed.dense().double().t()
    # Sums of `in` fp32 products, then one rounding to bf16 and the scale's product.
    summed = x.abs().double() @ packed.dense().abs().double().t() * shape[1] * 2.0**-24
    assert ((y - exact).abs() <= exact.abs() * (BF16 + 2.0**-22) + summed).all()


@pytest.mark.parametrize("shape", [(48, 32), (10, 64), (7, 12)])
@pytest.mark.parametrize("rows", [(1,), (3, 5), (2, 3, 4)])
def test_without_it_a_product_is_that_of_the_fp32_matrix(exact, shape, rows):
    packed, x = pack("w", torch.randn(shape)), torch.randn(*rows, shape[1])
    expected = F.linear(x.double(), packed.dense().double())
    assert_close(F.linear(x, packed).double(), expected, rtol=0, atol=1e-5)


def test_a_large_matrix_is_made_in_pieces_of_the_same_result(exact, monkeypatch):
    packed, x = pack("w", torch.randn(50, 12)), torch.randn(3, 12)
    whole = F.linear(x, packed)
    monkeypatch.setattr(int8, "PIECE", 100)
    assert_close(F.linear(x, packed), whole)


@needs_int8_product
def test_a_row_gets_the_same_bits_alone_and_among_others():
    packed, x = pack("w", torch.randn(48, 32)), torch.randn(FEW_ROWS, 32)
    with torch.no_grad():
        together = F.linear(x, packed)
        for row in range(FEW_ROWS):
            assert torch.equal(F.linear(x[row : row + 1], packed)[0], together[row])


def between(numbers):
    """The same numbers, from one byte after an aligned address on."""
    room = torch.empty(numbers.numel() + 1, dtype=torch.int8)[1:]
    return room.view(numbers.shape).copy_(numbers)


@pytest.mark.parametrize(
    ("shape", "rows", "move", "taken"),
    [
        ((48, 32), FEW_ROWS, torch.clone, True),
        ((48, 32), FEW_ROWS + 1, torch.clone, False),
        ((48, 24), 2, torch.clone, False),  # the product reads 16 numbers at a time,
        ((48, 32), 2, between, False),  # from addresses that are multiples of 16
    ],
)
def test_the_int8_product_gets_only_what_it_can_take(int8_products, shape, rows, move, taken):
    packed, x = pack("w", torch.randn(shape)), torch.randn(rows, shape[1])
    packed = Int8Weight(move(packed.numbers), packed.scale)
    with torch.no_grad():
        y = F.linear(x, packed)
    assert int8_products == ([(rows, shape[1], shape[0])] if taken else [])
    if not taken:
        assert_close(y, F.linear(x, packed.dense()), rtol=0, atol=1e-5)


def test_what_learns_gets_its_gradient_through_int8(int8_products):
    packed = pack("w", torch.randn(48, 32))
    found = []
    for weight in (packed, packed.dense()):
        x = torch.linspace(-1, 1, 64).view(2, 32).requires_grad_()
        F.linear(x, weight).square().sum().backward()
        found.append(x.grad)
    assert not int8_products
    assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 6, 40])
def test_grouped_products_are_those_of_the_fp32_experts(exact, rows):
    packed = pack("w", torch.randn(5, 16, 8))
    x, chosen = torch.randn(rows, 16), torch.arange(rows).remainder(4).sort().values  # 4: none
    ends = torch.searchsorted(chosen, torch.arange(5), right=True, out_int32=True)
    assert_close(grouped_mm(x, packed, ends), grouped_mm(x, packed.dense(), ends))
    token = torch.arange(rows).flip(0)
    assert_close(gathered_mm(x, token, packed, ends), gathered_mm(x, token, packed.dense(), ends))


def test_an_operation_without_an_int8_form_sees_the_fp32_matrix():
    for packed in (pack("w", torch.randn(6, 4)), pack("w", torch.randn(3, 6, 4))):
        dense = packed.dense()
        assert torch.equal(packed + 1, dense + 1)
        assert torch.equal(packed[:, 1:3], dense[:, 1:3])
        assert torch.equal(packed.to(torch.float64), dense.double())
        assert (packed.shape, packed.dtype) == (dense.shape, dense.dtype)
        assert torch.equal(packed.clone().dense(), dense)
        assert packed.clone().numbers.data_ptr() != packed.numbers.data_ptr()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("experts", [0, 5])
@pytest.mark.parametrize("tie_head", [True, False])
def test_a_models_large_matrices_become_int8_and_nothing_else(attention, experts, tie_head):
    model = model_of(attention=attention, experts=experts, tie_head=tie_head, lora_rank=2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert quantise(model) is model
    after = model.state_dict()
    assert list(after) == list(before)
    packed = {name for name, p in model.named_parameters() if isinstance(p, Int8Weight)}
    assert packed == {name for name in matrices(model) if not name.endswith("kv_up.weight")}
    wanted = {"embed.weight"} if tie_head else {"embed.weight", "head.weight"}
    for name, module in model.named_modules():
        if isinstance(module, LoopLinear) and not name.endswith(".kv_up"):
            wanted.add(f"{name}.weight")
        elif isinstance(module, Experts):
            wanted |= {f"{name}.w_in", f"{name}.w_out"}
    assert packed == wanted
    assert (model.head.weight is model.embed.weight) == tie_head
    for name in set(before) - packed - {"head.weight"}:
        assert torch.equal(after[name], before[name])


def test_a_quantised_model_takes_a_quarter_of_the_memory():
    model = tiny(hidden_size=64, feed_forward_size=256, expert_size=64)
    wide = sum(tensor.nbytes for tensor in matrices(model).values())
    packed = matrices(quantise(model)).values()
    assert sum(p.numbers.nbytes + p.scale.nbytes for p in packed) < 0.3 * wide


def calls(model):
    """One call of each way through the core, and one with few rows."""
    ids = some_ids(2, 7)
    yield model(ids, 3)
    yield model(ids, some_loops(2))
    yield model(ids, some_loops(2, 7))
    yield model(ids[:1, :2], 3)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_model_is_the_one_its_int8_numbers_stand_for(exact, attention):
    model = quantise(model_of(attention=attention, lora_rank=2))
    with torch.no_grad():
        for out, wide in zip(calls(model), calls(in_float64(model)), strict=True):
            assert_close(out.logits.double(), wide.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ATTENTION)
def test_int8_products_change_a_model_by_rounding_to_bf16_only(int8_products, attention):
    # Half precision may choose other experts where two are as good; here every token takes all.
    model = quantise(model_of(attention=attention, experts=4, experts_per_token=4))
    with torch.no_grad():
        for out, wide in zip(calls(model), calls(in_float64(model)), strict=True):
            assert_close(out.logits.double(), wide.logits, rtol=0, atol=ROUNDING)
    kinds = {outputs for _, _, outputs in int8_products}
    assert {32, 2 * 16} <= kinds  # out-projections and experts
    assert model.config.vocab_size not in kinds  # the head's product is exact


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_quantised_model_is_close_to_the_model_it_was_made_of(attention):
    model = model_of(attention=attention, experts=4, experts_per_token=4)
    with torch.no_grad():
        wide = [out.logits for out in calls(model)]
        quantise(model)
        for exact_logits, out in zip(wide, calls(model), strict=True):
            # 0.008 for each product in a row (normal weights), some 30 of them, of random sign.
            error = (out.logits - exact_logits).norm() / exact_logits.norm()
            assert 1e-4 < error < 0.008 * 30**0.5


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("rule", HALTING)
def test_a_cache_gives_the_uncached_logits_and_exits(exact, attention, rule):
    model = quantise(model_of(attention=attention, learned_act=rule == "act"))
    threshold = {"gate": 0.5, "delta": 0.6, "kl": 0.05, "act": 0.9}.get(rule)
    how, ids = {"halting": rule, "threshold": threshold}, some_ids(2, 6)
    with torch.no_grad():
        out = in_float64(model)(ids, 5, **how)
        cache = model.new_cache(batch_size=2, max_length=6, dtype=torch.float32)
        logits, loops = in_parts(model, ids, (3, 1, 2), 5, cache, **how)
    assert torch.equal(loops, out.loops)
    assert_close(logits.double(), out.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("rule", ["none", "kl"])
def test_generation_runs_and_repeats_itself(attention, rule):
    model, ids = quantise(model_of(attention=attention, max_length=16)), some_ids(2, 3)

    def written():
        how = {"thinking": Thinking(loops=4, halting=rule), "sampling": Sampling(seed=1)}
        tokens = list(generate(model, ids, max_new_tokens=8, **how))
        return [(new.token_ids.tolist(), new.loops.tolist()) for new in tokens]

    first = written()
    assert len(first) == 8
    assert written() == first


def test_a_copy_stays_int8_and_is_its_own():
    model = quantise(model_of())
    copied = copy.deepcopy(model)
    assert isinstance(copied.embed.weight, Int8Weight)
    assert copied.head.weight is copied.embed.weight
    with torch.no_grad():
        assert torch.equal(copied(some_ids()).logits, model(some_ids()).logits)
        copied.embed.weight.numbers.zero_()
        assert not torch.equal(copied(some_ids()).logits, model(some_ids()).logits)


def test_moving_to_where_it_is_changes_nothing_and_casting_widens():
    model = quantise(model_of())
    with torch.no_grad():
        logits = model(some_ids()).logits
        assert torch.equal(model.to("cpu", torch.float32).eval()(some_ids()).logits, logits)
        assert isinstance(model.embed.weight, Int8Weight)
        model.bfloat16()
        assert not any(isinstance(p, Int8Weight) for p in model.parameters())
        assert model(some_ids()).logits.dtype == torch.bfloat16


def test_a_cast_leaves_a_tied_head_tied():
    model = quantise(tiny(tie_head=True)).to(torch.bfloat16)
    assert model.head.weight is model.embed.weight
    assert model.double().head.weight is model.embed.weight


def test_adapters_learn_on_an_int8_model_as_on_the_fp32_one():
    model = quantise(model_of(lora_rank=2))
    wide, grads = copy.deepcopy(model), []
    for name, weight in matrices(wide).items():
        if isinstance(weight, Int8Weight):
            owner, _, own_name = name.rpartition(".")
            parameter = torch.nn.Parameter(weight.dense(), requires_grad=False)
            setattr(wide.get_submodule(owner), own_name, parameter)
    wide.head.weight = wide.embed.weight
    for one in (model, wide):
        for parameter in one.parameters():
            parameter.requires_grad_(False)
        adapters = one.adapter_parameters()
        for parameter in adapters.values():
            parameter.requires_grad_()
        one(some_ids(), 3).logits.square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in adapters.items()})
    assert_close(grads[0], grads[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_is_refused(dtype):
    with pytest.raises(InputError, match=f"model is {dtype} on cpu, must be torch.float32 on cpu"):
        quantise(model_of().to(dtype))


def test_a_weight_that_is_not_finite_is_refused_by_name():
    model = model_of()
    with torch.no_grad():
        model.core.layers[0].attention.out.weight[3, 4] = float("nan")
    name = "core.layers.0.attention.out.weight"
    with pytest.raises(CheckpointError, match=f"tensor '{name}' holds NaN or infinity"):
        quantise(model)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_weights_loaded_into_an_int8_model_are_used(attention, kind):
    model, other = (quantise(model_of(attention=attention, seed=seed)) for seed in (0, 7))
    given = other if kind == "int8" else model_of(attention=attention, seed=7)
    with torch.no_grad():
        expected = other(some_ids()).logits
        assert not torch.equal(model(some_ids()).logits, expected)  # and its experts are split
        model.load_state_dict(given.state_dict())
        assert torch.equal(model(some_ids()).logits, expected)
        assert torch.equal(model(some_ids()[:1, :2]).logits, other(some_ids()[:1, :2]).logits)
    assert isinstance(model.embed.weight, Int8Weight)
    assert model.head.weight is model.embed.weight


def test_a_plan_reads_weights_that_were_loaded():
    model, other = (quantise(model_of(seed=seed)) for seed in (0, 7))

    def written(one):
        cache = one.new_cache(batch_size=2)
        return in_parts(one, some_ids(2, 4), (2, 1, 1), 3, cache)[0]

    with torch.no_grad():
        written(model)
        model.load_state_dict(other.state_dict())
        assert torch.equal(written(model), written(other))


CHANGES = {
    "zero_": lambda w: w.zero_(),
    "mul_": lambda w: w.mul_(0.5),
    "add_ of a product": lambda w: w.addmm_(torch.ones(len(w), 2), torch.ones(2, w.shape[1])),
    "out": lambda w: torch.add(w.dense(), 1, out=w),
    "several at once": lambda w: torch._foreach_mul_([w], 0.5),
    "a part": lambda w: w.__setitem__(slice(0, 2), 0.0),
    "data": lambda w: setattr(w, "data", torch.zeros(w.shape)),
    "initialisation": lambda w: torch.nn.init.normal_(w),
    "numbers of another shape": lambda w: w.copy_(torch.ones(1, w.shape[1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_that_int8_cannot_follow_is_refused(change):
    weight = quantise(model_of()).prelude[0].attention.out.weight
    before = weight.dense()
    with torch.no_grad(), pytest.raises(InputError, match="int8 weight cannot be changed in place"):
        CHANGES[change](weight)
    assert torch.equal(weight.dense(), before)


def test_numbers_that_are_not_finite_are_not_loaded():
    model, given = quantise(model_of()), model_of().state_dict()
    given["prelude.0.attention.out.weight"][1, 2] = float("inf")
    with pytest.raises(RuntimeError, match="prelude.0.attention.out.weight.*NaN or infinity"):
        model.load_state_dict(given)


def test_an_int8_state_comes_back_from_torchs_own_file():
    model, file = quantise(model_of()), io.BytesIO()
    torch.save(model.state_dict(), file)
    found = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other = quantise(model_of(seed=7))
    other.load_state_dict(found)
    with torch.no_grad():
        assert torch.equal(other(some_ids()).logits, model(some_ids()).logits)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Int8Weight):
            assert torch.equal(found[name].numbers, tensor.numbers)
            assert found[name].few == tensor.few
