"""Rotary position embedding without complex numbers (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.config import RopePairing


class Rope(NamedTuple):
    """Cosine and sine of every position's angles, each `(*positions, dim / 2)`."""

    cos: Float[Tensor, "*positions half"]
    sin: Float[Tensor, "*positions half"]

    def per_head(self) -> Rope:
        """Add the axis of the heads: `(*positions, 1, dim / 2)`."""
        return Rope(self.cos.unsqueeze(-2), self.sin.unsqueeze(-2))

    def select(self, rows: Int[Tensor, " rows"]) -> Rope:
        """Take the given rows of a flat table."""
        return Rope(self.cos.index_select(0, rows), self.sin.index_select(0, rows))


def rope_table(
    positions: Int[Tensor, "*positions"], dim: int, base: float, dtype: torch.dtype
) -> Rope:
    """Return the angles' cosine and sine for `positions`, in fp32 or float64.

    Angles are computed in float64 and then rounded: at position 1,000,000 an fp32 product is
    off by 0.06 radians. MPS has no float64, so there the table is made on the CPU.
    """
    device = positions.device
    if device.type == "mps":
        positions = positions.cpu()
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions.double().unsqueeze(-1) * base**-exponent
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Rope(angles.cos().to(wide).to(device), angles.sin().to(wide).to(device))


def rotate(x: Float[Tensor, "*rows dim"], rope: Rope, pairing: RopePairing) -> Tensor:
    """Turn each pair of channels of `x` by its position's angle; shape and dtype are kept.

    The product is taken in the table's dtype, so bf16 queries and keys rotate in fp32.
    """
    if pairing == "half":
        first, second = x.chunk(2, dim=-1)
    else:
        first, second = x[..., 0::2], x[..., 1::2]
    turned = (first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin)
    if pairing == "half":
        return torch.cat(turned, dim=-1).to(x.dtype)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)
