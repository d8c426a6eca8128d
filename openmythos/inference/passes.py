"""The model's side of a tick: prelude, one loop of the core, coda and head for any set of rows.

Rows are positions of any sequences at any loops. Their states lie in seats, their keys and
values in pages. Layers are the model's own and see the pages through `Lane`, or the native code
runs them all, which `Paged` has told where everything lies.

Where the native code takes the whole model, a row's bits depend on nothing else in a pass. Torch's
products depend on how many rows they have, and its attention on padding, mask and batch: in
deterministic mode rows then go through the model in tiles of a fixed number, padded where fewer are
left, and each attends alone over its true length. All else is computed row by row anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.inference.pages import PAGE, Layout
from openmythos.inference.rules import Rules
from openmythos.inference.scheduler import Row, Track
from openmythos.inference.tiles import TILE, Some, filled, in_parts, integers, longer
from openmythos.inference.views import Lane, Views, always, entries
from openmythos.inference.weights import Weights
from openmythos.model.cache import Declaration
from openmythos.model.core import Rows
from openmythos.model.native.exits import Exits
from openmythos.model.native.linear import MOST_ROWS, may_run
from openmythos.model.native.paged import Paged, paged
from openmythos.model.native.turn import Places
from openmythos.model.rope import Rope, rope_table
from openmythos.model.span import Entries, Place
from openmythos.model.transformer import OpenMythos

CHANGED = "the model was changed after its engine was made: make a new engine"


@dataclass(frozen=True)
class Seated:
    """What of a call's rows stays the same as long as they are in flight."""

    rows: Sequence[Row]
    seats: Int[Tensor, " rows"]
    """Filled up, where rows are to stand alone, with the seat of padding."""
    rope: Rope
    outer: list[Entries]
    """For the native code, their places in each slot of prelude and coda."""


