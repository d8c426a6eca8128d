"""What completions and chat have in common in their answers: ids, usage, chunks, the whole."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, final, runtime_checkable

from anyio import to_thread
from fastapi import Request as HttpRequest
from starlette.responses import Response

from openmythos.inference.request import Event, FinishEvent, PromptEvent, Request, TokenEvent
from openmythos.inference.server.errors import (
    ApiError,
    gone,
    invalid,
    json_text,
    unavailable,
)
from openmythos.inference.server.json_output import TOO_COMPLEX
from openmythos.inference.server.mailbox import Mailbox
from openmythos.inference.server.schemas import Generation, StreamOptions, refuse_model
from openmythos.inference.server.serving import Loaded, Serving
from openmythos.inference.server.stream import EventStream, WholeAnswer

T = TypeVar("T")
MOST_AT_ONCE = 32
"""Events of a chunk that is written on the event loop; more, and prompts, are written in a thread.
A client that reads slowly gets thousands at once."""


@runtime_checkable
class Writer(Protocol):
    """Turns the events of one choice into the JSON of it."""

    def opening(self) -> dict[str, Any] | None:
        """Return the first chunk, before any event; None: there is none."""
        ...

    def chunk(self, events: Sequence[Event]) -> dict[str, Any] | None:
        """Return the chunk of some events; None: nothing of them shows."""
        ...


@runtime_checkable
class WholeWriter(Writer, Protocol):
    """Writes a choice in one piece as well."""

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return the choice from all of its events."""
        ...


W = TypeVar("W", bound=Writer, covariant=True)


async def respond(
    body: Generation,
    http: HttpRequest,
    server: Serving,
    read: Callable[[Loaded], tuple[Sequence[Request], Sequence[WholeWriter]]],
    *,
    prefix: str,
    named: str,
) -> Response:
    """Check a body, let the engine answer it, and return the answer: whole, or as a stream.

    Args:
        body: what is asked.
        http: who asks, and may go away.
        server: of the model.
        read: makes of the body a request for each prompt, and a writer for each choice.
        prefix: what the answer's id begins with.
        named: its `object`.

    Raises:
        ApiError, InputError: the body does not fit, or the server cannot take it now.
    """
    if body.stream:
        return await respond_with_events(body, server, read, prefix=prefix, named=named)
    answer = await _submitted(body, server, read, prefix=prefix, named=named)
    try:
        text = await unless_gone(http, answer.whole())
    finally:
        answer.mailbox.close()
    return WholeAnswer(text, server.settings.send_seconds)


async def respond_with_events(
    body: Generation,
    server: Serving,
    read: Callable[[Loaded], tuple[Sequence[Request], Sequence[Writer]]],
    *,
    prefix: str,
    named: str,
) -> Response:
    """Do the same for a body that asks for a stream."""
    answer = await _submitted(body, server, read, prefix=prefix, named=named)
    chunks = answer.chunks(body.stream_options or StreamOptions())
    return EventStream(chunks, answer.mailbox, server.settings.send_seconds)


async def _submitted(
    body: Generation,
    server: Serving,
    read: Callable[[Loaded], tuple[Sequence[Request], Sequence[W]]],
    *,
    prefix: str,
    named: str,
) -> Answer[W]:
    """Check a body and give it to the engine; whoever calls closes the mailbox."""
    loaded = server.ready()
    refuse_model(body.model, server.name)
    body.check()
    # In a thread: long texts and schemas take a while, in which others want their tokens.
    requests, writers = await to_thread.run_sync(read, loaded)
    most = server.settings.max_unread * len(writers) if body.stream else None
    return Answer(
        prefix=prefix,
        object=named,
        model=server.name,
        writers=writers,
        choices=body.choices,
        mailbox=server.submit(requests, most=most),
        usage=UsageSoFar([len(request.token_ids) for request in requests]),
    )


@final
class UsageSoFar:
    """What a request has taken so far.

    Args:
        prompts: tokens of each prompt.
    """

    def __init__(self, prompts: Sequence[int]) -> None:
        self._prompts = prompts
        self._cached: dict[int, int] = {}
        self._new = self._loops = 0

    def add(self, number: int, event: Event) -> None:
        """Count an event of prompt `number`."""
        if isinstance(event, FinishEvent):
            self._cached.setdefault(number, event.cached_tokens)
        elif isinstance(event, TokenEvent):
            self._new += 1
            self._loops += event.loops

    def json(self) -> dict[str, Any]:
        """Return it in OpenAI's form, with our loops."""
        prompt, cached = sum(self._prompts), sum(self._cached.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._new,
            "total_tokens": prompt + self._new,
            "prompt_tokens_details": {"cached_tokens": cached},
            "loops": self._loops,
            "mean_loops": self._loops / self._new if self._new else None,
        }


