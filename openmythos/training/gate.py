"""Trains the halting gate after the model, by looking ahead to each token's best later loop.

The model is frozen and run to twice its mean loops; every state is decoded, which gives each
token's loss at each depth. A state is fit to stop at where it and the next (a fired token runs
one loop more) are as good as the best later one within a margin. One-step gains would mislead:
they are zero while a long chain is being worked. Then the gate, linear on the state, learns by
binary cross-entropy, and its threshold is chosen on validation text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from openmythos.model.halting import LearnedExit
from openmythos.model.transformer import OpenMythos, cross_entropy
from openmythos.training.token_file import TokenFile

CHANCES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995)
"""Thresholds that are tried on validation text."""


@dataclass(frozen=True)
class GateReport:
    """What the trained gate does on validation text, at its threshold."""

    threshold: float
    mean_loops: float
    loss: float
    """Nats per token with the gate."""
    full_loss: float
    """Nats per token at full depth."""
    budget: int
    """Full depth: the loops the gate may use."""


def fit_to_stop(losses: Float[Tensor, "loops ..."], margin: float) -> Bool[Tensor, "loops ..."]:
    """Mark states that are, as is the next one, within `margin` nats of the best later state."""
    best_later = losses.flip(0).cummin(0).values.flip(0)
    good = losses <= best_later + margin
    following = torch.cat([good[1:], torch.ones_like(good[:1])])
    return good & following


def train_gate(
    model: OpenMythos,
    training: TokenFile,
    validation: TokenFile,
    *,
    length: int,
    steps: int = 100,
    batch_size: int = 4,
    margin: float = 0.02,
    lr: float = 0.02,
    seed: int = 0,
) -> GateReport:
    """Train `model.core.gate` and set its threshold; nothing else of the model changes.

    Args:
        model: trained.
        training: text the gate learns from.
        validation: text its threshold is chosen on.
        length: tokens in a sequence.
        steps: batches.
        batch_size: sequences in a batch.
        margin: nats by which a state may be worse than the best later one. The threshold is the
            lowest whose mean loss is within it of full depth.
        lr: learning rate of AdamW, decaying linearly to 0.
        seed: of the text's order.
    """
    model.eval()
    gate, budget = model.core.gate, 2 * model.config.mean_loops
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=lr, weight_decay=0.0)
    for parameter in gate.parameters():
        parameter.requires_grad_(True)
    for step in range(steps):
        samples = list(range(step * batch_size, (step + 1) * batch_size))
        ids = torch.from_numpy(training.batch(samples, length, seed=seed + 1))
        states, losses = _trajectory(model, ids.to(model.embed.weight.device), budget)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        wanted = fit_to_stop(losses, margin).float()
        loss = F.binary_cross_entropy_with_logits(_scores(gate, states), wanted)
        loss.backward()
        optimizer.step()
    for parameter in gate.parameters():
        parameter.requires_grad_(False)
    return _choose_threshold(model, validation, length, budget, batch_size, margin)


@torch.no_grad()
def _trajectory(model: OpenMythos, ids: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """States after each loop, the first one before them, and losses: `(loops, batch, sequence)`."""
    states = model(ids[:, :-1], budget, return_states=True).states
    losses = torch.stack([cross_entropy(model.decode(h), ids[:, 1:]) for h in states])
    first = torch.zeros_like(states[:1])
    return torch.cat([first, states]), losses


def _scores(gate: LearnedExit, states: Tensor) -> Tensor:
    """The gate's logits after each loop, `(loops, batch, sequence)`."""
    scores: Tensor = gate(states[:-1], states[1:])
    return scores


@torch.no_grad()
def _choose_threshold(
    model: OpenMythos,
    validation: TokenFile,
    length: int,
    budget: int,
    batch_size: int,
    margin: float,
) -> GateReport:
    """Take the lowest threshold whose loss is within the margin of full depth."""
    windows = validation.windows(length)
    rows = []
    for at in range(0, min(len(windows.starts), 4 * batch_size), batch_size):
        ids = validation.read(windows.starts[at : at + batch_size], windows.length)
        tensor = torch.from_numpy(ids).to(model.embed.weight.device)
        states, losses = _trajectory(model, tensor, budget)
        rows.append((_scores(model.core.gate, states).sigmoid(), losses))
    chances = torch.cat([p.flatten(1) for p, _ in rows], 1)  # (loops, tokens)
    losses = torch.cat([x.flatten(1) for _, x in rows], 1)
    full = float(losses[-1].mean())
    report = GateReport(CHANCES[-1], float(budget), full, full, budget)
    for threshold in reversed(CHANCES):
        fires = chances >= threshold
        fires[-2:] = True  # the budget ends
        taken = (fires.int().argmax(0) + 2).clamp(max=budget)  # one loop more than where it fired
        loss = float(losses.gather(0, taken.unsqueeze(0) - 1).mean())
        if loss > full + margin:
            break
        mean = float(np.mean(taken.cpu().numpy()))
        report = GateReport(threshold, mean, loss, full, budget)
    model.core.gate.threshold.fill_(report.threshold)
    return report
