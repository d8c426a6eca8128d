"""Pages: which of them hold what, for whom, and which may be given to another. Free of torch.

A page is `PAGE` positions of one slot. A slot is one loop of the core, or the prelude and coda;
so the loop stands in the address, and a reader at loop t finds position p in slot
`min(t, exit_loop of p)` by an address alone: tokens of different depths mix, nothing is copied.

The pages of `PAGE` positions make a column, one page for each slot that any of them wrote. Full
columns are shared by sequences that begin alike and kept for later ones until their pages are
needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PAGE = 16
"""Positions of a page."""

Addresses = np.ndarray[Any, np.dtype[np.int64]]

ADDRESS = np.dtype(np.int64)
"""A place in the storage, as the native code reads it."""


@dataclass(eq=False)
class Column:
    """`PAGE` positions: a page for each slot that one of them wrote."""

    pages: dict[int, int] = field(default_factory=dict)
    users: int = 1
    key: tuple[Hashable, tuple[int, ...]] | None = None
    """What it is found by: the column before it (the salt at the start) and its token ids. The
    dictionary hashes this key and then compares it, so two texts never meet in one column."""
    exits: tuple[int, ...] = ()
    """Last loop of each position, of a column that can be found."""


class Pages:
    """A fixed number of pages: free, cached (of columns that nobody uses now) or used.

    Sequences are promised all pages they may come to need before they start, so `take` never
    fails and nobody is ever put back.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.promised = 0
        """Pages that sequences may still take, and those that count for their tables."""
        self.cached = 0
        self._free = list(range(total - 1, -1, -1))
        self._found: dict[Hashable, Column] = {}
        self._unused: OrderedDict[Column, None] = OrderedDict()  # longest unused first

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that some sequence reads or writes."""
        return self.total - self.free - self.cached

    @property
    def available(self) -> int:
        """Pages that can still be promised."""
        return self.free + self.cached - self.promised

    def promise(self, count: int) -> bool:
        """Set `count` pages aside, if there are as many."""
        if count > self.available:
            return False
        self.promised += count
        return True

    def give_back(self, count: int) -> None:
        """Undo a promise that is not needed any more."""
        self.promised -= count

    def take(self) -> int:
        """Take a promised page."""
        if not self._free:
            self._evict()
        self.promised -= 1
        return self._free.pop()

    def free_page(self, page: int) -> None:
        """Free one page of a column that nobody else knows."""
        self._free.append(page)

    def share(self, column: Column) -> None:
        """Count one more user."""
        if not column.users:
            del self._unused[column]
            self.cached -= len(column.pages)
        column.users += 1

    def release(self, column: Column) -> None:
        """Count one user less; release a sequence's columns from its end to its start."""
        column.users -= 1
        if column.users:
            return
        if column.key is None:
            self._free += column.pages.values()
        else:
            # A column's users use all columns before it, so columns end up here behind those
            # that follow them, and eviction never leaves one that cannot be reached.
            self._unused[column] = None
            self.cached += len(column.pages)

    def find(self, salt: Hashable, token_ids: Sequence[int]) -> list[Column]:
        """Return the columns that hold the start of `token_ids`, as far as there are any."""
        columns: list[Column] = []
        before: Hashable = salt
        for start in range(0, len(token_ids) - PAGE + 1, PAGE):
            column = self._found.get((before, tuple(token_ids[start : start + PAGE])))
            if column is None:
                break
            columns.append(column)
            before = column
        return columns

    def publish(
        self, column: Column, before: Hashable, token_ids: tuple[int, ...], exits: tuple[int, ...]
    ) -> Column | None:
        """Let a full column be found behind `before`, the column in front of it or the salt.

        Returns the column to go on with: one that was found there already replaces the caller's,
        which is freed. None: it could not replace it and the caller's stays its own.
        """
        key = (before, token_ids)
        found = self._found.get(key)
        if found is None:
            column.key, column.exits = key, exits
            self._found[key] = column
            return column
        # Outside deterministic mode exits may differ by rounding, and with them the page count;
        # what is promised must stay covered.
        if not found.users and len(found.pages) > len(column.pages) + self.available:
            return None
        self.share(found)
        self.release(column)
        return found

    def forget(self) -> None:
        """Let no column be found any more; free the pages of those that nobody uses now.

        Whoever uses one keeps it, and must publish none behind it.
        """
        for column in self._found.values():
            column.key = None
        for column in self._unused:
            self._free += column.pages.values()
        self._found.clear()
        self._unused.clear()
        self.cached = 0

    def _evict(self) -> None:
        column, _ = self._unused.popitem(last=False)
        assert column.key is not None
        del self._found[column.key]
        self.cached -= len(column.pages)
        self._free += column.pages.values()

    def check(self) -> None:
        """Assert what always holds, for tests."""
        free, unused = set(self._free), list(self._unused)
        assert len(free) == len(self._free), "a page is free twice"
        kept = [page for column in unused for page in column.pages.values()]
        assert len(set(kept)) == len(kept) == self.cached
        assert free.isdisjoint(kept)
        assert self.free + self.cached + self.used == self.total
        assert 0 <= self.promised <= self.free + self.cached
        assert all(not column.users for column in unused)
        gone: set[int] = set()
        for column in unused:
            gone.add(id(column))
        for key, column in self._found.items():
            assert column.key == key
            assert column.key is not None
            before = column.key[0]
            if isinstance(before, Column):
                assert self._found.get(before.key) is before, "a column behind one that is gone"
                assert not (column.users and not before.users), "used behind an unused one"
            assert (id(column) in gone) == (not column.users)


