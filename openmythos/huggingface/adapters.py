"""Where an adapter of PEFT would be lost: what the model takes weights of without calling it."""

from __future__ import annotations

from torch import nn

from openmythos.errors import InputError
from openmythos.model.attention import LatentAttention
from openmythos.model.transformer import OpenMythos


def check_adapters(model: OpenMythos) -> None:
    """Refuse adapters around parts that are not called, or whose matrix is another part's too.

    Raises:
        InputError: there is one.
    """
    layers = [*model.prelude, *model.core.layers, *model.coda]
    latent = [part for layer in layers if isinstance(part := layer.attention, LatentAttention)]
    for attention in latent:
        _refuse(attention.kv_up, "kv_up", "MLA multiplies it into queries")
    _refuse(model.core.injection, "injection", "each loop takes from it what stays the same")
    if model.config.tie_head:
        for name, part in {"embed": model.embed, "head": model.head}.items():
            _refuse(part, name, "embedding and head are one matrix (tie_head), and would be two")


def _refuse(part: nn.Module, name: str, why: str) -> None:
    if type(part).__module__.partition(".")[0] == "peft":
        raise InputError(f"target_parameters must leave out {name}.weight: {why}")
