"""Dense feed-forward kinds, and the table that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from openmythos.model.adapters import LoopLinear
from openmythos.model.remade import keeps_less, remade


def swiglu(x: Float[Tensor, "*rows double"]) -> Float[Tensor, "*rows single"]:
    """`silu(gate) * up`, the gate being the first half of the channels (arXiv 2002.05202)."""
    if keeps_less() and x.requires_grad:
        result: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
        return result
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone for the backward pass; silu is cheaper to redo than to keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        if torch.is_grad_enabled():  # for a second derivative, which silu_backward has not
            share = gate.sigmoid()
            to_gate = grad * up * share * (1 + gate * (1 - share))
        else:
            to_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat([to_gate, grad * F.silu(gate)], dim=-1)


def relu2(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """Squared ReLU (Primer, So et al. 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


FEED_FORWARD: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "swiglu": (swiglu, 2),
    "relu2": (relu2, 1),
}
"""Activation, and how many inner channels the first map makes for each one it keeps."""


class FeedForward(nn.Module):
    """Widen, activate, narrow."""

    def __init__(self, kind: str, hidden: int, size: int, rank: int = 0, loops: int = 1) -> None:
        super().__init__()
        self.activation, parts = FEED_FORWARD[kind]
        self.parts, self.size = parts, size
        self.w_in = LoopLinear(hidden, parts * size, rank, loops)
        self.w_out = LoopLinear(size, hidden, rank, loops)

    def forward(
        self, x: Float[Tensor, "*rows hidden"], loop: Int[Tensor, "*leading"]
    ) -> Float[Tensor, "*rows hidden"]:
        wide = self.w_in(x, loop)
        inner = self.activation(wide)
        with remade(inner, lambda: self.activation(wide)):
            return self.w_out(inner, loop)

    def fused_splits(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Parameters that hold several matrices: the axis and the pieces' sizes."""
        return {"w_in.weight": (0, (self.size,) * self.parts)} if self.parts > 1 else {}

    def flops(self) -> int:
        """Floating-point operations per row, forward."""
        return self.w_in.flops() + self.w_out.flops()
