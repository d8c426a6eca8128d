"""Exits on text: what a language model's tokens lose that leave the core early, rule by rule.

Every way of leaving reads the same windows of held-out text, so that bits per byte differ by the
exits alone. Random exit deals the gate's own loops to other tokens. The oracle knows each next
token: it leaves at the first loop whose loss is within `MARGIN` of the least that the token has at
any loop, read off a run in which all tokens take all loops.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.config import HaltingKind
from openmythos.evidence.cells import Result, Say
from openmythos.evidence.forced_routing import windows_of
from openmythos.evidence.report import table
from openmythos.inference.language_model import LanguageModel
from openmythos.model.transformer import cross_entropy
from openmythos.training.token_file import TokenFile

BUDGET = 8
"""Most loops of a token."""
LENGTH, TOKENS = 512, 16_384
"""Of a window, and of all windows together."""
FIXED = (1, 2, 3, 4, 6, 8)
RULES: dict[HaltingKind, tuple[float, ...]] = {
    "gate": (0.3, 0.5, 0.7, 0.9),
    "delta": (0.05, 0.1, 0.2, 0.4),
    "kl": (1e-3, 1e-2, 5e-2, 2e-1),
}
"""Thresholds by rule."""
MARGIN = 0.01
"""Nats by which the oracle's loop may be worse than the best."""
TOGETHER = 4
"""Windows that are read at once."""


@torch.inference_mode()
def measure(lm: LanguageModel, text: TokenFile, say: Say, tokens: int = TOKENS) -> Result:
    """Return bits per byte and mean loops of every way of leaving the core.

    Args:
        lm: a language model with a trained gate.
        text: held-out tokens.
        say: told of progress.
        tokens: about so many predictions are measured.
    """
    windows = windows_of(text, LENGTH, tokens)
    sizes = torch.from_numpy(lm.tokenizer.token_bytes)[windows[:, 1:]]

    def point(nats: Tensor, mean_loops: float) -> dict[str, float]:
        bits = float(nats.cpu().double().sum()) / math.log(2) / int(sizes.sum())
        return {"bits_per_byte": bits, "mean_loops": mean_loops}

    def read(loops: int | Tensor = BUDGET, **rule: Any) -> tuple[dict[str, float], Tensor]:
        nats, taken = [], []
        for at in range(0, len(windows), TOGETHER):
            part = windows[at : at + TOGETHER]
            budget = loops if isinstance(loops, int) else loops[at : at + TOGETHER]
            out = lm.model(part[:, :-1], budget, **rule)
            nats.append(cross_entropy(out.logits, part[:, 1:]))
            taken.append(out.loops)
        every = torch.cat(taken)
        return point(torch.cat(nats), float(every.cpu().double().mean())), every

    say(f"reading {windows[:, 1:].numel():,} tokens at fixed depths")
    losses = _losses(lm, windows)
    fixed = {str(loops): point(losses[loops - 1], float(loops)) for loops in FIXED}
    say("reading them with every rule")
    rules = {
        rule: [
            {"threshold": threshold, **read(halting=rule, threshold=threshold)[0]}
            for threshold in thresholds
        ]
        for rule, thresholds in RULES.items()
    }
    gate, loops = read(halting="gate")
    order = torch.randperm(loops.numel(), generator=torch.Generator().manual_seed(0))
    return {
        "fixed": fixed,
        "rules": rules,
        "gate": gate,
        "random": read(loops.flatten()[order].view_as(loops))[0],
        "oracle": read(first_good(losses))[0],
    }


def _losses(lm: LanguageModel, windows: Tensor) -> Tensor:
    """Nats of every prediction after each loop, `(loops, windows, length)`."""
    found = []
    for part in windows.split(TOGETHER):
        states = lm.model(part[:, :-1], BUDGET, return_states=True).states
        found.append(torch.stack([cross_entropy(lm.model.decode(h), part[:, 1:]) for h in states]))
    return torch.cat(found, dim=1)


def first_good(
    losses: Float[Tensor, "loops windows length"],
) -> Int[Tensor, "windows length"]:
    """Return the first loop whose loss is within `MARGIN` of the least of any loop."""
    return (losses <= losses.amin(0) + MARGIN).int().argmax(0) + 1


def rows_of(found: Result) -> list[tuple[str, dict[str, float]]]:
    """Return every way of leaving by name, and what it gave."""
    rows = [(f"none, loops: {loops}", point) for loops, point in found["fixed"].items()]
    for rule, points in found["rules"].items():
        rows += [(f"{rule} at {point['threshold']:g}", point) for point in points]
    rows += [("gate, as shipped", found["gate"]), ("random, the gate's loops", found["random"])]
    return [*rows, ("oracle", found["oracle"])]


def table_of(found: Result) -> str:
    """Return the table of exits on text."""
    head = ["exits on text", "bits per byte", "mean loops"]
    lines = [
        [name, f"{point['bits_per_byte']:.4f}", f"{point['mean_loops']:.2f}"]
        for name, point in rows_of(found)
    ]
    return table(head, lines)


NOTE = (
    f"On text every way of leaving reads the same {TOKENS:,} tokens of held-out messages; the "
    "oracle knows each next token, as no rule can. `act` asks for a model that was trained with "
    "it, which the shipped one was not."
)

WORTH = 0.05
"""Bits per byte that all loops must be worth over one for exits to be worth a question."""


def sentences(found: Result) -> list[str]:
    """Say whether there is depth to allocate, and who allocates it well."""
    one, full = (found["fixed"][loops]["bits_per_byte"] for loops in ("1", str(BUDGET)))
    worth = f"{BUDGET} loops are worth {one - full:.3f} bits per byte over one"
    if one - full < WORTH:
        return [f"On text there is no depth to allocate at this size: {worth}."]
    gate, dealt = found["gate"], found["random"]
    loops = gate["mean_loops"]
    near = min(found["fixed"], key=lambda depth: abs(int(depth) - loops))
    fixed, oracle = found["fixed"][near]["bits_per_byte"], found["oracle"]
    return [
        (
            f"On text {worth}. With its gate the shipped language model takes {loops:.2f} loops of "
            f"{BUDGET} for {gate['bits_per_byte']:.4f} bits per byte, where all loops give "
            f"{full:.4f}, {near} for every token {fixed:.4f}, the gate's own loops dealt to other "
            f"tokens {dealt['bits_per_byte']:.4f}, and an oracle {oracle['bits_per_byte']:.4f} "
            f"with {oracle['mean_loops']:.2f}."
        )
    ]
