"""From logits to the probabilities of a draw: temperature, then top-k, top-p and min-p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openmythos.errors import InputError
from openmythos.numbers import at_least, real, whole

COLDEST, HOTTEST = 1e-30, 1e30  # temperatures that fp32 can still divide by

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. A token must pass every filter.

    Each filter sees the probabilities after the temperature and before the other filters, so
    their order does not matter.
    """

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token, ties going to the lower id."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities reach p, above 0 and at most 1."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the likeliest, from 0 to below 1."""
    seed: int | None = None
    """Seed of the draws; the same seed gives the same text. Default: another text each time."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InputError: a value is out of range.
        """
        if self._number("temperature") < 0:
            raise InputError(f"temperature={self.temperature} must be 0 or more")
        if not at_least(self.top_k, 0):
            raise InputError(f"top_k={self.top_k!r} must be an integer of 0 (no limit) or more")
        if not 0 < self._number("top_p") <= 1:
            raise InputError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self._number("min_p") < 1:
            raise InputError(f"min_p={self.min_p} must be from 0 to below 1")
        if self.seed is not None:
            seed = whole(self.seed)
            if seed is None or not 0 <= seed < 2**63:
                raise InputError(
                    f"seed={self.seed!r} must be an integer from 0 to 2^63 - 1, or None"
                )
            object.__setattr__(self, "seed", seed)  # generators take Python's own only

    def _number(self, name: str) -> float:
        number = real(getattr(self, name))
        if number is None:
            raise InputError(f"{name}={getattr(self, name)!r} must be a finite number")
        return number


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities that a token is drawn with, `(*rows, vocab)`, fp32 or wider.

    Args:
        logits: `(*rows, vocab)`.
        sampling: with a temperature above 0.
    """
    wide = logits.float() if logits.itemsize < 4 else logits
    # Less their maximum before the division, or a low temperature makes them infinite.
    below = wide - wide.amax(-1, keepdim=True)
    probabilities = (below / min(max(sampling.temperature, COLDEST), HOTTEST)).softmax(-1)
    if not sampling.top_k and sampling.top_p == 1:  # nothing asks for an order
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        filtered = probabilities * (probabilities >= least)
        return filtered / filtered.sum(-1, keepdim=True)
    # Ties are ordered by id, so that a filter never depends on the sort.
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = ordered >= sampling.min_p * ordered[..., :1]
    if sampling.top_k:
        kept[..., sampling.top_k :] = False
    if sampling.top_p < 1:
        kept &= ordered.cumsum(-1) - ordered < sampling.top_p
        kept[..., 0] = True  # fp32 has no number for the smallest p
    filtered = probabilities.new_zeros(probabilities.shape)
    filtered.scatter_(-1, order, ordered * kept)
    return filtered / filtered.sum(-1, keepdim=True)


def with_text(logits: Tensor, vocab_size: int | None) -> Tensor:
    """Cut logits `(*rows, vocab)` to the ids that the tokenizer has text for: None: all of them.

    No other id is ever drawn, told or scored, and probabilities sum to 1 over these.
    """
    return logits[..., :vocab_size]
