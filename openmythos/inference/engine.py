"""The engine: many requests at once through one model, each as deep as it asks.

One thread owns the model and runs ticks; callers submit requests from any thread and read events.
Whatever happens, every choice of every accepted request gets its `FinishEvent`.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from openmythos.errors import EngineStopped, InputError, QueueFull
from openmythos.inference.engine_settings import EngineSettings
from openmythos.inference.language_model import LanguageModel
from openmythos.inference.pages import PAGE
from openmythos.inference.passes import page_bytes
from openmythos.inference.request import FinishReason, Request
from openmythos.inference.submission import Submission
from openmythos.inference.ticks import Counts, Ticker, told
from openmythos.inference.work import Work

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """How an engine stands after a tick."""

    running: int = 0
    """Requests in flight."""
    waiting: int = 0
    """Requests that wait for admission."""
    rows: int = 0
    """Rows in the core."""
    pages_total: int = 0
    """Pages of 16 positions in one slot."""
    pages_free: int = 0
    pages_cached: int = 0
    """Kept for requests to come, and given up when pages are needed."""
    pages_used: int = 0
    """`total` less `free` less `cached`."""
    pages_promised: int = 0
    """That requests in flight may still take, and those that count for their tables."""
    done: Counts = field(default_factory=Counts)
    """Up to this tick; a copy of its own."""


class Engine:
    """Serves requests with one model, many at once; see `EngineSettings`.

    Args:
        lm: model and tokenizer. The engine's thread runs the model; others may use it meanwhile
            only for reading. Between requests its weights may be replaced or written to: what was
            cached is then forgotten. After writing through `tensor.data`, of which torch tells
            nobody, make a new engine.
        settings: sizes and mode.

    Raises:
        InputError: the cache is too small for a single page.
    """

    def __init__(self, lm: LanguageModel, settings: EngineSettings | None = None) -> None:
        self.lm, self.settings = lm, settings or EngineSettings()
        size = page_bytes(lm.model)
        pages = self.settings.cache_bytes // size
        if not pages:
            raise InputError(
                f"cache_bytes={self.settings.cache_bytes} must hold at least one page of {PAGE} "
                f"positions, {size} bytes"
            )
        self._ticker = Ticker(
            lm,
            pages=pages,
            budget=self.settings.budget,
            chunk=self.settings.chunk,
            deterministic=self.settings.deterministic,
            prefix_sharing=self.settings.prefix_sharing,
        )
        self._wake = threading.Condition()
        self._inbox: deque[Submission] = deque()
        self._cancelled: deque[Submission] = deque()
        self._works: dict[Submission, Work] = {}
        self._thread: threading.Thread | None = None
        self._stopping: str = ""  # "drain" or "now" once it is
        self._statistics = self._take_statistics()

    def start(self) -> None:
        """Start the engine's thread; without effect where it runs.

        Raises:
            EngineStopped: it was stopped.
        """
        with self._wake:
            if self._stopping:
                raise EngineStopped("the engine was stopped: make a new one")
            if self._thread is None:
                # A daemon, or a script that fails before `stop` would never end; but torch must
                # not be taken down under it.
                self._thread = threading.Thread(
                    target=self._run, name="openmythos-engine", daemon=True
                )
                self._thread.start()
                atexit.register(self.stop, drain=False)

    def submit(self, request: Request) -> Submission:
        """Accept a request; its events come through what this returns.

        Raises:
            InputError: the model, the tokenizer or the cache can never serve it.
            QueueFull: as many requests wait as may.
            EngineStopped: the engine takes no requests any more.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Submission]:
        """Accept several requests or none; what may wait never refuses them where none waits.

        Raises:
            InputError: the model, the tokenizer or the cache can never serve one of them.
            QueueFull: more requests would wait than may.
            EngineStopped: the engine takes no requests any more.
        """
        for request in requests:
            self._ticker.prepare(request)
        submissions = [Submission(request, self._ask_to_cancel) for request in requests]
        with self._wake:
            if self._stopping:
                raise EngineStopped("the engine is stopping: it takes no more requests")
            waiting = len(self._inbox) + len(self._ticker.scheduler.waiting)
            if waiting and waiting + len(requests) > self.settings.max_waiting:
                raise QueueFull(
                    f"max_waiting={self.settings.max_waiting} must not be passed, and {waiting} "
                    "requests wait already: try again later"
                )
            self._inbox.extend(submissions)
            self._wake.notify()
        return submissions

    def pages_needed(self, request: Request, max_new_tokens: int | None = None) -> int:
        """Return the most pages that a request may need; admission waits until as many are there.

        Args:
            request: whatever the model or the cache make of it.
            max_new_tokens: count so many in place of the request's own.
        """
        return self._ticker.pages_needed(request, max_new_tokens)

    def _ask_to_cancel(self, submission: Submission) -> None:
        with self._wake:
            if not submission.finished:
                self._cancelled.append(submission)
                self._wake.notify()

    def stop(self, drain: bool = True) -> None:
        """Take no more requests and end the thread; may be called again, and from any thread.

        Args:
            drain: finish what has been submitted; otherwise everything ends as `cancelled`.
        """
        with self._wake:
            if not drain or not self._stopping:
                self._stopping = "drain" if drain else "now"
            self._wake.notify()
            thread = self._thread
        if thread is None:
            self._end_all("cancelled")
        elif thread is not threading.current_thread():
            thread.join()
            atexit.unregister(self.stop)

    def __enter__(self) -> Engine:
        """Start."""
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop at once."""
        self.stop(drain=False)

    @property
    def alive(self) -> bool:
        """Whether its thread works and takes requests."""
        thread = self._thread
        return thread is not None and thread.is_alive() and not self._stopping

    def statistics(self) -> Statistics:
        """Return the state after the last tick."""
        return self._statistics

    def _run(self) -> None:
        """The engine's thread, from its start to its end."""
        error: str | None = None
        try:
            with torch.inference_mode():
                while self._receive():
                    try:
                        self._ticker.tick()
                    except Exception as failure:
                        LOG.exception("a tick failed: the requests in flight end with an error")
                        self._ticker.fail(told(failure))
                    self._tidy()
        except BaseException as failure:
            LOG.exception("the engine failed and stops")
            error = told(failure)
        finally:
            self._end_all("cancelled" if error is None else "error", error)

    def _receive(self) -> bool:
        """Wait for something to do and take what was asked; False: end."""
        with self._wake:
            self._wake.wait_for(
                lambda: self._inbox or self._cancelled or self._stopping or not self._ticker.idle
            )
            inbox, cancelled = list(self._inbox), list(self._cancelled)
            self._inbox.clear()
            self._cancelled.clear()
            # Added under the lock, so that none is counted as waiting in neither place.
            refused = [pair for submission in inbox if (pair := self._add(submission))]
        for submission, error in refused:  # not under it: a listener may cancel or submit
            submission.close("error", error)
        for submission in cancelled:
            if submission in self._works:
                self._ticker.end(self._works.pop(submission), "cancelled")
        return not (self._stopping == "now" or (self._stopping == "drain" and self._ticker.idle))

    def _add(self, submission: Submission) -> tuple[Submission, str] | None:
        """Let a submission wait; return it with what is wrong where that fails."""
        try:
            self._works[submission] = self._ticker.add(submission.request, submission.deliver)
        except Exception as failure:  # noqa: BLE001 - a constraint is the caller's own code
            return submission, told(failure)
        return None

    def _tidy(self) -> None:
        self._works = {
            submission: work for submission, work in self._works.items() if not work.finished
        }
        self._statistics = self._take_statistics()

    def _end_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End everything that has not ended, whatever state the ticker is in."""
        with self._wake:
            self._stopping = self._stopping or "now"
            inbox = list(self._inbox)
            self._inbox.clear()
        for work in list(self._works.values()):
            try:
                self._ticker.end(work, reason, error)
            except Exception:
                LOG.exception("a request could not be ended in order")
        for submission in [*self._works, *inbox]:
            submission.close(reason, error)
        self._works = {}
        self._statistics = self._take_statistics()

    def _take_statistics(self) -> Statistics:
        ticker, pages = self._ticker, self._ticker.pages
        waiting = len(ticker.scheduler.waiting)
        return Statistics(
            running=len(ticker.works) - waiting,
            waiting=waiting + len(self._inbox),
            rows=sum(len(track.rows) for track in ticker.scheduler.tracks),
            pages_total=pages.total,
            pages_free=pages.free,
            pages_cached=pages.cached,
            pages_used=pages.used,
            pages_promised=pages.promised,
            done=replace(ticker.counts),
        )
