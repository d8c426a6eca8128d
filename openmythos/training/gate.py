"""Trains the halting gate after the model, by looking ahead to each token's best later loop.

The model is frozen and run to twice its mean loops; every state is decoded, which gives each
token's loss at each depth. A state is fit to stop at where it and the next (a fired token runs
one loop more) are as good as the best later one within a margin. One-step gains would mislead:
they are zero while a long chain is being worked. Then the gate learns by binary cross-entropy, and
its threshold is chosen on held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from openmythos.config import HaltingKind
from openmythos.errors import ConfigError, InputError
from openmythos.model.halting import LearnedExit
from openmythos.model.transformer import OpenMythos, cross_entropy
from openmythos.training.optimizer import is_sharded

CHANCES = (
    *(0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.985),
    *(0.99, 0.993, 0.995, 0.996, 0.997, 0.998, 0.999),
)
"""Thresholds that are tried on held-out text."""

UPDATES = 16
"""Steps of the optimizer on each batch: the model is frozen, and its states cost most."""


@dataclass(frozen=True)
class GateReport:
    """What the trained gate does on held-out text, at its threshold."""

    threshold: float
    mean_loops: float
    loss: float
    """Nats per token with the gate."""
    full_loss: float
    """Nats per token at full depth."""
    accuracy: float
    """Share of tokens whose likeliest id is the wanted one, with the gate."""
    full_accuracy: float
    """The same at full depth."""
    budget: int
    """Full depth: the loops the gate may use."""


def fit_to_stop(losses: Float[Tensor, "loops ..."], margin: float) -> Bool[Tensor, "loops ..."]:
    """Mark states that are, as is the next one, within `margin` nats of the best later state."""
    best_later = losses.flip(0).cummin(0).values.flip(0)
    good = losses <= best_later + margin
    following = torch.cat([good[1:], torch.ones_like(good[:1])])
    return good & following


class Labelled(NamedTuple):
    """Token ids and what should be said at each place, both `(batch, sequence)`."""

    token_ids: Int[Tensor, "batch sequence"]
    targets: Int[Tensor, "batch sequence"]


def train_gate(
    model: OpenMythos,
    batch: Callable[[int], Labelled],
    held_out: Iterable[Labelled],
    *,
    steps: int = 100,
    budget: int | None = None,
    margin: float = 0.02,
    cost: float | None = None,
    lost_accuracy: float | None = None,
    lr: float = 0.005,
    at_once: int | None = None,
) -> GateReport:
    """Train `model.core.gate` and set its threshold; nothing else of the model changes.

    It works in evaluation mode, and leaves the model in the mode that it had.

    Args:
        model: trained.
        batch: gives what a step learns from.
        held_out: what the threshold is chosen on; any iterable, read through once.
        steps: batches; each serves for `UPDATES` steps of the optimizer.
        budget: most loops; default: twice the model's mean.
        margin: nats by which a state may be worse than the best later one.
        cost: nats a token that exits may cost; the threshold is the lowest that keeps to it.
            Default: the margin, or without limit where `lost_accuracy` is given.
        lost_accuracy: accuracy that exits may cost, for text with one right answer at each place,
            where a few wrong ones cost more nats than they matter.
        lr: learning rate of AdamW, decaying linearly to 0.
        at_once: sequences of a batch that the model runs together, for want of memory. Default:
            all. Changes no result but rounding.

    Raises:
        ConfigError: the model is sharded.
        InputError: nothing is held out, or a target is no token id; in what is held out before any
            work, and in a batch before a step learns from it.
    """
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ConfigError(
            "model must be whole for its gate's training, is sharded: gather its state dict, and "
            "load it into a model of one process"
        )
    held_out = list(held_out)
    if not held_out:
        raise InputError("held_out holds nothing, must hold text to choose the threshold on")
    for asked in held_out:
        _check_targets("held_out", asked, model.config.vocab_size)
    budget, was_training = budget or 2 * model.config.mean_loops, model.training
    if cost is None:
        cost = margin if lost_accuracy is None else math.inf
    most = 1.0 if lost_accuracy is None else lost_accuracy
    model.eval()
    try:
        _learn(model, batch, steps, budget, margin, lr, at_once)
        return _choose_threshold(model, held_out, budget, cost, most)
    finally:
        model.core.gate.requires_grad_(False)
        model.train(was_training)


def _check_targets(name: str, asked: Labelled, vocab_size: int) -> None:
    least, most = (int(x) for x in asked.targets.aminmax())
    if least < 0 or most >= vocab_size:
        raise InputError(
            f"{name} has the target {least if least < 0 else most}, must have token ids from 0 to "
            f"{vocab_size - 1}: every place counts, so leave out those that ask for nothing"
        )


def _learn(
    model: OpenMythos,
    batch: Callable[[int], Labelled],
    steps: int,
    budget: int,
    margin: float,
    lr: float,
    at_once: int | None,
) -> None:
    """Fit the gate to which states are fit to stop at."""
    gate = model.core.gate
    gate.start_anew()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=lr, weight_decay=0.0)
    gate.requires_grad_(True)
    for step in range(steps):
        asked = batch(step)
        _check_targets(f"batch({step})", asked, model.config.vocab_size)
        states, losses = _trajectory(model, asked, budget, at_once)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        wanted = fit_to_stop(losses, margin).float()
        for _ in range(UPDATES):
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(_scores(gate, states), wanted)
            loss.backward()
            optimizer.step()


@torch.no_grad()
def _trajectory(
    model: OpenMythos, asked: Labelled, budget: int, at_once: int | None = None
) -> tuple[Tensor, Tensor]:
    """States after each loop, the first one before them, and losses: `(loops, batch, sequence)`."""
    if at_once is not None and at_once < len(asked.token_ids):
        parts = (Labelled(*rows) for rows in zip(*(x.split(at_once) for x in asked), strict=True))
        found = [_trajectory(model, part, budget) for part in parts]
        states, losses = (torch.cat(whole, dim=1) for whole in zip(*found, strict=True))
        return states, losses
    states = model(asked.token_ids, budget, return_states=True).states
    losses = torch.stack([cross_entropy(model.decode(h), asked.targets) for h in states])
    first = model.core.first_state(model.encode(asked.token_ids).to(states.dtype))
    return torch.cat([first.unsqueeze(0), states]), losses


def _scores(gate: LearnedExit, states: Tensor) -> Tensor:
    """The gate's logits after each loop, `(loops, batch, sequence)`."""
    scores: Tensor = gate(states[:-1], states[1:])
    return scores


