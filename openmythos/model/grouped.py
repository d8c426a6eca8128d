"""The grouped product: rows sorted by expert, one matrix per expert, as one operation.

Torch's `grouped_mm` is used where it takes the dtype and the widths; a loop elsewhere (float64,
MPS, rows not aligned to 16 bytes, and halves of a float on a CPU, see `_rounded`). Wrapped as a
custom operator because torch's fp32 version fails on `meta` and under `torch.compile`, and because
its backward refuses expanded gradients.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openmythos.model.remade import transformed
from openmythos.model.wide import autocast_dtype


@torch.library.custom_op("openmythos::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix.

    Args:
        x: `(rows, in)`, expert by expert.
        weights: `(experts, in, out)`.
        ends: `(experts,)` int32, where each expert's rows end.

    Returns:
        `(rows, out)`.
    """
    if _torch_takes(x, x.shape[1], weights.shape[2]):
        return F.grouped_mm(x, weights, offs=ends)
    out = x.new_empty(x.shape[0], weights.shape[2])
    for expert, (start, end) in _ranges(ends):
        rows = _rounded(end - start) if _compiles_by_rows(x) else end - start
        if start + rows <= len(x):  # what falls on the next experts' rows, these write over
            torch.mm(x[start : start + rows], weights[expert], out=out[start : start + rows])
        else:
            out[start:end] = torch.mm(_padded(x[start:end], rows), weights[expert])[: end - start]
    return out


@torch.library.custom_op("openmythos::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """Return `x_e^T y_e` for every expert's rows: `(experts, in, out)`."""
    if _torch_takes(x, x.shape[1], y.shape[1]):
        return F.grouped_mm(x.t(), y, offs=ends)
    out = x.new_zeros(ends.shape[0], x.shape[1], y.shape[1])
    for expert, (start, end) in _ranges(ends):
        rows = _rounded(end - start) if _compiles_by_rows(x) else end - start
        torch.mm(_padded(x[start:end], rows).t(), _padded(y[start:end], rows), out=out[expert])
    return out


def _torch_takes(x: Tensor, *widths: int) -> bool:
    """Whether torch's `grouped_mm` takes this dtype, device and row strides."""
    supported = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    aligned = all(width * x.itemsize % 16 == 0 for width in widths)
    if x.device.type == "mps" or _compiles_by_rows(x):
        return False
    return supported and aligned and x.shape[0] > 0


def _compiles_by_rows(x: Tensor) -> bool:
    """Whether the library that multiplies compiles a kernel for each number of rows it meets."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def _rounded(rows: int) -> int:
    """Return `rows` rounded up to one of eight sizes an octave: ..., 60, 64, 72, 80, ...

    On a CPU, products of bf16 are oneDNN's, which compiles a kernel for every shape it has not
    met: milliseconds, against tenths of one for the product. Experts get other numbers of rows at
    every loop, so that nearly all products would be first ones.
    """
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))


def _ranges(ends: Tensor) -> list[tuple[int, tuple[int, int]]]:
    pairs = enumerate(pairwise([0, *ends.tolist()]))
    return [(expert, (start, end)) for expert, (start, end) in pairs if end > start]


@grouped_mm.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:  # noqa: ARG001 (torch names them)
    return x.new_empty(x.shape[0], weights.shape[2])


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def _remember(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor],
    output: Tensor,  # noqa: ARG001 (torch names it)
) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weights, ends = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_x = grouped_mm(grad, weights.transpose(1, 2), ends)
    if ctx.needs_input_grad[1]:
        grad_weights = grouped_outer(x, grad, ends)
    return grad_x, grad_weights, None


grouped_mm.register_autograd(_backward, setup_context=_remember)


def _backward_outer(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """What a second derivative asks of the weights' first."""
    x, y, ends = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_y = None
    if ctx.needs_input_grad[0]:
        grad_x = grouped_mm(y, grad.transpose(1, 2), ends)
    if ctx.needs_input_grad[1]:
        grad_y = grouped_mm(x, grad, ends)
    return grad_x, grad_y, None


grouped_outer.register_autograd(_backward_outer, setup_context=_remember)


@torch.library.custom_op("openmythos::gathered_mm", mutates_args=())
def gathered_mm(x: Tensor, token: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` of the rows `x[token]`, which the backward pass gathers again.

    Kept, those rows would be `experts_per_token` copies of the state at every loop.
    """
    # index_select, because the backward of x[token] is not deterministic with two threads.
    return grouped_mm(x.index_select(0, token), weights, ends)


@gathered_mm.register_fake
def _(x: Tensor, token: Tensor, weights: Tensor, ends: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(token.shape[0], weights.shape[2])


def _remember_gathered(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    output: Tensor,  # noqa: ARG001 (torch names it)
) -> None:
    ctx.save_for_backward(*inputs)


def _backward_gathered(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    x, token, weights, ends = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_weights = None
    if ctx.needs_input_grad[0]:
        rows = grouped_mm(grad, weights.transpose(1, 2), ends)
        grad_x = torch.zeros_like(x).index_add_(0, token, rows)
    if ctx.needs_input_grad[2]:
        grad_weights = grouped_outer(x.index_select(0, token), grad, ends)
    return grad_x, None, grad_weights, None


gathered_mm.register_autograd(_backward_gathered, setup_context=_remember_gathered)


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor, token: Tensor | None = None) -> Tensor:
    """`grouped_mm`, or `gathered_mm` of rows `token`, in the autocast dtype where it is on."""
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, weights = x.to(dtype), weights.to(dtype)
    if transformed():  # which take no custom operator with a backward pass
        return _group_by_group(x if token is None else x.index_select(0, token), weights, ends)
    if token is None:
        return grouped_mm(x, weights, ends)
    return gathered_mm(x, token, weights, ends)


def _group_by_group(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` in torch's own operations."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ w for rows, w in zip(x.split(counts), weights, strict=True)])
