"""Halting rules: when a token leaves the core. Classes, then the table that names them.

A rule sees a row's state before and after a loop and says which rows exit. Its memory is
tensors whose first axis is the row, so core and engine carry it without knowing the rule. A row
that a rule fires on runs one loop more (unless its budget ends first), so that its last slot in
the cache holds keys of the state the rule decided on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from openmythos.config import MythosConfig
from openmythos.errors import InputError
from openmythos.model.wide import autocast_dtype, keep_wide
from openmythos.numbers import real

DEFAULT_THRESHOLD = 0.9  # of a gate that was never trained

Memory = tuple[Tensor, ...]
Readout = Callable[[Tensor], Tensor]
"""From a state `(rows, hidden)` to logits `(rows, vocab)`, without the coda."""


@runtime_checkable
class Rule(Protocol):
    """One way to decide when tokens exit; built for one call."""

    threshold: float
    """Its bound. `decide` reads it anew and takes a tensor `(rows,)` in its place, with which each
    row has its own: see `with_thresholds`."""
    row_by_row: bool
    """Whether what `decide` says of a row depends on nothing but that row, to the bit, where the
    readout does so too. The engine asks other rules about a fixed number of rows at a time."""

    def start(self, rows: int, like: Tensor) -> Memory:
        """Return the memory of fresh rows; `like` is `(rows, hidden)`."""
        ...

    def decide(
        self, before: Tensor, after: Tensor, memory: Memory, last: Tensor
    ) -> tuple[Tensor, Memory]:
        """Return which rows exit, `(rows,)`; `last` marks rows in their budget's last loop."""
        ...

    def output(self, after: Tensor, memory: Memory) -> Tensor:
        """Return the state handed to the coda, `(rows, hidden)`."""
        ...

    def ponder(self, memory: Memory) -> Tensor | None:
        """Return the cost of each row's loops, `(rows,)`, where the rule is learned with one."""
        ...


class LearnedExit(nn.Module):
    """Probability of an exit from the state after a loop: from its direction and its change.

    Features are the state's direction and the logarithm of how far, relative to its length, the
    last loop moved it; never the loop's number, which would bind it to one depth. `size` hidden
    units see them where there are any: "some answer is clear, whichever" is no linear question.
    Kept in fp32 or wider: in bf16 a threshold of 0.999 would round to 1 and never be reached.
    """

    threshold: Tensor

    def __init__(self, hidden: int, size: int = 0) -> None:
        super().__init__()
        self.size = size
        if size:
            self.w_in = nn.Parameter(torch.zeros(size, hidden + 1))
            self.bias_in = nn.Parameter(torch.zeros(size))
        self.weight = nn.Parameter(torch.zeros(size or hidden + 1))
        self.bias = nn.Parameter(torch.zeros(1))  # sharding refuses scalars
        self.register_buffer("threshold", torch.tensor(DEFAULT_THRESHOLD))

    @torch.no_grad()
    def start_anew(self) -> None:
        """Forget what was learned; hidden units start at random, but the same each time."""
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.zero_()
        for parameter in (self.w_in, self.weight) if self.size else ():
            start = torch.empty(parameter.shape, dtype=torch.float32).normal_(generator=generator)
            parameter.copy_(start / start.shape[-1] ** 0.5)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedExit:
        return super()._apply(keep_wide(fn), recurse)  # type: ignore[no-untyped-call]

    def forward(
        self, before: Float[Tensor, "*rows hidden"], after: Float[Tensor, "*rows hidden"]
    ) -> Float[Tensor, "*rows"]:
        """Return logits of the exit probability, in fp32 or wider."""
        if autocast_dtype(after.device) is not None:
            with torch.autocast(after.device.type, enabled=False):
                return self.forward(before, after)
        weight, bias = self.weight.to(after.dtype), self.bias.to(after.dtype)
        length = torch.linalg.vector_norm(after, dim=-1, keepdim=True) + 1e-8
        moved = torch.linalg.vector_norm(after - before, dim=-1, keepdim=True) / length
        direction, change = after * (after.shape[-1] ** 0.5 / length), (moved + 1e-6).log()
        if not self.size:
            return (direction * weight[:-1]).sum(-1) + weight[-1] * change[..., 0] + bias
        w_in, bias_in = self.w_in.to(after.dtype), self.bias_in.to(after.dtype)
        inner = F.linear(direction, w_in[:, :-1], bias_in) + change * w_in[:, -1]
        return (inner.relu() * weight).sum(-1) + bias


