"""Exits that are learnt with the model: Graves' rule.

Adaptive computation time (Graves 2016, arXiv 1603.08983) mixes the states of all loops by learned
probabilities and pays for loops in the loss, so a model must be trained with it. A shipped model is
trained on at several prices of a loop, through all its loops; each price gives one point of quality
against mean loops. Here the reasoner, on the chains that a gate is fitted on; the language model's
exits are in `text_exits`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from openmythos.evidence.cells import Result, Say
from openmythos.evidence.fit import Batch, FitConfig, fit
from openmythos.evidence.hop_training import REASONER, TASK, TRAINED_HOPS
from openmythos.model.transformer import OpenMythos
from openmythos.tasks.hops import Chains
from openmythos.training.gate import Labelled
from openmythos.training.settings import OptimizerConfig

STREAM = 14
"""Of training chains."""


@dataclass(frozen=True, kw_only=True)
class ActTraining:
    """How the exits are learnt, once for each price."""

    prices: tuple[float, ...]
    """Nats that a loop costs."""
    steps: int
    sequences: int
    """In a batch."""
    rate: float
    """Share of the rates that the model was trained at."""
    exit_bias: float = -2.0
    """Where the exit's bias starts: a probability of 0.12 at every loop."""
    seed: int = 0


NOTE = "`act` in the tables is Graves' rule (adaptive computation time, arXiv 1603.08983)."

CHAINS = ActTraining(prices=(0.003, 0.01, 0.03, 0.1), steps=200, sequences=16, rate=0.2)


def measure(
    model: OpenMythos, chains: Chains, budget: int, training: ActTraining, folder: Path, say: Say
) -> Result:
    """Train a copy at each price; return accuracy and mean loops, by price.

    Args:
        model: solves chains, and has no such exits yet.
        chains: what it is asked.
        budget: most loops of a token.
        training: of the exits, and of everything else along with them.
        folder: for checkpoints.
        say: told of progress.
    """
    token_ids, wanted = torch.from_numpy(chains.token_ids), torch.from_numpy(chains.answers)

    def asked(step: int) -> Labelled:
        random = np.random.default_rng([training.seed, STREAM, step])
        hops = int(random.integers(1, TRAINED_HOPS + 1))
        drawn = TASK.chains(random, training.sequences, hops, 2 * TRAINED_HOPS)
        return Labelled(torch.from_numpy(drawn.token_ids), torch.from_numpy(drawn.answers))

    points = {}
    for price in training.prices:
        taught = with_exits(model, training)
        teach(
            taught,
            asked,
            training,
            REASONER.optimizer(training.rate, warmup_steps=10),
            folder / f"{price:g}",
            say,
            budget=budget,
            price=price,
        )
        with torch.inference_mode():
            out = taught(token_ids, budget, halting="act")
        right = out.logits[..., : TASK.entities].argmax(-1) == wanted
        points[f"{price:g}"] = {
            "accuracy": float(right.double().mean()),
            "mean_loops": float(out.loops.double().mean()),
        }
    return points


def with_exits(model: OpenMythos, training: ActTraining) -> OpenMythos:
    """Return a copy of a model with exits that have yet to be learnt."""
    copy = OpenMythos(model.config.replace(learned_act=True), seed=training.seed)
    own = {name: tensor for name, tensor in copy.state_dict().items() if ".act." in name}
    copy.load_state_dict({**own, **model.state_dict()})
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if ".act." in name and name.endswith(".bias"):
                parameter.fill_(training.exit_bias)
    return copy


def teach(
    model: OpenMythos,
    asked: Callable[[int], Labelled],
    training: ActTraining,
    optimizer: OptimizerConfig,
    folder: Path,
    say: Say,
    *,
    budget: int,
    price: float | None,
) -> None:
    """Train a model on with its exits, through all loops; it is left on the CPU.

    Args:
        model: one of `with_exits`, or any for a twin without them.
        asked: gives what a step learns from.
        training: how long, and of what seed.
        optimizer: the rates.
        folder: for checkpoints.
        say: told of progress.
        budget: loops of every step.
        price: nats that a loop costs; None: no exits, all loops.
    """
    config = FitConfig(steps=training.steps, seed=training.seed, optimizer=optimizer)

    def loss(model: OpenMythos, batch: Batch) -> tuple[Float[Tensor, ""], Tensor | None]:
        out = model(batch.token_ids, batch.loops, halting="none" if price is None else "act")
        nats = F.cross_entropy(out.logits.flatten(0, 1).float(), batch.targets.flatten())
        if price is not None:
            assert out.ponder is not None
            nats = nats + price * out.ponder.mean()
        return nats, out.loads

    told = "without exits" if price is None else f"{price:g} nats a loop"

    def report(step: int, mean: float) -> None:
        say(f"{told}: step {step} of {config.steps}, loss {mean:.4f}")

    fit(
        model,
        lambda step: Batch(*asked(step), budget),
        config,
        folder,
        loss=loss,
        report=report,
    )
    model.cpu()


def rows(points: Result) -> list[list[str]]:
    """Return the table's rows."""
    return [
        [f"act, {price} nats a loop", "shipped, trained on", f"{point['accuracy']:.4f}",
         f"{point['mean_loops']:.1f}"]
        for price, point in points.items()
    ]  # fmt: skip


def sentence(part: dict[str, Any]) -> str:
    """Say how learned exits compare with the gate, on the shipped reasoner."""
    said = [
        f"{point['accuracy']:.3f} with {point['mean_loops']:.1f} loops at {price} nats a loop"
        for price, point in part["act"].items()
    ]
    gate, prices = part["chosen"], list(part["act"])
    best = max(part["act"], key=lambda price: part["act"][price]["accuracy"])
    edge = (
        " The dearest price tried is still the most accurate, so a dearer one may be better."
        if best == prices[-1]
        else ""
    )
    return (
        f"The shipped reasoner has {gate['accuracy']:.3f} with {gate['mean_loops']:.1f} loops by "
        f"its gate; trained on with Graves' rule instead, {', '.join(said)}.{edge}"
    )
