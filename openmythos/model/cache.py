"""Kept keys and values, one slot per loop, and what each token of a call may see.

An attention kind declares what it keeps per token (`{"key": (kv_heads, head_dim), ...}`); the
cache allocates, writes, rolls back and applies the exit rule for any such declaration. A reader
at loop t sees position p as it was at loop `min(t, exit_loop of p)`. That is kept true by
writing an exited token's entry into the deeper slots once, when it exits, so that every read is
a plain view: see `docs/decisions.md`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from openmythos.config import CachePolicy
from openmythos.errors import CacheError
from openmythos.numbers import whole

Declaration = dict[str, tuple[int, ...]]
"""What one attention keeps per token: names and shapes."""

# From so many queries on, values as narrow as MLA's are filled up to the width of the keys on the
# CPU: its fused attention wants one width, and without it all weights are written out. With 8
# heads of 48 and 32, 256 queries take 29 ms instead of 62 and 1,024 take 83 instead of 306.
FEW_QUERIES = 64


@dataclass(frozen=True)
class Entries:
    """Numbers of the places where each row of a call writes, and of those it sees."""

    write: Int[Tensor, "*loops rows"]
    """Where a row's own entry goes, before any is read."""
    counts: Int[Tensor, " rows"]
    """How many entries each row sees."""
    most: int
    """At least the largest count."""
    first: Int[Tensor, " rows"] | None = None
    """The first entry that a row sees, where the others follow it."""
    read: Int[Tensor, "*loops rows"] | None = None
    """Addresses in memory of lists of int64, one for each row, where they do not."""
    also: Int[Tensor, "*loops rows"] | None = None
    """A second place for a row's own entry; -1: none."""


