"""How many tokens a reply may have: what the model reads, the cache holds and an answer takes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from openmythos.inference.request import Request
from openmythos.inference.server.errors import ApiError, invalid
from openmythos.inference.server.serving import Loaded
from openmythos.inference.thinking import Thinking

ANSWER_LOGPROBS = 1 << 18
"""Most log-probabilities that are held at once for one answer: its choices, times their positions,
times the likeliest tokens and the one that stands there. As JSON they have up to 7 MB (as chat
20 MB). The new tokens of a stream do not count, because they go out as they come."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt and what is asked for it, as far as it decides how many tokens fit behind it."""

    token_ids: tuple[int, ...]
    """The prompt."""
    most: int | None
    """Tokens that a choice may have; None: `usual`, or as many as fit."""
    usual: int
    fields: tuple[str, str]
    """What the request calls its prompt and `most`."""
    choices: int
    """Of this prompt."""
    answered: int
    """Choices of the whole answer."""
    thinking: Thinking
    logprobs: int | None
    """Likeliest tokens that are wanted at each place; None: no log-probabilities."""
    echoed: bool
    """Whether the prompt's log-probabilities are wanted too."""
    streamed: bool
    """Whether tokens go out as they come."""


def tokens_to_make(asked: Asked, loaded: Loaded) -> int:
    """Return the most tokens to make: as many as asked, or as usual where so many fit.

    Raises:
        ApiError: they do not fit.
    """
    read = _read(asked, loaded)
    if asked.most is not None:
        _check_cached(asked, loaded, asked.most)
        return asked.most
    most = min(asked.usual, read, _shown(asked))
    fitting = most if loaded.pages is None else _cached(asked, loaded, loaded.pages, most)
    if not fitting:
        _check_cached(asked, loaded, 1)
    return fitting


def check_logprobs(requests: Sequence[Request], field: str, streamed: bool) -> None:
    """Check how many log-probabilities one answer would hold.

    Args:
        requests: one for each prompt.
        field: what the request calls the number of likeliest tokens.
        streamed: whether tokens go out as they come.

    Raises:
        ApiError: more than `ANSWER_LOGPROBS`.
    """
    count = sum(
        one.choices
        * (one.logprobs + 1)
        * (one.max_new_tokens * (not streamed) + len(one.token_ids) * one.prompt_logprobs)
        for one in requests
        if one.logprobs is not None
    )
    if count > ANSWER_LOGPROBS:
        echoed = ", prompt with echo" if requests[0].prompt_logprobs else ""
        raise invalid(
            f"{field}={requests[0].logprobs} with n={requests[0].choices} would give {count} "
            f"log-probabilities, must give at most {ANSWER_LOGPROBS} in one answer: ask for less "
            f"of {field}, n, max_tokens{echoed}",
            field,
        )


def too_long(message: str, param: str) -> ApiError:
    """Return the error of a text that is longer than the model takes."""
    return invalid(message, param, "context_length_exceeded")


def _read(asked: Asked, loaded: Loaded) -> int:
    """Return how many tokens the model still takes behind the prompt; enough, where asked."""
    (prompt, field), count = asked.fields, len(asked.token_ids)
    left = loaded.max_length - count
    if left < (0 if asked.most == 0 else 1):
        raise too_long(
            f"{prompt} has {count} tokens, must leave room within "
            f"max_model_len={loaded.max_length}: shorten it",
            prompt,
        )
    if asked.most is not None and asked.most > left:
        raise too_long(
            f"{field}={asked.most} after a prompt of {count} tokens must end by "
            f"max_model_len={loaded.max_length}: at most {left} fit",
            field,
        )
    return left


def _shown(asked: Asked) -> int:
    """Return how many tokens' log-probabilities an answer has place for: at least one's."""
    if asked.logprobs is None or asked.streamed:
        return asked.usual
    positions = ANSWER_LOGPROBS // (asked.answered * (asked.logprobs + 1))
    return max(1, positions - len(asked.token_ids) * asked.echoed)


def _cached(asked: Asked, loaded: Loaded, pages: int, most: int) -> int:
    """Return how many tokens, at most `most`, the cache's pages hold for every choice."""
    needed = _pages(asked, loaded)
    return bisect_right(range(1, most + 1), pages, key=needed)


def _check_cached(asked: Asked, loaded: Loaded, new: int) -> None:
    needed = _pages(asked, loaded)(new)
    if loaded.pages is None or needed <= loaded.pages:
        return
    loops = asked.thinking.loops_of(loaded.lm.model.config)
    field = "loops" if asked.most is None else asked.fields[1]
    least = "" if asked.most is None else f"{field}={asked.most} with "
    raise invalid(
        f"{least}loops={loops} and n={asked.choices} after a prompt of "
        f"{len(asked.token_ids)} tokens needs {needed} pages of the server's cache, must need at "
        f"most {loaded.pages}: ask for less of these, or start the server with a larger "
        "--cache-bytes",
        field,
    )


def _pages(asked: Asked, loaded: Loaded) -> Callable[[int], int]:
    """Return what gives the pages that the engine promises for so many new tokens of each choice.

    A request looks at every token of its prompt when it is made, so it is made once.
    """
    request = Request(
        token_ids=asked.token_ids,
        max_new_tokens=1,
        thinking=asked.thinking,
        choices=asked.choices,
    )
    return partial(loaded.engine.pages_needed, request)