def no_rule(threshold: float | None, _learned: Any, _readout: Readout) -> None:
    """Exit when the budget ends and not before: nothing has to be asked, and no bound is taken."""
    if threshold is not None:
        raise InputError(f"threshold={threshold} must be left out with halting='none'")


class Gate:
    """Exit when the learned gate's probability reaches `threshold`; nothing is accumulated.

    The gate is trained after the model, on frozen states, by looking ahead to each token's best
    later loop (`openmythos.training.gate`). Default threshold: the one chosen then on validation
    text.
    """

    row_by_row = False  # torch's sigmoid has other bits in the last few numbers of an array

    def __init__(self, threshold: float | None, learned: Any, readout: Readout) -> None:
        if threshold is None:
            threshold = float(learned["gate"].threshold)
        self.threshold = _between(threshold, 0, 1)
        self.gate: LearnedExit = learned["gate"]

    def start(self, rows: int, like: Tensor) -> Memory:
        """Keep nothing."""
        return ()

    def decide(
        self, before: Tensor, after: Tensor, memory: Memory, last: Tensor
    ) -> tuple[Tensor, Memory]:
        """Rows whose probability has reached the threshold."""
        return self.gate(before, after).sigmoid() >= self.threshold, memory

    def output(self, after: Tensor, memory: Memory) -> Tensor:
        """The state as it is."""
        return after

    def ponder(self, memory: Memory) -> None:
        """Nothing: loops cost no more than their time."""


class RelativeChange:
    """Exit when two loops in a row move the state by less than `threshold` of its length.

    No training (the latent-difference exit of Geiping et al. 2025, arXiv 2502.05171).
    """

    row_by_row = False

    def __init__(self, threshold: float | None, learned: Any, readout: Readout) -> None:
        self.threshold = _between(0.03 if threshold is None else threshold, 0, float("inf"))

    def start(self, rows: int, like: Tensor) -> Memory:
        """Was the last loop quiet? `(rows,)`."""
        return (torch.zeros(rows, dtype=torch.bool, device=like.device),)

    def decide(
        self, before: Tensor, after: Tensor, memory: Memory, last: Tensor
    ) -> tuple[Tensor, Memory]:
        """Rows whose last two loops were both quiet."""
        moved = torch.linalg.vector_norm(after - before, dim=-1)
        quiet = moved < self.threshold * torch.linalg.vector_norm(before, dim=-1)
        return quiet & memory[0], (quiet,)

    def output(self, after: Tensor, memory: Memory) -> Tensor:
        """The state as it is."""
        return after

    def ponder(self, memory: Memory) -> None:
        """Nothing: loops cost no more than their time."""


class Divergence:
    """Exit when a loop moves the readout's distribution by less than `threshold` nats (KL).

    The readout is norm and head without the coda, so that it is local to the row; KL(after ||
    before) as in Huginn's exit, whose default was 5e-4 (arXiv 2502.05171).
    """

    row_by_row = True  # softmax and sum go along each row; see `decide`

    def __init__(self, threshold: float | None, learned: Any, readout: Readout) -> None:
        self.threshold = _between(5e-4 if threshold is None else threshold, 0, float("inf"))
        self.readout = readout

    def start(self, rows: int, like: Tensor) -> Memory:
        """Keep nothing yet; from the first loop on the log-probabilities, `(rows, vocab)`."""
        return ()

    def decide(
        self, before: Tensor, after: Tensor, memory: Memory, last: Tensor
    ) -> tuple[Tensor, Memory]:
        """Rows whose distribution moved by less than the threshold."""
        earlier = memory[0] if memory else self._logits(before).log_softmax(-1)
        logits = self._logits(after)
        later = logits.log_softmax(-1)
        # Not `later.exp()`, whose bits depend on how many rows there are.
        moved = (logits.softmax(-1) * (later - earlier)).sum(-1)
        return moved < self.threshold, (later,)

    def _logits(self, h: Tensor) -> Tensor:
        logits = self.readout(h)
        return logits.float() if logits.itemsize < 4 else logits

    def output(self, after: Tensor, memory: Memory) -> Tensor:
        """The state as it is."""
        return after

    def ponder(self, memory: Memory) -> None:
        """Nothing: loops cost no more than their time."""