@torch.no_grad()
def _choose_threshold(
    model: OpenMythos,
    held_out: Sequence[Labelled],
    budget: int,
    cost: float,
    lost_accuracy: float,
) -> GateReport:
    """Take the lowest threshold at which exits cost no more nats and accuracy than they may.

    Where all cost more, the highest. Measured with exits as they will be, because a token that
    leaves early is read by others.
    """
    full = _measure(model, held_out, budget, None)

    def reported(threshold: float) -> GateReport:
        gated = _measure(model, held_out, budget, threshold)
        return GateReport(
            threshold=threshold,
            mean_loops=gated.loops,
            loss=gated.loss,
            full_loss=full.loss,
            accuracy=gated.accuracy,
            full_accuracy=full.accuracy,
            budget=budget,
        )

    report = reported(CHANCES[-1])
    for threshold in reversed(CHANCES[:-1]):
        lower = reported(threshold)
        if lower.loss > full.loss + cost or lower.accuracy < full.accuracy - lost_accuracy:
            break
        report = lower
    model.core.gate.threshold.fill_(report.threshold)
    return report


class _Measured(NamedTuple):
    """Means over tokens."""

    loss: float
    accuracy: float
    loops: float


def _measure(
    model: OpenMythos, held_out: Sequence[Labelled], budget: int, threshold: float | None
) -> _Measured:
    """What the model does with the gate at a threshold; None is full depth."""
    loss, right, loops, tokens = 0.0, 0, 0, 0
    halting: HaltingKind = "none" if threshold is None else "gate"
    for asked in held_out:
        out = model(asked.token_ids, budget, halting=halting, threshold=threshold)
        losses = cross_entropy(out.logits, asked.targets)
        loss += float(losses.cpu().double().sum())  # not every GPU has float64
        right += int((out.logits.argmax(-1) == asked.targets).sum())
        loops += int(out.loops.sum())
        tokens += asked.targets.numel()
    return _Measured(loss / tokens, right / tokens, loops / tokens)
