"""What a caller asks of the engine, and the events it gets back. Free of torch.

A request is token ids and how to continue them. Every token drawn is one event; each of the
request's choices ends with one `FinishEvent`, whatever happens to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from openmythos.errors import InputError
from openmythos.inference.sampling import Sampling
from openmythos.inference.stops import check_stops
from openmythos.inference.thinking import Thinking
from openmythos.numbers import whole

FinishReason = Literal["stop", "length", "cancelled", "error"]


@runtime_checkable
class Constraint(Protocol):
    """What a choice may write next, a grammar for example; each choice has its own copy."""

    def allowed(self) -> np.ndarray:
        """Return which tokens may come next; at least one, unless `finished`.

        Either bool `(vocab,)`, or bits packed into int32 or uint32 words, token 0 the lowest bit
        of the first. Tokens beyond its end are not allowed. The end-of-document token is allowed
        where the text may end.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Take the token that was drawn (never the end-of-document token)."""
        ...

    def finished(self) -> bool:
        """Whether nothing can follow; the choice then finishes with `stop`."""
        ...

    def copy(self) -> Constraint:
        """Return an equal constraint with a state of its own."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it."""

    token_ids: tuple[int, ...]
    """The prompt, at least one id. `LanguageModel` puts the end-of-document token in front."""
    max_new_tokens: int
    """Most tokens of each choice; room for them is reserved when the request is admitted. 0 reads
    the prompt and draws nothing."""
    thinking: Thinking = field(default_factory=Thinking)
    """Loops, halting rule, its threshold and the cache's policy."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn: each choice has draws of its own. Without a seed the engine draws one;
    with it, choice n draws what row n of `generate` does."""
    stop: tuple[str, ...] = ()
    """Strings that end the text, not included, wherever token boundaries fall."""
    stop_at_end: bool = True
    """The end-of-document token finishes a choice."""
    choices: int = 1
    """Continuations of the one prompt, which is read once."""
    priority: int = 0
    """Higher is admitted first; equal ones in order of arrival, but some that fit may pass one that
    waits for room."""
    logprobs: int | None = None
    """None: none. k: the logprob of each new token, and those of the k likeliest."""
    prompt_logprobs: bool = False
    """Also the logprobs of the prompt's tokens. Nothing of the prompt is then taken from the
    prefix cache, because cached positions have no logits."""
    constraint: Constraint | None = None
    """What may be written; None: anything."""
    draft_loops: int | None = None
    """Loops after which the next token is drafted, to be verified by the remaining ones: text
    comes sooner where few rows are in flight, and is the same. None: no drafts."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InputError: a value is out of range.
        """
        self._take("token_ids", tuple(_checked_id(token_id) for token_id in self.token_ids))
        self._check_stop()
        if not self.token_ids:
            raise InputError(
                "token_ids holds no token, must hold at least one: start with the end-of-document "
                "token"
            )
        self._take("max_new_tokens", self._whole("max_new_tokens", 0))
        self._take("choices", self._whole("choices", 1))
        self._take("priority", self._whole("priority"))
        if self.logprobs is not None:
            self._take("logprobs", self._whole("logprobs", 0, ", or None"))
        if self.draft_loops is not None:
            self._take("draft_loops", self._whole("draft_loops", 1, ", or None"))
            self._check_drafts()

    def _take(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _whole(self, name: str, least: int | None = None, otherwise: str = "") -> int:
        """A field as Python's own integer, whoever's it is."""
        number = whole(getattr(self, name))
        if number is None or (least is not None and number < least):
            wanted = "" if least is None else f" of {least} or more"
            given = getattr(self, name)
            raise InputError(f"{name}={given!r} must be an integer{wanted}{otherwise}")
        return number

    def _check_stop(self) -> None:
        stop: object = self.stop
        if isinstance(stop, str):
            raise InputError(f"stop={stop!r} must be a tuple of strings: write ({stop!r},)")
        self._take("stop", tuple(self.stop))
        check_stops(self.stop)

    def _check_drafts(self) -> None:
        if self.constraint is not None:
            raise InputError("draft_loops must be left out with a constraint")
        if self.thinking.cache_policy == "last":
            raise InputError("draft_loops must be left out with cache_policy='last'")


def _checked_id(token_id: object) -> int:
    number = token_id if type(token_id) is int else whole(token_id)
    if number is None or number < 0:
        raise InputError(f"token_ids holds {token_id!r}, must hold integers of 0 or more")
    return number


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """A token was drawn, the end-of-document token included (its text is empty)."""

    choice: int
    """From 0 to the request's choices - 1."""
    token_id: int
    text: str
    """Text that it made whole and that can be no part of a stop string; possibly none."""
    loops: int
    """Loops that the position took which it was drawn from."""
    logprob: float | None = None
    """Of this token, in nats, under the model's own distribution over the tokenizer's ids: before
    temperature, filters and constraint. None where the request did not ask."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their logprobs, likeliest first, ties by lower id."""


@dataclass(frozen=True, kw_only=True)
class PromptEvent:
    """The prompt has been read: with `prompt_logprobs`, once, before any token."""

    logprobs: tuple[float | None, ...]
    """Of each of the prompt's tokens after those before it; None for the first."""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    """The likeliest tokens at each place, as many as `logprobs` asks; empty for the first."""
    loops: tuple[int, ...]
    """Loops that each of the prompt's positions took."""


@dataclass(frozen=True, kw_only=True)
class FinishEvent:
    """A choice has ended: its last event."""

    choice: int
    reason: FinishReason
    """`stop`: a stop string, the end-of-document token or the constraint. `length`: max_new_tokens.
    `cancelled` by the caller or because the engine stopped. `error`: see `error`."""
    text: str = ""
    """Text that was held back until now."""
    stop: str | None = None
    """The stop string that ended it; None: none did."""
    error: str | None = None
    """One sentence, where reason is `error`."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, those taken from the prefix cache."""
    new_tokens: int = 0
    """Tokens drawn, each with its `TokenEvent`."""
    loops: int = 0
    """Loops of all tokens drawn together; divided by `new_tokens` it is their mean depth."""
    prompt_loops: int = 0
    """Loops of the prompt's positions together; cached ones took theirs earlier."""


Event = TokenEvent | PromptEvent | FinishEvent
