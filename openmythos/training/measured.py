"""What a model in training gives on held-out text, as `metrics.jsonl` has it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from openmythos.model.transformer import OpenMythos
from openmythos.training.evaluate import (
    Evaluation,
    HaltingEvaluation,
    Reading,
    evaluate,
    evaluate_halting,
)
from openmythos.training.token_file import TokenFile

WINDOWS = 4
"""Of held-out text, on which the state and the experts' loads are looked at."""


class Measured(NamedTuple):
    """Bits per byte by depth, and with the model's own exits."""

    by_depth: Evaluation
    act: HaltingEvaluation | None
    """Where the exits are learnt with it."""

    @classmethod
    def of(
        cls,
        model: OpenMythos,
        text: TokenFile,
        token_bytes: NDArray[np.int64],
        reading: Reading,
        *,
        batch_size: int = 8,
    ) -> Measured:
        """Measure a model at 1, 2, 4, 8, 16 and its mean loops; a plain one at 1."""
        how: dict[str, Any] = {"reading": reading, "batch_size": batch_size}
        mean, act = model.config.mean_loops, None
        loops = sorted({1, 2, 4, 8, 16, mean}) if mean > 1 else [1]
        by_depth = evaluate(model, text, token_bytes, loops, **how)
        if model.config.learned_act:
            act = evaluate_halting(model, text, token_bytes, halting="act", budget=mean, **how)
        return cls(by_depth, act)

    def as_trained(self, mean_loops: int) -> float:
        """Bits per byte as the model is trained to run: with its exits, or with its mean loops."""
        if self.act is not None:
            return self.act.bits_per_byte
        return self.by_depth.bits_per_byte[self.by_depth.loops.index(mean_loops)]

    def line(self) -> dict[str, Any]:
        """Return its part of a line of metrics."""
        depths = self.by_depth
        line: dict[str, Any] = {
            "validation": dict(zip(map(str, depths.loops), depths.bits_per_byte, strict=True)),
        }
        if (act := self.act) is not None:
            line["act"] = {
                "bits_per_byte": act.bits_per_byte,
                "mean_loops": act.mean_loops,
                "budget": act.budget,
            }
        return line


@torch.no_grad()
def inside(
    model: OpenMythos, text: TokenFile, length: int, *, batch_size: int = WINDOWS
) -> dict[str, Any]:
    """RMS of the state after each loop and load of each expert, on windows of held-out text."""
    model.eval()
    windows = text.windows(length)
    ids = torch.from_numpy(text.read(windows.starts[:WINDOWS], windows.length)[:, :-1])
    mean = model.config.mean_loops
    loops = max(2, 2 * mean) if mean > 1 else 1
    squares, loads = torch.zeros(loops), None
    for part in ids.to(model.embed.weight.device).split(batch_size):
        out = model(part, loops, return_states=True)
        squares += out.states.float().square().mean((1, 2, 3)).cpu() * (len(part) / len(ids))
        if out.loads is not None:
            loads = out.loads if loads is None else loads + out.loads
    line: dict[str, Any] = {"state_rms": [round(float(x), 5) for x in squares.sqrt()]}
    if loads is not None:
        share = loads.float() / loads.sum(-1, keepdim=True)
        line["expert_share"] = [[[round(float(x), 5) for x in r] for r in s] for s in share]
    return line
