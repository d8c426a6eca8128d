"""The playground: a page at `/`, and the routes under `/v1/playground` that it asks.

They stand under `/v1` so that the server's key guards them. The page is plain files without a
build step; everything it shows comes from these routes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, final

from anyio import to_thread
from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from pydantic import Field
from starlette.responses import Response

from openmythos.config import HaltingKind
from openmythos.inference.language_model import LanguageModel
from openmythos.inference.playground.lens import Lens, Unwanted, look
from openmythos.inference.playground.walks import WalkBody, Walks
from openmythos.inference.request import Event, FinishEvent, Request
from openmythos.inference.server.answers import (
    disconnected,
    finish_of,
    respond_with_events,
    text_of,
    tokens_of,
)
from openmythos.inference.server.errors import busy, gone, invalid, json_response, json_text
from openmythos.inference.server.logprobs import token_text
from openmythos.inference.server.schemas import Body, CompletionBody, Count, StreamOptions, TokenIds
from openmythos.inference.server.serving import Loaded, Serving, serving
from openmythos.inference.server.settings import ServerSettings
from openmythos.inference.server.stream import STREAMED, WholeAnswer
from openmythos.inference.server.translate import allowed_loops, of_completion
from openmythos.inference.shipped import REASONER
from openmythos.inference.thinking import Thinking
from openmythos.model.halting import halting_kinds
from openmythos.model.transformer import OpenMythos
from openmythos.training.tokenizer import Tokenizer

STATIC = Path(__file__).parent / "static"
"""The page's files."""
LONGEST_LOOK = 1024
"""Tokens of the longest text that is looked into: logits of all its places are held at once."""
MOST_RUN = 1 << 15
"""Most tokens times loops of one look: some seconds of a small model, in which others wait."""
MOST_SHOWN = 1 << 14
"""Most places times loops in one answer, which is then at most a few megabytes."""
MOST_WAITING = 8
"""Most looks and walks that are worked at or wait; more are refused."""

Server = Annotated[Serving, Depends(serving)]


class LensBody(Body):
    """The body of `POST /v1/playground/lens`."""

    token_ids: TokenIds
    """The text, with the end-of-document token that starts it."""
    first: Count = 0
    """Show places from this one on; those before are read all the same."""
    top: Annotated[int, Field(ge=1, le=10)] = 5
    """Likeliest tokens at each place and loop."""
    loops: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    halting: HaltingKind = "none"
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None


def playground(reasoner: str | Path = REASONER) -> APIRouter:
    """Return the routes, for `create_app(..., routers=[playground()], static=STATIC)`.

    Args:
        reasoner: name or folder of the model that walks through rooms; it may be missing.
    """
    router = APIRouter(prefix="/v1/playground")
    walks, turns = Walks(reasoner), Turns()

    @router.get("/info")
    async def info(server: Server) -> Response:
        """Tell what the model can do, for the page's controls."""
        known = describe(server.name, server.ready(), server.settings)
        return json_response({**known, "reasoner": walks.describe()})

    @router.post("/stream", response_class=Response, responses=STREAMED)
    async def stream(body: CompletionBody, server: Server) -> Response:
        """Continue a text: a stream of tokens with their ids, loops and losses."""
        body = streamed(body)
        read = partial(read_stream, body, server.settings)
        return await respond_with_events(
            body, server, read, prefix="play", named="playground.tokens"
        )

    @router.post("/lens")
    async def lens(body: LensBody, server: Server, http: HttpRequest) -> Response:
        """Show what the model would say at each place of a text after each loop."""
        loaded = server.ready()
        body.refuse_unknown()
        thinking = check_lens(body, loaded, server.settings)
        seen = await turns.take(partial(see, body, loaded.lm, thinking), server, http)
        return WholeAnswer(seen, server.settings.send_seconds)

    @router.post("/walk")
    async def walk(body: WalkBody, server: Server, http: HttpRequest) -> Response:
        """Solve a walk through rooms, and show what is believed after each loop."""
        server.ready()
        body.refuse_unknown()
        solved = await turns.take(lambda _: json_text(walks.solve(body)), server, http)
        return WholeAnswer(solved, server.settings.send_seconds)

    return router


