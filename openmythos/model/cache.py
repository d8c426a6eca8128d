"""Kept keys and values, one slot per loop.

An attention kind declares what it keeps per token (`{"key": (kv_heads, head_dim), ...}`); the
cache allocates, writes, rolls back and applies the exit rule for any such declaration. A reader
at loop t sees position p as it was at loop `min(t, exit_loop of p)`. That is kept true by
writing an exited token's entry into the deeper slots once, when it exits, so that every read is
a plain view: see `docs/decisions.md`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from openmythos.config import CachePolicy
from openmythos.errors import CacheError
from openmythos.model.span import Entries, Span
from openmythos.numbers import at_least, whole

Declaration = dict[str, tuple[int, ...]]
"""What one attention keeps per token: names and shapes."""


def _for_any_call() -> torch.inference_mode:
    """Allocate so that later calls may write, in inference mode or not."""
    return torch.inference_mode(False)


class Store:
    """One layer's entries for every slot: `(slots, batch, max_length, ...)` per declared name."""

    def __init__(self, declaration: Declaration, slots: int, empty: Tensor) -> None:
        """`empty` is `(batch, max_length, 0)` and brings dtype and device."""
        with _for_any_call():
            self.data = {
                name: empty.new_zeros((slots, *empty.shape[:2], *shape))
                for name, shape in declaration.items()
            }
        self.slots = slots

    def update(self, kept: dict[str, Tensor], span: Span, slot: int) -> dict[str, Tensor]:
        """Write this call's entries into a slot; return the slot's visible part, as `kept` is."""
        seen = {name: self._write(self.data[name][slot], x, span) for name, x in kept.items()}
        return {name: x.to(kept[name].dtype) for name, x in seen.items()}

    def entries(self, span: Span, slot: int) -> tuple[dict[str, Tensor], Entries] | None:
        """Return a slot's storage, and where the call's rows write and read in it."""
        data = {name: x[slot] for name, x in self.data.items()}
        found = span.entries(next(iter(data.values())).shape[1])
        return None if found is None else (data, found)

    def _write(self, slot: Tensor, x: Tensor, span: Span) -> Tensor:
        if span.rows is None and span.start is not None:
            slot[:, span.start : span.keys] = x
        else:
            rows = span.all_rows()
            if span.rows is None:
                x = x.flatten(0, 1).index_select(0, rows)
            places = self._places(span, rows, slot.shape[1])
            slot.flatten(0, 1).index_copy_(0, places, x.to(slot.dtype))
        seen = slot.narrow(1, 0, span.keys)
        return seen if span.sequences is None else seen.index_select(0, span.sequences)

    @staticmethod
    def _places(span: Span, rows: Tensor, max_length: int) -> Tensor:
        """Each row's number in the flattened `(batch, max_length)`."""
        index = span.index.flatten().index_select(0, rows)
        return rows // span.sequence * max_length + index

    def carry_deeper(self, span: Span, rows: Tensor, slot: int) -> None:
        """Copy the rows' entries of `slot` into every deeper slot: they left the core there."""
        if slot + 1 == self.slots:
            return
        for data in self.data.values():
            places = self._places(span, rows, data.shape[2])
            flat = data.flatten(1, 2)
            flat[slot + 1 :, places] = flat[slot, places]

    def grow(self, slots: int) -> None:
        """Add slots; what is cached already left the core at the last slot or before."""
        for name, data in self.data.items():
            more = data[-1:].expand(slots - self.slots, *data.shape[1:])
            with _for_any_call():
                self.data[name] = torch.cat([data, more])
        self.slots = slots

    def longer(self, max_length: int) -> Store:
        """Return a store of the same entries with room for more tokens."""
        grown = copy.copy(self)
        with _for_any_call():
            grown.data = {}
            for name, data in self.data.items():
                room = data.new_zeros((*data.shape[:2], max_length, *data.shape[3:]))
                room[:, :, : data.shape[2]] = data
                grown.data[name] = room
        return grown

    def select(self, rows: Int[Tensor, " rows"]) -> Store:
        """Return a store of these sequences."""
        chosen = copy.copy(self)
        with _for_any_call():
            chosen.data = {name: data.index_select(1, rows) for name, data in self.data.items()}
        return chosen

    def collapse(self) -> None:
        """Keep the last slot alone."""
        with _for_any_call():
            self.data = {name: data[-1:].clone() for name, data in self.data.items()}
        self.slots = 1

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(data.nbytes for data in self.data.values())