@dataclass(frozen=True)
class Span:
    """The tokens of one call, or those of them still in the core, and what they may see.

    `rows` is None while every token of the batch takes part: tensors then are
    `(batch, sequence, ...)`. Afterwards they are `(rows, ...)`, in order of sequence and place.
    """

    batch: int
    sequence: int
    index: Int[Tensor, "batch sequence"]
    """Each token's place among the real tokens of its sequence, cached ones included."""
    keys: int
    """How many places the longest sequence has after this call."""
    start: int | None = None
    """First place of this call, where it is one for all sequences and nothing is padded."""
    visible: Bool[Tensor, "sequences 1 queries keys"] | None = None
    """Mask for attention; None: everything, or what `causal` allows."""
    causal: bool = False
    real: Bool[Tensor, "batch sequence"] | None = None
    """Which tokens are not padding; None: all."""
    rows: Int[Tensor, " rows"] | None = None
    """Flat numbers (sequence by sequence) of the tokens that take part."""
    sequences: Int[Tensor, " sequences"] | None = None
    """Sequences that have such tokens; None: all."""
    widest: int = 0
    """Most of them in one sequence."""
    pad: Int[Tensor, " rows"] | None = None
    """Each row's number in the `(sequences, widest)` layout; None: the same."""
    alone: tuple[int, ...] | None = None
    """How many keys each row sees, where a row's bits may depend on nothing else in the call (the
    engine's deterministic mode); rows beyond these pad the call to a fixed number of rows."""
    _entries: dict[int, Entries] = field(init=False, default_factory=dict, compare=False)
    natives: dict[Any, Any] = field(init=False, default_factory=dict, compare=False)
    """What the native code found out about layers, which stands for one call."""

    @classmethod
    def fresh(cls, batch: int, sequence: int, mask: Tensor | None, device: torch.device) -> Span:
        """Tokens of a call without a cache: keys lie in the call's own order, padding included."""
        span = cls.after([0] * batch, sequence, mask, device)
        if span.real is None:
            return span
        causal = torch.ones(sequence, sequence, dtype=torch.bool, device=device).tril()
        itself = torch.eye(sequence, dtype=torch.bool, device=device)  # no row sees nothing
        visible = causal & (span.real.unsqueeze(1) | itself)
        return replace(span, visible=visible.unsqueeze(1))

    @classmethod
    def after(
        cls, lengths: Sequence[int], sequence: int, mask: Tensor | None, device: torch.device
    ) -> Span:
        """Tokens that follow `lengths` cached ones; `mask` (batch, sequence) marks real ones."""
        batch, past = len(lengths), lengths[0]
        if mask is not None and bool(mask.all()):
            mask = None
        if mask is None and all(length == past for length in lengths):
            index = torch.arange(past, past + sequence, device=device).expand(batch, sequence)
            span = cls(batch, sequence, index, past + sequence, start=past)
            if past == 0 or sequence == 1:
                return replace(span, causal=sequence > 1)
        elif mask is None:
            before = torch.tensor(list(lengths), device=device)
            index = before.unsqueeze(1) + torch.arange(sequence, device=device)
            span = cls(batch, sequence, index, max(lengths) + sequence)
        else:
            before = torch.tensor(list(lengths), device=device)
            index = (before.unsqueeze(1) + mask.cumsum(1) - 1).clamp(min=0)
            longest = int((before + mask.sum(1)).max())
            span = cls(batch, sequence, index, longest, real=mask)
        return replace(span, visible=span.causal_mask(index).unsqueeze(1))

    def causal_mask(self, index: Int[Tensor, "*rows"]) -> Bool[Tensor, "*rows keys"]:
        """Which places each token sees: its own and all before."""
        places = torch.arange(self.keys, device=index.device)
        return places <= index.unsqueeze(-1)

    def all_rows(self) -> Int[Tensor, " rows"]:
        """Flat numbers of the tokens that take part."""
        if self.rows is not None:
            return self.rows
        if self.real is not None:
            return self.real.flatten().nonzero().squeeze(1)
        return torch.arange(self.batch * self.sequence, device=self.index.device)

    def at_rows(self, rows: Int[Tensor, " rows"]) -> Span:
        """The same call with only the tokens of these flat numbers (sorted) taking part."""
        sequence_of = rows // self.sequence
        sequences, counts = sequence_of.unique_consecutive(return_counts=True)
        widest = int(counts.max())
        index = self.index.flatten().index_select(0, rows)
        visible = self.causal_mask(index)
        pad = None
        if int(counts.min()) != widest:
            first = counts.cumsum(0) - counts
            numbers = torch.arange(len(rows), device=rows.device)
            place = numbers - first.repeat_interleave(counts)
            group = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
            pad = group * widest + place
            padded = visible.new_ones(len(counts) * widest, self.keys)
            visible = padded.index_copy_(0, pad, visible)
        see_all = self.sequence == 1 and self.start is not None
        return replace(
            self,
            rows=rows,
            sequences=None if len(sequences) == self.batch else sequences,
            widest=widest,
            pad=pad,
            causal=False,
            visible=None if see_all else visible.unflatten(0, (-1, widest)).unsqueeze(1),
        )

    def first_sequences(self, count: int) -> Span:
        """The same call without a cache, cut to its first `count` sequences."""
        if count == self.batch:
            return self
        return replace(
            self,
            batch=count,
            index=self.index[:count],
            real=None if self.real is None else self.real[:count],
            visible=self.visible if self.start is not None else self.visible[:count],  # type: ignore[index]
        )

    def reordered(self, order: Int[Tensor, " sequences"]) -> Span:
        """The same call without a cache, its sequences in another order."""
        if self.start is not None:
            return self
        assert self.real is not None
        assert self.visible is not None
        return replace(
            self,
            index=self.index.index_select(0, order),
            real=self.real.index_select(0, order),
            visible=self.visible.index_select(0, order),
        )

    def entries(self, max_length: int) -> Entries | None:
        """Where rows write and read in a flattened `(batch, max_length)`; None with padding."""
        if self.real is not None and self.rows is None:
            return None
        if max_length not in self._entries:
            rows = self.all_rows()
            index = self.index.flatten().index_select(0, rows)
            first = rows // self.sequence * max_length
            self._entries[max_length] = Entries(first + index, index + 1, self.keys, first=first)
        return self._entries[max_length]

    def spread(self, x: Float[Tensor, "*rows heads width"]) -> Tensor:
        """Lay rows out by sequence, `(sequences, widest, heads, width)`, as attention needs."""
        if self.rows is None:
            return x
        if self.pad is not None:
            padded = x.new_zeros((int(self.visible.shape[0]) * self.widest, *x.shape[1:]))  # type: ignore[union-attr]
            x = padded.index_copy(0, self.pad, x)
        return x.unflatten(0, (-1, self.widest))

    def gather(self, x: Float[Tensor, "sequences widest heads width"]) -> Tensor:
        """Undo `spread`."""
        if self.rows is None:
            return x
        x = x.flatten(0, 1)
        return x if self.pad is None else x.index_select(0, self.pad)


