"""Attention kinds: one declaration of what is kept, one result in every form."""

from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from openmythos.config import AttentionKind, FeedForwardKind, MythosConfig
from openmythos.model.attention import ATTENTION, LatentAttention
from openmythos.model.feed_forward import FEED_FORWARD
from openmythos.model.native import linear
from tests.tiny import SIZES, in_parts, some_ids, some_loops, tiny


def test_the_tables_have_a_class_for_every_name_of_the_config():
    assert tuple(ATTENTION) == get_args(AttentionKind)
    assert tuple(FEED_FORWARD) == get_args(FeedForwardKind)


def absorbing(model, absorb):
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.absorb = absorb
    return model


@pytest.mark.parametrize("variant", [{}, {"qk_norm": False}, {"q_latent": 14, "lora_rank": 2}])
@pytest.mark.parametrize("loops", ["all", "by token", "padded"])
def test_absorbed_equals_expanded(variant, loops):
    model = tiny(attention="mla", dtype=torch.float64, experts=0, **variant)
    token_ids, budget = some_ids(2, 6), some_loops(2, 6) if loops == "by token" else 3
    mask = torch.tensor([[False] * 2 + [True] * 4, [True] * 6]) if loops == "padded" else None
    absorbed, expanded = (
        absorbing(model, absorb)(token_ids, budget, mask=mask).logits for absorb in (True, False)
    )
    assert_close(absorbed, expanded, rtol=0, atol=1e-10)


@pytest.mark.parametrize("absorb", [True, False])
def test_both_forms_decode_what_one_pass_gives(absorb):
    model, token_ids = tiny(attention="mla", dtype=torch.float64, experts=0), some_ids(2, 6)
    whole = absorbing(model, not absorb)(token_ids, 3).logits
    cache = model.new_cache(batch_size=2, max_length=6)
    logits, _ = in_parts(absorbing(model, absorb), token_ids, (4, 1, 1), 3, cache)
    assert_close(logits, whole, rtol=0, atol=1e-10)


def test_both_forms_have_one_gradient():
    model, token_ids, found = tiny(attention="mla", dtype=torch.float64, experts=0), some_ids(), []
    for absorb in (True, False):
        model.zero_grad()
        absorbing(model, absorb)(token_ids, 3).logits.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert_close(*found, rtol=0, atol=1e-9)


def test_decoding_absorbs_and_reading_a_prompt_expands():
    attention = LatentAttention(MythosConfig(attention="mla"))
    assert attention._absorbed(queries=1, keys=512)
    assert not attention._absorbed(queries=512, keys=512)


def test_mla_keeps_its_latent_and_one_rotated_key_for_all_heads():
    attention = tiny(attention="mla").core.layers[0].attention
    assert attention.kept == {"latent": (SIZES["kv_latent"] + SIZES["rope_dim"],)}


def test_gqa_keeps_keys_and_values_of_its_kv_heads():
    attention = tiny().core.layers[0].attention
    shape = (SIZES["kv_heads"], SIZES["head_dim"])
    assert attention.kept == {"key": shape, "value": shape}


def test_causal_attention_makes_no_mask(monkeypatch):
    masks = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watch(*args, attn_mask=None, **options):
        masks.append(attn_mask)
        return plain(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    monkeypatch.setattr(linear, "library", lambda: None)
    model, token_ids = tiny(experts=0), some_ids(2, 6)
    cache = model.new_cache(batch_size=2, max_length=8)
    model(token_ids, 3)
    model(token_ids, torch.tensor([1, 3]))
    model(token_ids, 3, mask=torch.ones(2, 6, dtype=torch.bool))
    in_parts(model, token_ids, (4, 1, 1), 3, cache)
    assert len(masks) == 6 * (2 + 2 * 3)
    assert all(mask is None for mask in masks)


@pytest.mark.parametrize("attention", ATTENTION)
def test_operations_stated_are_those_torch_counts(attention):
    from torch.utils.flop_counter import FlopCounterMode

    model = absorbing(tiny(attention=attention, experts=0, lora_rank=2, coda_layers=0), False)
    token_ids, loops = some_ids(1, 6), 3
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(token_ids, loops)
    # Torch counts neither attention's products on the CPU nor A h, 2 operations per channel.
    assert counter.get_total_flops() == 6 * (model.flops(keys=0, loops=loops) - 2 * 24 * loops)
    layers = [*model.prelude, *[layer for layer in model.core.layers for _ in range(loops)]]
    seen = sum(layer.attention.flops(9) - layer.attention.flops(0) for layer in layers)
    assert model.flops(keys=9, loops=loops) == model.flops(keys=0, loops=loops) + seen


@pytest.mark.parametrize(
    ("attention", "per_key"), [("gqa", 4 * 6 * 8), ("mla", 2 * 6 * (6 + 4 + 10))]
)
def test_operations_per_key_are_those_counted_by_hand(attention, per_key):
    own = tiny(attention=attention).core.layers[0].attention
    assert own.flops(9) - own.flops(0) == per_key * 9


@pytest.mark.parametrize("attention", ATTENTION)
def test_pieces_of_fused_matrices_fill_them(attention):
    model = tiny(attention=attention, q_latent=14)
    splits = model.fused_splits()
    assert splits
    for name, (axis, sizes) in splits.items():
        assert sum(sizes) == model.get_parameter(name).shape[axis], name


def test_decoding_states_the_operations_of_the_absorbed_form():
    model = tiny(attention="mla", experts=0, coda_layers=0)
    keys, latent = 100, model.core.layers[0].attention
    longer, shorter = (model.flops(n, 3, decoding=True) for n in (keys + 1, keys))
    assert longer - shorter == (1 + 2 * 3) * 2 * 6 * (2 * latent.latent + latent.rope)
    assert model.flops(0, 3) == model.flops(0, 3, decoding=True)
    assert tiny().flops(keys, 3) == tiny().flops(keys, 3, decoding=True)
