"""What a forward pass and a new cache accept: checked before any work is done."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from openmythos.config import MOST, CachePolicy, MythosConfig
from openmythos.errors import CacheError, InputError
from openmythos.model.cache import Cache
from openmythos.numbers import at_least, whole

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos


def check_model(config: MythosConfig, seed: int) -> None:
    """Raise `InputError` where `OpenMythos` cannot be made of these."""
    if not isinstance(config, MythosConfig):
        raise InputError(
            f"config={config!r} must be a MythosConfig: a named one is MythosConfig.preset(name)"
        )
    if whole(seed) is None:
        raise InputError(f"seed={seed!r} must be an integer")


def check_call(
    model: OpenMythos,
    token_ids: Tensor,
    loops: int | Tensor,
    cache: Cache | None,
    mask: Tensor | None,
    positions: Tensor | None,
    h0: Tensor | None,
    routing: Tensor | None,
) -> None:
    """Raise `InputError` or `CacheError` where an argument of `OpenMythos.forward` does not fit."""
    config = model.config
    _check_tensors(mask=mask, positions=positions, h0=h0, routing=routing)
    check_token_ids(token_ids, config)
    batch, sequence = token_ids.shape
    check_loops(loops, batch, sequence)
    if cache is not None:
        _check_cache(model, cache, batch)
    past = 0 if cache is None else cache.length
    if cache is None:
        _check_length(sequence, config)
    if past + sequence > config.max_length and mask is None:
        raise InputError(
            f"sequence={sequence} after {past} cached tokens must end by "
            f"max_length={config.max_length}: roll back, or build the model with a larger one"
        )
    _check_places(mask, positions, batch, sequence)
    if h0 is not None:
        _check_shape("h0", h0, (batch, sequence, config.hidden_size))
        _check_floating("h0", h0)
    if routing is not None:
        _check_routing(routing, config, batch, sequence)


def check_decode(
    h: Tensor, mask: Tensor | None, positions: Tensor | None, config: MythosConfig
) -> None:
    """Raise `InputError` where an argument of `OpenMythos.decode` does not fit."""
    _check_tensors(h=h, mask=mask, positions=positions)
    if h.ndim != 3:
        raise InputError(
            f"h has shape {tuple(h.shape)}, must be (batch, sequence, {config.hidden_size}): of "
            "states after several loops decode one at a time"
        )
    check_states("h", h, config)
    batch, sequence = h.shape[:2]
    if not h.numel():
        raise InputError(f"h has shape {tuple(h.shape)}, must hold at least one token")
    _check_length(sequence, config)
    _check_places(mask, positions, batch, sequence)


def check_states(name: str, states: Tensor, config: MythosConfig) -> None:
    """Raise `InputError` unless `states` are floating numbers in rows as wide as the model."""
    _check_tensors(**{name: states})
    _check_floating(name, states)
    if not states.ndim or states.shape[-1] != config.hidden_size:
        raise InputError(
            f"{name} has shape {tuple(states.shape)}, must end with hidden_size="
            f"{config.hidden_size}"
        )


def check_token_ids(token_ids: Tensor, config: MythosConfig) -> None:
    """Raise `InputError` unless `token_ids` is a non-empty int64 (batch, sequence) in range."""
    if not isinstance(token_ids, Tensor):
        raise InputError(f"token_ids is {type(token_ids).__name__}, must be a torch.Tensor")
    if token_ids.dtype != torch.int64:
        raise InputError(f"token_ids has dtype {token_ids.dtype}, must be torch.int64")
    if token_ids.ndim != 2:
        raise InputError(
            f"token_ids has shape {tuple(token_ids.shape)}, must be (batch, sequence): "
            "add an axis for the batch"
        )
    if not token_ids.numel():
        raise InputError(
            f"token_ids has shape {tuple(token_ids.shape)}, must hold at least one token"
        )
    if token_ids.is_meta or (token_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # no values yet: whoever records a call checks what it is replayed with
    least, most = (int(x) for x in token_ids.aminmax())
    if least < 0 or most >= config.vocab_size:
        wrong = least if least < 0 else most
        raise InputError(
            f"token_ids holds {wrong}, must be from 0 to {config.vocab_size - 1} "
            f"(vocab_size={config.vocab_size}): was it made by another tokenizer?"
        )


def check_loops(loops: int | Tensor, batch: int, sequence: int) -> None:
    """Raise `InputError` unless `loops` is 1 or more: an int, (batch,) or (batch, sequence)."""
    if isinstance(loops, Tensor) and loops.ndim:
        if loops.dtype not in (torch.int64, torch.int32):
            raise InputError(f"loops has dtype {loops.dtype}, must be torch.int64")
        if tuple(loops.shape) not in ((batch,), (batch, sequence)):
            raise InputError(
                f"loops has shape {tuple(loops.shape)}, must be ({batch},) or ({batch}, {sequence})"
            )
        if int(loops.min()) < 1:
            raise InputError(f"loops holds {int(loops.min())}, must be 1 or more")
    elif whole(loops) is None:
        raise InputError(f"loops={loops!r} must be an integer, or a tensor of them")
    elif not at_least(loops, 1):
        raise InputError(f"loops={loops} must be 1 or more")
    elif at_least(loops, MOST):
        raise InputError(f"loops={loops} must be below {MOST}")


def states_wanted(
    wanted: bool | Collection[int], loops: int | Tensor, halting: str
) -> bool | frozenset[int]:
    """Return `return_states` as a bool or as loop counts of Python's own.

    Raises:
        InputError: it is neither, or a count is below 1, or above the loops that all tokens take.
    """
    if isinstance(wanted, bool):
        return wanted
    if not isinstance(wanted, Collection) or getattr(wanted, "ndim", 1) != 1:
        raise InputError(f"return_states={wanted!r} must be True, False, or hold loop counts")
    counts = set()
    for count in wanted:
        number = whole(count)
        if number is None or number < 1:
            raise InputError(f"return_states holds {count!r}, must hold integers of 1 or more")
        if isinstance(loops, int) and halting == "none" and number > loops:
            raise InputError(f"return_states holds {number}, must hold at most {loops=}")
        counts.add(number)
    return frozenset(counts)


def check_window(
    backprop_loops: int | None, loops: int | Tensor, halting: str, notes: bool
) -> None:
    """Raise `InputError` unless a gradient window of `backprop_loops` can be kept.

    It cannot where tokens leave the core one by one, nor where sequences of different depths all
    start at loop 0, as they do to take notes of every loop: a window starts elsewhere for each.
    """
    if backprop_loops is None:
        return
    if not at_least(backprop_loops, 1):
        raise InputError(f"backprop_loops={backprop_loops!r} must be an integer of 1 or more")
    if halting != "none":
        raise InputError(f"backprop_loops={backprop_loops} must be left out with {halting=}")
    if isinstance(loops, Tensor) and loops.ndim == 2:
        raise InputError(f"backprop_loops={backprop_loops} must be left out with loops per token")
    if isinstance(loops, Tensor) and notes:
        raise InputError(
            f"backprop_loops={backprop_loops} must be left out with loops per sequence where "
            "return_states or return_routing is asked for"
        )


def floating(dtype: torch.dtype | str) -> torch.dtype:
    """Return torch's dtype, which may be given by its name there, for numbers in memory.

    Raises:
        InputError: there is no such dtype, or it is none of the floating ones.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    fits = isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1
    if not fits:
        raise InputError(f"{dtype=} must be torch.float32, float64, bfloat16 or float16")
    assert isinstance(found, torch.dtype)
    return found


