"""Bytes that a training keeps for the parameters, whatever the text; counted on the parameters."""

from __future__ import annotations

import os
from typing import NamedTuple

from openmythos.config import MythosConfig
from openmythos.errors import ConfigError
from openmythos.model.accounting import on_meta
from openmythos.model.transformer import OpenMythos
from openmythos.training.machine import default_device
from openmythos.training.optimizer import group_of, learning
from openmythos.training.settings import TrainConfig

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


def training_bytes(model: OpenMythos, train: TrainConfig | None = None) -> TrainingBytes:
    """Count weights, gradients and optimizer state in fp32, of a model that may be on `meta`.

    The gate, which is trained after the model, has no gradient meanwhile.

    Args:
        model: what is trained.
        train: says what of it learns, and by which optimizer. Default: as `TrainConfig()`.
    """
    train = train or TrainConfig()
    learns, matrices = learning(model, train.train), train.optimizer.matrices
    weights = gradients = state = 0
    for name, parameter in model.named_parameters():
        size = 4 * parameter.numel()
        weights += size
        if name in learns:
            gradients += size
            own = group_of(name, parameter).optimizer
            state += STATE[matrices if own == "muon" else own] * size
    return TrainingBytes(weights, gradients, state)


def check_fits(config: MythosConfig, train: TrainConfig | None = None) -> None:
    """Refuse a model that is larger than this machine's memory.

    Nothing is refused where the system does not tell how much there is.

    Args:
        config: the model's.
        train: its training, whose gradients and optimizer state count too, but for those that lie
            on a GPU. Default: it is only read, and its weights count alone.

    Raises:
        ConfigError: in fp32 it is; the message has both sizes.
    """
    model, memory = on_meta(config), physical_memory()
    count = sum(parameter.numel() for parameter in model.parameters())
    counted, needed = f"parameters={count:,} take", 4 * count
    if train is not None and default_device().type != "cuda":
        counted = f"parameters={count:,}, their gradients and optimizer state take"
        needed = training_bytes(model, train).total
    if memory is not None and needed > memory:
        raise ConfigError(
            f"{counted} {needed / 1e9:,.1f} GB in fp32, must fit into this machine's memory of "
            f"{memory / 1e9:,.1f} GB: choose a smaller model"
        )


def physical_memory() -> int | None:
    """Bytes of memory that this machine has; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX, or a system without these names
        return None
