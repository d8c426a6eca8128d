"""Exits on text: what a language model's tokens lose that leave the core early, rule by rule.

Every way of leaving reads the same windows of held-out text, so that bits per byte differ by the
exits alone. Random exit deals the gate's own loops to other tokens. The oracle knows each next
token: it leaves at the first loop whose loss is within `MARGIN` of the least that the token has at
any loop, read off a run in which all tokens take all loops.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.config import HaltingKind
from openmythos.evidence.cells import Result, Say
from openmythos.evidence.forced_routing import windows_of
from openmythos.evidence.graves_exits import ActTraining, teach, with_exits
from openmythos.evidence.report import counted, table
from openmythos.evidence.text_training import NOT_COMPARABLE
from openmythos.model.transformer import OpenMythos, cross_entropy
from openmythos.training.gate import Labelled
from openmythos.training.settings import OptimizerConfig
from openmythos.training.token_file import TokenFile
from openmythos.training.tokenizer import Tokenizer

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
SETTINGS = {
    "tokens": TOKENS,
    "budget": BUDGET,
    "length": LENGTH,
    "fixed": FIXED,
    "rules": RULES,
    "margin": MARGIN,
}
"""All that decides a measurement of one model."""


LEARNT = ActTraining(prices=(0.003, 0.01, 0.03), steps=100, sequences=4, rate=0.1)
"""How Graves' exits are learnt: at a tenth of the default rates, as the model's training ended."""


class Reader:
    """Reads the same windows of held-out text with any model and any way of leaving.

    Args:
        text: held-out tokens.
        tokenizer: of the text.
        tokens: about so many predictions are measured.
    """

    def __init__(self, text: TokenFile, tokenizer: Tokenizer, tokens: int = TOKENS) -> None:
        self.windows = windows_of(text, LENGTH, tokens)
        self.bytes = int(torch.from_numpy(tokenizer.token_bytes)[self.windows[:, 1:]].sum())

    def point(self, nats: Tensor, mean_loops: float) -> dict[str, float]:
        """Return bits per byte of the losses of all predictions, and the loops they took."""
        bits = float(nats.cpu().double().sum()) / math.log(2) / self.bytes
        return {"bits_per_byte": bits, "mean_loops": mean_loops}

    @torch.inference_mode()
    def read(
        self, model: OpenMythos, loops: int | Tensor = BUDGET, **rule: Any
    ) -> tuple[dict[str, float], Tensor]:
        """Return the point that a way of leaving gives, and each token's loops."""
        nats, taken = [], []
        for at in range(0, len(self.windows), TOGETHER):
            part = self.windows[at : at + TOGETHER]
            budget = loops if isinstance(loops, int) else loops[at : at + TOGETHER]
            out = model(part[:, :-1], budget, **rule)
            nats.append(cross_entropy(out.logits, part[:, 1:]))
            taken.append(out.loops)
        every = torch.cat(taken)
        return self.point(torch.cat(nats), float(every.cpu().double().mean())), every

    @torch.inference_mode()
    def losses(self, model: OpenMythos) -> Tensor:
        """Return nats of every prediction after each loop, `(loops, windows, length)`."""
        found = []
        for part in self.windows.split(TOGETHER):
            states = model(part[:, :-1], BUDGET, return_states=True).states
            found.append(torch.stack([cross_entropy(model.decode(h), part[:, 1:]) for h in states]))
        return torch.cat(found, dim=1)


def measure(model: OpenMythos, reader: Reader, say: Say) -> Result:
    """Return bits per byte and mean loops of every way of leaving the core.

    Args:
        model: a language model with a trained gate.
        reader: of held-out text.
        say: told of progress.
    """
    say(f"reading {reader.windows[:, 1:].numel():,} tokens at fixed depths")
    losses = reader.losses(model)
    fixed = {str(loops): reader.point(losses[loops - 1], float(loops)) for loops in FIXED}
    say("reading them with every rule")
    rules = {
        rule: [
            {"threshold": threshold, **reader.read(model, halting=rule, threshold=threshold)[0]}
            for threshold in thresholds
        ]
        for rule, thresholds in RULES.items()
    }
    gate, loops = reader.read(model, halting="gate")
    order = torch.randperm(loops.numel(), generator=torch.Generator().manual_seed(0))
    return {
        "fixed": fixed,
        "rules": rules,
        "gate": gate,
        "random": reader.read(model, loops.flatten()[order].view_as(loops))[0],
        "oracle": reader.read(model, first_good(losses))[0],
    }


