"""A layer as the native code reads it: sizes, and where its weights lie.

A layer that was changed from outside (hooks, other modules in it, other functions of its classes),
or whose kind or widths the native code does not know, is left to torch. Layer, core and model stand
above this file, which knows their classes by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from openmythos.model.adapters import LoopLinear, LoopLora
from openmythos.model.attention import GroupedQueryAttention, LatentAttention
from openmythos.model.experts import Experts, Router
from openmythos.model.feed_forward import FeedForward, relu2, swiglu
from openmythos.model.injection import INJECTION
from openmythos.model.int8 import Int8Weight
from openmythos.model.native.build import library
from openmythos.model.native.linear import FewRowsLinear
from openmythos.model.native.mirrored import code_of, is_named
from openmythos.model.native.structures import (
    KINDS,
    LANES,
    LayerStructure,
    LinearStructure,
    Map,
    OuterStructure,
    Stack,
)
from openmythos.model.native.watch import Watch, hooks_of
from openmythos.model.norm import RMSNorm

if TYPE_CHECKING:
    from openmythos.model.core import Core
    from openmythos.model.layer import Layer
    from openmythos.model.transformer import OpenMythos

KNOWN = (
    *(LoopLinear, LoopLora, GroupedQueryAttention, LatentAttention),
    *(Experts, Router, FeedForward, RMSNorm, FewRowsLinear, nn.Embedding),
)
"""Modules whose work the native code does."""

INJECTIONS = ("lti", "free", "add", "none")
"""Kinds that the native code does."""


class Described(NamedTuple):
    """What was found, which stands until something changes."""

    structure: Any
    """None: the native code cannot take it."""
    watch: Watch


_described: WeakKeyDictionary[nn.Module, Described] = WeakKeyDictionary()


def structure_of(layer: Layer) -> LayerStructure | None:
    """Return the layer for the native code, None where it cannot take it."""
    found = _described.get(layer)
    if found is None or not found.watch.stands():
        inner = list(layer.modules())[1:]  # the layer itself has been entered already
        found = _described[layer] = _describe([layer, *inner], inner, lambda: _structure(layer))
    made: LayerStructure | None = found.structure
    return made


class Outside(NamedTuple):
    """What a model does once, but for its layers: templates to which a call adds these."""

    before: OuterStructure
    """Embedding and the prelude's norm."""
    after: OuterStructure
    """From the core to the coda."""
    readout: LinearStructure
    """Norm and head."""


def outside_of(model: OpenMythos) -> Outside | None:
    """Return what stands around a model's core, None where the native code cannot take it."""
    found = _described.get(model)
    if found is None or not found.watch.stands():
        own = (model.embed, model.prelude_norm, model.core_output, model.norm, model.head)
        modules = [part for part in own if part is not None]
        around = [model, model.core, *model.core.injection.modules()]
        around += [] if model.core.norm is None else [model.core.norm]
        found = _described[model] = _describe([*around, *modules], modules, lambda: _outside(model))
    made: Outside | None = found.structure
    return made


def parts_of(model: OpenMythos) -> tuple[Outside, list[LayerStructure]] | None:
    """Return a whole model, its layers in their order; None where not all of it can be taken."""
    layers: list[Layer] = [*model.prelude, *model.core.layers, *model.coda]
    if library() is None or altered(layers) or not own_core(model.core) or not own_model(model):
        return None
    outside, found = outside_of(model), [structure_of(layer) for layer in layers]
    structures = [part for part in found if part is not None]
    first = len(model.prelude)
    if outside is None or len(structures) < len(found):
        return None
    core = structures[first : first + len(model.core.layers)]
    return (outside, structures) if alike(core) else None


def alike(structures: Sequence[LayerStructure]) -> bool:
    """Whether a core's layers can share a call: of one kind, with as many experts chosen."""
    return len({(part.kind, part.chosen) for part in structures}) == 1


def own_core(core: Core) -> bool:
    """Whether a core is what its config says: of our classes, and nobody watches its parts."""
    kind = core.config.injection
    if not is_named(type(core), "core.Core") or patched(core) or kind not in INJECTIONS:
        return False
    if type(core.injection) is not INJECTION[kind]:
        return False
    if not code_of(type(core), INJECTION[kind]).written:
        return False
    if core.norm is not None:
        if type(core.norm) is not RMSNorm:
            return False
        dtype = core.layers[0].attention_norm.weight.dtype  # type: ignore[union-attr]
        if core.norm.weight.dtype != dtype or core.norm.eps != core.config.norm_eps:
            return False
    return not altered([core.injection, core.norm, *core.layers])


def own_model(model: OpenMythos) -> bool:
    """Whether what a model does around its core is what its class says, and not a subclass."""
    return _own_class(type(model)) and not patched(model)  # type: ignore[arg-type]


@cache
def _own_class(kind: type) -> bool:
    ours = next(each for each in kind.__mro__ if is_named(each, "transformer.OpenMythos"))
    names = ("before_core", "after_core", "readout", "rope_kind")
    return all(getattr(kind, name) is getattr(ours, name) for name in names)


def watch_of(model: OpenMythos) -> Watch:
    """Look at all of a model that its native calls rest on: all but the learned exits."""
    exits = {part for gate in model.core.learned_exits().values() for part in gate.modules()}
    modules = [module for module in model.modules() if module not in exits]
    return Watch(modules, modules[1:])  # the model itself has been entered already


def altered(modules: Iterable[nn.Module | None]) -> bool:
    """Whether anybody watches these modules' calls, or gave one a function of its own."""
    there = [module for module in modules if module is not None]
    return any(hooks_of(there)) or any(patched(module) for module in there)


