"""What transformers gives a call, in the model's own terms."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from openmythos.errors import InputError
from openmythos.huggingface.cache import OpenMythosCache

OF_CALLS = {
    "cache_position",
    "num_items_in_batch",
    "output_attentions",
    "return_dict",
    "tokenizer",
}
"""What callers may add to a call that changes no logits."""


def refuse_unknown(given: dict[str, Any]) -> None:
    """Refuse arguments that would change nothing where they ought to.

    Raises:
        InputError: there is one.
    """
    for name, value in given.items():
        if name not in OF_CALLS and value is not None:
            raise InputError(f"{name} must be left out: the model has no such argument")
    if given.get("output_attentions"):
        raise InputError("output_attentions must be left out: no weights of attention are kept")


def cache_of(cache: Any, past_key_values: Any) -> OpenMythosCache | None:
    """Return the cache of a call, by whichever of its names it was given.

    Raises:
        InputError: it is not ours.
    """
    kept = cache if cache is not None else past_key_values
    if kept is None or isinstance(kept, OpenMythosCache):
        return kept
    raise InputError(
        f"cache={type(kept).__name__} must be an OpenMythosCache, which keeps each loop's keys: "
        "leave it out, and take the one that is returned"
    )


def mask_of(
    attention_mask: Tensor | None, input_ids: Int[Tensor, "batch sequence"], columns: int
) -> Bool[Tensor, "batch sequence"] | None:
    """Which of a call's tokens are no padding; None: all.

    Args:
        attention_mask: `(batch, columns + sequence)`, 0 for padding.
        input_ids: the call's tokens.
        columns: those that a cache has read.

    Raises:
        InputError: it has another shape.
    """
    if attention_mask is None:
        return None
    batch, sequence = input_ids.shape
    if tuple(attention_mask.shape) != (batch, columns + sequence):
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, must be "
            f"({batch}, {columns + sequence}): of all columns, those in the cache too"
        )
    mask = attention_mask[:, columns:].bool()
    return None if bool(mask.all()) else mask


def positions_of(
    position_ids: Int[Tensor, "rows sequence"] | None,
    mask: Bool[Tensor, "batch sequence"] | None,
    input_ids: Int[Tensor, "batch sequence"],
) -> Int[Tensor, "batch sequence"] | None:
    """Rotary positions of a call's tokens.

    Raises:
        InputError: they begin anew within a row, as those of packed documents do, which would see
            each other.
    """
    if position_ids is None:
        return None
    if len(position_ids) == 1:
        position_ids = position_ids.expand_as(input_ids)
    back = position_ids.diff(dim=1) <= 0
    if mask is not None and mask.shape == position_ids.shape:
        back &= mask[:, 1:] & mask[:, :-1]
    if bool(back.any()):
        raise InputError(
            "position_ids must rise within a row: packed documents would see each other, so give "
            "each a row of its own"
        )
    return position_ids
