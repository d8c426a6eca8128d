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

from collections.abc import Callable, Hashable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.inference.pages import PAGE, Layout
from openmythos.inference.scheduler import Row, Track
from openmythos.model.cache import Declaration, Entries, Place, Span
from openmythos.model.core import Rows
from openmythos.model.halting import Divergence, Memory, Rule
from openmythos.model.native.exits import BY_BUDGET, Decided, Exits, decided_here
from openmythos.model.native.paged import Paged, paged
from openmythos.model.native.run import MOST_ROWS, may_run
from openmythos.model.rope import Rope, rope_table
from openmythos.model.transformer import OpenMythos

TILE = 8
"""Rows of a pass in deterministic mode: the most for which a lone row costs hardly more than one
row does, because a product of few rows takes the time of reading its weights."""

LONG = 1 << 15
"""Numbers from which torch sums a lone row in parts."""

RULES = 16
"""Halting rules kept for requests to come, each with its own threshold and its memory of rows."""

CHANGED = "the model was changed after its engine was made: make a new engine"

Some = TypeVar("Some", Sequence[Row], Tensor)
"""Rows, or one tensor's."""
Choose = Callable[..., int]
"""The slot that a row `(track, row)` writes and reads, or `(track, row, ahead)` loops later."""
Also = Callable[[Track, Row], int | None]
"""Another slot that it writes."""


@dataclass(frozen=True)
class View:
    """What one call's rows write and see of the pages, in one slot each."""

    span: Span
    write: Int[Tensor, " rows"]
    """Where each row's entry goes; rows beyond are padding."""
    read: Int[Tensor, " entries"]
    """Places of all that is seen, sequence by sequence."""
    shape: tuple[int, int]
    """`(sequences, keys)` of `read`."""
    also: tuple[Int[Tensor, " some"], Int[Tensor, " some"]] | None = None
    """Rows whose entry is written a second time, and where."""


@dataclass(frozen=True)
class Seated:
    """What of a call's rows stays the same as long as they are in flight."""

    rows: Sequence[Row]
    seats: Int[Tensor, " rows"]
    """Filled up, where rows are to stand alone, with the seat of padding."""
    rope: Rope
    outer: list[Entries]
    """For the native code, their places in each slot of prelude and coda."""


