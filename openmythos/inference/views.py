"""What rows write and see of the pages, in one slot each: for torch, and for the native code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from openmythos.inference.pages import PAGE
from openmythos.inference.scheduler import Row, Track
from openmythos.inference.tiles import integers
from openmythos.model.span import Entries, Span

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
class Lane:
    """One layer's entries in all pages, `(places, ...)` per declared name, as a call sees them."""

    data: dict[str, Tensor]
    view: View

    def update(self, kept: dict[str, Tensor], span: Span, slot: int) -> dict[str, Tensor]:
        """Write this call's entries `(rows, ...)`; return what it sees, `(sequences, keys, ..)`."""
        view, seen = self.view, {}
        for name, x in kept.items():
            data = self.data[name]
            new = x.to(data.dtype)
            data.index_copy_(0, view.write, new[: len(view.write)])
            if view.also is not None:
                rows, places = view.also
                data.index_copy_(0, places, new.index_select(0, rows))
            seen[name] = data.index_select(0, view.read).unflatten(0, view.shape).to(x.dtype)
        return seen

    def entries(self, span: Span, slot: int) -> None:
        """Return nothing: what the native code takes does not come here."""


class Views:
    """Makes views for torch.

    Args:
        null: a place that stays zero, read beyond a row's length.
        device: the model's.
        alone: whether each row attends by itself, so that its bits depend on nothing else.
    """

    def __init__(self, null: int, device: torch.device, *, alone: bool) -> None:
        self.null, self.device, self.alone = null, device, alone

    def of(self, rows: Sequence[Row], slot: Choose, also: Also | None = None) -> View:
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
            integers(write).to(self.device),
            torch.from_numpy(read.reshape(-1)).to(self.device),
            (read.shape[0], read.shape[1]),
            None if not second else tuple(torch.tensor(second, device=self.device).t()),
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
            pad=None if full else integers(pad).to(self.device),
        )
        return span, read

    def _span(self, rows: Sequence[Row], keys: int, **fields: object) -> Span:
        index = integers([[row.position] for row in rows]).to(self.device)
        numbers = torch.arange(len(rows), device=self.device)
        return Span(len(rows), 1, index, keys, rows=numbers, **fields)  # type: ignore[arg-type]


def entries(rows: Sequence[Row], slot: Choose, also: Also | None = None, loops: int = 1) -> Entries:
    """Places for the native code, `(loops, rows)`: it reads the tables' own lists of them."""
    write, read, second = list[Sequence[int]](), list[Sequence[int]](), []
    for row in rows:
        track, table = row.track, row.track.table
        first, last = slot(track, row, 0), slot(track, row, loops - 1)
        start = table.base + first * table.step
        if first == last:
            write.append([table.write(first, row.position)] * loops)
            read.append([start] * loops)
        else:
            write.append(table.write_ahead(first, loops, row.position))
            read.append(range(start, start + loops * table.step, table.step))
    if also is not None and any(row.track.job.layout.latest for row in rows):
        for row in rows:
            other = also(row.track, row)
            second.append(-1 if other is None else row.track.table.write(other, row.position))
    counts = [row.position + 1 for row in rows]
    return Entries(
        _by_loop(write),
        integers(counts),
        max(counts),
        read=_by_loop(read),
        also=integers([second] * loops) if max(second, default=-1) >= 0 else None,
    )


def _by_loop(values: Sequence[Sequence[int]]) -> Int[Tensor, "loops rows"]:
    """Turn what each row has for each loop."""
    return integers(values).t().contiguous()


def always(slot: int) -> Choose:
    """Choose the same slot for every row."""
    return lambda *_: slot
