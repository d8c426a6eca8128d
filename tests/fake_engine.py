"""A server whose engine does what the test says, to see how the protocol takes it."""

import contextlib
import functools
import json
import threading
import time
from types import SimpleNamespace

from starlette.testclient import TestClient
from tiny import tiny

from openmythos.errors import EngineStopped, QueueFull
from openmythos.inference.chat import ChatLayout
from openmythos.inference.engine import Statistics
from openmythos.inference.language_model import LanguageModel
from openmythos.inference.request import FinishEvent, PromptEvent, TokenEvent
from openmythos.inference.server.app import create_app
from openmythos.inference.server.serving import Loaded, Serving
from openmythos.inference.server.settings import ServerSettings
from openmythos.inference.stops import HoldBack
from openmythos.training.tokenizer import Tokenizer

SAID = 'The mice ran up the clock — "naïve" ☃.'
LOGPROB = -0.5


@functools.cache
def language_model():
    """Nobody asks this one for its tokens; it knows its lengths and its words."""
    tokenizer = Tokenizer.train([SAID, "the clock struck one", "ran down"], vocab_size=290)
    return LanguageModel(tiny(vocab_size=tokenizer.vocab_size), tokenizer)


class Run:
    """One request in the fake engine."""

    def __init__(self, request):
        self.request, self.listeners, self.events = request, [], []
        self.lock = threading.Lock()
        self.cancelled = threading.Event()
        self.open = set(range(request.choices))
        tokenizer = language_model().tokenizer
        self.text = [tokenizer.text_stream(request.token_ids) for _ in self.open]
        self.held = [HoldBack(request.stop) for _ in self.open]
        self.new = [0] * request.choices

    def add_listener(self, listener):
        with self.lock:
            for event in self.events:
                listener(event)
            self.listeners.append(listener)

    hand_over = add_listener

    def cancel(self):
        self.cancelled.set()

    def say(self, event):
        with self.lock:
            self.events.append(event)
            for listener in self.listeners:
                listener(event)

    def prompt(self):
        """Say that the prompt has been read: position p is as likely as exp(-p)."""
        count, top = len(self.request.token_ids), range(self.request.logprobs or 0)
        self.say(
            PromptEvent(
                logprobs=(None, *(-float(place) for place in range(1, count))),
                top_logprobs=((), *[tuple((token, -9.0) for token in top)] * (count - 1)),
                loops=(2,) * count,
            )
        )

    def token(self, token_id, choice=0, loops=3):
        """Draw a token; says whether the choice goes on."""
        asked = self.request.logprobs
        top = [(token_id, LOGPROB), *((other, -2.0 - other) for other in range(1, asked or 0))]
        self.new[choice] += 1
        end = token_id == language_model().tokenizer.end_id
        text = "" if end else self.held[choice].push(self.text[choice].push(token_id))
        self.say(
            TokenEvent(
                choice=choice,
                token_id=token_id,
                text=text,
                loops=loops,
                logprob=None if asked is None else LOGPROB,
                top_logprobs=tuple(top[:asked]) if asked else (),
            )
        )
        if end or self.held[choice].stopped:
            self.finish("stop", choice)
        elif self.new[choice] == self.request.max_new_tokens:
            self.finish("length", choice)
        return choice in self.open

    def finish(self, reason="stop", choice=0, error=None):
        self.open.discard(choice)
        rest = self.held[choice].push(self.text[choice].finish()) + self.held[choice].finish()
        self.say(
            FinishEvent(
                choice=choice,
                reason=reason,
                error=error,
                text=rest,
                prompt_tokens=len(self.request.token_ids),
                cached_tokens=1,
                new_tokens=self.new[choice],
                loops=3 * self.new[choice],
                prompt_loops=2 * len(self.request.token_ids),
            )
        )


def say(text=SAID):
    """A script: every choice says `text`, a token each in turn."""

    def script(run):
        tokenizer = language_model().tokenizer
        if run.request.prompt_logprobs:
            run.prompt()
        token_ids = [*tokenizer.encode(text), tokenizer.end_id]
        if not run.request.max_new_tokens:
            token_ids = []
            for choice in sorted(run.open):
                run.finish("length", choice)
        for token_id in token_ids:
            for choice in sorted(run.open):
                run.token(token_id, choice)

    return script


def wait(_):
    """A script: the test itself goes on."""


class FakeEngine:
    """Runs its script for each request, in the caller's thread or in one of its own."""

    def __init__(self, script, room=1000, threads=False):
        self.script, self.room, self.threads = script, room, threads
        self.runs, self.alive = [], True

    def submit_all(self, requests):
        if not self.alive:
            raise EngineStopped("the engine has stopped")
        waits = self.runs or not self.room  # with no room at all somebody always does
        if waits and len(self.runs) + len(requests) > self.room:
            raise QueueFull(f"max_waiting={self.room} requests wait already: try again later")
        return [self._run(request) for request in requests]

    def _run(self, request):
        run = Run(request)
        self.runs.append(run)
        if self.threads:
            threading.Thread(target=self.script, args=(run,), daemon=True).start()
        else:
            self.script(run)
        return run

    def pages_needed(self, request, max_new_tokens=None):
        return 1

    def statistics(self):
        return Statistics(running=len(self.runs), pages_total=8, pages_used=2, pages_promised=1)

    def stop(self, drain=True):
        self.alive = False


def make_app(engine, *, template=None, load=None, max_length=64, routers=(), static=None, **how):
    lm = language_model()
    layout = ChatLayout(lm.tokenizer, template)

    def loaded():
        return Loaded(lm=lm, layout=layout, engine=engine, max_length=max_length)

    server = Serving(load or loaded, "mouse", ServerSettings(**how))
    return create_app(server, routers=routers, static=static)


@contextlib.contextmanager
def client_of(script=None, *, room=1000, **how):
    """A client of a server whose model is loaded; `client.engine` is its engine."""
    engine = FakeEngine(script or say(), room)
    app = make_app(engine, **how)
    with TestClient(app) as client:
        wait_until(lambda: app.state.serving.state != "loading")
        client.engine, client.serving = engine, app.state.serving
        yield client


def wait_until(holds, seconds=60):
    """Look until something holds; the bound is for a test that fails."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.005)


def events_of(response):
    """The chunks of a stream, which must end with `[DONE]`."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    bodies = [line.removeprefix("data: ") for line in lines]
    assert bodies.pop() == "[DONE]"
    return [json.loads(body) for body in bodies]


def error_of(response):
    """Status and error of a refusal."""
    return SimpleNamespace(status=response.status_code, **response.json()["error"])
