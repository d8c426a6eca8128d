"""From the engine's thread to the event loop: the events of one HTTP request.

The engine never waits for a client. What a client has not taken yet waits here, up to a bound; a
client that falls further behind loses its request, and no other notices.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol, runtime_checkable

from openmythos.inference.request import Event, FinishEvent
from openmythos.inference.submission import Listener


@runtime_checkable
class Cancellable(Protocol):
    """What the mailbox needs of a submission."""

    def cancel(self) -> None:
        """Give the request up, from any thread; a second time does nothing."""
        ...


class TooSlowError(Exception):
    """The client reads more slowly than it may."""


class Mailbox:
    """Events of several submissions in order, taken by one coroutine. Made on the event loop.

    Args:
        most: events that may wait; None: any number, for a reader that waits for nobody.
        on_close: told once, when it is closed.
    """

    def __init__(
        self, most: int | None = None, on_close: Callable[[Mailbox], None] = lambda _: None
    ) -> None:
        self._loop, self._most, self._on_close = asyncio.get_running_loop(), most, on_close
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Event]] = []
        self._called = False  # is a wake-up on its way?
        self._overflowed = self._closed = False
        self._awake = asyncio.Event()
        self._submissions: list[Cancellable] = []
        self._open = 0  # choices that have not finished

    def expect(self, submission: Cancellable, choices: int) -> None:
        """Await the events of one more submission, which will finish so many choices."""
        self._submissions.append(submission)
        self._open += choices

    def listener(self, number: int) -> Listener:
        """Return what the engine calls with the events of submission `number`, from its thread."""
        return lambda event: self._put(number, event)

    async def batches(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Yield what has come, with the numbers of the submissions, until every choice is finished.

        Raises:
            TooSlowError: more waited than may.
        """
        while self._open:
            await self._awake.wait()
            self._awake.clear()
            with self._lock:
                batch, self._waiting, self._called = self._waiting, [], False
            if self._overflowed:
                raise TooSlowError
            self._open -= sum(isinstance(event, FinishEvent) for _, event in batch)
            if batch:
                yield batch

    def cancel(self) -> None:
        """Let every submission finish now; their last events still come."""
        for submission in self._submissions:
            submission.cancel()

    def close(self) -> None:
        """Cancel what still runs and take no more."""
        with self._lock:
            self._closed, self._waiting = True, []
        self.cancel()
        self._on_close(self)

    def _put(self, number: int, event: Event) -> None:
        with self._lock:
            if self._closed or self._overflowed:
                return
            self._waiting.append((number, event))
            if self._most is not None and len(self._waiting) > self._most:
                self._overflowed, self._waiting, self._called = True, [], False
            if self._called:
                return
            self._called = True
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._overflowed:  # here and not by the reader, which may wait for its client for long
            self.cancel()
        self._awake.set()
