"""How the prelude's output e enters each loop: u = A h + B e, and its alternatives.

The default is a linear time-invariant system with diagonal A below 1, as in Parcae
(arXiv 2604.12946), in a form that stays below 1 in floating point and not only on paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from openmythos.model.native.linear import drive, linear
from openmythos.model.wide import keep_wide

FLOOR = 2.0**-8  # A <= exp(-2^-8) < 1 - 2^-9: representable below 1 even in bf16
START = math.sqrt(1 / 5)  # A at initialisation, Parcae's 0.447
LARGEST_STEP = 8.0


Carry = Tensor
"""What multiplies h at every loop: a diagonal, a matrix, or nothing; one for all rows, or one for
each, whose axes before the last are then those of the rows."""


@runtime_checkable
class Injection(Protocol):
    """`prepare` once per call what does not change over the loops, then `__call__` at each."""

    def prepare(self, e: Tensor) -> tuple[Tensor, Carry]:
        """Return what every loop adds, `(*rows, hidden)`, and what multiplies h."""
        ...

    def __call__(self, h: Tensor, drive: Tensor, carry: Carry) -> Tensor:
        """Return u, the input of the core's layers, `(*rows, hidden)`."""
        ...

    def spectral_radius(self) -> Tensor:
        """Return the largest absolute eigenvalue of the linear part on h, a scalar."""
        ...

    def flops_once(self) -> int:
        """Return the floating-point operations of `prepare` per token: of its products."""
        ...

    def flops(self) -> int:
        """Return those of one loop per token."""
        ...


class Decay(nn.Module):
    """Two raw numbers per channel, kept in fp32 or wider whatever the model is cast to.

    In fp16 the gradient of the raw value -15 would round to zero, and a bf16 copy of a raw
    value is another A: kept wide, the fp32, bf16 and fp16 model share one linear system.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.empty(width))
        self.rate = nn.Parameter(torch.empty(width))

    @property
    def A(self) -> Float[Tensor, " hidden"]:
        """The diagonal they stand for, in fp32 or wider, each value in [0, 1)."""
        return torch.exp(-(FLOOR + F.softplus(self.step) * F.softplus(self.rate)))

    def reset_parameters(self, start: float = START) -> None:
        """Set step * rate so that A starts at `start`, with rate 1."""
        wanted = -math.log(start) - FLOOR
        with torch.no_grad():
            self.step.fill_(math.log(math.expm1(wanted)))
            self.rate.fill_(math.log(math.expm1(1.0)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decay:
        return super()._apply(keep_wide(fn), recurse)  # type: ignore[no-untyped-call]


class LTI(nn.Module):
    """u = A h + B e with A = exp(-(2^-8 + softplus(step) softplus(rate))), diagonal.

    For raw values in [-1e4, 1e4], 0 <= A < 1 holds in fp32 and wider, gradients are finite, and
    in [-15, 8] both are non-zero: a clamp would leave dead channels, softplus times exp gives
    NaN at the ends. B is the step, bounded smoothly by 8, times a dense matrix that starts as
    the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay = Decay(width)
        self.weight = nn.Parameter(torch.empty(width, width))

    @property
    def A(self) -> Float[Tensor, " hidden"]:
        """The diagonal in use, in fp32 or wider, each value in [0, 1)."""
        return self.decay.A

    def prepare(self, e: Float[Tensor, "*rows hidden"]) -> tuple[Tensor, Carry]:
        """Return B e and A, both in fp32 or wider."""
        done = drive(e, self.weight, self.decay, FLOOR, LARGEST_STEP)
        if done is not None:
            return done
        step = LARGEST_STEP * torch.tanh(F.softplus(self.decay.step) / LARGEST_STEP)
        return linear(e.to(self.weight.dtype), self.weight) * step, self.A

    def forward(
        self, h: Float[Tensor, "*rows hidden"], drive: Float[Tensor, "*rows hidden"], carry: Carry
    ) -> Float[Tensor, "*rows hidden"]:
        return torch.addcmul(drive, carry, h)

    def spectral_radius(self) -> Float[Tensor, ""]:
        """Return max A: the eigenvalues of a diagonal are its entries."""
        return self.A.detach().abs().max()

    def flops_once(self) -> int:
        """Of the product B e."""
        return 2 * self.weight.numel()

    def flops(self) -> int:
        """Of A h + B e: a product and a sum for each channel."""
        return 2 * len(self.weight)


