"""A linear map of few rows on the CPU, in the native code; and which rows that code takes.

With few rows, reading weights and starting operations is all the time there is. Everything else
goes through torch, with the same result but for rounding. This file knows no part of a model, so
that those that know no layer, as the injection, may have their maps from here.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from openmythos.model.int8 import Int8Weight
from openmythos.model.native.build import library
from openmythos.model.native.mirrored import code_of
from openmythos.model.native.structures import KINDS, LANES, LinearStructure, Map
from openmythos.model.remade import transformed, watched

if TYPE_CHECKING:
    from openmythos.model.injection import Decay

MOST_ROWS = 64
"""With more rows torch's products are quicker."""

FLOATS = (torch.float32, torch.bfloat16)
"""Of rows and of what is kept."""

LEAST_PRODUCTS = 2**17
"""Multiplications that are worth a thread: some 10 us of work."""

_own = threading.local()


def takes(x: Tensor) -> bool:
    """Whether the native code takes rows `(*rows, width)`: on the CPU, without gradient."""
    return x.dtype in FLOATS and takes_rows(x, x.shape[-1])


def takes_rows(x: Tensor, width: int) -> bool:
    """Whether the native code takes so few rows of `width` numbers or ids."""
    if not may_run() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    return 0 < x.numel() <= MOST_ROWS * width


def may_run() -> bool:
    """Whether torch is asked for nothing now that the native code does not do."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if watched() or torch._C._is_tracing() or transformed():
        return False
    return not torch.is_autocast_enabled("cpu") and library() is not None


def drive(
    e: Float[Tensor, "*rows hidden"], weight: Tensor, decay: Decay, floor: float, largest: float
) -> tuple[Float[Tensor, "*rows hidden"], Float[Tensor, " hidden"]] | None:
    """Return what `LTI.prepare` returns, in fp32; None where torch must do it."""
    if not takes(e):  # before anything else: under a transform no weight has an address
        return None
    step, rate, made = decay.step, decay.rate, matrix_structure(weight)
    wide = step.dtype == rate.dtype == torch.float32 and step.is_contiguous()
    if made is None or not wide or not rate.is_contiguous() or e.shape[-1] != made.map.inputs:
        return None
    if not code_of(type(decay)).written:
        return None
    times, carry = torch.empty_like(step), torch.empty_like(rate)
    code = library()
    assert code is not None
    raw = step.data_ptr(), rate.data_ptr(), len(step)
    code.run_constants(*raw, floor, largest, times.data_ptr(), carry.data_ptr())
    made.times = times.data_ptr()
    return multiply(e, made), carry


def linear(
    x: Float[Tensor, "*rows inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "*rows outputs"]:
    """Return `x weight^T`; native for few rows."""
    fits = takes(x) and x.shape[-1] == weight.shape[-1]  # or torch says that it does not
    made = matrix_structure(weight) if fits else None
    return F.linear(x, weight) if made is None else multiply(x, made).to(x.dtype)


def matrix_structure(weight: Tensor) -> LinearStructure | None:
    """A matrix `(outputs, inputs)` as the native code reads it; None where it cannot."""
    numbers, scale = weight, None
    if isinstance(weight, Int8Weight):
        numbers, scale = weight.numbers, weight.scale
    outputs, inputs = weight.shape
    if not plain(numbers) or not plain(scale) or inputs % LANES:
        return None
    found = Map(outputs=outputs, inputs=inputs, kind=KINDS[numbers.dtype])
    found.weight, found.scale = numbers.data_ptr(), at(scale)
    return LinearStructure(map=found, factor=1)


def multiply(
    x: Float[Tensor, "*rows inputs"], structure: LinearStructure
) -> Float[Tensor, "*rows outputs"]:
    """Send rows through a map and what stands around it; the result is fp32."""
    outputs, inputs = structure.map.outputs, structure.map.inputs
    wide, rows = x.float().contiguous(), x.numel() // inputs
    y = room(*x.shape[:-1], outputs)
    work = scratch(wide.numel()).data_ptr() if structure.norm else None
    code = library()
    assert code is not None
    threads = threads_for(rows * outputs * inputs)
    code.run_linear(structure, wide.data_ptr(), rows, y.data_ptr(), work, threads)
    return y


class FewRowsLinear(nn.Linear):
    """A linear map without bias whose rows do not depend on each other's number."""

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        return linear(x, self.weight)


def threads_for(products: int) -> int:
    """How many threads share so many multiplications: none is woken for a few microseconds."""
    return max(1, min(torch.get_num_threads(), products // LEAST_PRODUCTS))


def plain(numbers: Tensor | None) -> bool:
    """Whether these are numbers of a known kind that follow each other, or nothing.

    A tensor of another class may have none of its own, whatever it says of them.
    """
    if numbers is None:
        return True
    own = type(numbers) in (Tensor, nn.Parameter) and numbers.device.type == "cpu"
    return own and numbers.dtype in KINDS and numbers.is_contiguous()


def at(tensor: Tensor | None) -> int | None:
    """Where a tensor lies, if there is one."""
    return None if tensor is None else tensor.data_ptr()


def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for the native code to write to, whatever dtype and device torch makes by default."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def scratch(size: int) -> Tensor:
    """Memory of this thread, for the native code to work in."""
    found: Tensor | None = getattr(_own, "scratch", None)
    if found is None or found.numel() < size:
        found = _own.scratch = room(size)
    return found
