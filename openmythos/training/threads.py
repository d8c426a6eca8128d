"""How many threads a training computes with, and how these take denormals.

torch is imported inside, because the command line checks the number before it is there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from openmythos.errors import InputError

THREADS_PER_CPU = 4
"""Threads for each of the machine's CPUs beyond which more are refused: many slow a process down,
and thousands end it."""


def check_threads(threads: int) -> None:
    """Refuse numbers of CPU threads that no machine can use; without torch.

    Raises:
        InputError: fewer than one, or many more than this machine has CPUs.
    """
    cpus = os.cpu_count() or 1
    most = THREADS_PER_CPU * cpus
    if not 1 <= threads <= most:
        raise InputError(
            f"threads={threads} must be from 1 to {most}, {THREADS_PER_CPU} for each of this "
            f"machine's {cpus} CPUs: give fewer, or none to leave it to torch"
        )


@contextlib.contextmanager
def training_threads(count: int) -> Iterator[None]:
    """Compute with so many threads, which take denormals for 0, and then as before.

    Large logits early in training make denormals, and steps ten times slower. A thread of torch's
    inherits how it takes them from the one that it is made by, and keeps it: those that are made
    in here go on taking them for 0.
    """
    import torch

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
    import torch

    denormal = torch.ones((), dtype=torch.int32).view(torch.float32)
    return int((denormal * 1).view(torch.int32)) == 0
