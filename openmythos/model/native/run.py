"""Hand few rows on the CPU to the native code: through layers, a whole core, prelude and coda.

It takes fp32, bf16 or int8 weights, few rows, and keys kept in a cache. It computes in fp32
whatever the weights are, or on matrix tiles with nearly as many digits, or in products of bytes
with 16 bits of a row. Everything else goes through torch, with the same result but for rounding. A
row's bits do not depend on the other rows of a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.model.cache import Cache
from openmythos.model.native.build import library
from openmythos.model.native.describe import (
    alike,
    altered,
    outside_of,
    own_core,
    structure_of,
)
from openmythos.model.native.exits import Exits
from openmythos.model.native.linear import (
    FLOATS,
    at,
    multiply,
    plain,
    room,
    scratch,
    takes,
    takes_rows,
    threads_for,
)
from openmythos.model.native.structures import (
    KINDS,
    CallStructure,
    CoreStructure,
    LayerStructure,
    OuterStructure,
)
from openmythos.model.rope import Rope
from openmythos.model.span import Entries, Place, Span

if TYPE_CHECKING:
    from openmythos.model.core import Core, Rows
    from openmythos.model.layer import Layer
    from openmythos.model.transformer import OpenMythos


class Layers:
    """Layers that run one after another, and where each keeps its entries."""

    def __init__(
        self, structures: Sequence[LayerStructure], stores: Sequence[dict[str, Tensor]]
    ) -> None:
        self.structures = structures
        kept = [list(store.values()) for store in stores]
        self.numbers = numbers_read(structures[0]) if structures else 0
        self._arrays = [
            pointers([ctypes.addressof(part) for part in structures]),
            pointers([part[0].data_ptr() for part in kept]),
            pointers([part[-1].data_ptr() for part in kept]),
        ]
        self.layer, self.keys, self.values = map(ctypes.addressof, self._arrays)
        self._steps = [part.stride(0) for part in kept[0]] if kept else []
        self.kind = KINDS[kept[0][0].dtype] if kept else 0  # of what is kept

    def call(self, h: Tensor, rope: Rope, entries: Entries) -> CallStructure:
        """Return the rows `h` of a call, which the native code changes in place."""
        code = library()
        assert code is not None
        rows = h.numel() // h.shape[-1]
        threads = threads_for(rows * self.numbers)
        cos, sin = rope.cos.float().contiguous(), rope.sin.float().contiguous()
        sizes = [code.work_size(part, rows, entries.most, threads) for part in self.structures]
        call = CallStructure(
            rows=rows,
            rope_rows=cos.numel() // cos.shape[-1],
            threads=threads,
            h=h.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            write=entries.write.data_ptr(),
            also=at(entries.also),
            read=at(entries.read),
            first=at(entries.first),
            counts=entries.counts.data_ptr(),
            work=scratch(max(sizes, default=h.numel())).data_ptr(),
            most_keys=entries.most,
            kind=self.kind,
        )
        call.alive = (cos, sin)  # Python's own attribute: kept as long as the call
        return call

    def around(self, template: OuterStructure) -> OuterStructure:
        """Return these layers with what stands before and behind them."""
        made = OuterStructure.from_buffer_copy(template)
        made.layers, made.layer = len(self.structures), self.layer
        made.keys, made.values = self.keys, self.values
        return made

    def inside(self, core: Core) -> CoreStructure:
        """Return these layers as a core's; a call adds its loops and what enters them."""
        return CoreStructure(
            layers=len(self.structures),
            slots=1,
            layer=self.layer,
            keys=self.keys,
            values=self.values,
            keys_step=self._steps[0],
            values_step=self._steps[-1],
            norm=None if core.norm is None else core.norm.weight.data_ptr(),
            eps=core.config.norm_eps,
        )


