"""Bytes that a training keeps for the parameters, whatever the text; counted on the parameters."""

from __future__ import annotations

from typing import NamedTuple

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
