"""The served model from its loading to its end: what the routes ask and the process steers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, final, runtime_checkable

from fastapi import Request as HttpRequest

from openmythos.errors import ConfigError, EngineStopped, QueueFull
from openmythos.inference.chat import ChatLayout
from openmythos.inference.engine import Statistics
from openmythos.inference.language_model import LanguageModel
from openmythos.inference.request import Request
from openmythos.inference.server.errors import ApiError, busy, unavailable
from openmythos.inference.server.json_output import JsonGrammars
from openmythos.inference.server.mailbox import Mailbox
from openmythos.inference.server.metrics import Metrics, engine_metrics
from openmythos.inference.server.settings import ServerSettings
from openmythos.inference.submission import Listener

OTHER_FIELDS, TOKEN_BYTES, LARGEST_BODY = 1 << 18, 8, 8 << 20
"""Bytes of a body: for all but its prompts, for each token of those, and at most, all together."""
State = Literal["loading", "ready", "draining", "failed"]


@runtime_checkable
class Accepted(Protocol):
    """A request that the engine has accepted (`Submission`)."""

    def add_listener(self, listener: Listener) -> None:
        """Call `listener` with every event, those so far included."""
        ...

    def hand_over(self, listener: Listener) -> None:
        """Do the same for the last listener, and keep no events."""
        ...

    def cancel(self) -> None:
        """Give the request up, from any thread."""
        ...


@runtime_checkable
class Continues(Protocol):
    """What the server needs of an `Engine`."""

    @property
    def alive(self) -> bool:
        """Whether it works."""
        ...

    def submit_all(self, requests: Sequence[Request]) -> Sequence[Accepted]:
        """Accept requests, or raise `InputError`, `QueueFull` or `EngineStopped`."""
        ...

    def pages_needed(self, request: Request, max_new_tokens: int | None = None) -> int:
        """Return the most pages that a request may need, or would with so many new tokens."""
        ...

    def statistics(self) -> Statistics:
        """Return how it stands."""
        ...

    def stop(self, drain: bool = True) -> None:
        """End it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that is ready to be asked."""

    lm: LanguageModel
    layout: ChatLayout
    engine: Continues
    max_length: int
    """Most tokens of a prompt and its continuation together."""
    pages: int | None = None
    """Of the engine's cache, which a reply that names no limit is fitted to; None: it is not."""
    grammars: JsonGrammars = field(init=False)
    most_bytes: int = field(init=False)
    """Bytes of the longest text that can fit, however it is split."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "grammars", JsonGrammars(self.lm.tokenizer))
        longest = int(self.lm.tokenizer.token_bytes.max())
        object.__setattr__(self, "most_bytes", self.max_length * longest)


@final
class Serving:
    """Loads a model in a thread, takes requests for it, and lets them finish at the end.

    Args:
        load: makes the model ready; may take long and may fail.
        name: the model's in the API.
        settings: the server's.
    """

    def __init__(self, load: Callable[[], Loaded], name: str, settings: ServerSettings) -> None:
        self.name, self.settings = name, settings
        self.metrics = Metrics(name)
        self.failure: BaseException | None = None
        self._load = load
        self._loader: threading.Thread | None = None
        self._loaded: Loaded | None = None
        self._draining = self._stopped = False
        self.given_up = False
        """Whether what still runs has no time left."""
        self._answering = 0
        self._open: set[Mailbox] = set()
        self._lock = threading.Lock()

    @property
    def state(self) -> State:
        """Where the server is in its life."""
        if self.failure is not None:
            return "failed"
        if self._draining:
            return "draining"
        if self._loaded is None:
            return "loading"
        return "ready" if self._loaded.engine.alive else "failed"

    @property
    def died(self) -> bool:
        """Whether the engine has ended without having been told to."""
        loaded = self._loaded
        return loaded is not None and not self._stopped and not loaded.engine.alive

    @property
    def idle(self) -> bool:
        """Whether no request is being answered, to the last byte."""
        return not self._answering

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request that is being answered; on the event loop."""
        self._answering += 1
        try:
            yield
        finally:
            self._answering -= 1

    def start(self) -> None:
        """Begin to load."""
        self._loader = threading.Thread(target=self._load_it, name="openmythos-load", daemon=True)
        self._loader.start()

    @property
    def most_body(self) -> int:
        """Largest body of a request, in bytes."""
        if self.settings.max_body_bytes is not None:
            return self.settings.max_body_bytes
        if self._loaded is None:  # what comes now is refused anyway, and may come again
            return LARGEST_BODY
        return body_limit(self._loaded.max_length, self.settings.max_choices)

    @property
    def loading(self) -> bool:
        """Whether the model is being loaded, also where it is no longer wanted."""
        return self._loader is not None and self._loader.is_alive()

    def ready(self) -> Loaded:
        """Return the model.

        Raises:
            ApiError: it cannot be asked now.
        """
        loaded = self._loaded
        if loaded is None or self.state != "ready":
            raise self.unavailable()
        return loaded

    def unavailable(self) -> ApiError:
        """Return why it cannot be asked now."""
        state = self.state
        return unavailable(
            {
                "loading": "the model is being loaded: ask again in a moment",
                "draining": "the server is being stopped: ask another one",
            }.get(state, "the engine has failed: the server must be started again"),
            code=state,
        )

    def submit(self, requests: Sequence[Request], *, most: int | None = None) -> Mailbox:
        """Queue the requests of one HTTP request, all or none.

        The caller closes the mailbox with `close`, whatever happens to the response.

        Args:
            requests: one for each prompt.
            most: events that may wait for the client; None: any number.

        Raises:
            InputError: a request does not fit the model.
            ApiError: there is no room, or the server is being stopped.
        """
        engine, mailbox = self.ready().engine, Mailbox(most, on_close=self._open.discard)
        self._open.add(mailbox)
        try:
            meters = [self.metrics.meter() for _ in requests]
            every = engine.submit_all(requests)
            for number, (request, accepted) in enumerate(zip(requests, every, strict=True)):
                mailbox.expect(accepted, request.choices)
                accepted.add_listener(meters[number])
                accepted.hand_over(mailbox.listener(number))
        except BaseException as error:
            mailbox.close()
            if isinstance(error, QueueFull):
                raise busy(str(error)) from None
            if isinstance(error, EngineStopped):
                raise self.unavailable() from None
            raise
        return mailbox

    def drain(self) -> None:
        """Take no more requests; those that run go on."""
        self._draining = True

    def give_up(self) -> None:
        """Cancel every request that still runs."""
        self.given_up = True
        for mailbox in list(self._open):
            mailbox.cancel()

    def stop(self) -> None:
        """End the engine; where it has died, that is the server's failure."""
        with self._lock:
            if self.died:
                self.failure = EngineStopped("the engine has failed: the lines before say why")
            self._stopped, loaded = True, self._loaded
        if loaded is not None:
            loaded.engine.stop(drain=False)

    def _load_it(self) -> None:
        try:
            loaded = self._load()
        except BaseException as error:  # noqa: BLE001 - told by whoever runs the server
            self.failure = error
            return
        self.metrics.watch(lambda: engine_metrics(loaded.engine.statistics(), self.metrics))
        with self._lock:
            self._loaded, stopped = loaded, self._stopped
        if stopped:  # before it was there
            loaded.engine.stop(drain=False)


def serving(request: HttpRequest) -> Serving:
    """Return what the app of a request serves: a dependency for routes."""
    return request.app.state.serving


def body_limit(max_length: int, max_choices: int) -> int:
    """Return the largest body, in bytes, for what the model can read.

    A token's id takes up to 8 bytes of JSON, and its text is shorter as a rule. Python reads a body
    in one go, and everybody waits for that.
    """
    return min(LARGEST_BODY, OTHER_FIELDS + TOKEN_BYTES * max_length * max_choices)


def length_limit(asked: int | None, max_length: int) -> int:
    """Return the most tokens of prompt and continuation.

    Raises:
        ConfigError: more is asked than the model takes.
    """
    if asked is not None and asked > max_length:
        raise ConfigError(
            f"max_model_len={asked} must be at most the model's max_length={max_length}"
        )
    return asked or max_length
