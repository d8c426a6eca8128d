"""Depth-wise LoRA: one small low-rank correction per loop.

After "Relaxed Recursive Transformers" (Bae et al. 2024, arXiv 2410.20672). The correction is
zero at the start, and loops past the last trained one use the last, so depth stays free.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def loop_linear(
    x: Float[Tensor, "*rows inputs"],
    stack: Float[Tensor, "loops outputs inputs"],
    loop: Int[Tensor, "*leading"],
) -> Float[Tensor, "*rows outputs"]:
    """Multiply `x` by the matrix of its loop; loops past the last matrix use the last.

    The leading axes of `x` start with those of `loop` (none: one loop for all).
    """
    loop = loop.clamp(max=len(stack) - 1)
    if loop.ndim == 0:
        return F.linear(x, stack.index_select(0, loop.reshape(1))[0])
    rows = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)  # (leading, tokens, inputs)
    y = rows @ stack.index_select(0, loop).transpose(1, 2)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class LoopLora(nn.Module):
    """`up[loop] @ down[loop] @ x`, with `loop` clamped to the last correction there is."""

    def __init__(self, inputs: int, outputs: int, rank: int, loops: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(loops, rank, inputs))
        self.up = nn.Parameter(torch.zeros(loops, outputs, rank))

    def forward(
        self, x: Float[Tensor, "*rows inputs"], loop: Int[Tensor, "*leading"]
    ) -> Float[Tensor, "*rows outputs"]:
        """Correct `x`, whose leading axes start with those of `loop` (none: one loop for all)."""
        return loop_linear(loop_linear(x, self.down, loop), self.up, loop)


class LoopLinear(nn.Module):
    """A linear map without bias that every loop may correct in its own way."""

    def __init__(self, inputs: int, outputs: int, rank: int = 0, loops: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.lora = LoopLora(inputs, outputs, rank, loops) if rank else None

    def forward(
        self, x: Float[Tensor, "*rows inputs"], loop: Int[Tensor, "*leading"]
    ) -> Float[Tensor, "*rows outputs"]:
        y = F.linear(x, self.weight)
        return y if self.lora is None else y + self.lora(x, loop)

    def flops(self) -> int:
        """Floating-point operations per row, forward."""
        lora = 0 if self.lora is None else self.lora.down[0].numel() + self.lora.up[0].numel()
        return 2 * (self.weight.numel() + lora)