@dataclass(frozen=True)
class Place:
    """One layer's view of a call: where its keys go, and attention over what is visible."""

    span: Span
    store: Keeper | None = None
    slot: int = 0

    def keep(self, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep this call's entries `(*rows, ...)`; return all visible, `(sequences, keys, ...)`."""
        if self.store is None:
            return kept
        return self.store.update(kept, self.span, self.slot)

    def attend(
        self,
        query: Float[Tensor, "*rows heads width"],
        key: Float[Tensor, "sequences keys kv_heads width"],
        value: Float[Tensor, "sequences keys kv_heads value"],
        scale: float,
    ) -> Float[Tensor, "*rows heads value"]:
        """Scaled dot-product attention of this call's queries over the visible keys."""
        span = self.span
        if span.alone is not None:
            return self._attend_alone(query, key, value, scale)
        query, width = span.spread(query), value.shape[-1]
        narrower = key.shape[-1] - width
        if narrower > 0 and query.shape[1] > FEW_QUERIES and query.device.type == "cpu":
            value = F.pad(value, (0, narrower))
        y = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=span.visible,
            is_causal=span.causal,
            scale=scale,
            enable_gqa=query.shape[-2] != key.shape[-2],
        )
        return span.gather(y.transpose(1, 2)[..., :width])

    def _attend_alone(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend row by row, each over its true number of keys.

        Padding and a mask would change the order of a sum, and with two threads the number of
        sequences in a call changes it too.
        """
        assert self.span.alone is not None
        y = query.new_zeros(*query.shape[:2], value.shape[-1])
        for row, keys in enumerate(self.span.alone):
            own = slice(row, row + 1)
            y[row] = F.scaled_dot_product_attention(
                query[own].clone().transpose(0, 1).unsqueeze(0),  # aligned alike for every row
                key[own, :keys].transpose(1, 2),
                value[own, :keys].transpose(1, 2),
                scale=scale,
                enable_gqa=query.shape[-2] != key.shape[-2],
            )[0, :, 0]
        return y


@runtime_checkable
class Keeper(Protocol):
    """Where one layer's entries are kept: `Store`, `Frozen` in training, pages in the engine."""

    def update(self, kept: dict[str, Tensor], span: Span, slot: int) -> dict[str, Tensor]:
        """Keep a call's entries; return all that it sees, `(sequences, keys, ...)`."""
        ...

    def entries(self, span: Span, slot: int) -> tuple[dict[str, Tensor], Entries] | None:
        """Return the storage, `(places, ...)` by name, and where a call's rows write and read.

        None where rows cannot do so themselves, one by one.
        """
        ...


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
        """Write this call's entries into a slot; return the slot's visible part."""
        return {name: self._write(self.data[name][slot], x, span) for name, x in kept.items()}

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
    token. Slots grow when a call runs more loops than any before, with a halting rule when a loop
    is reached that has none.
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
        grows: bool = True,
    ) -> None:
        """`grows`: whether loops that have no slot get one, or share the last."""
        empty = torch.empty(batch_size, max_length, 0, dtype=dtype, device=device)
        self.outer = [Store(declaration, 1, empty) for declaration in outer]
        self.core = [Store(declaration, loops, empty) for declaration in core]
        self.batch_size, self.max_length, self.policy = batch_size, max_length, policy
        self.dtype, self.device, self.owner = dtype, device, owner
        self.grows = grows
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