def streamed(body: CompletionBody) -> CompletionBody:
    """Return a body that asks for what the page shows: a stream of losses, and at its end usage."""
    options = {"include_usage": True, "continuous_usage_stats": False}
    given = body.stream_options or StreamOptions()
    update = {"stream": True, "logprobs": 0, "stream_options": given.model_copy(update=options)}
    return body.model_copy(update=update)


def read_stream(
    body: CompletionBody, settings: ServerSettings, loaded: Loaded
) -> tuple[list[Request], list[TokenWriter]]:
    """Return the request for a stream, and its writer.

    Raises:
        ApiError, InputError: it is not one text, or a field does not fit.
    """
    if body.choices != 1 or body.echo or not isinstance(body.prompt, str):
        raise invalid("prompt must be one text, and n and echo be left out", "prompt")
    requests, _ = of_completion(body, loaded, settings)
    return requests, [TokenWriter(requests[0].token_ids, loaded.lm.tokenizer)]


@final
class Turns:
    """Does one piece of work after another, in a thread, so that writing goes on meanwhile.

    The engine's thread runs the model at the same time; both only read it.
    """

    def __init__(self) -> None:
        self._lock, self._taken = asyncio.Lock(), 0

    async def take(
        self, work: Callable[[Callable[[], bool]], str], server: Serving, http: HttpRequest
    ) -> str:
        """Wait for a turn and return what `work` returns.

        Args:
            work: may ask what it is given whether it is still wanted, and then raise `Unwanted`.
            server: may run out of time for it.
            http: who asks, and may go away.

        Raises:
            ApiError: too many wait already, the client has gone meanwhile, or the server is being
                stopped and waits no longer.
        """
        if self._taken >= MOST_WAITING:
            raise busy(
                f"{self._taken} looks and walks are worked at or wait already: try again later"
            )
        self._taken += 1
        try:
            async with self._lock:
                if await http.is_disconnected():
                    raise gone()
                return await self._do(work, server, http)
        except Unwanted:
            raise server.unavailable() if server.given_up else gone() from None
        finally:
            self._taken -= 1

    async def _do(
        self, work: Callable[[Callable[[], bool]], str], server: Serving, http: HttpRequest
    ) -> str:
        """Work in a thread, which cannot be ended: it asks whether to go on."""
        if server.given_up:
            raise Unwanted
        watching = asyncio.create_task(disconnected(http))
        try:
            return await to_thread.run_sync(work, lambda: watching.done() or server.given_up)
        finally:
            watching.cancel()


@final
class TokenWriter:
    """Writes each token as it comes: its id, name, text, loops and loss.

    Args:
        prompt: the prompt's token ids, with the one that starts the document.
        tokenizer: the model's.
    """

    def __init__(self, prompt: Sequence[int], tokenizer: Tokenizer) -> None:
        self._prompt, self._tokenizer = prompt, tokenizer

    def opening(self) -> dict[str, Any]:
        """The prompt's tokens."""
        text = self._tokenizer.text_stream()
        tokens = [{**self._named(one), "text": text.push(one)} for one in self._prompt]
        return {"prompt": tokens}

    def chunk(self, events: Sequence[Event]) -> dict[str, Any]:
        """What is new; `rest` is text that was held back, because it might have been a stop."""
        tokens = [
            {
                **self._named(token.token_id),
                "text": token.text,
                "loops": token.loops,
                "loss": None if token.logprob is None else _number(-token.logprob),
            }
            for token in tokens_of(events)
        ]
        finishes = [event for event in events if isinstance(event, FinishEvent)]
        return {"tokens": tokens, "rest": text_of(finishes), "finish_reason": finish_of(events)}

    def _named(self, token_id: int) -> dict[str, Any]:
        return {"id": token_id, "name": token_text(self._tokenizer, token_id)}


