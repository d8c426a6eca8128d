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
    FLOATS,
    at,
    matrix_structure,
    plain,
    room,
    scratch,
    takes_rows,
    threads_for,
)
from openmythos.model.native.run import Layers, choices, numbers_read
from openmythos.model.native.structures import (
    KINDS,
    CallStructure,
    LayerStructure,
    LinearStructure,
    ModelStructure,
)
from openmythos.model.rope import Rope

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos


class Whole:
    """A model as the native code reads it in calls of so many rows, and room for what they pass.

    Args:
        model: whose `outside` and `drive` these are.
        layers: of prelude, core and coda.
        outside: what stands around the core.
        drive: the map from the prelude's output to what enters each loop, where one is; of these
            calls alone, since their steps are written into it.
        rows: of a call.
        slots: of the core's cache.
    """

    def __init__(
        self,
        model: OpenMythos,
        layers: tuple[Layers, Layers, Layers],
        outside: Outside,
        drive: LinearStructure | None,
        rows: int,
        slots: int,
    ) -> None:
        config, width = model.config, model.config.hidden_size
        self.rows, self._layers, self._outside, self._drive = rows, layers, outside, drive
        self._rows = room(3, rows, width)
        self.h, self.e, driven = self._rows  # states, the prelude's output, what enters
        self.drive = self.e if drive is None else driven
        times, self.carry = self._constants = room(2, width)
        self.core = layers[1].inside(model.core)
        self.core.slots = slots
        if config.injection == "lti":
            self.core.carry = self.carry.data_ptr()
        elif config.injection == "free":
            self.carry = model.core.injection.diagonal
            self.core.carry = self.carry.data_ptr()
        self.before, self.after = layers[0].around(outside.before), layers[2].around(outside.after)
        outer = max(layers[0].numbers, layers[2].numbers)
        self.model = ModelStructure(
            before=ctypes.addressof(self.before),
            after=ctypes.addressof(self.after),
            drive=None if drive is None else ctypes.addressof(drive),
            readout=ctypes.addressof(outside.readout),
            core=ctypes.addressof(self.core),
            times=times.data_ptr(),
            carry=self._constants[1].data_ptr(),
            e=self.e.data_ptr(),
            driven=driven.data_ptr(),
            injected=config.injection != "none",
            first_is_e=config.h0 == "e",
            kind=KINDS[model.embed.weight.dtype],
            outer_threads=threads_for(rows * outer),
            core_threads=threads_for(rows * layers[1].numbers),
            drive_threads=threads_for(rows * width * width),
            readout_threads=threads_for(rows * width * config.vocab_size),
        )
        if config.injection == "lti":
            decay = model.core.injection.decay
            self.model.step, self.model.rate = decay.step.data_ptr(), decay.rate.data_ptr()
            assert drive is not None
            drive.times = times.data_ptr()
            self.model.floor, self.model.largest = FLOOR, LARGEST_STEP
        self._threads = threads_for(
            rows * max(numbers_read(part) for some in layers for part in some.structures)
        )
        self._size, self._most, self._longest = 0, 0, config.max_length

    def call(self) -> CallStructure:
        """Return a call of these rows, to which their places are added."""
        return CallStructure(rows=self.rows, h=self.h.data_ptr(), kind=self._layers[1].kind)

    def work(self, most_keys: int) -> int:
        """Return where there is memory for calls that see up to so many entries.

        It is this thread's, for all calls the same: in a tick of other rows it is still near.
        """
        if most_keys > self._most:
            code = library()
            assert code is not None
            self._most = max(most_keys, min(2 * most_keys, self._longest))
            self._size = max(
                code.work_size(part, self.rows, self._most, self._threads)
                for some in self._layers
                for part in some.structures
            )
        return scratch(self._size).data_ptr()

    def choice(self, loops: int) -> Tensor | None:
        """Room for the experts that these rows choose; None where there are none."""
        structures = self._layers[1].structures
        return choices(structures[0], loops, len(structures), self.rows)

    def logits(self) -> Float[Tensor, "rows vocab"]:
        """Room for logits, where the next call is to write them."""
        made = room(self.rows, self._outside.readout.map.outputs)
        self.model.logits = made.data_ptr()
        return made


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
        rows = cache.batch_size * sequence
        self.model, self.watch = ref(model), watch_of(model)
        self.sequence, self.addresses = sequence, _addresses(cache)
        first, last = len(model.prelude), len(model.prelude) + len(model.core.layers)
        stores = [store.data for store in (*cache.outer[:first], *cache.core, *cache.outer[first:])]
        parts = slice(0, first), slice(first, last), slice(last, None)
        before, core, after = (Layers(structures[part], stores[part]) for part in parts)
        self._whole = Whole(model, (before, core, after), outside, drive, rows, cache.slots)
        start = np.arange(cache.batch_size)[:, None] * cache.max_length
        numbers = np.arange(sequence)[None]
        self._first = np.broadcast_to(start, (cache.batch_size, sequence)).reshape(-1).copy()
        self._numbers = np.broadcast_to(numbers, (cache.batch_size, sequence)).reshape(-1)
        self._places = np.empty((2, rows), dtype=np.int64)
        self._call = self._whole.call()
        self._call.rope_rows = sequence
        self._call.first = self._first.ctypes.data
        self._call.write = self._places[0].ctypes.data
        self._call.counts = self._places[1].ctypes.data

    def stands(self, model: OpenMythos, cache: Cache, sequence: int) -> bool:
        """Whether model and cache are still as they were."""
        if sequence != self.sequence or self.model() is not model:
            return False
        return _addresses(cache) == self.addresses and self.watch.stands()

    def run(
        self, token_ids: Int[Tensor, "batch sequence"], loops: int, start: int, rope: Rope
    ) -> tuple[Float[Tensor, "batch sequence vocab"], Tensor | None]:
        """Return logits, and the experts chosen, `(loops, layers, batch, sequence, chosen)`."""
        code, call, whole = library(), self._call, self._whole
        assert code is not None
        ids = token_ids.contiguous()
        logits, choice = whole.logits(), whole.choice(loops)
        np.add(self._numbers, start, out=self._places[1])
        np.add(self._places[1], self._first, out=self._places[0])
        self._places[1] += 1
        call.most_keys = start + self.sequence
        call.work, call.choice = whole.work(call.most_keys), at(choice)
        cos, sin = rope.cos.contiguous(), rope.sin.contiguous()
        call.cos, call.sin = cos.data_ptr(), sin.data_ptr()
        whole.before.ids, whole.core.loops = ids.data_ptr(), loops
        code.run_model(whole.model, call, call, call)
        shape = *ids.shape, -1
        return logits.view(shape), None if choice is None else choice.unflatten(2, ids.shape)


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
    if parts is None or not joins(model):
        return None
    outside, structures = parts
    if cache.dtype not in FLOATS:
        return None
    return Plan(model, cache, sequence, outside, structures, drive_of(model))


def joins(model: OpenMythos) -> bool:
    """Whether the native code takes what stands between a model's layers, too."""
    norm = None if model.core.norm is None else model.core.norm.weight
    raw = [part for part in model.core.injection.parameters() if part.ndim == 1]
    if any(part.dtype != torch.float32 or not part.is_contiguous() for part in raw):
        return False
    mapped = getattr(model.core.injection, "weight", None) is not None
    return plain(norm) and (drive_of(model) is not None) == mapped


def drive_of(model: OpenMythos) -> LinearStructure | None:
    """The map from the prelude's output to what enters each loop; None where there is none."""
    weight = getattr(model.core.injection, "weight", None)
    return None if weight is None else matrix_structure(weight)


def _addresses(cache: Cache) -> list[int]:
    """Where a cache's entries lie, and how many slots there are: both change when it grows."""
    stores = [*cache.outer, *cache.core]
    return [cache.slots, *(data.data_ptr() for store in stores for data in store.data.values())]
