"""The server on real sockets: clients that go, stall, send too much, and the end of it all."""

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import threading
import time

import pytest
import uvicorn
from fake_engine import (
    SAID,
    FakeEngine,
    client_of,
    events_of,
    language_model,
    make_app,
    say,
    wait,
    wait_until,
)
from fastapi import APIRouter
from starlette.testclient import TestClient

from openmythos.errors import EngineStopped
from openmythos.inference.request import TokenEvent
from openmythos.inference.server import run
from openmythos.inference.server.run import Process, guarded, listen

LONG = {"prompt": "a", "max_tokens": 1_000_000}
MESSAGES = [{"role": "user", "content": "a"}]


class Listening:
    """A server in a thread; `signal` is what SIGTERM would do."""

    def __init__(self, script, **settings):
        self.engine = FakeEngine(script, threads=True)
        app = make_app(self.engine, max_length=1 << 21, **settings)
        self.serving = app.state.serving
        self.socket = listen("127.0.0.1", 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        self.port = self.socket.getsockname()[1]
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2)
        self.told = []
        self.process = Process(config, self.serving, lambda: None, self.told.append)
        self.thread = threading.Thread(target=self.process.run, args=([self.socket],))
        self.connections = []

    def signal(self):
        self.process.handle_exit(signal.SIGTERM, None)

    def post(self, body, path="/v1/completions"):
        """A connection whose answer is not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        self.connections.append(connection)
        return connection

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        with contextlib.closing(connection):
            return connection.getresponse().status


@contextlib.contextmanager
def listening(script, **settings):
    server = Listening(script, **settings)
    server.thread.start()
    try:
        wait_until(lambda: server.serving.state == "ready")
        yield server
    finally:
        for connection in server.connections:
            connection.close()
        server.signal()
        server.signal()
        server.thread.join(60)
        assert not server.thread.is_alive()


def talk(run):
    """A script: write until cancelled, as fast as it goes."""
    token = language_model().tokenizer.encode("the")[0]
    while not run.cancelled.is_set() and run.token(token):
        time.sleep(0.0002)
    if 0 in run.open:
        run.finish("cancelled")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [talk, wait], ids=["talking", "silent"])
def test_a_client_that_goes_cancels_its_request(stream, script):
    with listening(script) as server:
        connection = server.post({**LONG, "stream": stream})
        wait_until(lambda: server.engine.runs)
        assert not server.engine.runs[0].cancelled.is_set()
        connection.close()
        assert server.engine.runs[0].cancelled.wait(60)
        wait_until(lambda: server.serving.idle)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_goes_before_its_answer_is_not_counted_as_answered(path):
    body = {"prompt": "a"} if path == "/v1/completions" else {"messages": MESSAGES}
    with listening(wait) as server:
        connection = server.post(body, path)
        wait_until(lambda: server.engine.runs)
        connection.close()
        counted = f'http_requests_total{{path="{path}",status="499"}} 1.0'
        wait_until(lambda: counted in server.serving.metrics.page().decode())
        assert 'status="200"' not in server.serving.metrics.page().decode()


@pytest.mark.parametrize(
    ("host", "names", "others"),
    [
        ("127.0.0.1", ["localhost", "127.0.0.1:80", "[::1]:80", "LOCALHOST:1", ""], ["a.org"]),
        ("localhost", ["localhost", "127.0.0.1"], ["a.org:80", "127.0.0.1.a.org", "[::2]"]),
        ("127.0.0.2", ["127.0.0.2", "localhost"], ["127.0.0.3"]),
    ],
)
def test_where_no_key_guards_it_a_page_cannot_lead_its_own_name_here(host, names, others):
    def client_with(**settings):
        app = make_app(FakeEngine(say()), host=host, **settings)
        with listen(host, 0) as listening:
            return TestClient(guarded(app, listening))

    client = client_with()
    for name in names:
        assert client.get("/openapi.json", headers={"Host": name}).status_code == 200, name
    for name in others:
        response = client.get("/openapi.json", headers={"Host": name})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")
        assert client_with(api_key="k").get("/health", headers={"Host": name}).status_code == 503


def test_a_server_of_the_network_is_called_by_any_name():
    app = make_app(FakeEngine(say()), host="0.0.0.0")
    with listen("0.0.0.0", 0) as listening:
        assert guarded(app, listening) is app


def test_a_client_that_does_not_read_is_cut_off_and_stalls_nobody():
    def script(run):
        (say() if run.request.max_new_tokens < 100 else talk)(run)

    with listening(script, max_unread=50, send_seconds=0.5) as server:
        server.post({**LONG, "stream": True, "logprobs": 20})
        wait_until(lambda: server.engine.runs)
        while not server.engine.runs[0].cancelled.is_set():
            others = server.post({"prompt": "a", "max_tokens": 40}).getresponse()
            assert json.load(others)["choices"][0]["text"] == SAID
        wait_until(lambda: server.serving.idle)


def test_a_reader_that_is_only_slow_gets_everything():
    with listening(say(SAID * 20), max_unread=5000) as server:
        body = {"prompt": "a", "max_tokens": 5000, "stream": True}
        answer, text = server.post(body).getresponse(), b""
        while part := answer.read1(1500):
            text += part
            time.sleep(0.002)
        bodies = [line.removeprefix(b"data: ") for line in text.split(b"\n\n") if line]
        assert bodies.pop() == b"[DONE]"
        said = [json.loads(body)["choices"][0]["text"] for body in bodies]
        assert "".join(said) == SAID * 20


def test_a_stream_that_cannot_keep_up_ends_with_an_error():
    def burst(run):  # before anybody can read
        for _ in range(200):
            run.token(language_model().tokenizer.encode("the")[0])

    with client_of(burst, max_unread=100, max_length=1 << 21) as client:
        *_, last = events_of(client.post("/v1/completions", json={**LONG, "stream": True}))
        assert last["error"]["code"] == "client_too_slow"
        assert client.engine.runs[0].cancelled.is_set()


def test_of_a_stream_as_many_events_may_wait_for_each_choice():
    def burst(run):  # before anybody can read
        for _ in range(75):
            for choice in (0, 1):
                run.token(language_model().tokenizer.encode("the")[0], choice)
        run.finish("stop", 0)
        run.finish("stop", 1)

    with client_of(burst, max_unread=100, max_length=1 << 21) as client:
        chunks = events_of(client.post("/v1/completions", json={**LONG, "stream": True, "n": 2}))
        assert [c["choices"][0]["finish_reason"] for c in chunks] == ["stop", "stop"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_sender_of_too_much_sees_the_refusal(announced):
    with listening(say(), max_body_bytes=1000) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        server.connections.append(connection)
        body = b"x" * 3_000_000 if announced else iter([b"x" * 100_000] * 30)
        connection.request("POST", "/v1/completions", body)
        answer = connection.getresponse()
        assert answer.status == 413
        assert json.load(answer)["error"]["code"] == "body_too_large"


def test_a_client_that_goes_while_it_sends_does_no_harm():
    with listening(say()) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{")
        assert server.get("/health") == 200
        assert not server.engine.runs


def test_running_requests_finish_while_new_ones_are_refused():
    go = threading.Event()

    def script(run):
        go.wait(60)
        say()(run)

    with listening(script) as server:
        bodies = [{"prompt": "a", "max_tokens": 40, "stream": stream} for stream in (False, True)]
        running = [server.post(body) for body in bodies]
        wait_until(lambda: len(server.engine.runs) == 2)
        server.signal()
        wait_until(lambda: server.told)
        assert server.get("/health") == 503
        refused = server.post(bodies[0]).getresponse()
        assert (refused.status, json.load(refused)["error"]["code"]) == (503, "draining")
        go.set()
        whole, stream = (connection.getresponse().read() for connection in running)
        assert json.loads(whole)["choices"][0]["text"] == SAID
        assert stream.endswith(b"data: [DONE]\n\n")
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert not server.engine.alive
        assert server.serving.failure is None
        waiting = "waiting for 2 requests, at most 60 s; Ctrl-C again cancels them"
        assert server.told == [f"stopping: {waiting}"]


def test_a_server_without_requests_says_that_it_stops_and_nothing_more():
    with listening(say()) as server:
        assert server.get("/health") == 200
        wait_until(lambda: server.serving.idle)
        server.signal()
        server.thread.join(60)
    assert server.told == ["stopping"]


def test_what_has_no_tokens_is_waited_for_as_well():
    began, go, router = threading.Event(), threading.Event(), APIRouter()

    @router.post("/slow")
    def slow():
        began.set()
        go.wait(60)

    with listening(say(), routers=[router]) as server:
        connection = server.post({}, "/slow")
        assert began.wait(60)
        server.signal()
        assert not asyncio.run(server.process.on_tick(1))  # it goes on
        go.set()
        assert connection.getresponse().status == 200
        server.thread.join(60)
        assert not server.thread.is_alive()


def long_text(run):
    """A script: one token of more than what lies in the sockets of both sides."""
    run.say(TokenEvent(choice=0, token_id=1, text="x" * (4 << 20), loops=1))
    run.finish("length")


def test_a_whole_answer_is_waited_for_until_its_last_byte_is_sent():
    with listening(long_text) as server:
        connection = server.post({"prompt": "a"})
        wait_until(lambda: server.engine.runs and server.engine.runs[0].cancelled.is_set())
        server.signal()
        assert not server.serving.idle
        assert not asyncio.run(server.process.on_tick(1))
        assert len(json.load(connection.getresponse())["choices"][0]["text"]) == 4 << 20
        server.thread.join(60)
        assert not server.thread.is_alive()


def test_a_whole_answer_that_nobody_takes_is_cut_off():
    with listening(long_text, send_seconds=0.1) as server:
        connection = server.post({"prompt": "a"})
        wait_until(lambda: server.engine.runs)
        wait_until(lambda: server.serving.idle)
        with pytest.raises(http.client.IncompleteRead):
            connection.getresponse().read()


def test_an_engine_that_dies_ends_the_process_with_an_error(monkeypatch):
    monkeypatch.setattr(run, "FAILED_SECONDS", 0.0)
    engine = FakeEngine(say())
    app = make_app(engine, port=0)
    with pytest.raises(EngineStopped, match="the engine has failed"):
        run.run(app, on_ready=lambda _: setattr(engine, "alive", False))


def test_clients_are_told_before_a_server_whose_engine_died_ends():
    with listening(say()) as server:
        server.engine.alive = False
        refused = server.post({"prompt": "a"}).getresponse()
        assert (refused.status, json.load(refused)["error"]["code"]) == (503, "failed")
        assert not asyncio.run(server.process.on_tick(1))
        server.signal()  # it ends sooner then, and as badly
        server.thread.join(60)
        assert isinstance(server.serving.failure, EngineStopped)


@pytest.mark.parametrize("how", ["time", "second signal"])
def test_draining_has_an_end(how):
    with listening(talk, drain_seconds=0.3 if how == "time" else 60) as server:
        connection = server.post({**LONG, "stream": True})
        wait_until(lambda: server.engine.runs)
        server.signal()
        if how == "second signal":
            server.signal()
        answer = connection.getresponse().read()
        assert json.loads(answer.split(b"\n\n")[-3].removeprefix(b"data: "))["error"]["code"]
        server.thread.join(60)
        assert not server.thread.is_alive()
