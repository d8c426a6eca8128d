"""Weights at the start, drawn from a seed and each tensor's own name."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openmythos.model.halting import DEFAULT_THRESHOLD
from openmythos.model.injection import START, Decay

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos

NEVER = -4.0
"""Logit of an untrained exit's probability: it does not fire."""
IDENTITY = ("core.injection.weight", "core_output.weight")
"""B and C, where they are square."""
ONES = ("qk_scale", "q_scale", "k_scale")
ADDED = (".out.weight", "w_out.weight", "w_out")
"""Out-projections, which every loop adds to the state again."""


@torch.no_grad()
def initialise(model: OpenMythos, seed: int) -> None:
    """Fill every tensor, each from its own generator, so that any order and sharding agree.

    Matrices are normal with 1/sqrt(fan_in), out-projections `config.out_init` times that (small
    but not zero: with zero all loops are collinear); B, C and norms are the identity. The
    embedding's rows have unit length. Nothing happens on `meta`.

    Args:
        model: whose parameters and buffers are filled.
        seed: of all generators.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        _fill(name, parameter, model.config.out_init, generator)
    for name, buffer in model.named_buffers():
        if not buffer.is_meta:
            buffer.fill_(DEFAULT_THRESHOLD if name.endswith("threshold") else 0)
    decay = getattr(model.core.injection, "decay", None)
    if isinstance(decay, Decay) and not decay.step.is_meta:
        decay.reset_parameters()


def _fill(name: str, parameter: Tensor, out_init: float, generator: torch.Generator) -> None:
    last = name.rsplit(".", 1)[-1]
    square = parameter.ndim == 2 and parameter.shape[0] == parameter.shape[1]
    if name in IDENTITY and square:
        torch.nn.init.eye_(parameter)
        return
    if name.endswith("lora.up") or name.startswith(("core.gate.", "core.act.")):
        parameter.fill_(NEVER if name.endswith(".bias") else 0.0)
        return
    if parameter.ndim < 2 or last in ONES:
        parameter.fill_(START if last == "diagonal" else 1.0)
        return
    if last == "qk_bias":
        parameter.zero_()
        return
    stacked = parameter.ndim == 3 and "lora" not in name and "router" not in name
    fan_in = parameter.shape[-2] if stacked else parameter.shape[-1]
    scale = 1 / math.sqrt(fan_in)
    if name.endswith(ADDED):
        scale *= out_init
    values = torch.empty(parameter.shape, dtype=torch.float32)
    values.normal_(0, scale, generator=generator)
    parameter.copy_(values)
