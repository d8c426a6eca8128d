"""The causal test of routing: what a text costs when tokens are given other experts.

Losses are kept by window, and two ways of routing are compared window by window: an interval comes
from drawing windows again (bootstrap), and says how sure the text makes a difference, not how much
another training would change it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from openmythos.evidence.paired import Interval
from openmythos.model.transformer import OpenMythos, cross_entropy
from openmythos.training.token_file import TokenFile

Routing = Int[Tensor, "loops layers batch sequence chosen"]

DRAWS = 2000
"""Times that the windows are drawn again."""


def first_loop(own: Routing, _experts: int, _generator: torch.Generator) -> Tensor:
    """The first loop's experts at every loop."""
    return own[:1]  # the last loop given serves for all later ones


def shuffled_loops(own: Routing, _experts: int, generator: torch.Generator) -> Tensor:
    """Each token's own choices, dealt to its loops in another order."""
    shape = (own.shape[0], 1, *own.shape[2:4], 1)
    order = torch.rand(shape, generator=generator).argsort(0)
    return own.gather(0, order.expand(own.shape))


def other_token(own: Routing, _experts: int, generator: torch.Generator) -> Tensor:
    """At each loop, the experts that this loop chose for another token of the window."""
    return own[:, :, :, torch.randperm(own.shape[3], generator=generator)]


def at_random(own: Routing, experts: int, generator: torch.Generator) -> Tensor:
    """Experts drawn anew for each token, layer and loop."""
    scores = torch.rand(*own.shape[:4], experts, generator=generator)
    return scores.topk(own.shape[4], -1).indices


Force = Callable[[Tensor, int, torch.Generator], Tensor]
"""Given a model's own routing, the number of experts and a source of draws: another routing."""

FORCED: dict[str, Force] = {
    "first loop's": first_loop,
    "shuffled between loops": shuffled_loops,
    "another token's": other_token,
    "random": at_random,
}
"""Whose experts a token is given."""


class Read(NamedTuple):
    """A text read with a model's own routing, and with others."""

    own: list[float]
    """Nats per token of each window."""
    forced: dict[str, list[float]]
    choices: Int[Tensor, "loops layers tokens chosen"]
    """The model's own."""


@torch.no_grad()
def read(
    model: OpenMythos,
    windows: Int[Tensor, "windows longer"],
    loops: int,
    forced: Mapping[str, Force] = FORCED,
    *,
    batch_size: int = 8,
) -> Read:
    """Read windows of a text side by side, with every kind of routing.

    Args:
        model: with experts, in evaluation mode.
        windows: token ids, each predicted from those before.
        loops: of every token.
        forced: routings beside the model's own.
        batch_size: windows at once.
    """
    generator, experts = torch.Generator().manual_seed(0), model.config.experts
    own, choices = [], []
    losses: dict[str, list[Tensor]] = {name: [] for name in forced}
    for token_ids in windows.split(batch_size):
        out = model(token_ids[:, :-1], loops, return_routing=True)
        own.append(_by_window(out.logits, token_ids))
        choices.append(out.routing.flatten(2, 3))
        for name, force in forced.items():
            given = force(out.routing, experts, generator)
            other = model(token_ids[:, :-1], loops, routing=given)
            losses[name].append(_by_window(other.logits, token_ids))
    return Read(
        torch.cat(own).tolist(),
        {name: torch.cat(parts).tolist() for name, parts in losses.items()},
        torch.cat(choices, dim=2),
    )


def windows_of(text: TokenFile, length: int, most: int | None = None) -> Tensor:
    """Return windows of `length` + 1 tokens that share no prediction, `(windows, length + 1)`.

    Args:
        text: held-out tokens.
        length: tokens predicted in each window.
        most: about so many predictions in all, at least one window; None: all.
    """
    windows = text.windows(length)
    starts = windows.starts[windows.first == 0]
    starts = starts if most is None else starts[: max(1, most // length)]
    return torch.from_numpy(text.read(starts, windows.length))


def _by_window(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Mean loss of each window, `(batch,)`."""
    return cross_entropy(logits, token_ids[:, 1:]).double().mean(1)


def bootstrap(differences: Sequence[float]) -> Interval:
    """Return the mean of windows' differences and its 95 % interval, windows drawn again."""
    values = np.array(differences, dtype=np.float64)
    random = np.random.default_rng(0)
    drawn = values[random.integers(0, len(values), (DRAWS, len(values)))].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def costs(found: Read) -> dict[str, Interval]:
    """Return what each forced routing costs over the model's own, in nats per token."""
    return {
        name: bootstrap([after - before for after, before in zip(losses, found.own, strict=True)])
        for name, losses in found.forced.items()
    }
