"""A request that the engine has accepted: its events as they come, on any thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from openmythos.errors import InputError
from openmythos.inference.request import Event, FinishEvent, FinishReason, Request

LOG = logging.getLogger(__name__)

Listener = Callable[[Event], None]


class Submission:
    """A request that the engine has accepted: its events, in order, and a way to cancel it.

    Iterating waits for events and ends after the last choice's `FinishEvent`; it may be done
    several times and on any thread, each time from the first event.
    """

    def __init__(self, request: Request, cancel: Callable[[Submission], None]) -> None:
        self.request = request
        self._cancel = cancel
        self._events: list[Event] = []
        self._kept = True
        self._listeners: list[Listener] = []
        self._open = set(range(request.choices))
        # Listeners are called under it, each of them event by event, and may cancel: whoever holds
        # a lock that `cancel` takes must not deliver.
        self._changed = threading.Condition()

    def __iter__(self) -> Iterator[Event]:
        """Yield events as they come.

        Raises:
            InputError: they were handed over.
        """
        at = 0
        while True:
            with self._changed:
                self._check_kept()
                while at == len(self._events) and self._open:
                    self._changed.wait()
                    self._check_kept()
                if at == len(self._events):
                    return
                event = self._events[at]
            at += 1
            yield event

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return not self._open

    def add_listener(self, listener: Listener) -> None:
        """Call `listener` with every event: those so far now, later ones on the engine's thread.

        It must return at once and not raise: hand over to an event loop with
        `call_soon_threadsafe`. A listener that raises is dropped and the request cancelled.

        Raises:
            InputError: the events were handed over.
        """
        with self._changed:
            self._check_kept()
            if all(self._tell(listener, event) for event in self._events):
                self._listeners.append(listener)

    def hand_over(self, listener: Listener) -> None:
        """Add the last listener: the submission keeps no events any more, nor those so far.

        What streams a long text has its events elsewhere. They cannot be read here any more, nor
        by listeners to come.

        Raises:
            InputError: the events were handed over.
        """
        with self._changed:
            self.add_listener(listener)
            self._kept = False
            self._events.clear()
            self._changed.notify_all()

    def cancel(self) -> None:
        """End all choices with `cancelled` at the next tick; without effect once they ended."""
        self._cancel(self)

    def deliver(self, event: Event) -> None:
        """Add an event; the engine calls this."""
        with self._changed:
            if self._kept:
                self._events.append(event)
            if isinstance(event, FinishEvent):
                self._open.discard(event.choice)
            self._changed.notify_all()
            for listener in list(self._listeners):
                if not self._tell(listener, event):
                    self._listeners.remove(listener)

    def close(self, reason: FinishReason, error: str | None = None) -> None:
        """End the choices that have not ended; the engine calls this."""
        for choice in sorted(self._open):
            tokens = len(self.request.token_ids)
            self.deliver(
                FinishEvent(choice=choice, reason=reason, error=error, prompt_tokens=tokens)
            )

    def _tell(self, listener: Listener, event: Event) -> bool:
        """Call a listener; False: it failed, and the request is cancelled."""
        try:
            listener(event)
        except Exception:
            LOG.exception("a listener failed: it is dropped and its request cancelled")
            self._cancel(self)
            return False
        return True

    def _check_kept(self) -> None:
        if not self._kept:
            raise InputError("the events were handed over to a listener: read or listen before")