def layer_here(layer: Layer, span: Span) -> LayerStructure | None:
    """Return a layer for the native code, looked at once in each call of a model."""
    if layer not in span.natives:
        span.natives[layer] = structure_of(layer)
    found: LayerStructure | None = span.natives[layer]
    return found


def run_layer(
    layer: Layer,
    h: Float[Tensor, "*rows hidden"],
    rope: Rope,
    loop: Int[Tensor, "*leading"],
    place: Place,
    given: Int[Tensor, "*rows chosen"] | None,
) -> tuple[Float[Tensor, "*rows hidden"], Int[Tensor, "*rows chosen"] | None] | None:
    """Return what `Layer.forward` returns; None where torch must do it."""
    if place.store is None or not takes(h):
        return None
    structure = layer_here(layer, place.span)
    found = None if structure is None else place.store.entries(place.span, place.slot)
    if structure is None or found is None:
        return None
    data, entries = found
    if not keeps(data) or h.shape[-1] != structure.hidden:
        return None
    new, kept = _fresh(h), list(data.values())
    choice = choices(structure, *h.shape[:-1])
    loops = None
    if _corrects(structure) and loop.ndim:
        leading = loop.reshape(*loop.shape, *[1] * (h.ndim - 1 - loop.ndim))
        loops = leading.expand(h.shape[:-1]).contiguous()
    elif _corrects(structure):
        loops = loop.expand(h.shape[:-1]).contiguous()
    given = None if given is None else given.contiguous()
    call = Layers([structure], [data]).call(new, rope, entries)
    call.loops, call.given, call.choice = at(loops), at(given), at(choice)
    call.keys, call.values = kept[0].data_ptr(), kept[-1].data_ptr()
    code = library()
    assert code is not None
    code.run_layer(structure, call)
    return new.to(h.dtype), choice


def run_loops(
    core: Core,
    h: Float[Tensor, "*rows hidden"],
    rows: Rows,
    loops: int,
    cache: Cache,
    *,
    start: int = 0,
    exits: Exits | None = None,
) -> tuple[Float[Tensor, "*rows hidden"], list[list[Tensor]]] | None:
    """Run loops from number `start`, each in its slot of a cache: all, or until a row leaves.

    Returns:
        The last state and, for each loop that was run, each layer's chosen experts; None where
        torch must do it.
    """
    kind, places = core.config.injection, cache.core[0].entries(rows.span, 0)
    if places is None or kind == "linear" or not takes(h) or h.dtype != torch.float32:
        return None
    if not own_core(core):
        return None
    found = [layer_here(layer, rows.span) for layer in core.layers]  # type: ignore[arg-type]
    structures = [part for part in found if part is not None]
    norm = None if core.norm is None else core.norm.weight
    if len(structures) < len(found) or not plain(norm) or not alike(structures):
        return None
    data = [store.data for store in cache.core]
    if not keeps(data[0]) or h.shape[-1] != structures[0].hidden:
        return None
    new, layers = _fresh(h), Layers(structures, data)
    choice = choices(structures[0], loops, len(structures), *h.shape[:-1])
    call = layers.call(new, rows.rope, places[1])
    call.choice, call.loop = at(choice), start
    run = layers.inside(core)
    run.loops, run.start, run.slots = loops, start, cache.slots
    drive = rows.drive.contiguous() if kind != "none" else None
    carry = rows.carry.float().contiguous() if kind in ("lti", "free") else None
    run.drive, run.carry = at(drive), at(carry)
    if exits is not None:
        run.exits = ctypes.addressof(exits.structure(h.shape[-1]))
    code = library()
    assert code is not None
    code.run_core(run, call)
    if exits is not None:
        exits.read()
        loops = exits.ran
    return new, [] if choice is None else [list(one) for one in choice[:loops]]


