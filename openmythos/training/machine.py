"""What this machine does: its matrix-product peak, and whether bf16 is worth it here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

ROWS, WIDTH = 512, 512

HOPELESS = 0.02
"""Seconds of a product of 64 rows from which it is hopeless; it takes 0.1 ms with AMX."""
TRIES = 8
"""Such products before that is believed: the first one compiles its kernel, and any may have to
wait for other processes. A run keeps its precision to the end, so a slip would stay."""


def default_device() -> torch.device:
    """CUDA where there is one, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_name() -> str:
    """What `default_device` is called: `cpu`, `mps`, or the GPU's name."""
    device = default_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Machine(NamedTuple):
    """Measured, not looked up."""

    precision: str
    """`fp32` or `bf16`."""
    reason: str
    """Why, for people to read."""
    peak: float
    """Floating-point operations per second of a matrix product in that precision."""


def measure(precision: str, device: torch.device) -> Machine:
    """Measure matrix products and choose the precision where it is `auto`.

    bf16 is chosen where its product is at least 1.3 times as fast: with AMX or AVX512-BF16, and on
    most GPUs, it is several times; without, it can be a hundred times slower.
    """
    fp32 = matmul_peak(torch.float32, device)
    if precision == "fp32":
        return Machine("fp32", "asked for", fp32)
    bf16 = matmul_peak(torch.bfloat16, device)
    if precision == "bf16":
        return Machine("bf16", "asked for", bf16)
    ratio = f"a bf16 product runs at {bf16 / fp32:.2g} of the speed of an fp32 one here"
    return Machine("bf16", ratio, bf16) if bf16 > 1.3 * fp32 else Machine("fp32", ratio, fp32)


def matmul_peak(dtype: torch.dtype, device: torch.device, repeats: int = 10) -> float:
    """Return the floating-point operations per second of a product of two matrices: the best.

    The best of several, because other load can only slow a product down. Small products tell
    whether the dtype is hopeless, and large ones need not be waited for.
    """
    rows = ROWS if device.type == "cpu" else 8 * ROWS
    a = torch.randn(rows, WIDTH, device=device, dtype=torch.float32).to(dtype)
    b = torch.randn(WIDTH, WIDTH, device=device, dtype=torch.float32).to(dtype)
    once = math.inf
    for _ in range(TRIES):
        once = min(once, seconds_of(lambda: a[:64] @ b, device))
        if once < HOPELESS:
            break
    else:
        return 2 * 64 * WIDTH * WIDTH / once
    seconds_of(lambda: a @ b, device)
    seconds = min(seconds_of(lambda: a @ b, device) for _ in range(repeats))
    return 2 * rows * WIDTH * WIDTH / seconds


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, with all the work that it leaves to the device."""
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