class Cache:
    """All kept keys and values of a batch of sequences, for every layer and loop.

    Made by `model.new_cache`. With the policy `per_loop`, as in training, a token at loop t sees
    others as they were at loop t. With `last`, a prompt keeps all loops while it is read in
    (calls with more than one token); from the first one-token call on only each position's last
    loop is kept, which is `loops` times smaller and another model than the one trained.

    Loops may change between calls: the result equals one uncached call with loops given per
    token, but for rounding where `dtype` is narrower than the states. Slots grow when a call runs
    more loops than any before, with a halting rule when a loop is reached that has none.
    """

    def __init__(
        self,
        outer: Sequence[Declaration],
        core: Sequence[Declaration],
        *,
        batch_size: int,
        max_length: int,
        loops: int,
        policy: CachePolicy,
        dtype: torch.dtype,
        device: torch.device,
        owner: object,
        weights: torch.dtype | None = None,
        grows: bool = True,
    ) -> None:
        """Allocate.

        Args, beside those of `OpenMythos.new_cache`:
            weights: dtype of the model's, for which the cache is; default: `dtype`.
            grows: whether loops that have no slot get one, or share the last.
        """
        empty = torch.empty(batch_size, max_length, 0, dtype=dtype, device=device)
        self.outer = [Store(declaration, 1, empty) for declaration in outer]
        self.core = [Store(declaration, loops, empty) for declaration in core]
        self.batch_size, self.max_length, self.policy = batch_size, max_length, policy
        self.dtype, self.device, self.owner = dtype, device, owner
        self.weights, self.grows = dtype if weights is None else weights, grows
        self.lengths = [0] * batch_size

    @property
    def length(self) -> int:
        """Tokens cached for the longest sequence."""
        return max(self.lengths)

    @property
    def slots(self) -> int:
        """Slots that each core layer has now."""
        return self.core[0].slots

    @property
    def nbytes(self) -> int:
        """Bytes allocated, over all layers and slots."""
        return sum(store.nbytes for store in [*self.outer, *self.core])

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        """Return a copy with entries of its own, for the same model."""
        memo[id(self.owner)] = self.owner
        memo[id(self)] = copied = object.__new__(type(self))
        with _for_any_call():
            copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def select(self, rows: Sequence[int] | Int[Tensor, " rows"]) -> Cache:
        """Return a cache of these sequences, in this order; this one stays as it is.

        A row may stand more than once: a prompt that was read once goes on in several ways
        (`cache.select([0] * n)`), and a beam search keeps its best.

        Raises:
            CacheError: there are no rows, or one is not from 0 to batch_size - 1.
        """
        numbers = []
        for row in rows:
            number = whole(row)
            if number is None or not 0 <= number < self.batch_size:
                raise CacheError(f"rows holds {row!r}, must be from 0 to {self.batch_size - 1}")
            numbers.append(number)
        if not numbers:
            raise CacheError("rows holds nothing: at least one sequence must stay")
        chosen = copy.copy(self)
        at = torch.tensor(numbers, device=self.device)
        chosen.outer = [store.select(at) for store in self.outer]
        chosen.core = [store.select(at) for store in self.core]
        chosen.lengths = [self.lengths[number] for number in numbers]
        chosen.batch_size = len(numbers)
        return chosen

    def longer(self, max_length: int) -> Cache:
        """Return a cache of the same entries with room for more tokens; this one stays as it is.

        Args:
            max_length: tokens that each sequence may have in it.

        Raises:
            CacheError: they are fewer than this one has room for.
        """
        if not at_least(max_length, self.max_length):
            raise CacheError(
                f"max_length={max_length!r} must be an integer of {self.max_length} or more, which "
                "the cache has room for already"
            )
        grown = copy.copy(self)
        grown.outer = [store.longer(max_length) for store in self.outer]
        grown.core = [store.longer(max_length) for store in self.core]
        grown.max_length, grown.lengths = int(max_length), list(self.lengths)
        return grown

    def rollback(self, count: int | Sequence[int] | Int[Tensor, " batch"]) -> None:
        """Forget the last `count` tokens of every sequence (or one count for each).

        Raises:
            CacheError: a count is no integer, negative, or above what is cached.
        """
        # A tensor, or an array of NumPy's, is no `Sequence`.
        several = isinstance(count, Sequence) or bool(getattr(count, "ndim", None))
        counts = list(count) if several else [count] * self.batch_size  # type: ignore[arg-type]
        if len(counts) != self.batch_size:
            raise CacheError(f"count has {len(counts)} values, must have {self.batch_size}")
        kept = []
        for length, value in zip(self.lengths, counts, strict=True):
            forgotten = whole(value)
            if forgotten is None or not 0 <= forgotten <= length:
                raise CacheError(f"count={value} must be from 0 to the {length} tokens cached")
            kept.append(length - forgotten)
        self.lengths = kept

    def begin(self, sequence: int, mask: Tensor | None, loops: int) -> Span:
        """Make room for a call of `sequence` tokens that runs `loops` loops for certain.

        Raises:
            CacheError: the call does not fit behind what is cached.
        """
        self.make_room(sequence, mask, loops)
        return Span.after(self.lengths, sequence, mask, self.device)

    def make_room(self, sequence: int, mask: Tensor | None, loops: int) -> None:
        """Grow, or collapse, to what a call needs.

        Raises:
            CacheError: the call does not fit behind what is cached.
        """
        new = [sequence] * self.batch_size if mask is None else mask.sum(1).tolist()
        after = [n + k for n, k in zip(self.lengths, new, strict=True)]
        if max(after) > self.max_length:
            raise CacheError(
                f"the cache holds max_length={self.max_length} tokens and has {self.length}: "
                f"{max(new)} more do not fit; make a longer one or roll back"
            )
        decoding = self._decoding(sequence)
        for store in self.core:
            if decoding and store.slots > 1:
                store.collapse()
            elif not decoding and store.slots < loops:
                store.grow(loops)

    def _decoding(self, sequence: int) -> bool:
        """Whether a call of so many tokens keeps each position's last loop alone."""
        return self.policy == "last" and sequence == 1

    def reach(self, loop: int, sequence: int, most: int) -> int:
        """Give loop `loop` of a call its slot, where it is to have one.

        A rule may end every token long before its budget, so slots are not added for all of it:
        whenever a loop has none, there are twice as many after.

        Args:
            loop: in whose slot nobody has written yet, if it has none.
            sequence: tokens of the call.
            most: loops that the call may run.

        Returns:
            The first loop that has no slot yet; `most` where the others share one.
        """
        if not self.grows or self._decoding(sequence):
            return most
        if loop >= self.slots:
            slots = min(2 * self.slots, most)
            for store in self.core:
                store.grow(slots)
        return self.slots

    def commit(self, span: Span) -> None:
        """Count the call's tokens as cached."""
        real = span.real
        new = [span.sequence] * self.batch_size if real is None else real.sum(1).tolist()
        self.advance(new)

    def advance(self, new: Sequence[int]) -> None:
        """Count so many more tokens of each sequence as cached."""
        self.lengths = [n + k for n, k in zip(self.lengths, new, strict=True)]

    def slot_of(self, loop: int) -> int:
        """The slot that loop `loop` writes and reads."""
        return min(loop, self.slots - 1)

    def leave(self, span: Span, rows: Tensor, loop: int) -> None:
        """Record that the tokens of these flat numbers left the core after `loop`."""
        for store in self.core:
            store.carry_deeper(span, rows, self.slot_of(loop))


