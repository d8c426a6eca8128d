"""What completions and chat have in common in their answers: ids, usage, chunks, the whole."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, final, runtime_checkable

from fastapi import Request as HttpRequest

from openmythos.inference.request import Event, FinishEvent, PromptEvent, TokenEvent
from openmythos.inference.server.errors import ApiError, unavailable
from openmythos.inference.server.mailbox import Mailbox
from openmythos.inference.server.schemas import StreamOptions

T = TypeVar("T")


@runtime_checkable
class Writer(Protocol):
    """Turns the events of one choice into the JSON of it."""

    def opening(self) -> dict[str, Any] | None:
        """Return the first chunk, before any event; None: there is none."""
        ...

    def chunk(self, events: Sequence[Event]) -> dict[str, Any] | None:
        """Return the chunk of some events; None: nothing of them shows."""
        ...

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return the choice from all of its events."""
        ...


@final
class Usage:
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
class Answer:
    """The frame that is the same in every chunk of one answer."""

    kind: str
    """Prefix of its id."""
    object: str
    model: str
    writers: Sequence[Writer]
    """One for each choice, those of the first prompt first."""
    choices: int
    """Of each prompt."""
    mailbox: Mailbox
    usage: Usage
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.kind}-{uuid.uuid4().hex}")

    async def whole(self) -> dict[str, Any]:
        """Wait for every choice and return the answer.

        Raises:
            ApiError: a choice came to no good end.
        """
        events: list[list[Event]] = [[] for _ in self.writers]
        async for index, parts in self._parts():
            events[index] += parts
        choices = [
            {"index": index, **writer.whole(events[index])}
            for index, writer in enumerate(self.writers)
        ]
        return {**self._frame(choices), "usage": self.usage.json()}

    async def chunks(self, options: StreamOptions) -> AsyncIterator[dict[str, Any]]:
        """Yield the answer in chunks; all that waits for a choice goes into one.

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
                yield {**self._frame([{"index": index, **opening}]), **so_far()}
        async for index, parts in self._parts():
            chunk = self.writers[index].chunk(parts)
            if chunk is not None:
                yield {**self._frame([{"index": index, **chunk}]), **so_far()}
        if options.include_usage:
            yield {**self._frame([]), "usage": self.usage.json()}

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
            raise ApiError(500, event.error or "the engine failed", code="engine_error")

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def text_of(events: Sequence[Event]) -> str:
    """Return the text of some events, joined."""
    return "".join(event.text for event in events if isinstance(event, TokenEvent | FinishEvent))


def tokens_of(events: Sequence[Event]) -> list[TokenEvent]:
    """Return the tokens among some events."""
    return [event for event in events if isinstance(event, TokenEvent)]


def finish_of(events: Sequence[Event]) -> str | None:
    """Return why the choice finished; None: it has not."""
    return next((event.reason for event in events if isinstance(event, FinishEvent)), None)


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T | None:
    """Wait for `work`, or cancel it and return None when the client disconnects."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        watching.cancel()


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
