"""What the native layer reads: the C structures of `layer.c`, field by field."""

from __future__ import annotations

import ctypes

import torch

_pointer, _number, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

LANES = 8
"""Widths must be multiples of it."""

KINDS = {torch.float32: 0, torch.int8: 1, torch.bfloat16: 2}
"""Numbers that the native code reads, and what it calls them."""


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Map(ctypes.Structure):
    """A linear map with its int8 scales and its depth-wise LoRA, where it has them."""

    _fields_ = [
        *_fields(_pointer, "weight scale down up"),
        *_fields(_number, "kind outputs inputs rank loops"),
    ]


class Stack(ctypes.Structure):
    """One matrix for each expert."""

    _fields_ = [*_fields(_pointer, "weight scale"), *_fields(_number, "kind outputs inputs")]


class LayerStructure(ctypes.Structure):
    """A layer's sizes, and where its weights lie."""

    _fields_ = [
        *_fields(_number, "kind hidden heads kv_heads head_dim latent nope rope value"),
        *_fields(_number, "interleaved sandwich swiglu size experts chosen expert_size routers"),
        *_fields(_real, "eps routed_scale balance_rate score_scale"),
        *_fields(_pointer, "attention_norm feed_forward_norm"),
        *_fields(_pointer, "attention_out_norm feed_forward_out_norm qk_scale qk_bias"),
        *_fields(_pointer, "q_norm kv_norm q_scale k_scale kv_up"),
        *_fields(Map, "qkv q_down q_up kv_down out w_in w_out"),
        *_fields(_pointer, "router balance"),
        *_fields(Stack, "experts_in experts_out"),
    ]


class CallStructure(ctypes.Structure):
    """The rows of one call, and where their keys lie."""

    _fields_ = [
        *_fields(_number, "rows rope_rows threads"),
        *_fields(_pointer, "h cos sin"),
        *_fields(_number, "loop"),
        *_fields(_pointer, "loops keys values write also read first counts"),
        *_fields(_pointer, "given choice work"),
        *_fields(_number, "most_keys kind"),
    ]


class OuterStructure(ctypes.Structure):
    """Layers that run once, and what stands before and behind them."""

    _fields_ = [
        *_fields(_number, "kind hidden layers"),
        *_fields(_pointer, "layer keys values ids"),
        *_fields(Map, "embedding output"),
        *_fields(_pointer, "first_norm last_norm"),
        *_fields(_real, "scale eps"),
    ]


class LinearStructure(ctypes.Structure):
    """A linear map with a norm before it and factors behind it."""

    _fields_ = [
        ("map", Map),
        *_fields(_pointer, "norm times"),
        *_fields(_number, "norm_kind"),
        *_fields(_real, "eps factor"),
    ]


class ExitsStructure(ctypes.Structure):
    """When rows leave the core, and which rules have fired."""

    _fields_ = [
        *_fields(_pointer, "budgets kinds thresholds gate_in gate_in_bias gate bias"),
        *_fields(_pointer, "quiet fired fires before"),
        *_fields(_number, "gate_size ran"),
    ]


class CoreStructure(ctypes.Structure):
    """Layers that run many times, and what happens between the loops."""

    _fields_ = [
        *_fields(_number, "loops layers start slots"),
        *_fields(_pointer, "layer keys values"),
        *_fields(_number, "keys_step values_step places_step"),
        *_fields(_pointer, "carry drive norm exits"),
        *_fields(_real, "eps"),
    ]


class ModelStructure(ctypes.Structure):
    """A whole model, and room for what passes between its parts."""

    _fields_ = [
        *_fields(_pointer, "before after drive readout core"),
        *_fields(_pointer, "step rate times carry e driven logits"),
        *_fields(_number, "injected first_is_e kind"),
        *_fields(_number, "outer_threads drive_threads core_threads readout_threads"),
        *_fields(_real, "floor largest"),
    ]


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "Map": Map,
    "Stack": Stack,
    "Layer": LayerStructure,
    "Call": CallStructure,
    "Exits": ExitsStructure,
    "Core": CoreStructure,
    "Outer": OuterStructure,
    "Linear": LinearStructure,
    "Model": ModelStructure,
}
"""By their names in `layer.c`, in its order, which `structure_sizes` follows."""
