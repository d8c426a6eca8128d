"""Tensors that stay in fp32 or wider whatever their model is cast to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def keep_wide(cast: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what a module's `_apply` may do instead of `cast`: move tensors, never narrow them."""

    def widely(tensor: Tensor) -> Tensor:
        moved = cast(tensor)
        narrow = moved.is_floating_point() and moved.itemsize < 4
        return tensor.to(moved.device) if narrow else moved

    return widely
