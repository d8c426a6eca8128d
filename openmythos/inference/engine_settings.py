"""How much an engine holds and does at once. Free of torch, so that flags are made from it."""

from __future__ import annotations

from dataclasses import dataclass

from openmythos.errors import InputError
from openmythos.numbers import at_least


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How much an engine holds and does at once."""

    cache_bytes: int = 1 << 28
    """Memory for keys and values, in bytes; rounded down to whole pages. A table of where they lie
    takes memory beside it for each choice, for which as many pages are left unused."""
    budget: int = 64
    """Most rows of a tick, and most choices in flight; an eighth more for requests of one choice
    beside those of several. Prompts get at most half of it while anything is being written."""
    chunk: int = 32
    """Most positions of one prompt that enter the core in one tick."""
    max_waiting: int = 1024
    """Most requests that wait for admission; more are refused. Those submitted together where none
    waits are all taken."""
    deterministic: bool = True
    """A request gives the same tokens, loops and logprobs, bit for bit, alone and in any company,
    whatever was cached, at any `chunk`. Costs speed where many rows run at once; without it,
    logits agree to rounding and near ties may fall otherwise."""
    prefix_sharing: bool = True
    """Keep what has been read, for requests that begin alike and think alike."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InputError: a size is below 1.
        """
        for name in ("cache_bytes", "budget", "chunk", "max_waiting"):
            if not at_least(getattr(self, name), 1):
                raise InputError(f"{name}={getattr(self, name)!r} must be an integer of 1 or more")