def patched(thing: object) -> bool:
    """Whether a module, or a rule, has something of its own in place of a function of its class."""
    return not vars(thing).keys().isdisjoint(_functions(type(thing)))  # type: ignore[arg-type]


@cache
def _functions(kind: type) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name)))


class _Cannot(Exception):  # noqa: N818 - not an error, only the end of a description
    """The native code has no form for this."""


def _describe(
    watched: Sequence[nn.Module], inner: Sequence[nn.Module], make: Callable[[], Any]
) -> Described:
    """Make a description, which rests on the watched modules and on the calls of the inner ones."""
    structure, watch = None, Watch(watched, inner)
    as_made = watch.written and not watch.hooked and not any(map(patched, watched))
    if as_made and all(type(module) in KNOWN for module in inner):
        try:
            structure = make()
        except _Cannot:
            structure = None
    return Described(structure, watch)


def _structure(layer: Layer) -> LayerStructure:
    if (
        not is_named(type(layer), "layer.Layer")
        or len({m.eps for m in layer.modules() if hasattr(m, "eps")}) > 1
    ):
        raise _Cannot
    attention, part = layer.attention, layer.feed_forward
    eps, gain = layer.attention_norm.eps, layer.attention_norm.weight
    kinds = {p.dtype for p in layer.parameters() if not isinstance(p, Int8Weight)}
    if len(kinds) > 1 or gain.dtype not in KINDS:
        raise _Cannot
    made = LayerStructure(
        kind=KINDS[gain.dtype],
        hidden=_wide(len(gain)),
        sandwich=layer.placement == "sandwich",
        interleaved=attention.pairing == "interleaved",
        eps=eps,
        attention_norm=_numbers(gain),
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
        made.size, made.swiglu = _wide(dense.size), _gated(dense.activation)
        made.w_in, made.w_out = _map(dense.w_in), _map(dense.w_out)
    return made


def _outside(model: OpenMythos) -> Outside:
    config, width = model.config, _wide(model.config.hidden_size)
    norms = (model.prelude_norm, model.core_output, model.norm)
    if any(getattr(norm, "eps", config.norm_eps) != config.norm_eps for norm in norms):
        raise _Cannot
    if model.embed.max_norm is not None:  # its calls change its rows
        raise _Cannot
    before = OuterStructure(hidden=width, scale=config.embedding_scale, eps=config.norm_eps)
    before.embedding = _matrix(model.embed.weight)
    before.last_norm, before.kind = _norm(model.prelude_norm)
    after = OuterStructure(hidden=width, scale=1, eps=config.norm_eps)
    if isinstance(model.core_output, nn.Linear):
        after.output = _matrix(model.core_output.weight)
    else:
        after.first_norm, after.kind = _norm(model.core_output)
    readout = LinearStructure(eps=config.norm_eps, factor=config.logit_scale)
    readout.map = _matrix(model.head.weight)
    readout.norm, readout.norm_kind = _norm(model.norm)
    return Outside(before, after, readout)


def _norm(norm: nn.Module | None) -> tuple[int | None, int]:
    """Address of a norm's gain, and what its numbers are."""
    if norm is None:
        return None, 0
    gain = norm.weight
    assert isinstance(gain, Tensor)
    return _numbers(gain), KINDS[gain.dtype]


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
    router = part.router.weight
    made.experts, made.chosen = router.shape[-2], part.router.chosen
    made.routers = len(router) if router.ndim == 3 else 1
    made.expert_size, made.swiglu = _wide(part.w_out.shape[1]), _gated(part.activation)
    made.routed_scale, made.balance_rate = part.scale, part.router.rate
    made.router = _numbers(part.router.weight)
    if not part.router.balance.is_contiguous():
        raise _Cannot
    made.balance = part.router.balance.data_ptr()
    made.experts_in, made.experts_out = _stack(part.w_in), _stack(part.w_out)


def _gated(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether it is SwiGLU, and not squared ReLU: the native code knows these two."""
    if activation not in (swiglu, relu2):
        raise _Cannot
    return activation is swiglu


def _wide(width: int) -> int:
    if width % LANES:
        raise _Cannot
    return width


def _numbers(tensor: Tensor | None) -> int | None:
    """Address of fp32 or bf16 numbers that follow each other."""
    if tensor is None:
        return None
    if tensor.dtype not in (torch.float32, torch.bfloat16) or type(tensor) is not nn.Parameter:
        raise _Cannot
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise _Cannot
    return tensor.data_ptr()


def _matrix(weight: Tensor) -> Map:
    outputs, inputs = weight.shape
    made = Map(outputs=outputs, inputs=_wide(inputs))
    made.weight, made.scale, made.kind = _weight(weight, transposed=False)
    return made


def _map(linear: LoopLinear) -> Map:
    made = _matrix(linear.weight)
    if linear.lora is not None:
        made.loops, made.rank, _ = linear.lora.down.shape
        made.down, made.up = _numbers(linear.lora.down), _numbers(linear.lora.up)
    return made


def _stack(weight: Tensor) -> Stack:
    _, inputs, outputs = weight.shape
    made = Stack(inputs=_wide(inputs), outputs=_wide(outputs))
    made.weight, made.scale, made.kind = _weight(weight, transposed=True)
    return made


def _weight(weight: Tensor, *, transposed: bool) -> tuple[int | None, int | None, int]:
    """Addresses of a weight and of its int8 scales, and what its numbers are."""
    if not isinstance(weight, Int8Weight):
        return _numbers(weight), None, KINDS[weight.dtype]
    numbers = weight.numbers.mT if transposed else weight.numbers
    if not numbers.is_contiguous() or not weight.scale.is_contiguous():
        raise _Cannot
    return numbers.data_ptr(), weight.scale.data_ptr(), KINDS[numbers.dtype]
