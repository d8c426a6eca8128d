"""The models of the claim on parameter efficiency: the looped shapes tried, and the plain ones."""

from __future__ import annotations

import dataclasses
from typing import Any

from openmythos.evidence.plain import PLAIN, plain_sizes
from openmythos.evidence.text_training import TextTraining
from openmythos.model.accounting import on_meta
from openmythos.training.settings import DepthLaw

WIDTH = 192


def looped(
    prelude: int,
    core: int,
    loops: int,
    coda: int,
    *,
    depth: DepthLaw = "near",
    lanes: int = 1,
    **more: Any,
) -> TextTraining:
    """Return a looped model of `prelude` + `core` x `loops` + `coda` layers."""
    shape = {
        "prelude_layers": prelude,
        "core_layers": core,
        "mean_loops": loops,
        "coda_layers": coda,
        "hidden_size": WIDTH,
    }
    return TextTraining(
        shape={**shape, **more}, lanes=lanes, depth=depth, vocab_size=4096, steps=1840
    )


VARIANTS = {
    "looped-1+2x6+1": looped(1, 2, 6, 1),
    "looped-0+4x4+0": looped(0, 4, 4, 0),
    "looped-1+2x4+1": looped(1, 2, 4, 1),
    "looped-1+2x8+1": looped(1, 2, 8, 1),
    "looped-1+3x4+0": looped(1, 3, 4, 0),
    "looped-1+1x6+0-wide": looped(1, 1, 6, 0, hidden_size=256),
    "looped-1+2x4+1-fixed": looped(1, 2, 4, 1, depth="fixed"),
    "looped-1+2x4+1-lora": looped(1, 2, 4, 1, lora_rank=4, feed_forward_size=704),
    "looped-1+2x4+1-peri": looped(1, 2, 4, 1, norm="peri"),
    "looped-1+2x4+1-norm": looped(1, 2, 4, 1, core_output="norm"),
    "looped-1+2x4+1-add": looped(1, 2, 4, 1, injection="add"),
    "looped-1+2x6+1-lanes": looped(1, 2, 6, 1, lanes=2),
    "looped-1+2x8+1-fixed": looped(1, 2, 8, 1, depth="fixed"),
    "looped-0+4x4+0-fixed": looped(0, 4, 4, 0, depth="fixed"),
}
"""Looped shapes that were tried, with the same parameters within 2 % (the wide one 5 % more). What
a core layer is worth grows with the share of layers in the core and with the loops, what it costs
with their product. `depth="near"` keeps the loops of training within one of the mean: a wide law
costs a language model loss. The model with LoRA has narrower feed-forwards to pay for it; lanes are
hyper-connections at the loop's boundary, see `laned`."""

MAIN = next(iter(VARIANTS))
RATIOS = {"plain-1.0x": 1.0, "plain-1.3x": 1.3, "plain-1.69x": 1.69, "plain-2x": 2.0}
ISO_FLOP = "plain-1.0x-iso-flop"
SEEDED = (MAIN, "looped-0+4x4+0", "plain-1.0x", "plain-1.69x")
"""Rows with all seeds and a learning rate of their own; the others have one seed."""
TUNED_AS = {"plain-1.3x": "plain-1.0x", "plain-2x": "plain-1.69x", ISO_FLOP: "plain-1.0x"}
"""Whose learning rate a row takes; where it is not named here and has none of its own, `MAIN`'s."""

TEXT_ROWS = ("looped-", "plain-")
"""How the names of rows of text begin, beside tuning and hops."""

RATES = (0.5, 1.0, 2.0)
"""What the learning rates of the default recipe are multiplied by."""

QUICK: dict[str, Any] = {
    "steps": 120,
    "length": 128,
    "vocab_size": 1024,
    "measured_tokens": 8192,
}
QUICK_WIDTH = 96


def trainings(*, quick: bool) -> dict[str, TextTraining]:
    """The rows and how each is trained, but for the rate and the seed."""
    if quick:
        main = VARIANTS[MAIN]
        small = dataclasses.replace(main, shape={**main.shape, "hidden_size": QUICK_WIDTH}, **QUICK)
        return {MAIN: small} | {
            name: plain_of(RATIOS[name], small) for name in ("plain-1.0x", "plain-1.69x")
        }
    main = VARIANTS[MAIN]
    plain = {name: plain_of(ratio, main) for name, ratio in RATIOS.items()}
    twin = plain["plain-1.0x"]
    most = max(_flops(VARIANTS[name]) for name in SEEDED if name in VARIANTS)
    longer = most / _flops(twin)
    iso_flop = dataclasses.replace(twin, steps=round(longer * twin.steps))
    return VARIANTS | plain | {ISO_FLOP: iso_flop}


def plain_of(ratio: float, looped: TextTraining) -> TextTraining:
    """Return a plain transformer of `ratio` times the parameters of `looped`, trained as it is."""
    width = looped.config.hidden_size
    layers, inner = plain_sizes(looped.config, ratio, inner=4 * width)
    shape = {"hidden_size": width, "core_layers": layers, "feed_forward_size": inner}
    return dataclasses.replace(looped, shape={**PLAIN, **shape})


def _flops(training: TextTraining) -> float:
    return training.training_flops(on_meta(training.config))
