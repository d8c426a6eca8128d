"""Tensors that stay in fp32 or wider whatever their model or autocast is set to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def keep_wide(cast: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what a module's `_apply` may do instead of `cast`: it narrows to fp32 at most."""

    def widely(tensor: Tensor) -> Tensor:
        moved = cast(tensor)
        narrow = moved.is_floating_point() and moved.itemsize < 4
        return tensor.to(moved.device, torch.float32) if narrow else moved

    return widely


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks of products on a device, None where it asks for none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None  # torch raises when it is asked about `meta`
    return torch.get_autocast_dtype(device.type)
