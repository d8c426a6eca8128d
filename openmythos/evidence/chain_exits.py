"""Ways to leave the core, on chains: accuracy against mean loops, and whether loops follow need."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmythos.config import HaltingKind
from openmythos.evidence.cells import Result
from openmythos.evidence.gate_study import Study, shown_chains
from openmythos.evidence.hop_training import TASK, TRAINED_HOPS
from openmythos.model.transformer import OpenMythos
from openmythos.tasks.hops import Chains

RULES: dict[HaltingKind, tuple[float, ...]] = {
    "gate": (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999),
    "delta": (0.01, 0.02, 0.05, 0.1),
    "kl": (1e-4, 1e-3, 1e-2),
}
POINTS = 0.005
"""Accuracy that a saving may cost: half a point."""


@torch.inference_mode()
def exits(model: OpenMythos, study: Study, stream: int) -> Result:
    """Accuracy and mean loops of every way of leaving, for a model with a gate."""
    chains = shown_chains(study, stream)
    token_ids = torch.from_numpy(chains.token_ids)
    right = _right_after(model, chains, study.budget)

    def score(**how: Any) -> tuple[float, float, Tensor]:
        return _score(model, chains, **how)

    fixed = {str(t + 1): float(row.double().mean()) for t, row in enumerate(right)}
    rules = {rule: _by_threshold(model, study, chains, rule) for rule in RULES}
    accuracy, mean, loops = score(loops=study.budget, halting="gate")
    # A token runs one loop more than it needs, so that others can read what it found.
    oracle = (first_lasting(right) + 1).clamp(max=study.budget)

    def settled() -> Result:
        """The least time to settle, the same for all, with which little is lost."""
        in_order, least = first_lasting(right).cummax(1).values, fixed[str(study.budget)] - POINTS
        for more in range(1, study.budget):
            accuracy, mean, _ = score(loops=(in_order + more).clamp(max=study.budget))
            if accuracy >= least:
                break
        return {**as_point(accuracy, mean), "more": more}

    shuffled = loops.flatten()[torch.from_numpy(_permutation(loops.numel()))].view_as(loops)
    return {
        "budget": study.budget,
        "fixed": fixed,
        "rules": rules,
        "chosen": as_point(accuracy, mean),
        "random": as_point(*score(loops=shuffled)[:2]),
        "oracle": as_point(*score(loops=oracle)[:2]),
        "settled_oracle": settled(),
        "spearman": spearman(loops.numpy(), chains.hops),
        "spearman_at_place": _spearman_at_place(loops.numpy(), chains.hops),
        "by_hops": _by_hops(loops.numpy(), chains.hops),
        "deeper": _deeper(model, study, stream),
        "saving": _saving(model, token_ids, study.budget, mean),
    }


def _right_after(model: OpenMythos, chains: Chains, budget: int) -> Tensor:
    """Whether each place is answered right after each loop, `(loops, batch, sequence)`."""
    states = model(torch.from_numpy(chains.token_ids), budget, return_states=True).states
    named = torch.stack([model.decode(h)[..., : TASK.entities].argmax(-1) for h in states])
    return named == torch.from_numpy(chains.answers)


def _by_threshold(
    model: OpenMythos, study: Study, chains: Chains, rule: HaltingKind
) -> list[list[float]]:
    """Threshold, accuracy and mean loops, for each threshold of a rule."""
    return [
        [
            threshold,
            *_score(model, chains, loops=study.budget, halting=rule, threshold=threshold)[:2],
        ]
        for threshold in RULES[rule]
    ]


def _score(model: OpenMythos, chains: Chains, **how: Any) -> tuple[float, float, Tensor]:
    """Accuracy, mean loops and each token's loops of one way of leaving."""
    out = model(torch.from_numpy(chains.token_ids), **how)
    right = out.logits[..., : TASK.entities].argmax(-1) == torch.from_numpy(chains.answers)
    return float(right.double().mean()), float(out.loops.double().mean()), out.loops


def as_point(accuracy: float, mean_loops: float) -> dict[str, float]:
    """Return what one way of leaving gives, as a result has it."""
    return {"accuracy": accuracy, "mean_loops": mean_loops}


def _permutation(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(0).permutation(count)


def first_lasting(right: Tensor) -> Tensor:
    """Return the loops after which each token is right and stays so; 1 where it never is.

    Args:
        right: `(loops, batch, sequence)`.
    """
    stays = right.flip(0).int().cumprod(0).flip(0)  # 1 where right from here to the end
    needed = right.shape[0] - stays.sum(0) + 1
    return torch.where(stays[-1].bool(), needed, torch.ones_like(needed))


def spearman(first: Any, second: Any) -> float:
    """Return the rank correlation of two arrays of one shape, ties sharing their rank."""
    return float(np.corrcoef(_ranks(np.ravel(first)), _ranks(np.ravel(second)))[0, 1])


def _ranks(values: Any) -> Any:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count - 1) / 2)[place]


def _spearman_at_place(loops: Any, hops: Any) -> float:
    """Mean rank correlation over places with more than one number of hops."""
    columns = [
        spearman(loops[:, at], hops[:, at])
        for at in range(loops.shape[1])
        if len(set(hops[:, at])) > 1 and len(set(loops[:, at])) > 1
    ]
    return statistics.fmean(columns) if columns else 0.0


def _by_hops(loops: Any, hops: Any) -> dict[str, float]:
    return {str(n): float(loops[hops == n].mean()) for n in range(int(hops.max()) + 1)}


def _deeper(model: OpenMythos, study: Study, stream: int) -> Result:
    """Loops that the ends of 30-hop chains take, which the gate never saw, beside 20-hop ones."""
    taken = {}
    for hops in (TRAINED_HOPS, 30):
        random = np.random.default_rng([study.training.seed, stream, hops])
        chains = TASK.chains(random, study.chains, hops, 60)
        budget = study.budget * 3 // 2
        out = model(torch.from_numpy(chains.token_ids), budget, halting="gate")
        right = out.logits[:, -1, : TASK.entities].argmax(-1).numpy() == chains.answers[:, -1]
        ends = out.loops[:, -1]
        taken[str(hops)] = {
            "fewest": int(ends.min()),
            "most": int(ends.max()),
            "right": float(right.mean()),
        }
    return taken


def _saving(model: OpenMythos, token_ids: Tensor, budget: int, mean: float) -> Result:
    """Share of the time that the gate saves, beside the share of the loops."""
    ways: dict[str, Callable[[], Any]] = {
        "full": lambda: model(token_ids, budget),
        "gate": lambda: model(token_ids, budget, halting="gate"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    share = statistics.median(times["gate"]) / statistics.median(times["full"])
    return {"time": 1 - share, "loops": 1 - mean / budget}