def run_before(
    model: OpenMythos, token_ids: Int[Tensor, "*rows"], rope: Rope, places: Sequence[Place]
) -> Float[Tensor, "*rows hidden"] | None:
    """Return what `OpenMythos.before_core` returns; None where torch must do it."""
    if not places or not takes_rows(token_ids, 1):
        return None
    found = outside_of(model)
    if found is None:
        return None
    h = room(*token_ids.shape, model.config.hidden_size)
    ids = token_ids.contiguous()
    done = _run_outer(found.before, h, rope, list(model.prelude), places, ids)  # type: ignore[arg-type]
    return h.to(model.embed.weight.dtype) if done else None


def run_after(
    model: OpenMythos, h: Float[Tensor, "*rows hidden"], rope: Rope, places: Sequence[Place]
) -> Float[Tensor, "*rows hidden"] | None:
    """Return what `OpenMythos.after_core` returns; None where torch must do it."""
    if not places or not takes(h):
        return None
    found = outside_of(model)
    if found is None or h.shape[-1] != found.after.hidden:
        return None
    new = _fresh(h)
    done = _run_outer(found.after, new, rope, list(model.coda), places)  # type: ignore[arg-type]
    return new.to(model.embed.weight.dtype) if done else None


def _run_outer(
    template: OuterStructure,
    h: Tensor,
    rope: Rope,
    layers: Sequence[Layer],
    places: Sequence[Place],
    token_ids: Tensor | None = None,
) -> bool:
    """Run layers once, in place; say whether the native code could."""
    structures, stores, entries = [], [], None
    for layer, place in zip(layers, places, strict=True):
        structure = layer_here(layer, place.span)
        found = None if place.store is None else place.store.entries(place.span, place.slot)
        if structure is None or found is None or not keeps(found[0]):
            return False
        if entries is not None and found[1] is not entries:
            return False
        structures.append(structure)
        stores.append(found[0])
        entries = found[1]
    if altered(layers) or entries is None:
        return False
    some = Layers(structures, stores)
    call, outer = some.call(h, rope, entries), some.around(template)
    outer.ids = at(token_ids)
    code = library()
    assert code is not None
    code.run_outer(outer, call)
    return True


def run_readout(
    model: OpenMythos, y: Float[Tensor, "*rows hidden"]
) -> Float[Tensor, "*rows vocab"] | None:
    """Return what `OpenMythos.readout` returns; None where torch must do it."""
    if not takes(y):
        return None
    found = outside_of(model)
    if found is None or y.shape[-1] != found.readout.map.inputs:
        return None
    return multiply(y, found.readout).to(model.head.weight.dtype)


def keeps(store: dict[str, Tensor]) -> bool:
    """Whether entries of a cache are numbers that the native code reads and writes."""
    return next(iter(store.values())).dtype in FLOATS


def _fresh(h: Tensor) -> Tensor:
    """Return rows in fp32 that may be written over."""
    return h.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def numbers_read(structure: LayerStructure) -> int:
    """Weights that a row reads in a layer, all but a few small ones."""
    maps = (structure.qkv, structure.q_down, structure.q_up, structure.kv_down, structure.out)
    dense = sum(part.outputs * part.inputs for part in (*maps, structure.w_in, structure.w_out))
    stacks = (structure.experts_in, structure.experts_out)
    return int(dense + structure.chosen * sum(part.outputs * part.inputs for part in stacks))


def choices(structure: LayerStructure, *shape: int) -> Tensor | None:
    """Room for the experts that rows choose; None where there are none."""
    if not structure.chosen:
        return None
    return room(*shape, structure.chosen, dtype=torch.int64)


def _corrects(structure: LayerStructure) -> bool:
    """Whether a layer's loops differ, so that it must know each row's."""
    corrected = (structure.qkv, structure.q_up, structure.w_in)
    return structure.routers > 1 or any(part.rank for part in corrected)


def pointers(addresses: list[int]) -> ctypes.Array[ctypes.c_void_p]:
    """An array of addresses."""
    return (ctypes.c_void_p * len(addresses))(*addresses)