class Passes:
    """Runs rows through a model; owns the storage of pages and the states of rows.

    Args:
        model: in evaluation mode.
        pages: how many to allocate.
        deterministic: whether a row's bits may depend on it alone.
    """

    def __init__(self, model: OpenMythos, pages: int, *, deterministic: bool) -> None:
        self.model, self.config = model, model.config
        weight = model.embed.weight
        self.device, self.dtype, self.kept = weight.device, weight.dtype, model.cache_dtype
        self.lanes = len(model.core.layers)
        shape = ((pages + 1) * PAGE,)  # the last page stays zero: what lies beyond a row's length
        self.null = pages * PAGE
        self.storage = [
            {
                name: torch.zeros(*shape, *size, dtype=self.kept, device=self.device)
                for name, size in declaration(model).items()
            }
            for _ in range(self.lanes)
        ]
        self.paged = paged(model, self.storage)
        self.weights = Weights(model, native=self.native)
        self._lost = False  # does the native code no longer take the model, or was it cast?
        self.alone = deterministic and not self.native
        """Whether rows go through torch, and must not depend on each other."""
        self.views = Views(self.null, self.device, alone=self.alone)
        self.rules = Rules(
            self.config.vocab_size, self.device, native=self.native, deterministic=deterministic
        )
        self.rope = self._rope_table()
        self._last: Seated | None = None
        self.carry = torch.empty(0)
        wide = torch.float32 if self.dtype.itemsize < 4 else self.dtype
        self.h = torch.zeros(1, self.config.hidden_size, dtype=wide, device=self.device)
        self.drive = torch.zeros_like(self.h)
        self.seats: list[int] = []  # free ones; seat 0 is that of padding
        self._through: tuple[Sequence[Row], Tensor] | None = None  # past the coda, with logits

    def _rope_table(self) -> Rope:
        positions = torch.arange(self.config.max_length, device=self.device)
        table = rope_table(positions, *self.model.rope_kind())
        return table.per_head()

    @property
    def native(self) -> bool:
        """Whether the native code takes the whole model: rows then depend on nothing else."""
        return self.paged is not None

    def changed(self) -> bool:
        """Look, once in each tick, whether the model is what it was.

        True: its weights may be others than before, and pages hold what those before have read. See
        `Weights` for what is seen; after other changes, a new engine must be made.
        """
        self._lost = self.model.cache_dtype != self.kept
        if self._lost:  # pages would hold other numbers than a new engine's
            return False
        if self.paged is not None and not self.paged.stands():
            again = paged(self.model, self.storage)
            self._lost = again is None
            if again is None:
                return False
            self.paged = again
        elif self.weights.stands():
            return False
        self.weights = Weights(self.model, native=self.native)
        return True

    def check(self) -> None:
        """Check what `changed` has found.

        Raises:
            RuntimeError: the native code took all of the model and does not any more, or the model
                was cast.
        """
        if self._lost or (self.native and not may_run()):
            raise RuntimeError(CHANGED)

    def _sit(self, rows: Sequence[Row]) -> None:
        """Give each row a seat, making more where they do not suffice."""
        missing = len(rows) - len(self.seats)
        if missing > 0:
            size = len(self.h)
            more = max(missing, size)
            self.h, self.drive = longer(self.h, more), longer(self.drive, more)
            self.rules.grow(more)
            self.seats += range(size + more - 1, size - 1, -1)
        for row in rows:
            row.seat = self.seats.pop()

    def stand_up(self, rows: Sequence[Row]) -> None:
        """Free the rows' seats."""
        self.seats += [row.seat for row in rows]

    def clear(self) -> None:
        """Free all seats: no row is left anywhere."""
        self._through = None
        self.seats = list(range(len(self.h) - 1, 0, -1))

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, from and to."""
        if not copies:
            return
        offsets = torch.arange(PAGE, device=self.device)
        pages = integers(copies).to(self.device)  # (copies, 2)
        source, target = ((pages[:, side : side + 1] * PAGE + offsets).flatten() for side in (0, 1))
        for data in (data for lane in self.storage for data in lane.values()):
            data.index_copy_(0, target, data.index_select(0, source))

    def _tiles(self, rows: Some) -> Iterator[Some]:
        size = TILE if self.alone else MOST_ROWS if self.native else max(1, len(rows))
        return in_parts(rows, size)

    def _padded(self, values: Sequence[int]) -> Int[Tensor, " rows"]:
        """As a tensor; of a whole tile where rows are to stand alone."""
        return (filled if self.alone else integers)(values).to(self.device)

    def _seated(self, rows: Sequence[Row]) -> Seated:
        """Return what stays of rows; prelude, loops and coda often see the same ones in turn."""
        if self._last is None or self._last.rows != rows:
            slots = range(outer_slots(self.model)) if self.native else ()
            self._last = Seated(
                rows,
                self._padded([row.seat for row in rows]),
                self.rope.select(self._padded([row.position for row in rows])),
                [entries(rows, always(slot)) for slot in slots],
            )
        return self._last

    def run(
        self, rows: Sequence[Row], loops: int = 1, *, through: bool = False
    ) -> tuple[list[bool], int]:
        """Let rows that start pass the prelude, and run all of them as `loop` does.

        Where `through`, each row may pass the coda once it leaves, and wants logits: if all rows
        leave together, they have done so, and `finish` has the logits there.
        """
        new = [row for row in rows if row.seat < 0]
        # a row whose loops in this tick are not all it has left goes on afterwards
        through = through and all(row.track.job.loops - row.loop <= loops for row in rows)
        if self._joins(rows, new, through=through):
            return self._joined(rows, loops, entering=bool(new), through=through)
        self.enter(new)
        return self.loop(rows, loops)

    def _joins(self, rows: Sequence[Row], new: Sequence[Row], *, through: bool) -> bool:
        """Whether prelude and loops, or loops and coda, can be one native call."""
        if self.paged is None or self.paged.outer_slots is None or not self.may_run_ahead(rows):
            return False
        if any(row.track.job.layout.latest for row in rows):
            return False
        return len(new) == len(rows) or (not new and through)

    def _joined(
        self, rows: Sequence[Row], loops: int, *, entering: bool, through: bool
    ) -> tuple[list[bool], int]:
        """Run rows that all enter, or are all in the core, in one native call."""
        assert self.paged is not None
        assert self.paged.outer_slots is not None
        turn, token_ids = self.paged.turn(len(rows), self.rope), None
        if entering:
            self._sit(rows)
            token_ids = integers([row.track.token_ids[row.position] for row in rows])
        seats = integers([row.seat for row in rows])
        if not entering:
            turn.go_on(self.h, self.drive, self.carry, seats)
        first_slot, last_slot = self.paged.outer_slots
        before = entries(rows, always(first_slot)) if entering else None
        after = None
        if through:
            same = before is not None and first_slot == last_slot
            after = before if same else entries(rows, always(last_slot))
        places = Places(before, entries(rows, Track.slot, loops=loops), after)
        first = integers([row.loop for row in rows])
        exits = self.rules.exits(rows, seats, first, loops)
        positions = integers([row.position for row in rows])
        logits = turn.run(token_ids, positions, first, places, exits)
        self.rules.note(rows, seats, exits)
        if logits is not None:
            self._through = rows, logits
        else:
            self.h.index_copy_(0, seats, turn.h)
            if entering:
                self.drive.index_copy_(0, seats, turn.drive)
                self.carry = turn.carry.clone()
        return exits.fires.tolist(), exits.ran

    def enter(self, rows: Sequence[Row]) -> None:
        """Run the prelude on rows that start, in order of position within a sequence."""
        if not rows:
            return
        self._sit(rows)
        core = self.model.core
        for tile in self._tiles(rows):
            at = self._seated(tile)
            token_ids = self._padded([row.track.token_ids[row.position] for row in tile])
            if self.paged is not None:
                e = self.paged.before(token_ids, at.rope, at.outer)
            else:
                e = self.model.before_core(token_ids, at.rope, self._outer(tile, 0))
            wide = e.to(self.h.dtype)
            drive, self.carry = core.injection.prepare(e)
            seats = at.seats[: len(tile)]
            self.drive.index_copy_(0, seats, drive[: len(tile)].to(wide.dtype))
            self.h.index_copy_(0, seats, core.first_state(wide)[: len(tile)])

    def _outer(self, rows: Sequence[Row], first: int) -> Iterator[Place]:
        """Places of the outer layers from number `first` on; several share a slot."""
        slot, view = -1, None
        for number in range(first, len(self.model.prelude) + len(self.model.coda)):
            if view is None or number // self.lanes != slot:
                slot = number // self.lanes
                view = self.views.of(rows, always(slot))
            lane = Lane(self.storage[number % self.lanes], view)
            yield Place(view.span, lane)

    def may_run_ahead(self, rows: Sequence[Row]) -> bool:
        """Whether rows can run several loops in one call: natively, with no other rule to ask."""
        return len(rows) <= MOST_ROWS and self.rules.all_native(rows)

    def loop(self, rows: Sequence[Row], loops: int = 1) -> tuple[list[bool], int]:
        """Run a loop of the core on each row, or up to some, until the first row leaves.

        Notes on each row whether its halting rule had fired before the last loop.

        Returns:
            Where the rule fires after it, and how many loops were run.
        """
        fires: list[bool] = []
        before, after = [], []
        for tile in self._tiles(rows):
            if self.paged is not None:
                h, new, exits = self._run_paged(self.paged, tile, loops)
                loops = exits.ran  # 1 where there are several tiles
                fires += exits.fires.tolist()
            else:
                h, new = self._one_loop(tile)
                fires += [False] * len(tile)
            self.h.index_copy_(0, self._seated(tile).seats[: len(tile)], new)
            before.append(h)
            after.append(new)
        for number in self.rules.asked(rows, before, after):
            fires[number] = True
        return fires, loops

    def _one_loop(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Run a loop by torch; return the states before and after."""
        at, view = self._seated(rows), self.views.of(rows, Track.slot, Track.also)
        h, drive = self.h.index_select(0, at.seats), self.drive.index_select(0, at.seats)
        loop = self._padded([row.loop for row in rows])
        lanes = [Lane(data, view) for data in self.storage]
        fixed = Rows(view.span, at.rope, drive, self.carry)
        new, _ = self.model.core.one_loop(h, fixed, loop, lanes)
        return h[: len(rows)], new[: len(rows)]

    def _run_paged(
        self, paged: Paged, rows: Sequence[Row], loops: int
    ) -> tuple[Tensor, Tensor, Exits]:
        """Run loops natively; return the states before and after, and what was decided."""
        at = self._seated(rows)
        first = integers([row.loop for row in rows])
        exits = self.rules.exits(rows, at.seats, first, loops)
        h, drive = self.h.index_select(0, at.seats), self.drive.index_select(0, at.seats)
        new = h.clone()
        places = entries(rows, Track.slot, Track.also, loops)
        paged.loops(new, at.rope, drive, self.carry, first, places, exits)
        self.rules.note(rows, at.seats, exits)
        return h, new, exits

    def leave(self, rows: Sequence[Row]) -> None:
        """Make of each row that left the core the state that its rule hands to the coda."""
        self.rules.output(rows, self.h)

    def finish(
        self, rows: Sequence[Row], wanted: Sequence[Row]
    ) -> Float[Tensor, "wanted vocab"] | None:
        """Run the coda on rows and the head on those `wanted`, in the same order; return logits.

        Where `run` has let the rows through, they are there already.
        """
        if self._through is not None:
            (done, logits), self._through = self._through, None
            place = {row: number for number, row in enumerate(done)}
            if place.keys() != set(rows) or len(rows) != len(wanted):
                raise RuntimeError("other rows pass the coda than those that have")
            order = [place[row] for row in wanted]  # a plan has prompts last
            return logits if order == sorted(order) else logits.index_select(0, integers(order))
        if not self.model.coda:
            rows = wanted
        states: list[Tensor] = []
        for tile in self._tiles(rows):
            at = self._seated(tile)
            h = self.h.index_select(0, at.seats)
            if self.paged is not None:
                y = self.paged.after(h, at.rope, at.outer)
            else:
                y = self.model.after_core(h, at.rope, self._outer(tile, len(self.model.prelude)))
            states.append(y[: len(tile)])
        if not wanted:
            return None
        y = torch.cat(states)
        if len(wanted) < len(rows):
            among = set(wanted)
            chosen = [number for number, row in enumerate(rows) if row in among]
            numbers = integers(chosen).to(self.device)
            y = y.index_select(0, numbers)
        return torch.cat([self._readout(part) for part in self._tiles(y)])

    def _readout(self, y: Tensor) -> Tensor:
        more = TILE - len(y) if self.alone else 0
        return self.model.readout(longer(y, more) if more else y)[: len(y)]


def declaration(model: OpenMythos) -> Declaration:
    """What one position keeps in one layer: the same for every layer of a model."""
    kept: Declaration = model.core.layers[0].attention.kept  # type: ignore[union-attr, assignment]
    return kept


def outer_slots(model: OpenMythos) -> int:
    """Slots for prelude and coda: as many of their layers share one as the core has."""
    return -(-(len(model.prelude) + len(model.coda)) // len(model.core.layers))


def page_bytes(model: OpenMythos) -> int:
    """Bytes of a page, over all layers."""
    numbers = sum(int(np.prod(shape)) for shape in declaration(model).values())
    return PAGE * len(model.core.layers) * numbers * model.cache_dtype.itemsize


def layout(model: OpenMythos, loops: int, policy: str) -> Layout:
    """The slots of a sequence that takes up to so many loops."""
    return Layout(outer_slots(model), loops, latest=policy == "last", page_bytes=page_bytes(model))
