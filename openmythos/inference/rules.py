"""The halting rules of requests: which there are, what each says of rows, and what it remembers.

Rules that the native code knows are decided there, loop by loop; all others are asked here after
each loop, those of one kind together, whatever thresholds requests gave them. What a rule
remembers of a row lies in the row's seat, as its state does, in one memory for each kind.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.inference.scheduler import Row
from openmythos.inference.tiles import TILE, filled, in_parts, integers, longer
from openmythos.model.halting import Memory, Rule, with_thresholds
from openmythos.model.native.exits import BY_BUDGET, Decided, Exits, decided_here
from openmythos.model.native.linear import MOST_ROWS

LONG = 1 << 15
"""Numbers from which torch sums a lone row in parts, one for each thread."""


class Rules:
    """Keeps the halting rules of requests, asks them about rows, and holds their memories.

    Args:
        vocab_size: the model's.
        device: the model's.
        native: whether the native code takes the whole model, and so decides what it can.
        deterministic: whether what a rule says of a row must depend on that row alone.
    """

    def __init__(
        self, vocab_size: int, device: torch.device, *, native: bool, deterministic: bool
    ) -> None:
        self.device, self.native, self.deterministic = device, native, deterministic
        self.short = vocab_size < LONG
        """Whether torch sums a row of logits in one piece."""
        self.kept: dict[Hashable, Rule | None] = {}
        """By the name that jobs have for them: of one kind, each threshold is one."""
        self.memories: dict[type[Rule], Memory] = {}
        """By seat, of the kinds that are asked here."""
        self._decided: dict[Hashable, Decided | None] = {}
        """The same as the native code knows them; None: it does not."""
        self._quiet = torch.zeros(1, dtype=torch.bool)
        """By seat, of the rules decided natively: `Exits.quiet`."""

    def have(self, name: Hashable, rule: Rule | None, used: Set[Hashable]) -> None:
        """Have a rule by its name, beside those that are `used`; forget all others."""
        self.kept = {key: rule for key, rule in self.kept.items() if key in used}
        self.kept.setdefault(name, rule)
        self._decided = {key: decided_here(rule) for key, rule in self.kept.items()}

    def grow(self, more: int) -> None:
        """Make room for so many more seats."""
        self._quiet = longer(self._quiet, more)
        self.memories = {
            kind: tuple(longer(part, more) for part in memory)
            for kind, memory in self.memories.items()
        }

    def all_native(self, rows: Sequence[Row]) -> bool:
        """Whether no row's rule has to be asked here."""
        return self.native and all(self._decided[row.track.job.halting] for row in rows)

    def exits(
        self, rows: Sequence[Row], seats: Tensor, first: Int[Tensor, " rows"], loops: int
    ) -> Exits:
        """Return what decides natively when rows leave; `first` are the loops they run next."""
        return Exits(
            [self._decided[row.track.job.halting] or BY_BUDGET for row in rows],
            integers([min(loops, row.track.job.loops - row.loop) for row in rows]),
            torch.from_numpy(np.array([row.fired for row in rows])),
            self._quiet.index_select(0, seats) & (first > 0),
        )

    def note(self, rows: Sequence[Row], seats: Tensor, exits: Exits) -> None:
        """Take over what has been decided natively."""
        self._quiet.index_copy_(0, seats, exits.quiet)
        for row, fired in zip(rows, exits.fired.tolist(), strict=True):
            row.fired = fired

    def asked(
        self, rows: Sequence[Row], before: Sequence[Tensor], after: Sequence[Tensor]
    ) -> list[int]:
        """Ask the rules that were not decided natively; return which rows they fire on.

        Args:
            rows: all that ran a loop.
            before: their states before it, in one or more parts.
            after: and after it.
        """
        asked = {
            name: rule
            for name, rule in self.kept.items()
            if rule is not None and not (self.native and self._decided[name])
        }
        if not asked:
            return []
        fires: list[int] = []
        old, new = torch.cat(list(before)), torch.cat(list(after))
        kinds: dict[tuple[type[Rule], bool], list[int]] = {}
        for number, row in enumerate(rows):
            rule = asked.get(row.track.job.halting)
            if rule is not None:
                kinds.setdefault((type(rule), row.loop == 0), []).append(number)
        for numbers in kinds.values():
            tiled = self._tiled(asked[rows[numbers[0]].track.job.halting])
            size = TILE if tiled else MOST_ROWS if self.native else len(rows)
            for some in in_parts(numbers, size):
                where = self._numbers(some, tiled)
                parts = old.index_select(0, where), new.index_select(0, where)
                said = self._ask([rows[number] for number in some], *parts, tiled=tiled)
                fires += [number for number, does in zip(some, said, strict=True) if does]
        return fires

    def _tiled(self, rule: Rule) -> bool:
        """Whether a rule is asked about a fixed number of rows, because its answer may hang on it.

        Torch's elementwise functions have other bits in the last few numbers of an array, and it
        sums a single long row in parts, one for each thread.
        """
        return self.deterministic and not (rule.row_by_row and self.native and self.short)

    def _numbers(self, values: Sequence[int], tiled: bool) -> Int[Tensor, " rows"]:
        """As a tensor; of a whole tile where a rule is asked in tiles."""
        return (filled if tiled else integers)(values).to(self.device)

    def _rule(self, rows: Sequence[Row], like: Tensor) -> Rule:
        """One rule for rows of one kind; `like` has as many, or more where a tile is filled up."""
        rules = [self.kept[row.track.job.halting] for row in rows]
        first = rules[0]
        assert first is not None
        if all(rule is first for rule in rules):
            return first
        thresholds = [rule.threshold for rule in rules if rule is not None]
        thresholds += [first.threshold] * (len(like) - len(rows))
        return with_thresholds(first, like.new_tensor(thresholds))

    def _ask(
        self,
        rows: Sequence[Row],
        before: Float[Tensor, "filled hidden"],
        after: Float[Tensor, "filled hidden"],
        *,
        tiled: bool,
    ) -> list[bool]:
        """Let one kind of rule decide on some rows, all in their first loop or none.

        Keeps what it remembers of them.
        """
        rule = self._rule(rows, after)
        kind, seats = type(rule), self._numbers([row.seat for row in rows], tiled)
        if rows[0].loop == 0:
            memory = rule.start(len(before), before)
        else:
            memory = tuple(x.index_select(0, seats) for x in self.memories[kind])
        ends = [row.loop + 1 == row.track.job.loops for row in rows]
        fires, memory = rule.decide(before, after, memory, self._numbers(ends, tiled).bool())
        if kind not in self.memories:
            places = len(self._quiet)
            self.memories[kind] = tuple(x.new_zeros(places, *x.shape[1:]) for x in memory)
        for kept, x in zip(self.memories[kind], memory, strict=True):
            kept.index_copy_(0, seats[: len(rows)], x[: len(rows)])
        return fires[: len(rows)].tolist()

    def output(self, rows: Sequence[Row], h: Float[Tensor, "seats hidden"]) -> None:
        """Make of the state of each row that left what its rule hands to the coda."""
        kinds: dict[type[Rule], tuple[Rule, list[int]]] = {}
        for row in rows:
            rule = self.kept[row.track.job.halting]
            if rule is not None and type(rule) in self.memories:
                kinds.setdefault(type(rule), (rule, []))[1].append(row.seat)
        for kind, (rule, numbers) in kinds.items():
            seats = integers(numbers).to(self.device)
            memory = tuple(x.index_select(0, seats) for x in self.memories[kind])
            h.index_copy_(0, seats, rule.output(h.index_select(0, seats), memory))