class Free(nn.Module):
    """u = a h + B e with a free diagonal a: what `lti` is compared with. Nothing bounds a."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.diagonal = nn.Parameter(torch.full((width,), START))
        self.weight = nn.Parameter(torch.empty(width, width))

    @property
    def A(self) -> Float[Tensor, " hidden"]:
        """The diagonal in use."""
        return self.diagonal

    def prepare(self, e: Float[Tensor, "*rows hidden"]) -> tuple[Tensor, Carry]:
        """Return B e and the diagonal."""
        return linear(e.to(self.weight.dtype), self.weight), self.diagonal

    def forward(
        self, h: Float[Tensor, "*rows hidden"], drive: Float[Tensor, "*rows hidden"], carry: Carry
    ) -> Float[Tensor, "*rows hidden"]:
        return carry * h + drive

    def spectral_radius(self) -> Float[Tensor, ""]:
        """Return max |a|."""
        return self.diagonal.detach().abs().max()

    def flops_once(self) -> int:
        """Of the product B e."""
        return 2 * self.weight.numel()

    def flops(self) -> int:
        """Of a h + B e: a product and a sum for each channel."""
        return 2 * len(self.weight)


class Linear(nn.Module):
    """u = W [h, e], the adapter of Huginn (Geiping et al. 2025, arXiv 2502.05171)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 2 * width))

    def prepare(self, e: Float[Tensor, "*rows hidden"]) -> tuple[Tensor, Carry]:
        """Return e's half of the product and h's half of W."""
        width = e.shape[-1]
        return F.linear(e.to(self.weight.dtype), self.weight[:, width:]), self.weight[:, :width]

    def forward(
        self, h: Float[Tensor, "*rows hidden"], drive: Float[Tensor, "*rows hidden"], carry: Carry
    ) -> Float[Tensor, "*rows hidden"]:
        return F.linear(h.to(carry.dtype), carry) + drive

    def spectral_radius(self) -> Float[Tensor, ""]:
        """Return the largest absolute eigenvalue of h's half of W."""
        square = self.weight.detach()[:, : self.weight.shape[0]].float()
        return torch.linalg.eigvals(square.cpu()).abs().max()

    def flops_once(self) -> int:
        """Of e's half of the product."""
        return self.weight.numel()

    def flops(self) -> int:
        """Of h's half."""
        return self.weight.numel()


class Add(nn.Module):
    """u = h + e: marginally stable, spectral radius 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def prepare(self, e: Float[Tensor, "*rows hidden"]) -> tuple[Tensor, Carry]:
        """Return e and nothing."""
        return e, e.new_empty(0)

    def forward(
        self, h: Float[Tensor, "*rows hidden"], drive: Float[Tensor, "*rows hidden"], carry: Carry
    ) -> Float[Tensor, "*rows hidden"]:
        return h + drive

    def spectral_radius(self) -> Float[Tensor, ""]:
        """Return 1."""
        return torch.ones(())

    def flops_once(self) -> int:
        """None: e enters as it is."""
        return 0

    def flops(self) -> int:
        """Of a sum for each channel."""
        return self.width


class NoInjection(nn.Module):
    """u = h: e enters as the first state only (`h0="e"`), as in a plain transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def prepare(self, e: Float[Tensor, "*rows hidden"]) -> tuple[Tensor, Carry]:
        """Return e, which no loop reads, and nothing."""
        return e, e.new_empty(0)

    def forward(
        self, h: Float[Tensor, "*rows hidden"], drive: Float[Tensor, "*rows hidden"], carry: Carry
    ) -> Float[Tensor, "*rows hidden"]:
        return h

    def spectral_radius(self) -> Float[Tensor, ""]:
        """Return 1: the residual stream passes unchanged."""
        return torch.ones(())

    def flops_once(self) -> int:
        """None."""
        return 0

    def flops(self) -> int:
        """None."""
        return 0


INJECTION: dict[str, Any] = {
    "lti": LTI,
    "free": Free,
    "linear": Linear,
    "add": Add,
    "none": NoInjection,
}
