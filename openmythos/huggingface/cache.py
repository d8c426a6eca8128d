"""Kept keys and values in the hands of `generate`: searched, cropped and grown."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import Cache

from openmythos.errors import InputError
from openmythos.model.cache import Cache as MythosCache
from openmythos.model.transformer import OpenMythos

LEAST = 64
"""Tokens that a cache has room for at first."""


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
        self.real: Bool[Tensor, "batch columns"] | None = None
        """Which columns hold tokens, once one held padding."""

    def ready(self, model: OpenMythos, batch_size: int, sequence: int) -> MythosCache:
        """Return ours, with room for `sequence` more tokens.

        Raises:
            InputError: they would be more than the model's max_length.
        """
        limit = model.config.max_length
        needed = sequence if self.kept is None else self.kept.length + sequence
        if needed > limit:
            raise InputError(
                f"max_length={limit} must hold the prompt and all new tokens, with those that are "
                f"tried at once, and these are {needed}: shorten the prompt, or ask for fewer"
            )
        if self.kept is None:
            self.kept = model.new_cache(batch_size, min(max(needed, LEAST), limit))
        elif needed > self.kept.max_length:
            self.kept = self.kept.longer(min(2 * needed, limit))
        return self.kept

    def advance(
        self, input_ids: Int[Tensor, "batch sequence"], mask: Bool[Tensor, "batch sequence"] | None
    ) -> None:
        """Count a call's columns as read; None: no padding was among them."""
        batch, sequence = input_ids.shape
        if mask is not None or self.real is not None:
            before = self.real
            if before is None:
                before = input_ids.new_ones((batch, self.columns), dtype=torch.bool)
            new = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
            self.real = torch.cat([before, new], 1)
        self.columns += sequence

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` columns.

        Raises:
            InputError: the number is above 0, or there are not so many.
        """
        gone = -tokens_to_remove
        if not 0 <= gone <= self.columns:
            raise InputError(
                f"tokens_to_remove={tokens_to_remove} must be from {-self.columns} to 0: minus the "
                "columns to forget"
            )
        if self.kept is None or gone == 0:
            return
        self.columns -= gone
        if self.real is None:
            self.kept.rollback(gone)
        else:
            self.kept.rollback(self.real[:, self.columns :].sum(1))
            self.real = self.real[:, : self.columns]

    def batch_select_indices(self, indices: Int[Tensor, " rows"]) -> None:
        """Keep these sequences, in this order."""
        if self.kept is not None:
            self.kept = self.kept.select(indices)
        if self.real is not None:
            self.real = self.real.index_select(0, indices.to(self.real.device))

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        """Keep these sequences, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each sequence so many times."""
        if self.kept is not None:
            rows = torch.arange(self.kept.batch_size)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.kept, self.columns, self.real = None, 0, None

    def activate_past_recording(self) -> None:
        """Do nothing: whatever was read can be cropped."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were read."""
        del layer_idx
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: it grows."""
        del layer_idx
        return -1

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
        """Layers that keep something, 0 while nothing was read."""
        return 0 if self.kept is None else len(self.kept.outer) + len(self.kept.core)

    def __repr__(self) -> str:
        """Say how much it holds."""
        return f"OpenMythosCache({self.columns} columns)"
