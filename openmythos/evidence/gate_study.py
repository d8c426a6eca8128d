"""A model for chains and its gate: how the gate is trained, and then the model with its exits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmythos.evidence.cells import Say
from openmythos.evidence.fit import Batch, FitConfig, fit
from openmythos.evidence.hop_training import TASK, TRAINED_HOPS, HopTraining
from openmythos.model.transformer import OpenMythos
from openmythos.tasks.hops import Chains
from openmythos.training.gate import Labelled, train_gate

GATE_TRAINING, GATE_HELD_OUT, TEST, EXITS, SHIPPED_TEST = 10, 11, 12, 13, 15
"""Streams of chains. The gate's size and how its threshold is found were chosen by those of `TEST`,
and nothing by those of `SHIPPED_TEST`."""


@dataclass(frozen=True, kw_only=True)
class GateFit:
    """How a gate is trained, and what its exits may cost."""

    steps: int
    cost: float | None = None
    """Nats a token."""
    lost_accuracy: float | None = None
    """Share of the answers."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One model with its gate, measured before and after a training with exits."""

    training: HopTraining
    budget: int = 40
    """Most loops of a token."""
    margin: float = 0.05
    """Nats by which a state that the gate stops at may be worse than the best later one."""
    gates: tuple[GateFit, ...] = (
        *[GateFit(steps=150, cost=0.05)] * 3,
        GateFit(steps=150, lost_accuracy=0.003),
    )
    """One after the other; the model is trained on with the exits of each but the last."""
    exit_steps: int = 200
    """Steps of each training with a gate's exits."""
    held_out: int = 32
    """Chains for each number of hops on which a gate's threshold is chosen. Where one answer is
    wrong, most after it are, so that few chains say little."""
    chains: int = 32
    """Test chains for each number of hops, 1 to 20, each among as many no-ops as make 40 slots."""


def shown_chains(study: Study, stream: int = TEST) -> Chains:
    """Chains of 1 to `TRAINED_HOPS` hops in 40 slots: what all ways of leaving are asked."""
    return of_all_lengths(np.random.default_rng([study.training.seed, stream]), study.chains)


def of_all_lengths(random: np.random.Generator, count: int) -> Chains:
    """So many chains of each number of hops, 1 to `TRAINED_HOPS`, among no-ops in 40 slots."""
    lengths = range(1, TRAINED_HOPS + 1)
    drawn = [TASK.chains(random, count, hops, 2 * TRAINED_HOPS) for hops in lengths]
    return Chains(*(np.concatenate(parts) for parts in zip(*drawn, strict=True)))


def fit_gate(model: OpenMythos, study: Study, how: GateFit) -> dict[str, Any]:
    """Train the gate of a hop model; return what it does on held-out chains."""

    def labelled(chains: Chains) -> Labelled:
        return Labelled(torch.from_numpy(chains.token_ids), torch.from_numpy(chains.answers))

    def batch(step: int) -> Labelled:
        random = np.random.default_rng([study.training.seed, GATE_TRAINING, step])
        hops = int(random.integers(1, TRAINED_HOPS + 1))
        return labelled(TASK.chains(random, 16, hops, 2 * TRAINED_HOPS))

    random = np.random.default_rng([study.training.seed, GATE_HELD_OUT])
    held_out = [labelled(of_all_lengths(random, 1)) for _ in range(study.held_out)]
    report = train_gate(
        model,
        batch,
        held_out,
        steps=how.steps,
        budget=study.budget,
        margin=study.margin,
        cost=how.cost,
        lost_accuracy=how.lost_accuracy,
    )
    return dataclasses.asdict(report)


def train_on(
    model: OpenMythos, study: Study, number: int, folder: Path, say: Say, *, exits: bool
) -> None:
    """Train on with the loops that a gate gives each token, so that early keys are seen.

    Without `exits`, on the same chains with one number of loops for all, as the model was trained.
    """
    optimizer = study.training.optimizer(0.1, warmup_steps=10)
    config = FitConfig(steps=study.exit_steps, seed=study.training.seed, optimizer=optimizer)
    fewest, most = study.training.loops

    def batch(step: int) -> Batch:
        random = np.random.default_rng([study.training.seed, EXITS, number, step])
        hops = int(random.integers(1, TRAINED_HOPS + 1))
        chains = TASK.chains(random, 24, hops, 2 * TRAINED_HOPS)
        token_ids, answers = torch.from_numpy(chains.token_ids), torch.from_numpy(chains.answers)
        if not exits:
            return Batch(token_ids, answers, int(random.integers(fewest, most + 1)))
        token_ids = token_ids.to(model.embed.weight.device)
        model.eval()
        with torch.no_grad():
            loops = model(token_ids, study.budget, halting="gate").loops
        model.train()
        return Batch(token_ids, answers, loops.clone())

    how = f"exits of gate {number + 1}" if exits else f"part {number + 1}, without exits"

    def report(step: int, loss: float) -> None:
        say(f"{how}: step {step} of {config.steps}, loss {loss:.4f}")

    fit(model, batch, config, folder, report=report)
    model.cpu()
