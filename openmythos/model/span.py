"""What each token of a call may see, and attention over it.

Tokens of a call have a place in their sequence, behind what is cached, and leave the core at loops
of their own; padding takes no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

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