class Graves:
    """Adaptive computation time (Graves 2016, arXiv 1603.08983), for comparison.

    The output is the mean of the states weighted by exit probabilities; the remainder goes to
    the loop where their sum reaches `threshold` or the budget ends, so weights sum to 1 at every
    budget. Its ponder cost, loops taken plus remainder, is learned jointly with the model.
    """

    row_by_row = False

    def __init__(self, threshold: float | None, learned: Any, readout: Readout) -> None:
        if "act" not in learned:
            raise InputError(
                "halting='act' needs a model trained with it: set learned_act=True in its config"
            )
        self.threshold = _between(0.99 if threshold is None else threshold, 0, 1)
        self.exit: LearnedExit = learned["act"]

    def start(self, rows: int, like: Tensor) -> Memory:
        """Probability spent `(rows,)`, weighted sum of states, loops plus remainder `(rows,)`."""
        zeros = like.new_zeros(rows)
        return zeros, torch.zeros_like(like), zeros

    def decide(
        self, before: Tensor, after: Tensor, memory: Memory, last: Tensor
    ) -> tuple[Tensor, Memory]:
        """Rows whose summed probability reaches the threshold, or whose budget ends."""
        spent, total, ponder = memory
        p = self.exit(before, after).sigmoid()
        running = spent < 1
        ends = running & ((spent + p >= self.threshold) | last)
        weight = torch.where(running, torch.where(ends, 1 - spent, p), 0.0)
        total = total + weight.unsqueeze(-1) * after
        ponder = ponder + running + torch.where(ends, 1 - spent, 0.0)
        spent = torch.where(ends, 1.0, spent + weight)
        return ends, (spent, total, ponder)

    def output(self, after: Tensor, memory: Memory) -> Tensor:
        """The weighted mean of the states."""
        return memory[1]

    def ponder(self, memory: Memory) -> Float[Tensor, " rows"]:
        """Loops plus remainder, Graves' equation 13."""
        return memory[2]


HALTING: dict[str, Callable[[float | None, Any, Readout], Rule | None]] = {
    "none": no_rule,
    "gate": Gate,
    "delta": RelativeChange,
    "kl": Divergence,
    "act": Graves,
}


def make_rule(name: str, threshold: float | None, learned: Any, readout: Readout) -> Rule | None:
    """Build the rule `name` for one call; None where nothing ends a token but its budget.

    Args:
        name: a key of `HALTING`.
        threshold: the rule's bound; None is its own default.
        learned: the core's learned exits by name.
        readout: from a state to logits, for rules that compare distributions.

    Raises:
        InputError: no such rule, or a threshold it cannot take.
    """
    if not isinstance(name, str) or name not in HALTING:
        raise InputError(f"halting={name!r} must be one of {', '.join(HALTING)}")
    return HALTING[name](threshold, learned, readout)


def with_thresholds(rule: Rule, thresholds: Float[Tensor, " rows"]) -> Rule:
    """Return a rule of the same kind for one call, in which each row has a threshold of its own.

    What it says of a row of fp32 or wider states is what a rule with that row's threshold says, to
    the bit: torch rounds a number to such a tensor's dtype before it compares or multiplies.
    """
    made = copy(rule)
    made.threshold = thresholds  # type: ignore[assignment]  # for `decide` alone, which takes both
    return made


def select(memory: Memory, rows: Tensor | Bool[Tensor, " rows"]) -> Memory:
    """Take some rows of a rule's memory."""
    return tuple(part.index_select(0, rows) for part in memory)


def halting_kinds(config: MythosConfig) -> list[str]:
    """Return the rules that a model can follow: `act` asks for one that was trained with it."""
    return [name for name in HALTING if name != "act" or config.learned_act]


def _between(threshold: float, least: float, most: float) -> float:
    number = real(threshold)
    if number is None:
        raise InputError(f"threshold={threshold!r} must be a finite number")
    if not least < number <= most:
        upper = f" and at most {most}" if math.isfinite(most) else ""
        raise InputError(f"threshold={threshold} must be above {least}{upper}")
    return number
