"""Kept keys and values in the hands of `generate`: searched, cropped and grown."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache

from openmythos.errors import InputError
from openmythos.model.cache import Cache as MythosCache
from openmythos.model.transformer import OpenMythos

LEAST = 64
"""Tokens of a cache that nobody said a length for."""


class OpenMythosCache(Cache):  # type: ignore[misc]  # transformers has no types here
    """`openmythos.model.cache.Cache`, made at the first call and longer whenever it is full.

    Transformers counts columns of `input_ids`, padding and all; ours holds no padding.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept: MythosCache | None = None
        self.columns = 0

    def ready(self, model: OpenMythos, batch_size: int, sequence: int) -> MythosCache:
        """Return ours, with room for `sequence` more tokens.

        Raises:
            InputError: they would be more than the model's max_length.
        """
        limit = model.config.max_length
        needed = sequence if self.kept is None else self.kept.length + sequence
        if needed > limit:
            raise InputError(
                f"max_length={limit} must hold the prompt and all new tokens, and these are "
                f"{needed}: shorten the prompt, or ask for fewer new tokens"
            )
        if self.kept is None:
            self.kept = model.new_cache(batch_size, min(max(needed, LEAST), limit))
        elif needed > self.kept.max_length:
            self.kept = self.kept.longer(min(2 * needed, limit))
        return self.kept

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were read."""
        del layer_idx
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: it grows."""
        del layer_idx
        return -1

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        """Keep these sequences, in this order."""
        if self.kept is not None:
            self.kept = self.kept.select(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " rows"]) -> None:
        """Keep these sequences, in this order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each sequence so many times."""
        if self.kept is not None:
            rows = torch.arange(self.kept.batch_size)
            self.kept = self.kept.select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; a number above 0 is how many stay."""
        gone = -tokens_to_remove if tokens_to_remove <= 0 else self.columns - tokens_to_remove
        if self.kept is not None and gone > 0:
            self.kept.rollback(gone)
            self.columns -= gone

    def reset(self) -> None:
        """Forget everything."""
        self.kept, self.columns = None, 0

    def activate_past_recording(self) -> None:
        """Do nothing: whatever was read can be cropped."""

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.kept is not None

    @property
    def is_sliding(self) -> list[bool]:
        """No layer has a window."""
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        """No layer is linear attention."""
        return [False]

    def __len__(self) -> int:
        """Return 0 while empty, as a cache without layers."""
        return 0 if self.kept is None else len(self.kept.outer) + len(self.kept.core)

    def __repr__(self) -> str:
        """Say how much it holds."""
        return f"OpenMythosCache({self.columns} columns)"
