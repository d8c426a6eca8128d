"""Layers compiled by torch for the steps of a training, where that pays.

Norms, rotations, activations and residuals of a small model take as long as its products; a
compiler fuses them. Only the passes that carry gradient are compiled: measurements come in many
shapes, and each would be compiled anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils import deterministic

from openmythos.errors import ConfigError
from openmythos.model.transformer import OpenMythos
from openmythos.training.settings import Compile

LEAST_FLOPS = 5e13
"""Operations of a training from which compiling pays: about ten minutes of one core."""

VARIANTS = 64
"""Most times that torch compiles a layer: by kind, dtype, and one or many loops in a call."""

_memory: Any = deterministic  # its settings have no types


def compiling_pays(choice: Compile, flops: float, device: torch.device) -> bool:
    """Decide whether the layers of a training are compiled.

    Args:
        choice: `auto` compiles on the CPU, where the training is long enough and torch finds a
            C++ compiler.
        flops: floating-point operations of the whole training.
        device: where it runs.

    Raises:
        ConfigError: `always`, and torch cannot compile here.
    """
    check_compiler(choice)
    if choice != "auto":
        return choice == "always"
    return device.type == "cpu" and flops >= LEAST_FLOPS and _problem() is None


def check_compiler(choice: Compile) -> None:
    """Refuse `always` where torch cannot compile.

    Raises:
        ConfigError: it cannot.
    """
    if choice == "always" and (problem := _problem()):
        raise ConfigError(
            f"compile='always' must have a compiler that torch can use, but: {problem}; install "
            "g++ or set CXX, or take compile='auto'"
        )


@cache
def _problem() -> str | None:
    """Why torch cannot compile here; None where it can."""
    try:
        torch.compile(torch.neg)(torch.ones(8))
    except (RuntimeError, OSError) as error:
        return str(error).strip().split("\n")[0]
    return None


def compiled_layers(
    model: OpenMythos, *, sizes_vary: bool
) -> Callable[[], AbstractContextManager[None]]:
    """Return what makes contexts in which layers run compiled wherever they carry gradient.

    A run that is interrupted and goes on in another process gives the same bits: sums over chosen
    rows keep their order, which torch must be asked for in compiled code.

    Args:
        model: its layers are compiled when they first run.
        sizes_vary: whether batches differ in size from step to step or loop to loop; one compiled
            form then serves them all, in whichever order they come.
    """
    limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    torch._dynamo.config.recompile_limit = limit
    dynamic = True if sizes_vary else None
    layers = (*model.prelude, *model.core.layers, *model.coda)
    calls = [(layer, _with_gradient(layer, dynamic)) for layer in layers]
    on_cpu = model.embed.weight.device.type == "cpu"

    @contextmanager
    def running() -> Iterator[None]:
        with _ordered_sums() if on_cpu else nullcontext():
            for layer, call in calls:
                layer.forward = call
            try:
                yield
            finally:
                for layer, _ in calls:
                    del layer.forward

    return running


@contextmanager
def _ordered_sums() -> Iterator[None]:
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    _memory.fill_uninitialized_memory = False  # costs time, changes nothing
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        _memory.fill_uninitialized_memory = fill


def _with_gradient(layer: nn.Module, dynamic: bool | None) -> Callable[..., Any]:
    plain = layer.forward
    compiled = torch.compile(plain, dynamic=dynamic)

    def forward(*given: Any) -> Any:
        return compiled(*given) if torch.is_grad_enabled() else plain(*given)

    return forward
