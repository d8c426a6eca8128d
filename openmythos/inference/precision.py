"""What a model's weights are in memory, and where they lie."""

from __future__ import annotations

import copy
import time
from typing import get_args

import torch

from openmythos.config import WeightsChoice
from openmythos.errors import InputError
from openmythos.model.int8 import Int8Weight
from openmythos.model.quantised import quantise
from openmythos.model.transformer import OpenMythos
from openmythos.training.machine import measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

PROMPT, WRITTEN = 128, 32
"""Tokens read at once, and then one by one: what is timed."""
REPEATS = 3


def check_weights(weights: str | None) -> None:
    """Refuse what is no choice of weights; None leaves them as they are.

    Raises:
        InputError: it is none.
    """
    kinds = get_args(WeightsChoice)
    if weights is not None and weights not in kinds:
        raise InputError(f"weights={weights!r} must be one of {', '.join(kinds)}")


def find_device(device: str | torch.device | None, weights: str | None = None) -> torch.device:
    """Return torch's device, after a look whether it is one here that can hold such weights.

    Args:
        device: as for `torch.device`; None is the CPU.
        weights: what the weights are to be.

    Raises:
        InputError: it is none, or it cannot.
    """
    try:
        place = torch.device("cpu" if device is None else device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(
            f"device={device!r} must be one that torch finds here, as 'cpu' is, but: {reason}"
        ) from None
    if weights == "int8" and place.type != "cpu":
        raise InputError(f"device={device!r} must be 'cpu' with weights='int8'")
    if place.type == "meta":
        raise InputError(f"device={device!r} must be one that computes, as 'cpu' does")
    return place


def with_weights(model: OpenMythos, weights: WeightsChoice | None) -> OpenMythos:
    """Return a model whose weights are these; `file` and None leave them as they are."""
    if weights == "auto":
        return quicker(model)
    if weights == "int8":
        return quantise(model.float())
    return model.to(DTYPES[weights]) if weights in DTYPES else model


def weights_of(model: OpenMythos) -> str:
    """Return what a model's weights are: `fp32`, `bf16`, `int8`, or what torch calls them."""
    weight = model.embed.weight
    if isinstance(weight, Int8Weight):
        return "int8"
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(weight.dtype, str(weight.dtype).removeprefix("torch."))


def quicker(model: OpenMythos) -> OpenMythos:
    """Return the model in fp32 or bf16, whichever reads and writes text quicker here.

    A product of many rows in bf16 is several times as fast as in fp32 on a CPU with AMX, but
    writing token by token is not made of such products: there fp32 weights run in compiled code.
    On a CPU a bf16 copy is made and both read a prompt of 128 tokens and write 32, where bf16
    products are quicker at all; elsewhere products decide.
    """
    device = model.embed.weight.device
    if measure("auto", device).precision == "fp32":
        return model.float()
    if device.type != "cpu":
        return model.bfloat16()
    wide, narrow = model.float(), copy.deepcopy(model).bfloat16()
    fp32, bf16 = seconds(wide), seconds(narrow)
    return narrow if bf16 < fp32 else wide


@torch.inference_mode()
def seconds(model: OpenMythos) -> float:
    """Return how long a model takes to read a prompt and write behind it: the best of some."""
    length = min(PROMPT + WRITTEN, model.config.max_length)
    prompt = max(1, length - WRITTEN)
    token_ids = torch.zeros(1, prompt, dtype=torch.int64)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        cache = model.new_cache(1, length)
        model(token_ids, cache=cache)
        for _ in range(prompt, length):
            model(token_ids[:, :1], cache=cache)
        best = min(best, time.perf_counter() - start)
    return best