@dataclass(frozen=True, kw_only=True)
class Answer(Generic[W]):
    """The frame that is the same in every chunk of one answer."""

    prefix: str
    """Of its id."""
    object: str
    model: str
    writers: Sequence[W]
    """One for each choice, those of the first prompt first."""
    choices: int
    """Of each prompt."""
    mailbox: Mailbox
    usage: UsageSoFar
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.prefix}-{uuid.uuid4().hex}")

    async def whole(self: Answer[WholeWriter]) -> str:
        """Wait for every choice and return the answer as JSON.

        Raises:
            ApiError: a choice came to no good end.
        """
        events: list[list[Event]] = [[] for _ in self.writers]
        async for index, parts in self._parts():
            events[index] += parts
        return await to_thread.run_sync(self._written, events)

    def _written(self: Answer[WholeWriter], events: Sequence[Sequence[Event]]) -> str:
        """Return the whole answer as JSON, each choice by itself: nothing else runs in between."""
        choices = [
            json_text({"index": index, **writer.whole(events[index])})
            for index, writer in enumerate(self.writers)
        ]
        frame = json_text({**self._frame(), "usage": self.usage.json()})
        return f'{frame[:-1]},"choices":[{",".join(choices)}]}}'

    async def chunks(self, options: StreamOptions) -> AsyncIterator[str]:
        """Yield the answer in chunks of JSON; all that waits for a choice goes into one.

        Raises:
            ApiError: a choice came to no good end.
            TooSlowError: the client does not keep up.
        """

        def so_far() -> dict[str, Any]:
            if options.continuous_usage_stats and options.include_usage:
                return {"usage": self.usage.json()}
            return {"usage": None} if options.include_usage else {}

        for index, writer in enumerate(self.writers):
            opening = writer.opening()
            if opening is not None:
                yield json_text({**self._frame([{"index": index, **opening}]), **so_far()})
        async for index, parts in self._parts():
            usage = so_far()
            if len(parts) > MOST_AT_ONCE or any(isinstance(part, PromptEvent) for part in parts):
                chunk = await to_thread.run_sync(self._chunk, index, parts, usage)
            else:
                chunk = self._chunk(index, parts, usage)
            if chunk is not None:
                yield chunk
        if options.include_usage:
            yield json_text({**self._frame([]), "usage": self.usage.json()})

    def _chunk(self, index: int, parts: Sequence[Event], usage: dict[str, Any]) -> str | None:
        """Return the chunk of some of a choice's events as JSON; None: nothing of them shows."""
        chunk = self.writers[index].chunk(parts)
        if chunk is None:
            return None
        return json_text({**self._frame([{"index": index, **chunk}]), **usage})

    async def _parts(self) -> AsyncIterator[tuple[int, list[Event]]]:
        """Yield what has come for each choice, by its index."""
        async for batch in self.mailbox.batches():
            by_choice: dict[int, list[Event]] = {}
            for number, event in batch:
                for index in self._indices(number, event):
                    by_choice.setdefault(index, []).append(event)
                self.usage.add(number, event)
                if isinstance(event, FinishEvent):
                    self._check(event)
            for index, parts in by_choice.items():
                yield index, parts

    def _indices(self, number: int, event: Event) -> Sequence[int]:
        """Which choices an event is about: a prompt's is about all of its own."""
        first = number * self.choices
        if isinstance(event, PromptEvent):
            return range(first, first + self.choices)
        return (first + event.choice,)

    def _check(self, event: FinishEvent) -> None:
        if event.reason == "cancelled":
            raise unavailable("the server is being stopped: ask another one", "draining")
        if event.reason == "error":
            said = event.error or "the engine failed"
            if said.startswith(TOO_COMPLEX):  # some schemas show it only on the way
                raise invalid(said, "response_format.json_schema.schema")
            raise ApiError(500, said, code="engine_error")

    def _frame(self, choices: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        frame = {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
        }
        return frame if choices is None else {**frame, "choices": choices}


def text_of(events: Sequence[Event]) -> str:
    """Return the text of some events, joined."""
    return "".join(event.text for event in events if isinstance(event, TokenEvent | FinishEvent))


def tokens_of(events: Sequence[Event]) -> list[TokenEvent]:
    """Return the tokens among some events."""
    return [event for event in events if isinstance(event, TokenEvent)]


def finish_of(events: Sequence[Event]) -> str | None:
    """Return why the choice finished; None: it has not."""
    return next((event.reason for event in events if isinstance(event, FinishEvent)), None)


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Wait for `work`, or cancel it when the client disconnects.

    Raises:
        ApiError: the client has gone.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise gone()
        return await working
    finally:
        working.cancel()
        watching.cancel()


async def disconnected(request: HttpRequest) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
