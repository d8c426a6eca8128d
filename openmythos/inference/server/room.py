"""How many tokens a reply may have: what the model reads, the cache holds and an answer takes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from openmythos.inference.passes import layout
from openmythos.inference.request import Request
from openmythos.inference.scheduler import Job
from openmythos.inference.server.errors import ApiError, invalid
from openmythos.inference.server.serving import Loaded
from openmythos.inference.thinking import Thinking

MOST_CELLS = 1 << 18
"""Most log-probabilities that are held at once for one answer: its choices, times their positions,
times the likeliest tokens and the one that stands there. As JSON they have up to 7 MB (as chat
20 MB). The new tokens of a stream do not count, because they go out as they come."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What decides how many tokens fit behind a prompt."""

    token_ids: tuple[int, ...]
    """The prompt."""
    asked: int | None
    """Most tokens of a choice; None: `usual`, or as many as fit."""
    usual: int
    fields: tuple[str, str]
    """What the request calls its prompt and `asked`."""
    choices: int
    """Of this prompt."""
    answered: int
    """Choices of the whole answer."""
    thinking: Thinking
    """With the number of loops."""
    logprobs: int | None
    """Likeliest tokens that are wanted at each place; None: no log-probabilities."""
    echoed: bool
    """Whether the prompt's log-probabilities are wanted too."""
    streamed: bool
    """Whether tokens go out as they come."""


def room(wish: Wish, loaded: Loaded) -> int:
    """Return the most tokens to make: as many as asked, or as usual where so many fit.

    Raises:
        ApiError: they do not fit.
    """
    read = _read(wish, loaded)
    if wish.asked is not None:
        _check_cached(wish, loaded, wish.asked)
        return wish.asked
    most = min(wish.usual, read, _shown(wish))
    fitting = most if loaded.pages is None else _cached(wish, loaded, loaded.pages, most)
    if not fitting:
        _check_cached(wish, loaded, 1)
    return fitting


def check_cells(requests: Sequence[Request], field: str, streamed: bool) -> None:
    """Check how many log-probabilities one answer would hold.

    Args:
        requests: one for each prompt.
        field: what the request calls the number of likeliest tokens.
        streamed: whether tokens go out as they come.

    Raises:
        ApiError: more than `MOST_CELLS`.
    """
    cells = sum(
        asked.choices
        * (asked.logprobs + 1)
        * (asked.max_new_tokens * (not streamed) + len(asked.token_ids) * asked.prompt_logprobs)
        for asked in requests
        if asked.logprobs is not None
    )
    if cells > MOST_CELLS:
        echoed = ", prompt with echo" if requests[0].prompt_logprobs else ""
        raise invalid(
            f"{field}={requests[0].logprobs} with n={requests[0].choices} would give {cells} "
            f"log-probabilities, must give at most {MOST_CELLS} in one answer: ask for less of "
            f"{field}, n, max_tokens{echoed}",
            field,
        )


def too_long(message: str, param: str) -> ApiError:
    """Return the error of a text that is longer than the model takes."""
    return invalid(message, param, "context_length_exceeded")


def _read(wish: Wish, loaded: Loaded) -> int:
    """Return how many tokens the model still takes behind the prompt; enough, where asked."""
    (prompt, field), count = wish.fields, len(wish.token_ids)
    left = loaded.max_length - count
    if left < (0 if wish.asked == 0 else 1):
        raise too_long(
            f"{prompt} has {count} tokens, must leave room within "
            f"max_model_len={loaded.max_length}: shorten it",
            prompt,
        )
    if wish.asked is not None and wish.asked > left:
        raise too_long(
            f"{field}={wish.asked} after a prompt of {count} tokens must end by "
            f"max_model_len={loaded.max_length}: at most {left} fit",
            field,
        )
    return left


def _shown(wish: Wish) -> int:
    """Return how many tokens' log-probabilities an answer has place for: at least one's."""
    if wish.logprobs is None or wish.streamed:
        return wish.usual
    positions = MOST_CELLS // (wish.answered * (wish.logprobs + 1))
    return max(1, positions - len(wish.token_ids) * wish.echoed)


def _cached(wish: Wish, loaded: Loaded, pages: int, most: int) -> int:
    """Return how many tokens, at most `most`, the cache's pages hold for every choice."""
    return bisect_right(range(1, most + 1), pages, key=lambda new: _pages(wish, loaded, new))


def _check_cached(wish: Wish, loaded: Loaded, new: int) -> None:
    needed = _pages(wish, loaded, new)
    if loaded.pages is None or needed <= loaded.pages:
        return
    field = "loops" if wish.asked is None else wish.fields[1]
    least = "" if wish.asked is None else f"{field}={wish.asked} with "
    raise invalid(
        f"{least}loops={wish.thinking.loops} and n={wish.choices} after a prompt of "
        f"{len(wish.token_ids)} tokens needs {needed} pages of the server's cache, must need at "
        f"most {loaded.pages}: ask for less of these, or start the server with a larger "
        "--cache-bytes",
        field,
    )


def _pages(wish: Wish, loaded: Loaded, new: int) -> int:
    """Return how many pages the engine promises for so many new tokens of each choice."""
    loops, model = wish.thinking.loops, loaded.lm.model
    loops = model.config.mean_loops if loops is None else loops
    job = Job(
        number=0,
        token_ids=wish.token_ids,
        max_new_tokens=new,
        loops=loops,
        choices=wish.choices,
        priority=0,
        layout=layout(model, loops, wish.thinking.cache_policy),
    )
    return job.pages
