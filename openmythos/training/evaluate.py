"""Bits per byte of held-out text at several depths, from one run of the core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from openmythos.errors import InputError
from openmythos.model.transformer import OpenMythos, cross_entropy
from openmythos.training.token_file import TokenFile


@dataclass(frozen=True)
class Evaluation:
    """Quality on one file of tokens."""

    loops: tuple[int, ...]
    bits_per_byte: tuple[float, ...]
    """One for each of `loops`."""
    tokens: int
    bytes: int


@torch.no_grad()
def evaluate(
    model: OpenMythos,
    file: TokenFile,
    token_bytes: NDArray[np.int64],
    loops: Sequence[int],
    *,
    length: int,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
) -> Evaluation:
    """Measure bits per byte at every depth of `loops`.

    End marks cost bits and count no byte. Depths share one run of the core, whose states are
    decoded at each.

    Args:
        model: put into evaluation mode for the measurement.
        file: held-out tokens.
        token_bytes: bytes that each token id stands for, `(vocab,)`.
        loops: depths, each 1 or more.
        length: tokens in a window.
        stride: tokens a window advances; smaller gives more context. Default: half of `length`.
        batch_size: windows at once.
        max_tokens: stop after about so many predictions, for a quick look; None: all.

    Raises:
        InputError: no depth, or one below 1.
    """
    if not loops or min(loops) < 1:
        raise InputError(f"loops={tuple(loops)} must hold depths of 1 or more")
    windows = file.windows(length, stride or max(1, length // 2))
    device, training = model.embed.weight.device, model.training
    nats, tokens, count = np.zeros(len(loops)), 0, 0
    size = torch.from_numpy(token_bytes).to(device)
    model.eval()
    for at in range(0, len(windows.starts), batch_size):
        chunk = slice(at, at + batch_size)
        ids = torch.from_numpy(file.read(windows.starts[chunk], windows.length)).to(device)
        places = torch.arange(windows.length, device=device)
        counted = places >= torch.from_numpy(windows.first[chunk]).to(device).unsqueeze(1)
        nats += _losses(model, ids, counted, loops)
        tokens += int(counted.sum())
        count += int((size[ids[:, 1:]] * counted).sum())
        if max_tokens is not None and tokens >= max_tokens:
            break
    model.train(training)
    bits = nats / math.log(2) / max(1, count)
    return Evaluation(tuple(loops), tuple(float(b) for b in bits), tokens, count)


def _losses(
    model: OpenMythos, ids: torch.Tensor, counted: torch.Tensor, loops: Sequence[int]
) -> NDArray[np.float64]:
    """Summed loss in nats of the counted predictions, at every depth."""
    inputs, targets, deepest = ids[:, :-1], ids[:, 1:], max(loops)
    out = model(inputs, deepest, return_states=True)
    sums = []
    for depth in loops:
        logits = out.logits if depth == deepest else model.decode(out.states[depth - 1])
        sums.append((cross_entropy(logits, targets).double() * counted).sum())
    return np.array([float(total) for total in sums])
