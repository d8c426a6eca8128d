"""Where adapters of PEFT have a place, and where they would be lost."""

from __future__ import annotations

from torch import nn

from openmythos.errors import InputError
from openmythos.model.adapters import LoopLinear
from openmythos.model.attention import LatentAttention
from openmythos.model.experts import Experts
from openmythos.model.transformer import OpenMythos

ABSORBED = "kv_up"
"""MLA's map that is multiplied into queries, without a call of it."""


def adapter_targets(model: nn.Module) -> list[str]:
    """Return the matrices of a model's layers, for `target_parameters` of PEFT's `LoraConfig`.

    Maps of attention and feed-forwards are no `torch.nn.Linear`, and routed experts are stacks:
    `target_modules` finds neither. Shared experts are left out: beside stacks, PEFT cannot reach
    what lies in the same part.

    Args:
        model: an `OpenMythosForCausalLM`, or an `OpenMythos`.
    """
    found = set()
    inner = next(part for part in model.modules() if isinstance(part, OpenMythos))
    for layer in [*inner.prelude, *inner.core.layers, *inner.coda]:
        for name, part in layer.named_modules():
            if isinstance(part, Experts):
                found |= {f"{name}.w_in", f"{name}.w_out"}
            elif isinstance(part, LoopLinear) and not name.endswith(ABSORBED):
                found.add(f"{name}.weight")
    found -= {name for name in found if ".shared." in name}
    return sorted(found)


def check_adapters(model: OpenMythos) -> None:
    """Refuse adapters around parts that are not called, or whose matrix is another part's too.

    Raises:
        InputError: there is one.
    """
    layers = [*model.prelude, *model.core.layers, *model.coda]
    for attention in [layer.attention for layer in layers]:
        if isinstance(attention, LatentAttention):
            _refuse(attention.kv_up, ABSORBED, "MLA multiplies it into queries")
    _refuse(model.core.injection, "injection", "each loop takes from it what stays the same")
    if model.config.tie_head:
        for name, part in {"embed": model.embed, "head": model.head}.items():
            _refuse(part, name, "embedding and head are one matrix (tie_head), and would be two")


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into a model."""
    return any(_of_peft(part) for part in model.modules())


def _refuse(part: nn.Module, name: str, why: str) -> None:
    if _of_peft(part):
        raise InputError(f"adapters must leave out {name}: {why}")


def _of_peft(part: nn.Module) -> bool:
    return type(part).__module__.partition(".")[0] == "peft"
