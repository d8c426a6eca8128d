"""How many threads a training computes with, and how these take denormals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def training_threads(count: int) -> Iterator[None]:
    """Compute with so many threads, which take denormals for 0, and then as before.

    Large logits early in training make denormals, and steps ten times slower. A thread of torch's
    inherits how it takes them from the one that it is made by, and keeps it: those that are made
    in here go on taking them for 0.
    """
    threads, flushing = torch.get_num_threads(), _denormals_are_0()
    if threads != count:
        torch.set_num_threads(count)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushing)
        if threads != count:
            torch.set_num_threads(threads)


def _denormals_are_0() -> bool:
    """Whether this thread takes them for 0, which torch can be told but not asked."""
    denormal = torch.ones((), dtype=torch.int32).view(torch.float32)
    return int((denormal * 1).view(torch.int32)) == 0
