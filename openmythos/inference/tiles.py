"""Rows a fixed number at a time, and small tensors about them.

Torch's products have other bits for another number of rows, and its elementwise functions in the
last few numbers of an array. What must depend on nothing but a row is computed in tiles, filled
up where fewer rows are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from openmythos.inference.scheduler import Row

TILE = 8
"""Rows of a tile: the most for which a lone row costs hardly more than one row does, because a
product of few rows takes the time of reading its weights."""

Some = TypeVar("Some", Sequence[Row], Sequence[int], Tensor)
"""Rows, their numbers, or one tensor's."""


def in_parts(rows: Some, size: int) -> Iterator[Some]:
    """Yield the rows in parts of `size` or, at the end, fewer."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def integers(values: Sequence[Any]) -> Tensor:
    """As int64: by way of NumPy, which takes a tenth of `torch.tensor`'s time."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def filled(values: Sequence[int]) -> Int[Tensor, " rows"]:
    """As int64, with zeros up to a whole tile."""
    return integers([*values, *[0] * (TILE - len(values))])


def longer(x: Tensor, more: int) -> Tensor:
    """With so many more rows of zeros."""
    return torch.cat([x, x.new_zeros(more, *x.shape[1:])])