@dataclass(frozen=True)
class Layout:
    """Which slots a sequence has: `outer` for prelude and coda, then the core's.

    With `latest`, one slot comes before the loops' that every loop overwrites: all that tokens
    after the prompt write and read, and all that is left of the prompt once it has been read.
    """

    outer: int
    loops: int
    latest: bool = False
    page_bytes: int | None = None
    """Of a page in memory; with it, what a sequence's `Table` takes counts as pages too."""

    @property
    def first(self) -> int:
        """Slot of loop 0."""
        return self.outer + self.latest

    @property
    def slots(self) -> int:
        """All of them."""
        return self.first + self.loops

    def pages(self, prompt: int, new: int) -> int:
        """Most pages of a sequence of `prompt` and up to `new` more positions in the core."""
        columns, table = -(-(prompt + new) // PAGE), self.table_pages(prompt + new)
        if not self.latest:
            return columns * self.slots + table
        read = -(-prompt // PAGE)
        return read * self.slots + (columns - read) * self.first + table

    def fork_pages(self, prompt: int, new: int) -> int:
        """Most pages of another sequence that shares the first one's full columns."""
        columns = -(-(prompt + new) // PAGE) - prompt // PAGE
        own = columns * (self.first if self.latest else self.slots)
        return own + self.table_pages(prompt + new)

    def table_pages(self, length: int) -> int:
        """Pages that take as much memory as the table of a sequence of so many positions.

        They are promised and never taken: choices that share a long prompt each have a table of it.
        """
        if self.page_bytes is None:
            return 0
        return -(-(self.slots + 1) * length * ADDRESS.itemsize // self.page_bytes)


class Table:
    """Where one sequence's entries lie.

    `addresses[slot, p]` is the place in the storage (page times `PAGE` plus offset) where a
    reader of `slot` finds position p: its own entry of that slot, or its last one before.
    """

    def __init__(self, pages: Pages, layout: Layout, capacity: int, promised: int) -> None:
        self.pages, self.layout, self.promised = pages, layout, promised
        self.addresses: Addresses = np.zeros((layout.slots, capacity), dtype=ADDRESS)
        self.base: int = self.addresses.__array_interface__["data"][0]
        """Where `addresses` lies in memory."""
        self.step = self.addresses.strides[0]
        """Bytes from a slot's addresses to the next one's."""
        self.exits = np.full(capacity, -1, dtype=np.int64)
        """Last loop of each position; -1 while it is in the core."""
        self.columns: list[Column] = []
        self.done = 0
        """Columns of which every position has left."""
        self.findable = not layout.latest
        """Whether all columns up to `done` can be found by others, and later ones may be."""

    def adopt(self, columns: Sequence[Column]) -> None:
        """Start with columns that others have written."""
        for column in columns:
            self.pages.share(column)
            self.columns.append(column)
            self._point(len(self.columns) - 1, column)
        self.done = len(columns)

    def _point(self, number: int, column: Column) -> None:
        """Read a found column's positions from its pages."""
        offsets = np.arange(PAGE)
        places = slice(number * PAGE, (number + 1) * PAGE)
        first = self.layout.first
        for slot in range(first):
            self.addresses[slot, places] = column.pages[slot] * PAGE + offsets
        exits = np.array(column.exits)
        of_slot = np.array([column.pages[first + loop] for loop in range(exits.max() + 1)])
        for loop in range(self.layout.loops):
            pages = of_slot[np.minimum(loop, exits)]
            self.addresses[first + loop, places] = pages * PAGE + offsets
        self.exits[places] = exits

    def write(self, slot: int, position: int) -> int:
        """Return the address where `position` writes its entry of `slot`."""
        number, offset = divmod(position, PAGE)
        address = self._page(number, slot) * PAGE + offset
        self.addresses[slot, position] = address
        return address

    def write_ahead(self, first: int, count: int, position: int) -> list[int]:
        """Do so for so many slots from `first` on."""
        number, offset = divmod(position, PAGE)
        slots = range(first, first + count)
        found = [self._page(number, slot) * PAGE + offset for slot in slots]
        self.addresses[first : first + count, position] = found
        return found

    def _page(self, number: int, slot: int) -> int:
        """The page of a column's slot, taken where it has none."""
        while number >= len(self.columns):
            self.columns.append(Column())
        pages = self.columns[number].pages
        if slot not in pages:
            self.promised -= 1
            pages[slot] = self.pages.take()
        return pages[slot]

    def leave(self, position: int, loop: int) -> None:
        """Let readers of deeper slots find `position` in its last one, that of `loop`."""
        self.exits[position] = loop
        slot = self.layout.first + loop
        self.addresses[slot + 1 :, position] = self.addresses[slot, position]

    def complete(self, length: int, token_ids: Sequence[int], salt: Hashable) -> None:
        """Note that every position before `length` has left; let full columns be found.

        `salt` is None where they shall not be.
        """
        while (self.done + 1) * PAGE <= length:
            number = self.done
            column = self.columns[number]
            if not self.layout.latest:
                self._give_back(self.layout.slots - len(column.pages))
            self.done += 1
            if salt is None or not self.findable:
                self.findable = False
                continue
            places = slice(number * PAGE, (number + 1) * PAGE)
            before = self.columns[number - 1] if number else salt
            exits = tuple(self.exits[places].tolist())
            found = self.pages.publish(column, before, tuple(token_ids[places]), exits)
            if found is None:
                self.findable = False
            elif found is not column:
                self.columns[number] = found
                self._point(number, found)

    def end_prompt(self, prompt: int) -> None:
        """Keep only the slot `latest` of what has been read (layouts that have one)."""
        layout = self.layout
        if not layout.latest:
            return
        for column in self.columns:
            for slot in range(layout.first, layout.slots):
                if slot in column.pages:
                    self.pages.free_page(column.pages.pop(slot))
                else:
                    self._give_back(1)
        assert len(self.columns) == -(-prompt // PAGE)

    def fork(self, length: int, promised: int) -> tuple[Table, list[tuple[int, int]]]:
        """Return a table that shares the first `length` positions, and pages to copy (from, to).

        Full columns are shared; of a column that has begun, each needs its own pages.
        """
        self.promised -= promised
        other = Table(self.pages, self.layout, self.addresses.shape[1], promised)
        other.addresses[:, :length] = self.addresses[:, :length]
        other.exits[:length] = self.exits[:length]
        full = length // PAGE
        other.done, other.findable = min(self.done, full), self.findable
        for column in self.columns[:full]:
            self.pages.share(column)
            other.columns.append(column)
        copies: list[tuple[int, int]] = []
        if length % PAGE:
            begun = other.addresses[:, full * PAGE : length]
            before = begun // PAGE
            column = Column()
            for slot, page in self.columns[full].pages.items():
                column.pages[slot] = self.pages.take()
                other.promised -= 1
                copies.append((page, column.pages[slot]))
                begun[before == page] += (column.pages[slot] - page) * PAGE
            other.columns.append(column)
        return other, copies

    def release(self) -> None:
        """Give everything back."""
        for column in reversed(self.columns):
            self.pages.release(column)
        self._give_back(self.promised)
        self.columns = []

    def _give_back(self, count: int) -> None:
        self.pages.give_back(count)
        self.promised -= count