class Frozen:
    """A store for training with per-token exits: nothing is written in place.

    Holds one core layer's entries of one loop; tokens that have left keep theirs, so that those
    still in the core see the keys they will meet at inference, with gradients. A store serves
    one loop alone, because activation checkpointing runs its layer again in the backward pass.
    """

    def __init__(
        self, earlier: dict[str, Tensor] | None = None, active: Tensor | None = None
    ) -> None:
        self.earlier, self.active = earlier or {}, active
        self.brought: dict[str, Tensor] = {}

    def after(self, active: Bool[Tensor, "batch sequence"]) -> Frozen:
        """Return the store of the next loop, in which only `active` tokens bring new entries."""
        return Frozen(self.brought, active)

    def update(self, kept: dict[str, Tensor], span: Span, slot: int) -> dict[str, Tensor]:
        """Take the entries of active tokens, keep the others'; shapes `(batch, sequence, ...)`."""
        if self.active is not None and self.earlier:
            for name, new in kept.items():
                active = self.active.view(*self.active.shape, *[1] * (new.ndim - 2))
                kept[name] = torch.where(active, new, self.earlier[name])
        self.brought = dict(kept)
        return kept

    def entries(self, span: Span, slot: int) -> None:
        """Return None: what is kept here carries gradients."""
        return
