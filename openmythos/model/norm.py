"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


def rms_normalise(x: Float[Tensor, "*rows width"], eps: float) -> Float[Tensor, "*rows width"]:
    """Divide `x` by the root of its mean square over the last axis, in fp32 or wider."""
    x = x.float() if x.itemsize < 4 else x
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


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
        return (rms_normalise(x, self.eps) * self.weight).to(self.weight.dtype)
