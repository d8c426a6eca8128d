"""Which precision a model reads and writes text quicker in, measured on the model itself.

A product of many rows in bf16 is several times as fast as in fp32 on a CPU with AMX, but writing
token by token is not made of such products: there fp32 and int8 weights run in compiled code.
"""

from __future__ import annotations

import copy
import time

import torch

from openmythos.model.transformer import OpenMythos
from openmythos.training.machine import measure

PROMPT, WRITTEN = 128, 32
"""Tokens read at once, and then one by one: what is timed."""
REPEATS = 3


def quicker(model: OpenMythos) -> OpenMythos:
    """Return the model in fp32 or bf16, whichever is quicker here.

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
