"""What a configuration costs: parameters, operations, cache. Counted on `meta`, never by formula.

A model on `meta` has all its tensors and none of their memory, so 1 T parameters are counted in a
fifth of a second, and a change of the model cannot leave its count behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openmythos.config import CachePolicy, MythosConfig
from openmythos.model.transformer import OpenMythos

ROUTED = (".feed_forward.w_in", ".feed_forward.w_out")
"""Ends of the names of the routed experts' stacked matrices; dense ones end in `.weight`."""


@dataclass(frozen=True)
class Account:
    """What a configuration costs."""

    parts: dict[str, int]
    """Parameters of embedding, prelude, core, experts (the routed ones), coda and head (0 where it
    is the embedding)."""
    active: int
    """Parameters that one token uses: all but the routed experts it does not choose."""
    keys: int
    """Keys that a token sees where operations are counted."""
    flops: dict[int, int]
    """Floating-point operations per token, forward, by loops."""
    cache_bytes: dict[str, int]
    """Bytes per token in bf16 at the mean loops, by cache policy. `last` is what stands while a
    text is written; its prompt keeps all loops until it is read."""
    serving_bytes: int
    """Bytes of the weights in bf16."""

    @property
    def total(self) -> int:
        """All parameters; a tied head counts once."""
        return sum(self.parts.values())


def on_meta(config: MythosConfig) -> OpenMythos:
    """Return the model without memory for its tensors."""
    with torch.device("meta"):
        return OpenMythos(config)


def account(
    config: MythosConfig, *, loops: Sequence[int] | None = None, keys: int = 1024
) -> Account:
    """Count what a configuration costs.

    Args:
        config: the shape.
        loops: depths to count operations at; default: 1, and half, all and twice the mean.
        keys: keys that a token sees, at most the config's max_length.
    """
    model, mean = on_meta(config), config.mean_loops
    keys = min(keys, config.max_length)
    loops = sorted({1, max(1, mean // 2), mean, 2 * mean}) if loops is None else loops
    parts = parameters(model)
    serving = model.bfloat16()
    tensors = {**dict(serving.named_parameters()), **dict(serving.named_buffers())}
    return Account(
        parts=parts,
        active=sum(parts.values()) - unchosen(model),
        keys=keys,
        flops={depth: model.flops(keys, depth) for depth in loops},
        cache_bytes=cache_bytes(serving),
        serving_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def cache_bytes(model: OpenMythos) -> dict[str, int]:
    """Count the bytes per token of a cache in the model's dtype, at the mean loops, by policy."""
    slots_of: dict[CachePolicy, int] = {"per_loop": model.config.mean_loops, "last": 1}
    return {
        policy: model.new_cache(1, 1, loops=slots, policy=policy).nbytes
        for policy, slots in slots_of.items()
    }


def training_flops(
    model: OpenMythos,
    tokens: int,
    keys: int,
    loops: float,
    *,
    learning: float | None = None,
    recomputed: bool = False,
) -> float:
    """Count the floating-point operations of a training: backward takes twice those of forward.

    Args:
        model: its parts say what they take forward.
        tokens: predicted in all steps.
        keys: keys that a token sees.
        loops: that it runs; of tokens that differ, the mean.
        learning: the last of these, which carry gradient as those before do not. Default: all.
        recomputed: a loop with gradient runs forward once more on the way back.
    """
    loop, carrying = model.core.flops(keys), loops if learning is None else min(loops, learning)
    forward_alone = (loops - carrying) + (carrying if recomputed else 0)
    both_ways = model.flops(keys, 0) + carrying * loop
    return float(3 * tokens * both_ways + tokens * forward_alone * loop)


def parameters(model: OpenMythos) -> dict[str, int]:
    """Count the parameters of each part."""
    counts = Counter({"embedding": 0, "prelude": 0, "core": 0, "experts": 0, "coda": 0, "head": 0})
    stages = {"embed": "embedding", "prelude": "prelude", "prelude_norm": "prelude"}
    stages |= {"core": "core", "head": "head"}
    for name, parameter in model.named_parameters():
        part = stages.get(name.split(".")[0], "coda")  # with C and the last norm
        if part == "core" and name.endswith(ROUTED):
            part = "experts"
        counts[part] += parameter.numel()
    return dict(counts)


def unchosen(model: OpenMythos) -> int:
    """Count the parameters of the routed experts that one token does not choose."""
    chosen = model.config.experts_per_token
    return sum(
        (len(stack) - chosen) * stack[0].numel()
        for layer in model.core.experts_layers()
        for stack in (layer.w_in, layer.w_out)
    )
