"""A whole model in one native call: few tokens behind a cache, all at one depth.

At one token a call, what Python does between a model's parts takes as long as the parts. A plan
holds all that does not change from token to token, and is made anew when something does.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.model.cache import Cache
from openmythos.model.injection import FLOOR, LARGEST_STEP
from openmythos.model.native.build import library
from openmythos.model.native.describe import (
    Outside,
    altered,
    parts_of,
    watch_of,
)
from openmythos.model.native.linear import (
    matrix_structure,
    plain,
    room,
    takes_rows,
    threads_for,
)
from openmythos.model.native.run import Layers, numbers_read
from openmythos.model.native.structures import (
    KINDS,
    CallStructure,
    CoreStructure,
    LayerStructure,
    LinearStructure,
    ModelStructure,
)
from openmythos.model.rope import Rope

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos


class Plan:
    """A model and a cache as the native code reads them, for calls of so many tokens."""

    def __init__(
        self,
        model: OpenMythos,
        cache: Cache,
        sequence: int,
        outside: Outside,
        structures: list[LayerStructure],
        drive: LinearStructure | None,
    ) -> None:
        """`drive` is the map from the prelude's output to what enters each loop, where one is."""
        config, rows = model.config, cache.batch_size * sequence
        self.model, self.watch = ref(model), watch_of(model)
        self.sequence, self.outside, self.structures = sequence, outside, structures
        self.addresses = _addresses(cache)
        first, last = len(model.prelude), len(model.prelude) + len(model.core.layers)
        outer = [*range(first), *range(last, len(structures))]
        stores = [store.data for store in (*cache.outer[:first], *cache.core, *cache.outer[first:])]
        parts = slice(0, first), slice(last, None), slice(first, last)
        self._layers = [Layers(structures[part], stores[part]) for part in parts]
        width = config.hidden_size
        self._rows = room(3, rows, width)  # states, the prelude's output, what enters
        self._constants = room(2, width)
        start = np.arange(cache.batch_size)[:, None] * cache.max_length
        numbers = np.arange(sequence)[None]
        self._first = np.broadcast_to(start, (cache.batch_size, sequence)).reshape(-1).copy()
        self._numbers = np.broadcast_to(numbers, (cache.batch_size, sequence)).reshape(-1)
        self._places = np.empty((2, rows), dtype=np.int64)
        self._threads = threads_for(rows * max(map(numbers_read, structures)))
        self._work = room(0)
        self._core = self._core_structure(model, cache)
        self._parts = [
            self._layers[0].around(outside.before),
            self._layers[1].around(outside.after),
        ]
        self._drive = drive
        own = [numbers_read(structures[number]) for number in outer]
        self._model = ModelStructure(
            before=ctypes.addressof(self._parts[0]),
            after=ctypes.addressof(self._parts[1]),
            drive=None if self._drive is None else ctypes.addressof(self._drive),
            readout=ctypes.addressof(outside.readout),
            core=ctypes.addressof(self._core),
            times=self._constants[0].data_ptr(),
            carry=self._constants[1].data_ptr(),
            e=self._rows[1].data_ptr(),
            driven=self._rows[2].data_ptr(),
            injected=config.injection != "none",
            first_is_e=config.h0 == "e",
            kind=KINDS[model.embed.weight.dtype],
            outer_threads=threads_for(rows * max(own, default=0)),
            core_threads=threads_for(rows * numbers_read(structures[first])),
            drive_threads=threads_for(rows * width * width),
            readout_threads=threads_for(rows * width * config.vocab_size),
        )
        if config.injection == "lti":
            decay = model.core.injection.decay
            self._model.step, self._model.rate = decay.step.data_ptr(), decay.rate.data_ptr()
            assert drive is not None
            drive.times = self._constants[0].data_ptr()
            self._model.floor, self._model.largest = FLOOR, LARGEST_STEP
        self._call = CallStructure(rows=rows, rope_rows=sequence, h=self._rows[0].data_ptr())
        self._call.first = self._first.ctypes.data
        self._call.write = self._places[0].ctypes.data
        self._call.counts = self._places[1].ctypes.data

    def _core_structure(self, model: OpenMythos, cache: Cache) -> CoreStructure:
        made = self._layers[2].inside(model.core)
        made.slots = cache.slots
        if model.config.injection == "lti":
            made.carry = self._constants[1].data_ptr()
        elif model.config.injection == "free":
            made.carry = model.core.injection.diagonal.data_ptr()
        return made

    def stands(self, model: OpenMythos, cache: Cache, sequence: int) -> bool:
        """Whether model and cache are still as they were."""
        if sequence != self.sequence or self.model() is not model:
            return False
        return _addresses(cache) == self.addresses and self.watch.stands()

    def run(
        self, token_ids: Int[Tensor, "batch sequence"], loops: int, start: int, rope: Rope
    ) -> tuple[Float[Tensor, "batch sequence vocab"], Tensor | None]:
        """Return logits, and the experts chosen, `(loops, layers, batch, sequence, chosen)`."""
        code, call, made = library(), self._call, self._model
        assert code is not None
        ids = token_ids.contiguous()
        logits = room(*ids.shape, self.outside.readout.map.outputs)
        chosen, layers = self._layers[2].structures[0].chosen, self._core.layers
        choice = room(loops, layers, *ids.shape, chosen, dtype=torch.int64)
        np.add(self._numbers, start, out=self._places[1])
        np.add(self._places[1], self._first, out=self._places[0])
        self._places[1] += 1
        call.most_keys = start + self.sequence
        size = max(
            code.work_size(part, call.rows, call.most_keys, self._threads)
            for part in self.structures
        )
        if self._work.numel() < size:
            self._work = room(2 * size)
        call.work, call.choice = self._work.data_ptr(), choice.data_ptr()
        cos, sin = rope.cos.contiguous(), rope.sin.contiguous()
        call.cos, call.sin = cos.data_ptr(), sin.data_ptr()
        self._parts[0].ids = ids.data_ptr()
        self._core.loops, made.logits = loops, logits.data_ptr()
        code.run_model(made, call)
        return logits, choice if chosen else None


