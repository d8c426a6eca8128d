"""Matrices in eight bits: int8 numbers and one fp32 scale per output, and products that read them.

w = numbers * scale with scale = max |w| / 127 over an output's inputs, so |error| <= scale / 2.
One scale per output is what the int8 product takes. A scale per 64 inputs has less error where
rows have outliers: relative to the matrix 0.0059 against 0.0070 for normal weights (256 inputs),
0.0105 against 0.0164 for Student's t with 3 degrees of freedom. Matrices trained here are like
the normal ones (0.0060 against 0.0064), so they would gain nothing for 6 % more bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import openmythos.model.grouped  # noqa: F401 - makes the operators that `PRODUCTS` names
from openmythos.errors import CheckpointError, InputError

LARGEST = 127

# Up to so many rows the int8 product is quicker than making the fp32 matrix. One thread with AVX2,
# us for 1, 8 and 16 rows: 1024 x 256 fp32 39, 111, 157; int8 34, 135, 273; made anew 76, 147, 226.
# 2048 x 2048, which no cache holds: fp32 776, 2966, 4320; int8 313, 1502, 2959; made anew 1669,
# 4310, 4734. So at one row int8 is 2.5 times as fast as fp32 weights that no cache holds, and about
# as fast in small matrices; in a whole small model the gain is the memory.
FEW_ROWS = 8

# Larger matrices are made in pieces of so many numbers, which a cache holds.
PIECE = 2**18

# Private, but the only int8 product of torch that leaves activations alone. It is written for bf16
# activations: with fp32 ones it takes ten times as long as fp32 weights. Without vector
# instructions (other processors, and torch's build for Windows) it is never quick.
_QUICK = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and sys.platform != "win32"
_int8_mm: Callable[[Tensor, Tensor, Tensor], Tensor] | None = (
    getattr(torch, "_weight_int8pack_mm", None) if _QUICK else None
)
# It reads 16 numbers at a time and checks nothing: another width, or rows that begin between, are
# a wrong result or a crash. Its offsets are 32-bit.
ALIGNED = 16
MOST_NUMBERS = 2**31 - 1


def pack(name: str, matrix: Tensor) -> Int8Weight:
    """Round a matrix `(out, in)`, or a stack `(experts, in, out)`, to int8 with scales.

    Raises:
        CheckpointError: it holds NaN or infinity, and nothing can be rounded to those.
    """
    wide = matrix.float()
    scale = wide.abs().amax(input_axis(matrix), keepdim=True) / LARGEST
    if not bool(scale.isfinite().all()):
        raise CheckpointError(
            f"tensor {name!r} holds NaN or infinity, must be finite to become int8: take an "
            "earlier checkpoint"
        )
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros
    return Int8Weight((wide / scale).round().to(torch.int8).contiguous(), scale)


def input_axis(matrix: Tensor) -> int:
    """The axis that a product sums over: `(out, in)`, but experts are `(experts, in, out)`."""
    return -2 if matrix.ndim == 3 else -1


class Int8Weight(Tensor):
    """A parameter that is int8 inside and fp32 to all who ask.

    It stands where an fp32 parameter stood, so the model is written once. Products with it read
    the int8 numbers (`PRODUCTS`); any other operation gets the fp32 matrix, made for it. Numbers
    may be copied into it, as `load_state_dict` does; another change in place would be of a matrix
    that nobody keeps, and is refused.
    """

    numbers: Tensor
    """int8, of the shape the parameter has; rows of one output lie together in memory."""
    scale: Tensor
    """fp32, broadcasts against `numbers`."""
    few: int
    """Up to so many rows, products read the int8 numbers."""

    @staticmethod
    def __new__(
        cls: type[Int8Weight], numbers: Tensor, scale: Tensor, few: int = FEW_ROWS
    ) -> Int8Weight:
        return Tensor._make_wrapper_subclass(
            cls, numbers.shape, dtype=scale.dtype, device=numbers.device
        )

    def __init__(
        self,
        numbers: Int8[Tensor, "*stack rows columns"],
        scale: Float[Tensor, "*stack _ _"],
        few: int = FEW_ROWS,
    ) -> None:
        if numbers.ndim == 3:
            numbers = numbers.mT.contiguous().mT
        self.numbers, self.scale, self.few = numbers, scale, few

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own, place = PRODUCTS.get(func, (func, 0))
        if own is not func and len(args) > place and isinstance(args[place], Int8Weight):
            return own(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub lacks the class method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = _written(func, args, kwargs)
        if written and func is torch.ops.aten.copy_.default and args[1].shape == args[0].shape:
            return args[0].take_over(args[1])
        if written:
            raise _refused(func)
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))

    def dense(self) -> Tensor:
        """The fp32 matrix, or stack of them."""
        return (self.numbers.float() * self.scale).contiguous()

    def take_over(self, matrix: Tensor) -> Int8Weight:
        """Become another matrix of the same shape, rounded where it is not int8.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        packed = matrix if isinstance(matrix, Int8Weight) else pack("weight", matrix)
        self.numbers.copy_(packed.numbers)
        self.scale.copy_(packed.scale)
        return self

    @cached_property
    def experts(self) -> list[Int8Weight]:
        """The matrices of a stack."""
        pairs = zip(self.numbers, self.scale, strict=True)
        return [Int8Weight(numbers, scale, self.few) for numbers, scale in pairs]

    @cached_property
    def fits(self) -> bool:
        """Whether torch's int8 product can take this matrix."""
        inputs = self.shape[0 if self.scale.shape[0] == 1 else 1]
        aligned = inputs % ALIGNED == 0 and self.numbers.data_ptr() % ALIGNED == 0
        return aligned and self.numel() <= MOST_NUMBERS

    @cached_property
    def ones(self) -> Tensor:
        """One for each output of a matrix: torch's int8 product would round our scales to bf16."""
        return torch.ones(self.scale.numel(), dtype=torch.bfloat16)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Weight:
        return nn.Parameter(_copy(self), requires_grad=False)  # type: ignore[return-value]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation writes to an int8 weight."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    places = (a.name for a in func._schema.arguments if a.is_write)
    leaves = (leaf for name in places for leaf in tree_leaves(given.get(name)))
    return any(isinstance(leaf, Int8Weight) for leaf in leaves)


