"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openmythos.model.remade import keeps_less


def inverse_rms(x: Float[Tensor, "*rows width"], eps: float) -> Float[Tensor, "*rows 1"]:
    """Return 1 / sqrt(mean(x^2) + eps) over the last axis; `x` is fp32 or wider.

    One reduction and three small operations: a decoded token waits for the number of operations
    (torch's `rms_norm` takes 30 us on one row of 256 here, this and two products 18).
    """
    width = x.shape[-1]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_constant(eps, x), length, length, value=1 / width).rsqrt_()


def _constant(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)


def rms_norm(
    x: Float[Tensor, "*rows width"], weight: Float[Tensor, "*gains width"], eps: float
) -> Float[Tensor, "*rows width"]:
    """Divide `x` by the root of its mean square over the last axis, times `weight`.

    In fp32 or wider; the result has the wider dtype. `weight` may have leading axes of its own,
    as one gain for each head.
    """
    x = x.float() if x.itemsize < 4 else x
    weight = weight.to(x.dtype)
    if keeps_less() and (x.requires_grad or weight.requires_grad):
        result: Tensor = _Normalise.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return result
    return x * inverse_rms(x, eps) * weight


class _Normalise(torch.autograd.Function):
    """Keeps x and one number a row for the backward pass, where autograd would keep x / rms too.

    With the state at every loop kept for its backward pass, that copy is a tenth of all memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = inverse_rms(x, eps)
        ctx.save_for_backward(x, inverse, weight)
        ctx.eps = eps
        return x * inverse * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, of which this is a part
            inverse = inverse_rms(x, ctx.eps)
        unit = x * inverse
        scaled = grad * weight
        projection = (scaled * unit).mean(-1, keepdim=True)
        return (
            torch.addcmul(scaled, unit, projection, value=-1) * inverse,
            (grad * unit).sum_to_size(weight.shape),
            None,
        )


class RMSNorm(nn.Module):
    """Unit root mean square with a learned scale.

    The state may be wider than the weights (it stays fp32 in a bf16 core): the result has the
    weights' dtype, which is what the next linear map needs.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        return rms_norm(x, self.weight, self.eps).to(self.weight.dtype)