_plans: WeakKeyDictionary[Cache, Plan] = WeakKeyDictionary()


def plan_of(model: OpenMythos, cache: Cache, token_ids: Tensor, loops: int) -> Plan | None:
    """Return the plan for such a call, None where other code must do it.

    The cache must have room already.
    """
    if len(set(cache.lengths)) > 1 or loops < cache.slots or not takes_rows(token_ids, 1):
        return None
    sequence, found = token_ids.shape[1], _plans.get(cache)
    if found is None or not found.stands(model, cache, sequence):
        found = _made(model, cache, sequence)
        if found is None:
            return None
        _plans[cache] = found
    return found


def _made(model: OpenMythos, cache: Cache, sequence: int) -> Plan | None:
    parts = None if altered([model.core]) else parts_of(model)
    if parts is None:
        return None
    outside, structures = parts
    norm = None if model.core.norm is None else model.core.norm.weight
    raw = [part for part in model.core.injection.parameters() if part.ndim == 1]
    if any(part.dtype != torch.float32 or not part.is_contiguous() for part in raw):
        return None
    if not plain(norm) or {KINDS.get(cache.dtype)} != {part.kind for part in structures}:
        return None
    weight = getattr(model.core.injection, "weight", None)
    drive = None if weight is None else matrix_structure(weight)
    if weight is not None and drive is None:
        return None
    return Plan(model, cache, sequence, outside, structures, drive)


def _addresses(cache: Cache) -> list[int]:
    """Where a cache's entries lie, and how many slots there are: both change when it grows."""
    stores = [*cache.outer, *cache.core]
    return [cache.slots, *(data.data_ptr() for store in stores for data in store.data.values())]
