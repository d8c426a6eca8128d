"""When rows leave the core natively: their budgets, their rules, and which of these have fired.

The rules `gate` and `delta` need nothing but a row's state and are decided where it is; others
need torch. A call runs until the first row leaves, because who calls then has something to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from openmythos.model.halting import Gate, LearnedExit, RelativeChange, Rule
from openmythos.model.native.describe import altered, patched
from openmythos.model.native.mirrored import code_of
from openmythos.model.native.structures import ExitsStructure

NEVER, GATE, CHANGE = range(3)


class Decided(NamedTuple):
    """A rule as the native code knows it."""

    kind: int
    threshold: float
    gate: LearnedExit | None = None


BY_BUDGET = Decided(NEVER, 0.0)
"""No rule."""


def decided_here(rule: Rule | None) -> Decided | None:
    """Return a rule for the native code; None: it must be asked by torch."""
    if rule is None:
        return BY_BUDGET
    if type(rule) not in (Gate, RelativeChange) or patched(rule) or not code_of(type(rule)).written:
        return None
    if isinstance(rule, RelativeChange):
        return Decided(CHANGE, rule.threshold)
    assert isinstance(rule, Gate)
    if (
        type(rule.gate) is not LearnedExit
        or altered([rule.gate])
        or not code_of(LearnedExit).written
    ):
        return None
    return Decided(GATE, rule.threshold, rule.gate)


@dataclass
class Exits:
    """What decides when each row of a call leaves, and after the call, what was decided."""

    rules: Sequence[Decided]
    """Each row's, or one for all; all gates are the same one."""
    budgets: Int[Tensor, " rows"]
    """Loops that each may still run."""
    fired: Bool[Tensor, " rows"]
    """Whether a row's rule had fired before the last loop that was run."""
    moved_little: Bool[Tensor, " rows"] | None = None
    """For `delta`: whether the last loop did so to a row's state; None: it is the first."""
    ran: int = 0
    """Loops run, until the first row left."""

    def __post_init__(self) -> None:
        """Own what is written to."""
        self.fired = self.fired.clone()
        before = self.moved_little
        self.quiet = torch.zeros_like(self.fired) if before is None else before.clone()
        """The same after the last loop."""
        self.fires: Bool[Tensor, " rows"] = torch.zeros_like(self.fired)
        """Whether it fires after that loop."""

    @property
    def loops(self) -> int:
        """Most loops that any row may run."""
        return int(self.budgets.max())

    def structure(self, hidden: int) -> ExitsStructure:
        """Return what the native code reads; it lives as long as this object."""
        rows = len(self.budgets)
        each = list(self.rules) * (rows if len(self.rules) == 1 else 1)
        gate = next((rule.gate for rule in each if rule.gate is not None), None)
        self._alive = (
            self.budgets.contiguous(),
            torch.from_numpy(np.array([rule.kind for rule in each], dtype=np.int64)),
            torch.from_numpy(np.array([rule.threshold for rule in each], dtype=np.float32)),
            *_weights(gate),
            self.quiet,
            self.fired,
            self.fires,
            torch.empty(rows, hidden, dtype=torch.float32, device="cpu"),
        )
        pointers = (None if part is None else part.data_ptr() for part in self._alive)
        self._structure = ExitsStructure(*pointers, 0 if gate is None else gate.size)
        return self._structure

    def read(self) -> None:
        """Take over what the native code has found."""
        self.ran = self._structure.ran


def _weights(gate: LearnedExit | None) -> list[Tensor | None]:
    """What the native code reads of a gate, in its order."""
    if gate is None:
        return [None] * 4
    inner = [gate.w_in, gate.bias_in] if gate.size else [None, None]
    return [None if part is None else part.float() for part in (*inner, gate.weight, gate.bias)]
