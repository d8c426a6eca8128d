"""A model whose matrices are int8 in memory: which they are, and how they become so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from openmythos.errors import InputError
from openmythos.model.adapters import LoopLinear
from openmythos.model.experts import Experts
from openmythos.model.int8 import Int8Weight, pack

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos


def matrices(model: OpenMythos) -> dict[str, Tensor]:
    """The parameters that may be int8: embedding, head, and the layers' linear maps and experts.

    Not B and C of the core, which start as the identity: beside a 1, int8 has no digits for the
    rest of a row (0.035 of error where others have 0.007).
    """
    found: dict[str, Tensor] = {"embed.weight": model.embed.weight}
    if not model.config.tie_head:
        found["head.weight"] = model.head.weight
    for name, module in model.named_modules(remove_duplicate=False):  # a layer may stand twice
        if isinstance(module, LoopLinear):
            found[f"{name}.weight"] = module.weight
        elif isinstance(module, Experts):
            found |= {f"{name}.w_in": module.w_in, f"{name}.w_out": module.w_out}
    return found


def quantise(model: OpenMythos) -> OpenMythos:
    """Turn a model's matrices into int8, in place, for inference on the CPU; return the model.

    The native code multiplies the int8 numbers by activations in fp32, or in 16 bits and more of a
    row's largest. Without it, a call with few rows multiplies them by activations rounded to bf16,
    and with more rows, and for the head, the fp32 matrix is made, used and forgotten. The state,
    norms, attention and the routers' choice stay fp32; caches keep bf16. Casting or moving the
    model widens its weights again. MLA's `kv_up` stays fp32, because the absorbed form takes it
    apart.

    Raises:
        InputError: the model is not fp32 on the CPU.
        CheckpointError: a matrix holds NaN or infinity.
    """
    weight = model.embed.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise InputError(
            f"model is {weight.dtype} on {weight.device}, must be torch.float32 on cpu: quantise "
            "it before casting or moving it"
        )
    for name, parameter in matrices(model).items():
        if stays_wide_in_memory(name):
            continue
        packed = parameter if isinstance(parameter, Int8Weight) else pack(name, parameter.detach())
        if name in ("embed.weight", "head.weight"):
            packed.few = 0  # logits are compared with each other: bf16's rounding makes ties
        owner, _, own_name = name.rpartition(".")
        setattr(
            model.get_submodule(owner), own_name, nn.Parameter(packed.detach(), requires_grad=False)
        )
    if model.config.tie_head:
        model.head.weight = model.embed.weight
    return model


def stays_wide_in_memory(name: str) -> bool:
    """Whether a model in int8 keeps this matrix in fp32."""
    return name.endswith(".kv_up.weight")
