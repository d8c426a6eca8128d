"""Plain transformers, the controls of looped models: no loop, no injection, as many parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

from openmythos.config import MythosConfig
from openmythos.model.accounting import on_meta, parameters
from openmythos.model.transformer import OpenMythos

PLAIN: dict[str, Any] = {
    "prelude_layers": 0,
    "coda_layers": 0,
    "mean_loops": 1,
    "injection": "none",
    "h0": "e",
    "core_output": "none",
    "prelude_norm": False,
}
"""Fields of a plain transformer, whose layers are the core's."""


class Sizes(NamedTuple):
    """What a plain transformer's parameters are made up of."""

    layers: int
    feed_forward_size: int


def plain_sizes(looped: MythosConfig, ratio: float, inner: int) -> Sizes:
    """Return the sizes that give a plain transformer `ratio` times a model's parameters.

    Args:
        looped: the model, dense and with `relu2`, whose width both have.
        ratio: embedding and head count too, the gate does not.
        inner: about the width inside of a layer's feed-forward; what whole layers leave is made up
            by that width, in steps of 8.
    """
    wanted, width = ratio * trained_parameters(on_meta(looped)), looped.hidden_size
    layer = 4 * width**2 + 2 * width * inner  # attention's maps, and two of the feed-forward
    layers = max(1, round((wanted - looped.vocab_size * width) / layer))
    narrow = on_meta(looped.replace(**PLAIN, core_layers=layers, feed_forward_size=8))
    size = 8 + (wanted - trained_parameters(narrow)) / (2 * width * layers)
    return Sizes(layers, max(8, 8 * round(size / 8)))


def trained_parameters(model: OpenMythos) -> int:
    """Return a model's parameters without its gate, which takes no part in a training."""
    gate = sum(parameter.numel() for parameter in model.core.gate.parameters())
    return sum(parameters(model).values()) - gate
