"""A whole model over pages: prelude, loops and coda of the engine's ticks, row by row.

Between short calls, looking at every layer again takes as long as the calls. Here model and pages
are looked at once, and `stands` says once in each tick whether they still are what they were.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.model.native.build import library
from openmythos.model.native.describe import (
    Outside,
    parts_of,
    watch_of,
)
from openmythos.model.native.exits import Exits
from openmythos.model.native.linear import at, plain, room
from openmythos.model.native.run import Layers, choices, keeps
from openmythos.model.native.structures import LayerStructure, Map, OuterStructure
from openmythos.model.native.turn import Turn
from openmythos.model.native.whole import Whole, drive_of, joins
from openmythos.model.rope import Rope
from openmythos.model.span import Entries

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos


class Paged:
    """A model and its pages as the native code reads them.

    A row's bits depend on nothing else in a call. Angles are in fp32; states are, too, but those
    that leave prelude and coda are rounded to the model's dtype.
    """

    def __init__(
        self,
        model: OpenMythos,
        pages: Sequence[dict[str, Tensor]],
        outside: Outside,
        structures: list[LayerStructure],
    ) -> None:
        self._model, self._watch = model, watch_of(model)
        self._dtype = model.embed.weight.dtype
        first, lanes = len(model.prelude), len(pages)
        last = first + lanes
        self._core = Layers(structures[first:last], pages)
        self._run = self._core.inside(model.core)
        outer = [*structures[:first], *structures[last:]]
        parts = [
            (number // lanes, structure, pages[number % lanes])
            for number, structure in enumerate(outer)
        ]
        self._before = _by_slot(outside.before, parts[:first])
        self._after = _by_slot(outside.after, parts[first:])
        self._outside, self._outer = outside, parts
        self._turns: dict[tuple[int, int], Turn] = {}
        own = [{slot for slot, _, _ in some} for some in (parts[:first], parts[first:])]
        self.outer_slots: tuple[int, int] | None = None
        """The slots of prelude and coda, where calls may be joined: each has layers, in one slot.

        Without layers, torch does what is left of them (`before`, `after`), with other bits.
        """
        if all(len(some) == 1 for some in own) and joins(model):
            self.outer_slots = (min(own[0]), min(own[1]))

    def stands(self) -> bool:
        """Whether the model is as it was."""
        return self._watch.stands()

    def turn(self, rows: int, rope: Rope) -> Turn:
        """Return joined calls of so many rows; `outer_slots` says whether there are any."""
        key = rows, torch.get_num_threads()
        if key not in self._turns:
            model, first = self._model, len(self._model.prelude)
            before, after = (
                Layers([part[1] for part in some], [part[2] for part in some])
                for some in (self._outer[:first], self._outer[first:])
            )
            layers = before, self._core, after
            whole = Whole(model, layers, self._outside, drive_of(model), rows, slots=1)
            self._turns[key] = Turn(whole, rope, model.head.weight.dtype)
        return self._turns[key]

    def before(
        self, token_ids: Int[Tensor, " rows"], rope: Rope, places: Sequence[Entries]
    ) -> Float[Tensor, "rows hidden"]:
        """Return what `OpenMythos.before_core` returns; `places` are those of each outer slot."""
        if not self._before:
            return self._model.before_core(token_ids, rope, iter(()))
        h = room(len(token_ids), self._model.config.hidden_size)
        self._run_outer(self._before, h, rope, places, token_ids)
        return h.to(self._dtype)

    def after(
        self, h: Float[Tensor, "rows hidden"], rope: Rope, places: Sequence[Entries]
    ) -> Float[Tensor, "rows hidden"]:
        """Return what `OpenMythos.after_core` returns; the states `h` are used up."""
        if not self._after:
            return self._model.after_core(h, rope, iter(()))
        self._run_outer(self._after, h, rope, places)
        return h.to(self._dtype)

    @staticmethod
    def _run_outer(
        parts: Sequence[tuple[int, Layers, OuterStructure]],
        h: Tensor,
        rope: Rope,
        places: Sequence[Entries],
        token_ids: Tensor | None = None,
    ) -> None:
        code = library()
        assert code is not None
        for slot, layers, outer in parts:
            outer.ids, token_ids = at(token_ids), None
            code.run_outer(outer, layers.call(h, rope, places[slot]))

    def loops(
        self,
        h: Float[Tensor, "rows hidden"],
        rope: Rope,
        drive: Float[Tensor, "rows hidden"],
        carry: Tensor,
        first: Int[Tensor, " rows"],
        entries: Entries,
        exits: Exits,
    ) -> None:
        """Run loops of the core in place, until a row leaves.

        Args:
            h: the rows' states.
            rope: their angles.
            drive: what the injection adds to each.
            carry: what it multiplies all by.
            first: the loop that each row runs first, from 0.
            entries: places with a first axis for the loops, all but `counts`.
            exits: when they leave; afterwards, what was decided.
        """
        code, core = library(), self._model.core
        assert code is not None
        kind, loops = core.config.injection, len(entries.write)
        choice = choices(self._core.structures[0], loops, len(core.layers), len(h))
        call, run = self._core.call(h, rope, entries), self._run
        call.loops, call.choice = first.data_ptr(), at(choice)
        run.loops, run.places_step = loops, len(h)
        wide = carry.float().contiguous() if kind in ("lti", "free") else None
        run.carry, run.drive = at(wide), at(drive if kind != "none" else None)
        run.exits = ctypes.addressof(exits.structure(h.shape[-1]))
        code.run_core(run, call)
        exits.read()


def paged(model: OpenMythos, pages: Sequence[dict[str, Tensor]]) -> Paged | None:
    """Return a model over pages `(places, ...)` of each of its core's layers.

    None where the native code cannot take all of it. The core's layers share their pages with the
    outer ones: of these, number n has the pages of layer n mod `core_layers`, in slot
    n // `core_layers`.
    """
    parts = parts_of(model)
    if parts is None:
        return None
    outside, structures = parts
    maps = [getattr(model.core.injection, "weight", None)]
    maps += [None if model.core.norm is None else model.core.norm.weight]
    if not all(plain(part) for part in maps) or not keeps(pages[0]):
        return None
    return Paged(model, pages, outside, structures)


def _by_slot(
    template: OuterStructure, parts: Sequence[tuple[int, LayerStructure, dict[str, Tensor]]]
) -> list[tuple[int, Layers, OuterStructure]]:
    """Gather layers `(slot, layer, pages)` that run once: a call has all those of one slot."""
    made = []
    for slot, some in groupby(parts, lambda part: part[0]):
        own = list(some)
        layers = Layers([part[1] for part in own], [part[2] for part in own])
        made.append((slot, layers, layers.around(template)))
    for _, _, outer in made[1:]:  # what stands before all layers
        outer.output, outer.first_norm = Map(), None
    for _, _, outer in made[:-1]:  # and behind them
        outer.last_norm = None
    return made