def learn(
    model: OpenMythos,
    reader: Reader,
    training_text: TokenFile,
    training: ActTraining,
    folder: Path,
    say: Say,
) -> Result:
    """Train copies on with Graves' exits, and one without: bits per byte and mean loops.

    Further training changes what a model reads by itself: the twin without exits, trained on alike,
    is what the others are compared with.

    Args:
        model: a language model.
        reader: of held-out text.
        training_text: tokens of text that the model was trained on.
        training: of the exits, and of everything else along with them.
        folder: for checkpoints.
        say: told of progress.
    """
    default = OptimizerConfig()
    optimizer = OptimizerConfig(
        muon_lr=training.rate * default.muon_lr,
        adam_lr=training.rate * default.adam_lr,
        warmup_steps=10,
        decay_share=0.8,
    )

    def asked(step: int) -> Labelled:
        first = step * training.sequences
        samples = range(first, first + training.sequences)
        token_ids = torch.from_numpy(training_text.batch(samples, LENGTH, seed=training.seed))
        return Labelled(token_ids[:, :-1], token_ids[:, 1:])

    def taught(price: float | None) -> OpenMythos:
        own = copy.deepcopy(model) if price is None else with_exits(model, training)
        where = folder / ("twin" if price is None else f"{price:g}")
        teach(own, asked, training, optimizer, where, say, budget=BUDGET, price=price)
        return own

    twin = reader.losses(taught(None))
    return {
        "twin": {str(loops): reader.point(twin[loops - 1], float(loops)) for loops in FIXED},
        "act": {
            f"{price:g}": reader.read(taught(price), halting="act")[0] for price in training.prices
        },
    }


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


def learnt_rows(learnt: Result) -> list[tuple[str, dict[str, float]]]:
    """Return what models gave that were trained on, with Graves' exits and without."""
    rows = [(f"none, loops: {loops}, trained on", point) for loops, point in learnt["twin"].items()]
    return rows + [
        (f"act, {price} nats a loop, trained on", point) for price, point in learnt["act"].items()
    ]


def table_of(found: Result, learnt: Result | None = None) -> str:
    """Return the table of exits on text."""
    head = ["exits on text", "bits per byte", "mean loops"]
    rows = rows_of(found) + ([] if learnt is None else learnt_rows(learnt))
    lines = [
        [name, f"{point['bits_per_byte']:.4f}", f"{point['mean_loops']:.2f}"]
        for name, point in rows
    ]
    return table(head, lines)


NOTE = (
    f"On text every way of leaving reads the first {TOKENS:,} tokens of the held-out messages of "
    f"odd number, in windows of {LENGTH} tokens that do not overlap, so that the first tokens of a "
    f"window have next to no context. {NOT_COMPARABLE} The oracle knows each next token, as no "
    "rule can. Held-out messages told when a part of the model's recipe had gone on for too long."
)

LEARNT_NOTE = (
    "`act` asks for a model that was trained with it: the shipped one is trained on for "
    f"{LEARNT.steps} steps at each price of a loop, and a twin alike with all {BUDGET} loops and "
    "without exits."
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


def learnt_sentence(learnt: Result) -> str:
    """Say what Graves' exits make of the language model."""
    said = [
        f"{point['bits_per_byte']:.4f} with {point['mean_loops']:.2f} loops (at {price} nats each)"
        for price, point in learnt["act"].items()
    ]
    twin = ", ".join(
        f"{point['bits_per_byte']:.4f} at {counted(int(n), 'loop')}"
        for n, point in learnt["twin"].items()
    )
    return (
        f"Trained on with Graves' rule, the language model has {', '.join(said)} bits per byte; "
        f"trained on alike without exits, {twin}."
    )
