"""Draws that are a pure function of seed, choice and position, so company cannot change them.

All text is drawn so: the engine's, and that of `generate`, whose rows count as choices.

A running generator would give a request other numbers when it shares a batch, resumes or is
drawn in another order. A draw is a race: token i arrives after an exponential time divided by its
probability, and the first one wins, with just that probability. Two distributions that are nearly
equal then mostly give the same token from the same noise, which is what lets a draft be right.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from openmythos.inference.sampling import Sampling, distribution


def exponentials(seed: int, choice: int, position: int, count: int) -> np.ndarray:
    """Return `count` numbers of unit exponential law, `(count,)` float64.

    Philox (Salmon et al. 2011) with (seed, choice) as key and position in the counter. The first
    numbers do not depend on `count`.
    """
    source = np.random.Philox(key=[seed, choice], counter=[0, 0, 0, position])
    return -np.log1p(-np.random.Generator(source).random(count))


def draw_at(
    logits: Float[Tensor, " vocab"], sampling: Sampling, seed: int, choice: int, position: int
) -> int:
    """Draw the token at `position` of a choice's sequence; ties go to the lower id."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    noise = torch.from_numpy(exponentials(seed, choice, position, len(logits)))
    # In float64, or small probabilities would tie; one of 0 arrives never. Not every GPU has it.
    times = noise / distribution(logits, sampling).cpu().double()
    return int(times.argmin())
