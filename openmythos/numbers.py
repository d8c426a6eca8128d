"""Numbers as callers give them: Python's, NumPy's, or a tensor that holds one."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection

from openmythos.errors import InputError


def whole(value: object) -> int | None:
    """Return an integer as Python's own; None where the value is none, as a bool or 2.0 is not."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    if getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # no number, or a tensor without data
        return None


def at_least(value: object, least: int) -> bool:
    """Whether a value is an integer of `least` or more."""
    number = whole(value)
    return number is not None and number >= least


def check_depths(loops: Collection[int]) -> None:
    """Raise `InputError` unless there are numbers of loops, each 1 or more."""
    if not loops:
        raise InputError("loops must hold a depth of 1 or more, and holds none")
    if min(loops) < 1:
        raise InputError(f"loops={min(loops)} must be 1 or more")


def real(value: object) -> float | None:
    """Return a finite number as Python's float; None where the value is none, as "0.8" is not."""
    if isinstance(value, str | bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    if getattr(value, "ndim", 0):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
