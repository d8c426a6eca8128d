"""Is A below 1 in floating point? No training: all pairs of raw values on a wide grid.

Beside the package's form stands the one that papers write, exp(-softplus(p) e^q) (Parcae, arXiv
2604.12946), computed in the model's dtype: below 1 on paper.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openmythos.evidence.cells import Result
from openmythos.evidence.report import rounded_up, table
from openmythos.model.injection import LTI

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST = 1e4
"""Raw values go from minus this to this."""

ALIVE = (-15.0, 8.0)
"""Between these raw values both gradients must not vanish, so that no channel is dead."""


def raw_values() -> tuple[Tensor, Tensor]:
    """Return all pairs of 0 and +-10^-4 to +-10^4, as two tensors."""
    size = np.geomspace(1e-4, LARGEST, 65)
    values = torch.tensor([*-size[::-1], 0.0, *size], dtype=torch.float32)
    pairs = torch.cartesian_prod(values, values)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def ours(dtype: torch.dtype) -> Result:
    """Measure A of the package's injection in a model that was cast to `dtype`."""
    first, second = raw_values()
    injection = LTI(1)
    injection.decay.step, injection.decay.rate = nn.Parameter(first), nn.Parameter(second)
    a = injection.to(dtype).A
    gradients = torch.autograd.grad(a.sum(), [injection.decay.step, injection.decay.rate])
    low, high = ALIVE
    alive = (first >= low) & (first <= high) & (second >= low) & (second <= high)
    return {
        **_figures(a, dtype),
        "gradients_finite": all(bool(g.isfinite().all()) for g in gradients),
        "dead": int(sum((g[alive] == 0).sum() for g in gradients)),
    }


def on_paper(dtype: torch.dtype) -> Result:
    """Measure exp(-softplus(p) e^q), computed in `dtype`."""
    first, second = (values.to(dtype) for values in raw_values())
    return _figures(torch.exp(-F.softplus(first) * second.exp()), dtype)


def _figures(a: Tensor, dtype: torch.dtype) -> Result:
    """The largest A, and the shares of the grid where it is not in [0, 1) or no number."""
    a = a.detach()
    rounded, number = a.to(dtype), ~a.isnan()
    return {
        "pairs": a.numel(),
        "largest": float(a[number].max()),
        "outside": int((number & ((a < 0) | (a >= 1))).sum()),
        "outside_rounded": int((number & (rounded >= 1)).sum()),
        "no_number": int((~number).sum()),
    }


def measure() -> Result:
    """Measure both forms in every dtype."""
    forms = {"ours": ours, "on paper": on_paper}
    return {
        form: {name: figures(dtype) for name, dtype in DTYPES.items()}
        for form, figures in forms.items()
    }


def wrong_pairs(run: Result) -> int:
    """Return at how many pairs A is not in [0, 1), or rounds to 1, or is no number."""
    return int(run["outside"] + run["outside_rounded"] + run["no_number"])


def sentence(radius: Result) -> str:
    """Whether A is below 1 in floating point."""
    ours, paper = radius["ours"], radius["on paper"]
    pairs = ours["fp32"]["pairs"]
    wrong = sum(map(wrong_pairs, ours.values()))
    largest = max(run["largest"] for run in ours.values())
    shares = [
        f"{100 * (run['outside'] + run['no_number']) / run['pairs']:.0f} % in {name}"
        for name, run in paper.items()
    ]
    held = f"is at most {rounded_up(largest, 5)} in every dtype"
    if wrong:
        held = f"fails at {wrong} of them"
    return (
        f"Without training, for {pairs:,} pairs of raw values from -10,000 to 10,000, A {held}; "
        "exp(-softplus(p) e^q), which is below 1 on paper, rounds to 1 or is no number for "
        f"{', '.join(shares)}."
    )


def as_table(radius: Result) -> str:
    """Return what was measured, a line for each form and dtype."""
    head = ["A at raw values of ±1e4", "dtype", "pairs", "largest", "1 or more, or below 0"]
    head += ["1 after rounding", "no number", "gradients"]
    lines = []
    for form, measured in radius.items():
        for name, run in measured.items():
            gradients = ""
            if "dead" in run:
                finite = "finite" if run["gradients_finite"] else "not finite"
                gradients = f"{finite}, {run['dead']} dead in -15 to 8"
            counts = [run["outside"], run["outside_rounded"], run["no_number"]]
            largest = rounded_up(run["largest"], 5)
            lines.append([form, name, f"{run['pairs']:,}", largest, *counts, gradients])
    return table(head, lines)
