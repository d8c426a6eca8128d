"""Which experts each loop chooses: what loops share, against chance, noise and other tokens.

Choices are `(loops, layers, tokens, chosen)`, distinct experts of one token in one layer at one
loop. All figures are means over pairs of loops, layers and tokens.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from openmythos.evidence.cells import Result
from openmythos.model.experts import Router
from openmythos.model.transformer import OpenMythos

Choices = Int[Tensor, "loops layers tokens chosen"]

NOISE = 0.01
"""Jitter, as a share of the state's length."""


class Shared(NamedTuple):
    """What two choices have in common, as shares of tokens, and the mean overlap."""

    identical: float
    disjoint: float
    jaccard: float


def chance(experts: int, chosen: int) -> Shared:
    """Return what two independent uniform choices share, exactly."""
    total = math.comb(experts, chosen)
    overlap = {
        common: math.comb(chosen, common) * math.comb(experts - chosen, chosen - common) / total
        for common in range(chosen + 1)
    }
    jaccard = sum(p * common / (2 * chosen - common) for common, p in overlap.items())
    return Shared(overlap[chosen], overlap[0], jaccard)


def shared(
    one: Bool[Tensor, "*rows experts"], other: Bool[Tensor, "*rows experts"], chosen: int
) -> Shared:
    """Return what two choices share."""
    common = (one & other).sum(-1)
    jaccard = common.double() / (2 * chosen - common)
    parts = ((common == chosen).double(), (common == 0).double(), jaccard)
    return Shared(*(float(part.mean()) for part in parts))


def members(choices: Int[Tensor, "*rows chosen"], experts: int) -> Bool[Tensor, "*rows experts"]:
    """Return which experts are chosen."""
    return F.one_hot(choices, experts).sum(-2).bool()


def statistics_of(choices: Choices, experts: int, *, seed: int = 0) -> Result:
    """Return what the loops' choices share and how the experts are loaded.

    Args:
        choices: at least one loop.
        experts: how many there are to choose from.
        seed: of the order in which tokens are compared with other tokens.
    """
    chosen = choices.shape[-1]
    sets = members(choices, experts)
    pairs = list(itertools.combinations(range(len(sets)), 2))
    order = torch.randperm(choices.shape[2], generator=torch.Generator().manual_seed(seed))
    same = [shared(sets[i], sets[j], chosen) for i, j in pairs]
    others = [shared(sets[i], sets[j][:, order], chosen) for i, j in pairs]
    loads = sets.sum(2)  # (loops, layers, experts)
    by_layer = [loads[:, layer] for layer in range(loads.shape[1])]
    return {
        "loops": _mean(same)._asdict(),
        "identical_by_pair": {
            f"{i + 1} and {j + 1}": pair.identical for (i, j), pair in zip(pairs, same, strict=True)
        },
        "other_tokens": _mean(others)._asdict(),
        "information": float(np.mean([mutual_information(load) for load in by_layer])),
        "variation": max(variation(load.sum(0)) for load in by_layer),
        "load": (loads.double() / loads.sum(-1, keepdim=True)).tolist(),
    }


def _mean(parts: list[Shared]) -> Shared:
    """The mean over pairs of loops; a single loop is identical with itself."""
    if not parts:
        return Shared(1.0, 0.0, 1.0)
    return Shared(*(float(np.mean(values)) for values in zip(*parts, strict=True)))


def variation(load: Int[Tensor, " experts"]) -> float:
    """Return the deviation of the experts' loads over their mean."""
    wide = load.double()
    return float(wide.std(correction=0) / wide.mean())


def mutual_information(load: Int[Tensor, "loops experts"]) -> float:
    """Return the normalised mutual information of loop and expert, from 0 to 1.

    Their mutual information over the mean of their entropies: 0 where every loop loads the experts
    alike, 1 where the expert tells the loop and the loop the expert.
    """
    joint = load.double() / load.sum()
    rows, columns = joint.sum(1), joint.sum(0)
    entropies = _entropy(rows) + _entropy(columns)
    both = entropies - _entropy(joint.flatten())
    return max(0.0, float(2 * both / entropies)) if entropies > 0 else 0.0


def _entropy(chances: Float[Tensor, " outcomes"]) -> float:
    return float(-torch.xlogy(chances, chances).sum())


@torch.no_grad()
def jitter(model: OpenMythos, token_ids: Int[Tensor, "batch sequence"], loops: int) -> float:
    """Return how often a router chooses the same experts for a state and for one near it.

    Every state that a router sees is given to it once more, moved by `NOISE` of its length in a
    random direction. Nothing else of the pass changes.
    """
    generator = torch.Generator().manual_seed(0)
    same: list[Tensor] = []

    def ask_again(router: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, loop = inputs[:2]
        direction = F.normalize(torch.randn(x.shape, generator=generator), dim=-1)
        moved = x + NOISE * torch.linalg.vector_norm(x, dim=-1, keepdim=True) * direction
        again = router.forward(moved, loop)[0]
        same.append((again.sort(-1).values == output[0].sort(-1).values).all(-1))

    routers: list[Router] = [layer.router for layer in model.core.experts_layers()]
    hooks = [router.register_forward_hook(ask_again) for router in routers]
    try:
        model(token_ids, loops)
    finally:
        for hook in hooks:
            hook.remove()
    return float(torch.stack(same).double().mean())
