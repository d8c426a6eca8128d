"""Values that the backward pass makes again instead of keeping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Make = Callable[[], Tensor]


def keeps_less() -> bool:
    """Whether autograd keeps values that we may choose.

    It keeps none without gradient, and lets nobody choose under a compiler or a transform.
    """
    learns = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return learns and not transformed()


def transformed() -> bool:
    """Whether one of `torch.func`'s transforms is at work, or forward-mode differentiation.

    Both see torch's own operations alone, the latter without gradient too.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def watched() -> bool:
    """Whether somebody sees torch's operations or takes them for others, as fake tensors do."""
    modes: int = torch._C._len_torch_dispatch_stack()
    return modes > 0


def remade(value: Tensor, make: Make) -> AbstractContextManager[Make]:
    """Inside, what autograd keeps of `value` for the backward pass is `make`, not its numbers.

    For values that are cheap to make from others that are kept anyway, as an activation is from
    its input. `make` runs once in the backward pass, without gradient, and must give the same
    bits. Nothing changes where `keeps_less` says no, and where saved tensors have hooks already:
    activation checkpointing keeps neither.

    Returns:
        A context that gives a call which makes the value, for values made of this one.
    """
    if not keeps_less():
        return nullcontext(make)
    wanted = value.requires_grad and value.is_contiguous() and not _hooked()
    return _inside(_Remade(value, make)) if wanted else nullcontext(make)


@contextmanager
def _inside(kept: _Remade) -> Iterator[Make]:
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        yield kept


class _Remade:
    """Holds the value in the backward pass from its first use to its last."""

    def __init__(self, value: Tensor, make: Make) -> None:
        self.storage, self.make = value.untyped_storage().data_ptr(), make
        self.kept = self.used = 0
        self.again: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.again is None:
            with torch.no_grad():
                self.again = self.make()
        return self.again

    def pack(self, saved: Tensor) -> tuple[Any, ...]:
        """Keep the layout of the value, and any other tensor as autograd does."""
        if saved.untyped_storage().data_ptr() != self.storage:
            return saved.detach(), saved._version  # itself, a result would be its own owner
        self.kept += 1
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(self, packed: tuple[Any, ...]) -> Tensor:
        """Return what was kept."""
        if isinstance(other := packed[0], Tensor):
            if (now := other._version) != packed[1]:
                raise RuntimeError(
                    "a tensor that the gradient needs was changed in place since the forward pass "
                    f"(version {now}, expected {packed[1]}): change it after backward()"
                )
            return other
        result = self().as_strided(*packed)
        self.used += 1
        if self.used % self.kept == 0:
            self.again = None
        return result


def _hooked() -> bool:
    """Whether hooks on saved tensors are in force."""
    top: Callable[[bool], object] = torch._C._autograd._top_saved_tensors_default_hooks
    return top(True) is not None