def check_cache_sizes(
    config: MythosConfig, batch_size: int, max_length: int, loops: int, policy: str
) -> None:
    """Raise `InputError` where `OpenMythos.new_cache` cannot make such a cache."""
    for name, value in {"batch_size": batch_size, "max_length": max_length, "loops": loops}.items():
        if not at_least(value, 1) or at_least(value, MOST):
            raise InputError(f"{name}={value!r} must be an integer from 1 to {MOST - 1}")
    if max_length > config.max_length:
        raise InputError(
            f"max_length={max_length} must be at most the model's, {config.max_length}"
        )
    if policy not in get_args(CachePolicy):
        raise InputError(f"policy={policy!r} must be one of {', '.join(get_args(CachePolicy))}")


def _check_cache(model: OpenMythos, cache: Cache, batch: int) -> None:
    if not isinstance(cache, Cache):
        raise CacheError(f"cache={cache!r} must be made by the model's new_cache")
    if cache.owner is not model.identity:
        raise CacheError("cache was made by another model: call new_cache of this one")
    if cache.batch_size != batch:
        raise CacheError(f"cache has batch_size={cache.batch_size}, token_ids has {batch} rows")
    weight = model.embed.weight
    if cache.weights != weight.dtype or cache.device != weight.device:
        raise CacheError(
            f"cache is for {cache.weights} on {cache.device}, the model is {weight.dtype} on "
            f"{weight.device}: make the cache after moving the model"
        )


def _check_tensors(**given: object) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise InputError(f"{name} is {type(value).__name__}, must be a torch.Tensor")


def _check_length(sequence: int, config: MythosConfig) -> None:
    if sequence > config.max_length:
        raise InputError(
            f"sequence={sequence} must be at most max_length={config.max_length}: "
            "shorten the text, or build the model with a larger max_length"
        )


def _check_places(mask: Tensor | None, positions: Tensor | None, batch: int, sequence: int) -> None:
    if mask is not None:
        _check_shape("mask", mask, (batch, sequence))
        if mask.dtype != torch.bool:
            raise InputError(f"mask has dtype {mask.dtype}, must be torch.bool: True marks text")
        if not bool(mask.any()):
            raise InputError("mask marks no token at all: at least one must be True")
    if positions is not None:
        _check_shape("positions", positions, (batch, sequence))
        if positions.dtype not in (torch.int64, torch.int32):
            raise InputError(f"positions has dtype {positions.dtype}, must be torch.int64")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise InputError(f"{name} has dtype {tensor.dtype}, must be a floating one")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}, must be {shape}")


def _check_routing(routing: Tensor, config: MythosConfig, batch: int, sequence: int) -> None:
    if not config.experts:
        raise InputError("routing was given to a model whose core has no experts: leave it out")
    wanted = (config.core_layers, batch, sequence, config.experts_per_token)
    if routing.ndim != 5 or tuple(routing.shape[1:]) != wanted or not len(routing):
        raise InputError(f"routing has shape {tuple(routing.shape)}, must be (loops, *{wanted})")
    if routing.dtype != torch.int64:
        raise InputError(f"routing has dtype {routing.dtype}, must be torch.int64")
    if int(routing.min()) < -1 or int(routing.max()) >= config.experts:
        raise InputError(
            f"routing must hold experts from 0 to {config.experts - 1}, or -1 where a token has "
            "left the core"
        )
    ordered = routing.sort(-1).values
    if bool(((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any()):
        raise InputError("routing must hold different experts for a token")
