"""Bytes that a training keeps for the parameters, whatever the text; counted on the parameters."""

from __future__ import annotations

import os
from typing import NamedTuple

from openmythos.config import MythosConfig
from openmythos.errors import ConfigError
from openmythos.model.accounting import on_meta, parameters
from openmythos.model.transformer import OpenMythos
from openmythos.training.optimizer import group_of

STATE = {"muon": 1, "adamw": 2}
"""Tensors an optimizer keeps for each parameter, of its size: momentum, or both moments."""


class TrainingBytes(NamedTuple):
    """Memory of a training in fp32. Activations come on top: they depend on the batch."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return sum(self)


def training_bytes(model: OpenMythos) -> TrainingBytes:
    """Count weights, gradients and optimizer state in fp32, of a model that may be on `meta`.

    The gate, which is trained after the model, has no gradient meanwhile.
    """
    weights = gradients = state = 0
    for name, parameter in model.named_parameters():
        size = 4 * parameter.numel()
        weights += size
        if not name.startswith("core.gate."):
            gradients += size
            state += STATE[group_of(name, parameter).optimizer] * size
    return TrainingBytes(weights, gradients, state)


def check_fits(config: MythosConfig) -> None:
    """Refuse a model whose weights alone are larger than this machine's memory.

    Nothing is refused where the system does not tell how much there is.

    Raises:
        ConfigError: in fp32 they are; the message has both sizes.
    """
    count, memory = sum(parameters(on_meta(config)).values()), physical_memory()
    if memory is not None and 4 * count > memory:
        raise ConfigError(
            f"parameters={count:,} take {4 * count / 1e9:,.1f} GB in fp32, must fit into this "
            f"machine's memory of {memory / 1e9:,.1f} GB: choose a smaller model"
        )


def physical_memory() -> int | None:
    """Bytes of memory that this machine has; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX, or a system without these names
        return None
