"""Casts, autocast and compilation: the same model."""

import pytest
import torch
from torch.testing import assert_close

from openmythos.model.attention import ATTENTION
from openmythos.model.injection import INJECTION
from openmythos.model.rope import rope_table
from openmythos.model.span import Place, Span
from tests.tiny import SIZES, in_parts, some_ids, some_loops, tiny

SMALL = {"core_layers": 1, "experts": 4, "hidden_size": 16, "expert_size": 8, "vocab_size": 20}
IDS = some_ids(2, 5, vocab=20)

# Half precision may choose other experts where two are as good; here every token takes all.
EVERY_EXPERT = {"experts": 4, "experts_per_token": 4, "lora_rank": 2}
# Logits are near 1, and about 30 roundings to 8 or 11 bits lie behind each: sqrt(30) of them, and
# four times that because the largest of 100 logits is compared.
ROUNDING = {torch.bfloat16: 0.09, torch.float16: 0.011}


def small(**changes):
    return tiny(**{**SMALL, **changes}, spread=0.1)


def calls(model):
    """One call of each way through the core."""
    yield model(IDS, 3)
    yield model(IDS, some_loops(2))
    yield model(IDS, some_loops(2, 5))
    yield model(IDS, 4, halting="delta", threshold=1e-4)  # never fires within rounding
    yield model(IDS, 3, mask=torch.tensor([[False] * 2 + [True] * 3, [True] * 5]))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_cast_to_half_precision_is_about_the_same(attention, dtype):
    model = small(attention=attention, **EVERY_EXPERT)
    tolerance = {"rtol": 0, "atol": ROUNDING[dtype]}
    with torch.no_grad():
        wide = [out.logits for out in calls(model)]
        model.to(dtype)
        assert model.core.injection.A.dtype == torch.float32
        for exact, out in zip(wide, calls(model), strict=True):
            assert out.logits.dtype == dtype
            real = out.loops > 0
            assert_close(out.logits.float()[real], exact[real], **tolerance)
        cache = model.new_cache(batch_size=2, max_length=5)
        logits, _ = in_parts(model, IDS, (3, 1, 1), 3, cache)
        assert cache.dtype == dtype
        assert_close(logits.float(), wide[0], **tolerance)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_model_cast_to_float64_agrees_to_1e_4(attention):
    model = small(attention=attention, lora_rank=2)
    with torch.no_grad():
        narrow = [out.logits for out in calls(model)]
        for before, out in zip(narrow, calls(model.to(torch.float64)), strict=True):
            assert out.logits.dtype == torch.float64
            assert_close(before.double(), out.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ATTENTION)
def test_autocast_is_about_the_same_and_keeps_the_state_wide(attention):
    model = small(attention=attention, **EVERY_EXPERT)
    tolerance = {"rtol": 0, "atol": ROUNDING[torch.bfloat16]}
    with torch.no_grad():
        exact = [out.logits for out in calls(model)]
        with torch.autocast("cpu", torch.bfloat16):
            for wide, out in zip(exact, calls(model), strict=True):
                assert_close(out.logits.float()[out.loops > 0], wide[out.loops > 0], **tolerance)
            assert model(IDS, 2, return_states=True).states.dtype == torch.float32
            cache = model.new_cache(batch_size=2, max_length=5)
            logits, _ = in_parts(model, IDS, (3, 1, 1), 3, cache)
    assert_close(logits.float(), exact[0], **tolerance)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_under_autocast(attention, checkpointing):
    model = small(attention=attention, lora_rank=2).train()
    model.core.checkpointing = checkpointing
    for loops in (3, some_loops(2), some_loops(2, 5)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(IDS, loops).logits.float().square().mean()
        loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "core.gate" not in name]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize(("attention", "experts"), [("gqa", 4), ("mla", 0)])
def test_a_core_layer_compiles_whole_once_for_all_loops(attention, experts):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = small(attention=attention, experts=experts, lora_rank=2)
    layer, counter = model.core.layers[0], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    width = SIZES["rope_dim" if attention == "mla" else "head_dim"]
    rope = rope_table(torch.arange(5)[None], width, 1e4, "half", torch.float32).per_head()
    place, h = Place(Span.fresh(2, 5, None, IDS.device)), torch.randn(2, 5, 16)
    for loop in range(7):
        found = []
        for function in (layer, compiled):
            model.zero_grad()
            y, _ = function(h, rope, torch.tensor(loop), place)
            y.square().sum().backward()
            found.append((y.detach(), {n: p.grad for n, p in layer.named_parameters()}))
        assert_close(*found, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("injection", INJECTION)
@pytest.mark.parametrize("gradient", [False, True])
def test_what_enters_each_loop_compiles_whole(injection, gradient):
    module, e = small(injection=injection, h0="e").core.injection, torch.randn(2, 5, 16)
    torch._dynamo.reset()
    with torch.set_grad_enabled(gradient):
        compiled = torch.compile(module.prepare, fullgraph=True, backend="eager")
        assert_close(compiled(e), module.prepare(e))
