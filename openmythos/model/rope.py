"""Rotary position embedding without complex numbers (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.config import RopePairing
from openmythos.model.remade import watched

LEAST_KEPT = 256
"""Positions of the smallest table that is kept."""


class Rope(NamedTuple):
    """What every channel and its partner are multiplied by, each `(*positions, dim)`.

    `sin` carries the sign of its channel, so that a rotation is two products and one swap.
    """

    cos: Float[Tensor, "*positions dim"]
    sin: Float[Tensor, "*positions dim"]

    def per_head(self) -> Rope:
        """Add the axis of the heads: `(*positions, 1, dim)`."""
        return Rope(self.cos.unsqueeze(-2), self.sin.unsqueeze(-2))

    def select(self, rows: Int[Tensor, " rows"]) -> Rope:
        """Take the given rows of a table."""
        return Rope(self.cos.index_select(0, rows), self.sin.index_select(0, rows))


def rope_table(
    positions: Int[Tensor, "*positions"],
    dim: int,
    base: float,
    pairing: RopePairing,
    dtype: torch.dtype,
) -> Rope:
    """Return the factors for `positions`, in fp32, or float64 for a float64 model.

    Angles are computed in float64 and then rounded: at position 1,000,000 an fp32 product is
    off by 0.06 radians. MPS has no float64, so there the table is made on the CPU.
    """
    device = positions.device
    if device.type == "mps":
        positions = positions.cpu()
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions.double().unsqueeze(-1) * base**-exponent  # (*positions, dim / 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = angles.cos().to(wide).to(device), angles.sin().to(wide).to(device)
    if pairing == "half":
        return Rope(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))
    paired = torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)
    return Rope(*(x.flatten(-2) for x in paired))


def rope_rows(
    start: int,
    count: int,
    dim: int,
    base: float,
    pairing: RopePairing,
    dtype: torch.dtype,
    device: torch.device,
) -> Rope:
    """Return `rope_table` of the `count` positions from `start` on, `(1, count, dim)`.

    Tables are kept: at one token a call, making a row of one takes a tenth of all time.
    """
    if device.type == "meta" or torch.compiler.is_compiling() or watched():
        positions = torch.arange(start, start + count, device=device)
        return Rope(*(x[None] for x in rope_table(positions, dim, base, pairing, dtype)))
    length = max(LEAST_KEPT, 1 << (start + count - 1).bit_length())
    kept = _kept(length, dim, base, pairing, dtype, device)
    return Rope(*(x[None, start : start + count] for x in kept))


@lru_cache(maxsize=8)
def _kept(
    length: int,
    dim: int,
    base: float,
    pairing: RopePairing,
    dtype: torch.dtype,
    device: torch.device,
) -> Rope:
    with torch.inference_mode(False):  # a later call may want gradients
        positions = torch.arange(length, device=device)
        return rope_table(positions, dim, base, pairing, dtype)


def rotate(x: Float[Tensor, "*rows dim"], rope: Rope, pairing: RopePairing) -> Tensor:
    """Turn each pair of channels of `x` by its position's angle; shape and dtype are kept.

    The product is taken in the table's dtype, so bf16 queries and keys rotate in fp32.
    """
    wide, half = x.to(rope.cos.dtype), x.shape[-1] // 2
    if pairing == "half":
        swapped = wide.view(*x.shape[:-1], 2, half).flip(-2)
    else:
        swapped = wide.view(*x.shape[:-1], half, 2).flip(-1)
    return torch.addcmul(wide * rope.cos, swapped.view(x.shape), rope.sin).to(x.dtype)
