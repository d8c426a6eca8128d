"""Hand a layer's rows to the native code where it can take them.

It takes fp32 states on the CPU, fp32 or int8 weights, few rows, and keys kept in a cache: reading
weights and starting operations is then all the time there is. Everything else, and any layer that
was changed from outside (hooks, other modules in it), goes through torch, with the same result but
for rounding.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.model.adapters import LoopLinear, LoopLora
from openmythos.model.attention import GroupedQueryAttention, LatentAttention
from openmythos.model.cache import Entries, Place
from openmythos.model.experts import Experts, Router
from openmythos.model.feed_forward import FeedForward
from openmythos.model.native.build import library
from openmythos.model.native.structures import CallStructure, LayerStructure, Map, Stack
from openmythos.model.norm import RMSNorm
from openmythos.model.quantised import Int8Weight
from openmythos.model.rope import Rope

if TYPE_CHECKING:
    from openmythos.model.layer import Layer

MOST_ROWS = 64
"""With more rows torch's products are quicker."""

LANES = 8
"""Widths must be multiples of it."""

KNOWN = (
    *(LoopLinear, LoopLora, GroupedQueryAttention, LatentAttention),
    *(Experts, Router, FeedForward, RMSNorm),
)
"""Modules whose work the native code does; any other in a layer leaves it to torch."""

_scratch = threading.local()


@dataclass
class Native:
    """A layer as the native code reads it; None where it cannot, until something changes."""

    structure: LayerStructure | None
    modules: list[nn.Module]
    parts: list[tuple[dict[str, Any], str, object]]
    """What must still be what it was: submodules and parameters."""
    addresses: list[int]

    def stands(self) -> bool:
        """Whether nothing was moved, replaced or hooked since."""
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.modules):
            return False
        if any(held.get(name) is not part for held, name, part in self.parts):
            return False
        return _addresses(self.parts) == self.addresses


_described: WeakKeyDictionary[nn.Module, Native] = WeakKeyDictionary()


def native(layer: Layer) -> LayerStructure | None:
    """Return the layer for the native code, None where it cannot take it."""
    found = _described.get(layer)
    if found is None or not found.stands():
        found = _described[layer] = _describe(layer)
    return found.structure


