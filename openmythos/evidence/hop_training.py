"""Models for chains of hops, how they are trained, and how they are measured at many depths.

Shared by the claims that need exact answers whose depth is known: depth extrapolation, adaptive
computation, and the reasoning side of parameter efficiency.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmythos.config import MythosConfig
from openmythos.evidence.cells import Say, as_json
from openmythos.evidence.fit import Batch, FitConfig, fit
from openmythos.evidence.plain import PLAIN, trained_parameters
from openmythos.model.accounting import training_flops
from openmythos.model.transformer import OpenMythos
from openmythos.tasks.hops import Chains, HopTask
from openmythos.training.settings import OptimizerConfig

TASK = HopTask()
TRAINED_HOPS = 20
SEQUENCES, LENGTH = 10, 128
"""A training batch: so many sequences of so many tokens, packed with chains."""

LOOPS = (*range(1, 17), 18, 20, 22, 24, 28, 32, 36, 40, 48, 56, 64, 80, 96, 128)
"""Depths that are measured."""

TOGETHER = 64
"""Chains that are measured at a time: the states of all loops are kept."""

VALIDATION, FRESH, AFTERWARDS = 1, 2, 3
"""Streams of chains, which share none with the training's but by chance (1 in 32 * 16^hops).
`AFTERWARDS` is for what was changed after it had been scored on `FRESH`."""


@dataclass(frozen=True, kw_only=True)
class HopTraining:
    """One model trained on chains of up to `TRAINED_HOPS` hops."""

    core_layers: int = 3
    plain_layers: int = 0
    """Layers of a plain transformer instead: no loop, no injection."""
    hidden_size: int = 96
    feed_forward_size: int = 768
    loops: tuple[int, int] = (5, 10)
    """Fewest and most loops; each step draws a number between for its batch."""
    backprop_loops: int = 8
    """Last loops that carry gradient."""
    no_ops: float = 0.0
    """Share of the chains that have no-ops strewn in, so that their length is no clue."""
    steps: int = 2000
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0

    @property
    def config(self) -> MythosConfig:
        """The model's shape."""
        common: dict[str, Any] = {
            "vocab_size": TASK.vocab_size,
            "hidden_size": self.hidden_size,
            "feed_forward_size": self.feed_forward_size,
            "num_heads": 4,
            "max_length": 512,
            "feed_forward": "relu2",
        }
        if self.plain_layers:
            return MythosConfig(**common, **PLAIN, core_layers=self.plain_layers)
        mean = sum(self.loops) // 2
        return MythosConfig(**common, core_layers=self.core_layers, mean_loops=mean)

    @property
    def fit_config(self) -> FitConfig:
        """How it is trained."""
        return FitConfig(
            steps=self.steps,
            backprop_loops=self.backprop_loops,
            seed=self.seed,
            optimizer=self.optimizer(),
        )

    def optimizer(self, share: float = 1.0, warmup_steps: int = 100) -> OptimizerConfig:
        """Return its optimizers; a training that goes on from it takes a share of the rates."""
        return OptimizerConfig(
            muon_lr=share * self.muon_lr,
            adam_lr=share * self.adam_lr,
            weight_decay=self.weight_decay,
            warmup_steps=warmup_steps,
            decay_share=0.8,
        )

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        random = np.random.default_rng([self.seed, 0, step])
        chains = TASK.packed(random, SEQUENCES, LENGTH, TRAINED_HOPS, self.no_ops)
        fewest, most = (1, 1) if self.plain_layers else self.loops
        loops = int(random.integers(fewest, most + 1))
        return Batch(torch.from_numpy(chains.token_ids), torch.from_numpy(chains.answers), loops)

    def train(self, folder: Path, say: Say) -> tuple[OpenMythos, dict[str, Any]]:
        """Train, or go on training; return the model and what the training took."""
        model = OpenMythos(self.config, seed=self.seed)

        def report(step: int, loss: float) -> None:
            say(f"step {step} of {self.steps}, loss {loss:.3f}")

        fitted = self.fit_config
        seconds = fit(model, self.batch, fitted, folder, report=report)
        return model, {
            "parameters": trained_parameters(model),
            "flops": self.training_flops(model),
            "training_seconds": seconds,
        }

    def training_flops(self, model: OpenMythos) -> float:
        """Floating-point operations of the training, with the loops it has on average."""
        tokens, mean = self.steps * SEQUENCES * LENGTH, sum(self.loops) / 2
        loops = 1 if self.plain_layers else mean
        return training_flops(model, tokens, LENGTH // 2, loops, learning=self.backprop_loops)

    def as_json(self) -> dict[str, Any]:
        """Return the settings as a cell keeps them."""
        fields = {**dataclasses.asdict(self), "optimizer": dataclasses.asdict(self.optimizer())}
        fields |= {"task": dataclasses.asdict(TASK), "trained_hops": TRAINED_HOPS}
        return as_json(fields | {"packed": (SEQUENCES, LENGTH)})


REASONER = HopTraining(core_layers=1, loops=(10, 30), no_ops=0.3)
"""The training that the shipped reasoner comes from."""


def measure(
    model: OpenMythos,
    stream: int,
    hops: int,
    loops: Sequence[int],
    *,
    seed: int,
    count: int = 256,
    no_ops: bool = False,
    h0: Callable[[Chains], Tensor] | None = None,
) -> dict[int, float]:
    """Return the share of right answers at the end of chains, for each number of loops.

    Args:
        model: trained.
        stream: which chains, `VALIDATION` or `FRESH`.
        hops: of every chain.
        loops: depths to read the answer at.
        seed: of the chains.
        count: how many chains.
        no_ops: among as many no-ops.
        h0: first state for the chains; default: the model's own.
    """
    chains = draw(stream, hops, seed=seed, count=count, no_ops=no_ops)
    right = answers(model, chains, loops, h0=None if h0 is None else h0(chains))
    wanted = torch.from_numpy(chains.answers)[:, -1]
    return {depth: float((given == wanted).double().mean()) for depth, given in right.items()}


def draw(stream: int, hops: int, *, seed: int, count: int, no_ops: bool = False) -> Chains:
    """Return the chains of a stream."""
    random = np.random.default_rng([seed, stream, hops])
    return TASK.chains(random, count, hops, 2 * hops if no_ops else hops)


@torch.inference_mode()
def answers(
    model: OpenMythos, chains: Chains, loops: Sequence[int], *, h0: Tensor | None = None
) -> dict[int, Tensor]:
    """Return the entity named at the end of each chain, `(batch,)`, for each number of loops."""
    device = model.embed.weight.device
    parts = torch.from_numpy(chains.token_ids).to(device).split(TOGETHER)
    firsts = [None] * len(parts) if h0 is None else h0.to(device).split(TOGETHER)
    entities = slice(0, TASK.entities)
    found: dict[int, list[Tensor]] = {depth: [] for depth in loops}
    for token_ids, first in zip(parts, firsts, strict=True):
        states = model(token_ids, max(loops), return_states=True, h0=first).states
        for depth, named in found.items():
            named.append(model.decode(states[depth - 1])[:, -1, entities].argmax(-1).cpu())
    return {depth: torch.cat(named) for depth, named in found.items()}