def _refused(how: object) -> InputError:
    return InputError(
        f"an int8 weight cannot be changed in place by {how}: copy a matrix of its shape into it, "
        "or change the fp32 model and quantise that"
    )


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, Int8Weight) else value


def _product(x: Tensor, numbers: Tensor, weight: Int8Weight) -> Tensor:
    """Multiply `x` `(*rows, in)` by the matrix whose int8 numbers are `(out, in)`."""
    scale, rows = weight.scale.flatten(), x.numel() // x.shape[-1]
    learns = x.requires_grad and torch.is_grad_enabled()  # the int8 product has no backward pass
    few = 0 < rows <= weight.few and x.dtype == torch.float32 and not learns
    if few and _int8_mm is not None and weight.fits:
        y = _int8_mm(x.reshape(rows, -1).bfloat16(), numbers, weight.ones)
        return (y * scale).view(*x.shape[:-1], -1)
    pieces = numbers.split(max(1, PIECE // numbers.shape[1]))
    parts = [F.linear(x, piece.to(x.dtype)) for piece in pieces]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)) * scale


def _linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    y = _product(x, weight.numbers, weight)
    return y if bias is None else y + bias


def _mm(x: Tensor, weight: Int8Weight) -> Tensor:
    return _product(x, weight.numbers.t(), weight)


def _addmm(total: Tensor, x: Tensor, weight: Int8Weight, *, alpha: float = 1) -> Tensor:
    return torch.add(total, _mm(x, weight), alpha=alpha)


def _embedding(token_ids: Tensor, weight: Int8Weight, *_: Any, **__: Any) -> Tensor:
    return weight.numbers[token_ids] * weight.scale[token_ids]


def _expert(stack: Int8Weight, index: Any) -> Tensor:
    whole = stack.ndim == 3 and isinstance(index, int)
    return stack.experts[index] if whole else stack.dense()[index]


def _grouped_mm(x: Tensor, weights: Int8Weight, ends: Tensor) -> Tensor:
    """As `openmythos.model.grouped.grouped_mm`; no matrix is made of an expert without rows."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    groups = zip(x.split(counts), weights.experts, strict=True)
    parts = [_mm(rows, expert) for rows, expert in groups if len(rows)]
    return torch.cat(parts) if parts else x.new_empty(0, weights.shape[2])


def _gathered_mm(x: Tensor, token: Tensor, weights: Int8Weight, ends: Tensor) -> Tensor:
    return _grouped_mm(x.index_select(0, token), weights, ends)


def _same(weight: Int8Weight) -> Int8Weight:
    return Int8Weight(weight.numbers, weight.scale, weight.few)


def _copy(weight: Int8Weight, **_: Any) -> Int8Weight:
    return Int8Weight(weight.numbers.clone(), weight.scale.clone(), weight.few)


def _never(*_: Tensor) -> bool:
    """A cast parameter must be a new one: data put into this one would leave its numbers behind."""
    return False


def _refuse(*_: Any) -> None:
    """Such a change reaches torch as one of the fp32 matrix, or of nothing."""
    raise _refused("setting a part of it or its data")


# An operation, what it does with an Int8Weight, and where among its arguments it takes one.
PRODUCTS: dict[Any, tuple[Callable[..., Any], int]] = {
    F.linear: (_linear, 1),
    F.embedding: (_embedding, 1),
    torch.mm: (_mm, 1),
    torch.addmm: (_addmm, 2),
    torch.ops.openmythos.grouped_mm.default: (_grouped_mm, 1),
    torch.ops.openmythos.gathered_mm.default: (_gathered_mm, 2),
    Tensor.__getitem__: (_expert, 0),
    Tensor.__setitem__: (_refuse, 0),
    Tensor.data.__set__: (_refuse, 0),  # type: ignore[attr-defined]
    Tensor.detach: (_same, 0),
    Tensor.clone: (_copy, 0),
    torch._has_compatible_shallow_copy_type: (_never, 0),
}

torch.serialization.add_safe_globals([Int8Weight])  # `torch.load` runs nothing but its making