def takes(layer: Layer, h: Tensor, place: Place) -> LayerStructure | None:
    """Return the layer for the native code where it can do this call, else None."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or place.store is None:
        return None
    if type(h) is not Tensor or h.dtype != torch.float32 or h.device.type != "cpu":
        return None
    if not 0 < h.numel() <= MOST_ROWS * h.shape[-1] or torch.is_autocast_enabled("cpu"):
        return None
    return None if library() is None else native(layer)


def run(
    structure: LayerStructure,
    h: Float[Tensor, "*rows hidden"],
    rope: Rope,
    loop: Int[Tensor, "*leading"],
    data: dict[str, Tensor],
    entries: Entries,
    given: Int[Tensor, "*rows chosen"] | None,
) -> tuple[Float[Tensor, "*rows hidden"], Int[Tensor, "*rows chosen"] | None]:
    """Return what `Layer.forward` returns."""
    code = library()
    assert code is not None
    new = h.clone(memory_format=torch.contiguous_format)
    rows, chosen = h.numel() // h.shape[-1], structure.chosen
    cos, sin = rope.cos.contiguous(), rope.sin.contiguous()
    threads = threads_for(rows)
    kept = list(data.values())
    choice = torch.empty(*h.shape[:-1], chosen, dtype=torch.int64) if chosen else None
    size = code.work_size(structure, rows, entries.most, threads)
    loops = None
    if _corrects(structure):
        leading = loop.reshape(*loop.shape, *[1] * (h.ndim - 1 - loop.ndim))
        loops = leading.expand(h.shape[:-1]).contiguous()
    given = None if given is None else given.contiguous()
    call = CallStructure(
        rows=rows,
        rope_rows=cos.numel() // cos.shape[-1],
        threads=threads,
        h=new.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        loops=_at(loops),
        keys=kept[0].data_ptr(),
        values=kept[-1].data_ptr(),
        write=entries.write.data_ptr(),
        also=_at(entries.also),
        read=_at(entries.read),
        first=_at(entries.first),
        counts=entries.counts.data_ptr(),
        given=_at(given),
        choice=_at(choice),
        work=_work(size).data_ptr(),
        most_keys=entries.most,
    )
    code.run_layer(structure, call)
    return new, choice


def threads_for(rows: int) -> int:
    """How many threads share a call."""
    return 1


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _work(size: int) -> Tensor:
    """Scratch memory of this thread."""
    found: Tensor | None = getattr(_scratch, "work", None)
    if found is None or found.numel() < size:
        found = _scratch.work = torch.empty(size)
    return found


def _corrects(structure: LayerStructure) -> bool:
    maps = (structure.qkv, structure.q_up, structure.w_in)
    return any(part.rank for part in maps)


# What the native code reads


class _Cannot(Exception):  # noqa: N818 - not an error, only the end of a description
    """The native code has no form for this."""


def _describe(layer: Layer) -> Native:
    modules = list(layer.modules())
    parts: list[tuple[dict[str, Any], str, object]] = []
    for module in modules:
        parts += [(module._modules, *pair) for pair in module._modules.items()]
        parts += [(module._parameters, *pair) for pair in module._parameters.items()]
        parts += [(module._buffers, *pair) for pair in module._buffers.items()]
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    strange = any(type(m) not in KNOWN or "forward" in vars(m) for m in modules[1:])
    structure = None
    if not hooked and not strange:
        try:
            structure = _structure(layer)
        except _Cannot:
            structure = None
    return Native(structure, modules, parts, _addresses(parts))


def _addresses(parts: list[tuple[dict[str, Any], str, object]]) -> list[int]:
    return [_address(part) for _, _, part in parts if isinstance(part, Tensor)]


def _address(tensor: Tensor) -> int:
    return (tensor.numbers if isinstance(tensor, Int8Weight) else tensor).data_ptr()


def _structure(layer: Layer) -> LayerStructure:
    attention, part = layer.attention, layer.feed_forward
    eps = layer.attention_norm.eps
    made = LayerStructure(
        hidden=_wide(len(layer.attention_norm.weight)),
        sandwich=layer.placement == "sandwich",
        interleaved=attention.pairing == "interleaved",
        eps=eps,
        attention_norm=_numbers(layer.attention_norm.weight),
        feed_forward_norm=_numbers(layer.feed_forward_norm.weight),
        out=_map(attention.out),
    )
    if layer.attention_out_norm is not None and layer.feed_forward_out_norm is not None:
        made.attention_out_norm = _numbers(layer.attention_out_norm.weight)
        made.feed_forward_out_norm = _numbers(layer.feed_forward_out_norm.weight)
    if isinstance(attention, LatentAttention):
        _describe_latent(made, attention)
    else:
        _describe_grouped(made, attention)
    if isinstance(part, Experts):
        _describe_experts(made, part)
    dense = part.shared if isinstance(part, Experts) else part
    if dense is not None:
        made.size, made.swiglu = _wide(dense.size), dense.parts == 2
        made.w_in, made.w_out = _map(dense.w_in), _map(dense.w_out)
    return made


def _describe_grouped(made: LayerStructure, attention: GroupedQueryAttention) -> None:
    made.heads, made.kv_heads = attention.num_heads, attention.kv_heads
    made.head_dim = _wide(attention.head_dim)
    made.score_scale = attention.head_dim**-0.5
    made.qkv = _map(attention.qkv)
    made.qk_scale, made.qk_bias = _numbers(attention.qk_scale), _numbers(attention.qk_bias)


def _describe_latent(made: LayerStructure, attention: LatentAttention) -> None:
    made.heads, made.latent = attention.num_heads, _wide(attention.latent)
    made.nope, made.rope, made.value = attention.nope, _wide(attention.rope), attention.value
    width = _wide(attention.nope + attention.rope)
    made.score_scale = width**-0.5
    made.kv_down, made.q_up = _map(attention.kv_down), _map(attention.q_up)
    if attention.q_down is not None and attention.q_norm is not None:
        made.q_down, made.q_norm = _map(attention.q_down), _numbers(attention.q_norm.weight)
    made.kv_norm, made.kv_up = _numbers(attention.kv_norm.weight), _numbers(attention.kv_up.weight)
    made.q_scale, made.k_scale = _numbers(attention.q_scale), _numbers(attention.k_scale)


def _describe_experts(made: LayerStructure, part: Experts) -> None:
    made.experts, made.chosen = len(part.router.weight), part.router.chosen
    made.expert_size, made.swiglu = _wide(part.w_out.shape[1]), part.parts == 2
    made.routed_scale, made.balance_rate = part.scale, part.router.rate
    made.router = _numbers(part.router.weight)
    if not part.router.balance.is_contiguous():
        raise _Cannot
    made.balance = part.router.balance.data_ptr()
    made.experts_in, made.experts_out = _stack(part.w_in), _stack(part.w_out)


def _wide(width: int) -> int:
    if width % LANES:
        raise _Cannot
    return width


def _numbers(tensor: Tensor | None) -> int | None:
    """Address of fp32 numbers that follow each other."""
    if tensor is None:
        return None
    if tensor.dtype != torch.float32 or type(tensor) is not nn.Parameter:
        raise _Cannot
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise _Cannot
    return tensor.data_ptr()


def _map(linear: LoopLinear) -> Map:
    outputs, inputs = linear.weight.shape
    weight, scale = _weight(linear.weight, transposed=False)
    made = Map(weight=weight, scale=scale, outputs=outputs, inputs=_wide(inputs))
    if linear.lora is not None:
        made.loops, made.rank, _ = linear.lora.down.shape
        made.down, made.up = _numbers(linear.lora.down), _numbers(linear.lora.up)
    return made


def _stack(weight: Tensor) -> Stack:
    _, inputs, outputs = weight.shape
    address, scale = _weight(weight, transposed=True)
    return Stack(weight=address, scale=scale, inputs=_wide(inputs), outputs=_wide(outputs))


def _weight(weight: Tensor, *, transposed: bool) -> tuple[int | None, int | None]:
    """Addresses of a weight and of its int8 scales."""
    if not isinstance(weight, Int8Weight):
        return _numbers(weight), None
    numbers = weight.numbers.mT if transposed else weight.numbers
    if not numbers.is_contiguous() or not weight.scale.is_contiguous():
        raise _Cannot
    return numbers.data_ptr(), weight.scale.data_ptr()