def describe(name: str, loaded: Loaded, settings: ServerSettings) -> dict[str, Any]:
    """Return a model's limits and the halting rules that it can obey."""
    config = loaded.lm.model.config
    return {
        "model": name,
        "max_length": loaded.max_length,
        "mean_loops": config.mean_loops,
        "max_loops": settings.max_loops,
        "core_layers": config.core_layers,
        "experts": config.experts,
        "lens": {
            "max_tokens": min(LONGEST_LOOK, loaded.max_length),
            "max_run": MOST_RUN,
            "max_shown": MOST_SHOWN,
        },
        "rules": rules(loaded.lm.model),
    }


def rules(model: OpenMythos) -> list[dict[str, Any]]:
    """Return a model's halting rules with their default thresholds, and whether they can fire.

    A gate that was never trained cannot.
    """
    learned, found = model.core.learned_exits(), []
    for name in halting_kinds(model.config):
        rule = model.rule(name)
        threshold = None if rule is None else rule.threshold
        fires = name not in learned or bool(learned[name].weight.any())
        found.append({"name": name, "threshold": threshold, "fires": fires})
    return found


def check_lens(body: LensBody, loaded: Loaded, settings: ServerSettings) -> Thinking:
    """Return how deep the text is thought about.

    Raises:
        ApiError: the text or the answer would be too long, or loops or all of them together too
            many.
    """
    count, most = len(body.token_ids), min(LONGEST_LOOK, loaded.max_length)
    if not count:
        raise invalid("token_ids must hold at least one token id", "token_ids")
    if count > most:
        raise invalid(
            f"token_ids holds {count} tokens, must hold at most {most}: look into a shorter text",
            "token_ids",
        )
    largest, vocab = max(body.token_ids), loaded.lm.tokenizer.vocab_size
    if largest >= vocab:
        raise invalid(
            f"token_ids holds {largest}, must hold ids below vocab_size={vocab}", "token_ids"
        )
    if body.first >= count:
        raise invalid(f"first={body.first} must be below the {count} tokens of token_ids", "first")
    asked = allowed_loops(body.loops, loaded, settings)
    thinking = Thinking(loops=asked, halting=body.halting, threshold=body.threshold)
    loops = thinking.loops_of(loaded.lm.model.config)
    if count * loops > MOST_RUN:
        raise invalid(
            f"loops={loops} with {count} tokens must be at most {MOST_RUN // count}: ask for "
            "fewer, or look into a shorter text",
            "loops",
        )
    if (count - body.first) * loops > MOST_SHOWN:
        raise invalid(
            f"first={body.first} with loops={loops} must leave at most {MOST_SHOWN // loops} of "
            f"{count} places: raise it to {count - MOST_SHOWN // loops}",
            "first",
        )
    return thinking


def see(body: LensBody, lm: LanguageModel, thinking: Thinking, unwanted: Callable[[], bool]) -> str:
    """Look into a text and return what is seen as JSON.

    Raises:
        Unwanted: `unwanted` said so.
    """
    lens = look(
        lm,
        body.token_ids,
        thinking=thinking,
        top=body.top,
        first=body.first,
        unwanted=unwanted,
    )
    names = {str(token): token_text(lm.tokenizer, token) for token in lens.top.unique().tolist()}
    return json_text({"first": body.first, "places": _places(lens), "names": names})


def _places(lens: Lens) -> list[dict[str, Any]]:
    """Every place: a row for each loop that it took."""
    top, likely = lens.top.tolist(), lens.probabilities.tolist()
    losses, entropy = lens.losses.tolist(), lens.entropy.tolist()
    experts = None if lens.experts is None else lens.experts.transpose(1, 2).tolist()
    return [
        {
            "loops": loops,
            "rows": [
                {
                    "loss": _number(losses[t][place]),
                    "entropy": _number(entropy[t][place]),
                    "top": [
                        [token, _number(p)]
                        for token, p in zip(top[t][place], likely[t][place], strict=True)
                    ],
                    "experts": None if experts is None else experts[t][place],
                }
                for t in range(loops)
            ],
        }
        for place, loops in enumerate(lens.loops.tolist())
    ]


def _number(value: float) -> float | None:
    """Round a value for its way to the page; JSON has no NaN."""
    return round(value, 5) if math.isfinite(value) else None