@dataclass(frozen=True)
class Lane:
    """One layer's entries in all pages, `(places, ...)` per declared name, as a call sees them."""

    data: dict[str, Tensor]
    view: View

    def update(self, kept: dict[str, Tensor], span: Span, slot: int) -> dict[str, Tensor]:
        """Write this call's entries `(rows, ...)`; return what it sees, `(sequences, keys, ..)`."""
        view, seen = self.view, {}
        for name, x in kept.items():
            data = self.data[name]
            x = x.to(data.dtype)
            data.index_copy_(0, view.write, x[: len(view.write)])
            if view.also is not None:
                rows, places = view.also
                data.index_copy_(0, places, x.index_select(0, rows))
            seen[name] = data.index_select(0, view.read).unflatten(0, view.shape)
        return seen

    def entries(self, span: Span, slot: int) -> None:
        """Return nothing: what the native code takes does not come here."""


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
        self.device, self.dtype = weight.device, weight.dtype
        self.lanes = len(model.core.layers)
        shape = ((pages + 1) * PAGE,)  # the last page stays zero: what lies beyond a row's length
        self.null = pages * PAGE
        self.storage = [
            {
                name: torch.zeros(*shape, *size, dtype=self.dtype, device=self.device)
                for name, size in declaration(model).items()
            }
            for _ in range(self.lanes)
        ]
        self.paged = paged(model, self.storage)
        self.native = self.paged is not None
        """Whether the native code takes the whole model: rows then depend on nothing else."""
        self.deterministic = deterministic
        self.alone = deterministic and not self.native
        """Whether rows go through torch, and must not depend on each other."""
        self.rope = self._rope_table()
        self._last: Seated | None = None
        self.carry = torch.empty(0)
        self.quiet = torch.zeros(1, dtype=torch.bool)  # by seat, for rules decided natively
        self.rules: dict[Hashable, Rule | None] = {}
        self.decided: dict[Hashable, Decided | None] = {}
        """The same as the native code knows them; None: it does not."""
        self.memories: dict[Hashable, Memory] = {}
        wide = torch.float32 if self.dtype.itemsize < 4 else self.dtype
        self.h = torch.zeros(1, self.config.hidden_size, dtype=wide, device=self.device)
        self.drive = torch.zeros_like(self.h)
        self.seats: list[int] = []  # free ones; seat 0 is that of padding

    def _rope_table(self) -> Rope:
        positions = torch.arange(self.config.max_length, device=self.device)
        table = rope_table(positions, *self.model.rope_kind())
        return table.per_head()

    def check(self) -> None:
        """Look, once in each tick, whether the model is what it was.

        Raises:
            RuntimeError: the native code took all of it and does not any more.
        """
        if not self.native:
            return
        if self.paged is None or not self.paged.stands():
            self.paged = paged(self.model, self.storage)  # its weights may only have moved
        if self.paged is None or not may_run():
            raise RuntimeError(CHANGED)

    def keep_rules(
        self, used: Set[Hashable], name: Hashable, make: Callable[[], Rule | None]
    ) -> None:
        """Have a halting rule by its name; forget rules that are not used where they are many."""
        if name not in self.rules and len(self.rules) >= RULES:
            self.rules = {key: rule for key, rule in self.rules.items() if key in used}
            self.memories = {key: part for key, part in self.memories.items() if key in used}
        if name not in self.rules:
            self.rules[name] = make()
        self.decided = {key: decided_here(rule) for key, rule in self.rules.items()}

    # Seats

    def _sit(self, rows: Sequence[Row]) -> None:
        """Give each row a seat, making more where they do not suffice."""
        missing = len(rows) - len(self.seats)
        if missing > 0:
            size = len(self.h)
            more = max(missing, size)
            self.h = _longer(self.h, more)
            self.drive = _longer(self.drive, more)
            self.quiet = _longer(self.quiet, more)
            self.memories = {
                key: tuple(_longer(part, more) for part in memory)
                for key, memory in self.memories.items()
            }
            self.seats += range(size + more - 1, size - 1, -1)
        for row in rows:
            row.seat = self.seats.pop()

    def stand_up(self, rows: Sequence[Row]) -> None:
        """Free the rows' seats."""
        self.seats += [row.seat for row in rows]

    def clear(self) -> None:
        """Free all seats: no row is left anywhere."""
        self.seats = list(range(len(self.h) - 1, 0, -1))

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, from and to."""
        if not copies:
            return
        offsets = torch.arange(PAGE, device=self.device)
        pages = _whole(copies).to(self.device)  # (copies, 2)
        source, target = ((pages[:, side : side + 1] * PAGE + offsets).flatten() for side in (0, 1))
        for data in (data for lane in self.storage for data in lane.values()):
            data.index_copy_(0, target, data.index_select(0, source))

    # What a call sees

    def _tiles(self, rows: Some) -> Iterator[Some]:
        size = TILE if self.alone else MOST_ROWS if self.native else max(1, len(rows))
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    def _padded(self, values: Sequence[int], tiled: bool | None = None) -> Int[Tensor, " rows"]:
        """As a tensor; of `TILE` values where rows are to stand alone."""
        if self.alone if tiled is None else tiled:
            values = [*values, *[0] * (TILE - len(values))]
        return _whole(values).to(self.device)

    def _seated(self, rows: Sequence[Row]) -> Seated:
        """Return what stays of rows; prelude, loops and coda often see the same ones in turn."""
        if self._last is None or self._last.rows != rows:
            slots = range(outer_slots(self.model)) if self.native else ()
            self._last = Seated(
                rows,
                self._padded([row.seat for row in rows]),
                self.rope.select(self._padded([row.position for row in rows])),
                [self._entries(rows, _always(slot)) for slot in slots],
            )
        return self._last

    def _view(self, rows: Sequence[Row], slot: Choose, also: Also | None = None) -> View:
        """Let rows write `slot` and read all positions up to their own there."""
        write = [row.track.table.write(slot(row.track, row), row.position) for row in rows]
        second = []
        if also is not None:
            for number, row in enumerate(rows):
                place = also(row.track, row)
                if place is not None:
                    second.append((number, row.track.table.write(place, row.position)))
        build = self._alone if self.alone else self._together
        span, read = build(rows, slot)
        return View(
            span,
            _whole(write).to(self.device),
            torch.from_numpy(read.reshape(-1)).to(self.device),
            (read.shape[0], read.shape[1]),
            None if not second else tuple(torch.tensor(second, device=self.device).t()),
        )

    def _entries(
        self, rows: Sequence[Row], slot: Choose, also: Also | None = None, loops: int = 1
    ) -> Entries:
        """Places for the native code, `(loops, rows)`: it reads the tables' own lists of them."""
        write, read, second = [], [], []
        for ahead in range(loops):
            for row in rows:
                table, place = row.track.table, slot(row.track, row, ahead)
                write.append(table.write(place, row.position))
                read.append(table.base + place * table.step)
        if also is not None and any(row.track.job.layout.latest for row in rows):
            for row in rows:
                other = also(row.track, row)
                second.append(-1 if other is None else row.track.table.write(other, row.position))
        counts = [row.position + 1 for row in rows]
        return Entries(
            _whole(write).view(loops, -1),
            _whole(counts),
            max(counts),
            read=_whole(read).view(loops, -1),
            also=_whole([second] * loops) if max(second, default=-1) >= 0 else None,
        )

    def _alone(self, rows: Sequence[Row], slot: Choose) -> tuple[Span, np.ndarray]:
        lengths = tuple(row.position + 1 for row in rows)
        keys = -(-max(lengths) // PAGE) * PAGE  # so that every row's entries are aligned alike
        read = np.full((len(rows), keys), self.null)
        for places, row, length in zip(read, rows, lengths, strict=True):
            places[:length] = row.track.table.addresses[slot(row.track, row), :length]
        return self._span(rows, keys, alone=lengths), read

    def _together(self, rows: Sequence[Row], slot: Choose) -> tuple[Span, np.ndarray]:
        """Rows of one sequence that read one slot share what they read."""
        groups = [
            (track, place, list(members))
            for (track, place), members in groupby(
                rows, lambda row: (row.track, slot(row.track, row))
            )
        ]
        keys = max(row.position for row in rows) + 1
        widest = max(len(members) for _, _, members in groups)
        read = np.full((len(groups), keys), self.null)
        last = np.full((len(groups), widest), keys - 1)  # last key that a query sees
        pad: list[int] = []
        for number, (track, place, members) in enumerate(groups):
            positions = [row.position for row in members]
            length = positions[-1] + 1
            read[number, :length] = track.table.addresses[place, :length]
            last[number, : len(members)] = positions
            pad += range(number * widest, number * widest + len(members))
        visible = torch.from_numpy(np.arange(keys) <= last[:, :, None])
        full = len(pad) == len(groups) * widest
        span = self._span(
            rows,
            keys,
            visible=visible.unsqueeze(1).to(self.device),
            widest=widest,
            pad=None if full else _whole(pad).to(self.device),
        )
        return span, read

    def _span(self, rows: Sequence[Row], keys: int, **fields: object) -> Span:
        index = _whole([[row.position] for row in rows]).to(self.device)
        numbers = torch.arange(len(rows), device=self.device)
        return Span(len(rows), 1, index, keys, rows=numbers, **fields)  # type: ignore[arg-type]

    # The stages

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
                view = self._view(rows, _always(slot))
            lane = Lane(self.storage[number % self.lanes], view)
            yield Place(view.span, lane)

    def may_run_ahead(self, rows: Sequence[Row]) -> bool:
        """Whether rows can run several loops in one call: natively, with no other rule to ask."""
        if not self.native or len(rows) > MOST_ROWS:
            return False
        return all(self.decided[row.track.job.halting] for row in rows)

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
        for number in self._asked(rows, before, after):
            fires[number] = True
        return fires, loops

    def _one_loop(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Run a loop by torch; return the states before and after."""
        at, view = self._seated(rows), self._view(rows, Track.slot, Track.also)
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
        first = _whole([row.loop for row in rows])
        exits = Exits(
            [self.decided[row.track.job.halting] or BY_BUDGET for row in rows],
            _whole([min(loops, row.track.job.loops - row.loop) for row in rows]),
            torch.tensor([row.fired for row in rows]),
            self.quiet.index_select(0, at.seats) & (first > 0),
        )
        h, drive = self.h.index_select(0, at.seats), self.drive.index_select(0, at.seats)
        new = h.clone()
        entries = self._entries(rows, Track.slot, Track.also, loops)
        paged.loops(new, at.rope, drive, self.carry, first, entries, exits)
        self.quiet.index_copy_(0, at.seats, exits.quiet)
        for row, fired in zip(rows, exits.fired.tolist(), strict=True):
            row.fired = fired
        return h, new, exits

    def _asked(
        self, rows: Sequence[Row], before: Sequence[Tensor], after: Sequence[Tensor]
    ) -> list[int]:
        """Ask the rules that were not decided natively; return which rows they fire on."""
        asked = {
            halting
            for halting, rule in self.rules.items()
            if rule is not None and not (self.native and self.decided[halting])
        }
        if not asked:
            return []
        exits: list[int] = []
        old, new = torch.cat(list(before)), torch.cat(list(after))
        kinds: dict[tuple[Hashable, bool], list[int]] = {}
        for number, row in enumerate(rows):
            halting = row.track.job.halting
            if halting in asked:
                kinds.setdefault((halting, row.loop == 0), []).append(number)
        for (halting, fresh), numbers in kinds.items():
            tiled = self._tiled(self.rules[halting])
            size = TILE if tiled else MOST_ROWS if self.native else len(rows)
            for start in range(0, len(numbers), size):
                some = numbers[start : start + size]
                fires = self._ask(halting, fresh, rows, some, old, new)
                exits += [number for number, does in zip(some, fires, strict=True) if does]
        return exits

    def _tiled(self, rule: Rule | None) -> bool:
        """Whether what a rule says of a row might depend on how many rows it is asked about.

        Torch's elementwise functions have other bits in the last few numbers of an array, and it
        sums a single long row in parts, one for each thread.
        """
        small = self.config.vocab_size < LONG
        return self.deterministic and not (self.native and small and isinstance(rule, Divergence))

    def _ask(
        self,
        halting: Hashable,
        fresh: bool,
        rows: Sequence[Row],
        numbers: list[int],
        before: Tensor,
        after: Tensor,
    ) -> list[bool]:
        """Let one rule decide on some rows, and keep its memory of them."""
        rule = self.rules[halting]
        assert rule is not None
        tiled = self._tiled(rule)
        chosen = self._padded(numbers, tiled)
        before, after = before.index_select(0, chosen), after.index_select(0, chosen)
        some = [rows[number] for number in numbers]
        seats = self._padded([row.seat for row in some], tiled)
        if fresh:
            memory = rule.start(len(chosen), before)
        else:
            memory = tuple(x.index_select(0, seats) for x in self.memories[halting])
        ends = [row.loop + 1 == row.track.job.loops for row in some]
        last = self._padded(ends, tiled).bool()
        fires, memory = rule.decide(before, after, memory, last)
        if halting not in self.memories:
            self.memories[halting] = tuple(x.new_zeros(len(self.h), *x.shape[1:]) for x in memory)
        real = seats[: len(some)]
        for kept, x in zip(self.memories[halting], memory, strict=True):
            kept.index_copy_(0, real, x[: len(some)])
        return fires[: len(some)].tolist()

    def leave(self, rows: Sequence[Row]) -> None:
        """Make of each row that left the core the state that its rule hands to the coda."""
        kinds: dict[Hashable, list[int]] = {}
        for row in rows:
            kinds.setdefault(row.track.job.halting, []).append(row.seat)
        for halting, numbers in kinds.items():
            rule = self.rules[halting]
            if rule is None or halting not in self.memories:
                continue
            seats = _whole(numbers).to(self.device)
            memory = tuple(x.index_select(0, seats) for x in self.memories[halting])
            self.h.index_copy_(0, seats, rule.output(self.h.index_select(0, seats), memory))

    def finish(
        self, rows: Sequence[Row], wanted: Sequence[Row]
    ) -> Float[Tensor, "wanted vocab"] | None:
        """Run the coda on rows and the head on those `wanted`, in the same order; return logits."""
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
            numbers = _whole(chosen).to(self.device)
            y = y.index_select(0, numbers)
        return torch.cat([self._readout(part) for part in self._tiles(y)])

    def _readout(self, y: Tensor) -> Tensor:
        more = TILE - len(y) if self.alone else 0
        return self.model.readout(_longer(y, more) if more else y)[: len(y)]


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
    return PAGE * len(model.core.layers) * numbers * model.embed.weight.dtype.itemsize


def layout(model: OpenMythos, loops: int, policy: str) -> Layout:
    """The slots of a sequence that takes up to so many loops."""
    return Layout(outer_slots(model), loops, latest=policy == "last")


def _longer(x: Tensor, more: int) -> Tensor:
    return torch.cat([x, x.new_zeros(more, *x.shape[1:])])


def _whole(values: Sequence[Any]) -> Tensor:
    """Whole numbers as int64: by way of NumPy, which takes a tenth of `torch.tensor`'s time."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _always(slot: int) -> Choose:
    return lambda *_: slot
