"""Rows of the engine that run together, from token ids to logits, in as few native calls as one.

One request that writes alone does nothing else: its token enters, runs all its loops and leaves in
one tick, and what Python does between prelude, loops and coda takes longer than they do.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.model.native.build import library
from openmythos.model.native.exits import Exits
from openmythos.model.native.linear import at, room
from openmythos.model.native.structures import CallStructure
from openmythos.model.native.whole import Whole
from openmythos.model.rope import Rope
from openmythos.model.span import Entries


class Places(NamedTuple):
    """Where rows write and what they see, with a first axis for the loops, all but `counts`."""

    before: Entries | None
    """In the prelude's slot; None: they are in the core."""
    core: Entries
    after: Entries | None
    """In the coda's slot; None: they do not pass it."""


class Turn:
    """Calls of so many rows; what they pass on stays here from one to the next.

    Args:
        whole: the model.
        rope: its table of angles, in fp32.
        dtype: of logits.
    """

    def __init__(self, whole: Whole, rope: Rope, dtype: torch.dtype) -> None:
        self._whole, self._dtype = whole, dtype
        self._angles = [room(whole.rows, table.shape[-1]) for table in rope]
        self._table = [table.view(-1, table.shape[-1]) for table in rope]
        self._calls = [whole.call() for _ in Places._fields]
        for call in self._calls:
            call.rope_rows = whole.rows
            call.cos, call.sin = (part.data_ptr() for part in self._angles)

    @property
    def h(self) -> Float[Tensor, "rows hidden"]:
        """The rows' states in the core."""
        return self._whole.h

    @property
    def drive(self) -> Float[Tensor, "rows hidden"]:
        """What the injection adds to each."""
        return self._whole.drive

    @property
    def carry(self) -> Tensor:
        """What it multiplies all by."""
        return self._whole.carry

    def go_on(self, h: Tensor, drive: Tensor, carry: Tensor, seats: Int[Tensor, " rows"]) -> None:
        """Take rows that are in the core already, from where the engine keeps them by seat."""
        torch.index_select(h, 0, seats, out=self.h)
        torch.index_select(drive, 0, seats, out=self.drive)
        if self._whole.model.step:  # else it is the model's own, or there is none
            self.carry.copy_(carry)

    def run(
        self,
        token_ids: Int[Tensor, " rows"] | None,
        positions: Int[Tensor, " rows"],
        first: Int[Tensor, " rows"],
        places: Places,
        exits: Exits,
    ) -> Float[Tensor, "rows vocab"] | None:
        """Run loops until a row leaves; where all do and may pass the coda, return their logits.

        Args:
            token_ids: what the rows enter with; None: they are in the core; see `go_on`.
            positions: of the rows.
            first: the loop that each runs first, from 0.
            places: theirs. Where there are some for the coda, `h` may be used up.
            exits: when they leave; afterwards, what was decided.
        """
        code, whole = library(), self._whole
        assert code is not None
        for table, angles in zip(self._table, self._angles, strict=True):
            torch.index_select(table, 0, positions, out=angles)
        core, loops = self._calls[1], len(places.core.write)
        choice = whole.choice(loops)
        work = whole.work(places.core.most)
        for call, part in zip(self._calls, places, strict=True):
            if part is not None:
                _place(call, part, work)
        core.loops, core.choice = first.data_ptr(), at(choice)
        whole.core.loops, whole.core.places_step = loops, whole.rows
        whole.core.drive = at(whole.drive) if whole.model.injected else None
        whole.core.exits = ctypes.addressof(exits.structure(whole.h.shape[-1]))
        whole.before.ids = at(token_ids)
        logits = None if places.after is None else whole.logits()
        calls = [
            None if part is None else call for call, part in zip(self._calls, places, strict=True)
        ]
        left = code.run_model(whole.model, *calls)
        exits.read()
        return logits.to(self._dtype) if left and logits is not None else None


def _place(call: CallStructure, entries: Entries, work: int) -> None:
    """Say where a call's rows write, and what they see."""
    call.write, call.read, call.also = at(entries.write), at(entries.read), at(entries.also)
    call.counts, call.most_keys, call.work = at(entries.counts), entries.most, work
