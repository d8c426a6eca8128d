"""What is not served: OpenAI's error shape, one sentence, the field and the status."""

import json

import pytest
from fake_engine import (
    FakeEngine,
    client_of,
    error_of,
    events_of,
    language_model,
    make_app,
    say,
    wait,
    wait_until,
)
from fastapi.exceptions import RequestValidationError
from starlette.testclient import TestClient

from openmythos.errors import CheckpointError
from openmythos.inference.request import Request
from openmythos.inference.server.errors import shortened
from openmythos.inference.server.json_output import TOO_COMPLEX
from openmythos.inference.server.schemas import ErrorBody
from openmythos.inference.server.serving import body_limit
from openmythos.training.tokenizer import Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "a"}]
SCHEMA = "response_format.json_schema.schema"


@pytest.fixture(scope="module")
def client():
    with client_of() as client:
        yield client


def schema(content):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": content}}


# The body, the field it is about, and the sentence.
BOTH = [
    ({"temperature": -1}, "temperature", "temperature=-1 must be greater than or equal to 0"),
    ({"temperature": "1"}, "temperature", "temperature='1' must be a valid number"),
    ({"top_p": 0}, "top_p", "top_p=0 must be greater than 0"),
    ({"top_p": 1.5}, "top_p", "top_p=1.5 must be less than or equal to 1"),
    ({"min_p": 1}, "min_p", "min_p=1 must be less than 1"),
    ({"top_k": -2}, "top_k", "top_k=-2 must be greater than or equal to -1"),
    ({"n": 0}, "n", "n=0 must be greater than or equal to 1"),
    ({"n": True}, "n", "n=True must be a valid integer"),
    ({"n": 129}, "n", "n=129 times 1 prompts must be at most 128"),
    ({"seed": -(1 << 63) - 1}, "seed", "must be greater than or equal to -9223372036854775808"),
    ({"seed": 1 << 63}, "seed", "seed=9223372036854775808 must be less than"),
    ({"stop": ""}, "stop", "stop must hold no empty string"),
    ({"stop": ["a"] * 17}, "stop", "stop must hold at most 16 strings"),
    ({"stop": "a" * 1025}, "stop", "stop has 1025 characters, must have at most 1024"),
    ({"stop": ["a", "b" * 1025]}, "stop", "stop has 1025 characters, must have at most 1024"),
    ({"stop": 5}, "stop", "stop must be a string or a list of strings"),
    ({"max_tokens": 64}, "max_tokens", "max_tokens=64 after a prompt of 2 tokens must end by"),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens=1.5 must be a valid integer"),
    ({"stream": "yes"}, "stream", "stream='yes' must be a valid boolean"),
    ({"stream_options": {}}, "stream_options", "stream_options must go with stream=true"),
    (
        {"stream": True, "stream_options": {"include_all": 1}},
        "stream_options.include_all",
        "stream_options.include_all=1 must be left out",
    ),
    (
        {"stream": True, "stream_options": {"include_obfuscation": 0}},
        "stream_options.include_obfuscation",
        "stream_options.include_obfuscation=0 must be False, or be left out",
    ),
    ({"loops": 0}, "loops", "loops=0 must be greater than or equal to 1"),
    ({"loops": 65}, "loops", "loops=65 must be at most 64, this server's max_loops"),
    ({"halting": "sleep"}, "halting", "halting='sleep' must be 'none', 'gate'"),
    ({"draft_loops": 0}, "draft_loops", "draft_loops=0 must be greater than or equal to 1"),
    (
        {"draft_loops": 1, "response_format": {"type": "json_object"}},
        "draft_loops",
        "draft_loops must be left out with response_format",
    ),
    (
        {"draft_loops": 1, "cache_policy": "last"},
        "draft_loops",
        "draft_loops must be left out with cache_policy='last'",
    ),
    ({"priority": 0.5}, "priority", "priority=0.5 must be a valid integer"),
    ({"priority": 1 << 63}, "priority", "priority=9223372036854775808 must be less than"),
    ({"cache_policy": "all"}, "cache_policy", "cache_policy='all' must be 'per_loop' or 'last'"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias={'5': 1} must be {}, or be left out"),
    ({"presence_penalty": 0.5}, "presence_penalty", "must be 0, or be left out"),
    ({"frequency_penalty": 1}, "frequency_penalty", "must be 0, or be left out"),
    ({"frequency_penalty": False}, "frequency_penalty", "must be 0, or be left out"),
    ({"store": 0}, "store", "store=0 must be False, or be left out"),
    ({"repetition_penalty": 1.1}, "repetition_penalty", "must be 1, or be left out"),
    ({"tools": [{"type": "function"}]}, "tools", "must be [], or be left out"),
    ({"guided_json": {}}, "guided_json", "guided_json={} must be left out: it is not supported"),
    ({"what": "x" * 99}, "what", "..."),
    ({"bad_words": ["a"]}, "bad_words", "must be [], or be left out"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "must be 'none', or be left out"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens", "must be True"),
    ({"options": {"a": 1}}, "options", "must be {}, or be left out"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "must be 'text', 'json_object'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "must be given"),
    (
        {"response_format": {"type": "text", "json_schema": {"schema": {"type": "integer"}}}},
        "response_format.json_schema",
        "must be left out with type='text'",
    ),
    (
        {"response_format": {"type": "json_object", "json_schema": {}}},
        "response_format.json_schema",
        "must be left out with type='json_object'",
    ),
    (
        {"response_format": schema({"const": "ab " * 50_000})},
        SCHEMA,
        "schema must be a JSON schema of at most 131072 bytes, has 150",
    ),
    ({"response_format": schema({"$ref": "#"})}, SCHEMA, "schema is too complex to be kept"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "must be left out"),
    ({"response_format": schema({"type": "mouse"})}, SCHEMA, "Invalid type: mouse"),
    ({"response_format": schema({"not": {}})}, SCHEMA, 'Unimplemented keys: ["not"]'),
    ({"response_format": schema({"$ref": "#/x"})}, SCHEMA, "does not exist"),
]
COMPLETION = [
    ({"prompt": {}}, "prompt", "prompt must be a text, a list of texts, a list of token ids"),
    ({"prompt": []}, "prompt", "not an empty list"),
    ({"prompt": [[]]}, "prompt", "no empty list of token ids"),
    ({"prompt": [["a"]]}, "prompt", "prompt must be a text, a list of texts"),
    ({"prompt": ["a", 5]}, "prompt", "prompt must be a text, a list of texts"),
    ({"prompt": [290]}, "prompt", "prompt holds token id 290, and must hold ids below vocab_size"),
    ({"prompt": [-1]}, "prompt[0]", "prompt[0]=-1 must be a token id: an integer from 0 to"),
    ({"prompt": [1, 1.5]}, "prompt[1]", "prompt[1]=1.5 must be a token id"),
    ({"prompt": [1 << 31]}, "prompt[0]", "prompt[0]=2147483648 must be a token id"),
    ({"prompt": [[1, 2], [3, -4]]}, "prompt[1][1]", "prompt[1][1]=-4 must be a token id"),
    ({"prompt": [True]}, "prompt", "prompt must be a text, a list of texts"),
    ({"prompt": [5] * 9000}, "prompt", "prompt has 9000 tokens, must leave room within"),
    ({"prompt": [5] * 64}, "prompt", "prompt has 64 tokens, must leave room within"),
    (
        {"prompt": [5] * 65, "echo": True, "max_tokens": 0},
        "prompt",
        "prompt has 65 tokens, must leave room within",
    ),
    ({"prompt": "\ud800"}, "prompt", "not half of a surrogate pair"),
    ({"prompt": ["a"] * 129}, "n", "n=1 times 129 prompts must be at most 128"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens=0 must go with echo=true"),
    ({"logprobs": 21}, "logprobs", "logprobs=21 must be less than or equal to 20"),
    ({"logprobs": True}, "logprobs", "logprobs=True must be a valid integer"),
    ({"best_of": 2}, "best_of", "best_of=2 must be n=1, or be left out"),
    ({"best_of": 0}, "best_of", "best_of=0 must be greater than or equal to 1"),
    ({"add_special_tokens": False}, "add_special_tokens", "must be True, or be left out"),
    ({"suffix": "x"}, "suffix", "suffix='x' must be '', or be left out"),
    ({"messages": HELLO}, "messages", "must be left out"),
]
PART = {"type": "image_url", "image_url": {"url": "http://a"}}
CHATS = [
    ({"messages": None}, "messages", "messages=None must be a valid list"),
    ({"messages": []}, "messages", "messages=[] must have at least 1 item"),
    ({"messages": [5]}, "messages[0]", "messages[0]=5 must be"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content must be text"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "messages[0].role must be given"),
    (
        {"messages": [*HELLO, {"role": "tool", "content": "a"}]},
        "messages[1].role",
        "messages[1].role='tool' must be 'system', 'developer', 'user' or 'assistant'",
    ),
    (
        {"messages": [{"role": "user", "content": [PART]}]},
        "messages[0].content[0].type",
        "messages[0].content[0].type='image_url' must be 'text'",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "must be given",
    ),
    (
        {"messages": [{"role": "user", "content": 5}]},
        "messages[0].content",
        "must be a text or a list of parts",
    ),
    ({"messages": [{**HELLO[0], "type": "image"}]}, "messages[0].type", "must be 'text'"),
    ({"add_special_tokens": True}, "add_special_tokens", "must be False, or be left out"),
    ({"messages": [{**HELLO[0], "tools": []}]}, "messages[0].tools", "must be left out"),
    ({"messages": [{"role": "user", "content": "a" * 65}]}, "messages", "must leave room within"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens=0 must be greater than or equal to 1"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "must be left out beside"),
    ({"top_logprobs": 2}, "top_logprobs", "top_logprobs must go with logprobs=true"),
    ({"logprobs": 1}, "logprobs", "logprobs=1 must be a valid boolean"),
    ({"echo": True}, "echo", "echo=True must be left out"),
]
TABLE = [
    *((COMPLETIONS, {"prompt": "a"}, *row) for row in BOTH + COMPLETION),
    *((CHAT, {"messages": HELLO}, *row) for row in BOTH + CHATS),
]


@pytest.mark.parametrize(("path", "body", "fields", "param", "sentence"), TABLE)
def test_what_is_not_served_is_refused_by_name(client, path, body, fields, param, sentence):
    asked = len(client.engine.runs)
    # ensure_ascii, which the client's own `json=` does not do, lets half a surrogate through.
    content = json.dumps({**body, **fields})
    headers = {"Content-Type": "application/json"}
    response = client.post(path, content=content, headers=headers)
    ErrorBody.model_validate(response.json())
    error = error_of(response)
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", param)
    assert sentence in error.message
    assert "validation" not in error.message  # which is pydantic's word
    assert len(client.engine.runs) == asked


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "body must be a JSON object"),
        (b"[]", "body must be a JSON object"),
        (b"5", "body must be a JSON object"),
        (b'{"prompt":', "body must be JSON, but is not at character 10"),
        (b"\xff\xfe{", "body must be JSON"),
        (b"[" * 100_000, "body must be JSON in UTF-8, and not nested beyond reason"),
        (b'{"n": ' + b"9" * 5000 + b"}", "body must hold no number beyond reason"),
        (b'{"temperature": NaN}', "temperature=nan must be a finite number"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(client, content, sentence):
    headers = {"Content-Type": "application/json"}
    error = error_of(client.post(COMPLETIONS, content=content, headers=headers))
    assert error.status == 400
    assert error.message.startswith(sentence)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "prompt", [1.5] * 50_000),
        (COMPLETIONS, "prompt", [[1.5]] * 50_000),
        (COMPLETIONS, "stop", [1] * 50_000),
        (CHAT, "messages", [1] * 50_000),
        (CHAT, "messages", [{"role": "user", "content": [1] * 50_000}]),
    ],
)
def test_of_a_long_list_the_first_mistake_is_enough(client, monkeypatch, path, field, value):
    """An error for each item would take a thousand times the body's memory."""
    found, errors = [], RequestValidationError.errors

    def counted(self):
        found.append(len(errors(self)))
        return errors(self)

    monkeypatch.setattr(RequestValidationError, "errors", counted)
    error = error_of(client.post(path, json={"prompt": "a", "messages": HELLO, field: value}))
    assert (error.status, error.param.partition("[")[0]) == (400, field)
    assert len(found) == 1
    assert found[0] < 10


def test_a_list_has_an_end_however_large_a_body_may_be():
    part = {"type": "text", "text": ""}
    with client_of(max_body_bytes=8 << 20) as client:
        for path, fields, param, most in [
            (COMPLETIONS, {"prompt": [5] * ((1 << 20) + 1)}, "prompt", 1 << 20),
            (COMPLETIONS, {"prompt": ["a"] * 65537}, "prompt", 65536),
            (CHAT, {"messages": HELLO * 2049}, "messages", 2048),
            (
                CHAT,
                {"messages": [{"role": "user", "content": [part] * 2049}]},
                "messages[0].content",
                2048,
            ),
        ]:
            error = error_of(client.post(path, json=fields))
            assert (error.status, error.param) == (400, param)
            assert f"must have at most {most} items" in error.message


def test_what_is_not_served_is_not_written_out(monkeypatch):
    """A sentence repeats the beginning of a value; the rest is never made into text."""

    class Counted(dict):
        written = 0

        def __repr__(self):
            Counted.written += 1
            return super().__repr__()

    assert shortened([Counted() for _ in range(100_000)]).startswith("[")
    assert Counted.written < 100
    assert shortened("x" * 1_000_000) == f"'{'x' * 76}..."


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (COMPLETIONS, {"prompt": "a" * 100_000}, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": ["a", "a" * 100_000]}, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": ["a"] * 10_000}, "n", None),
        (COMPLETIONS, {"prompt": [[1]] * 10_000}, "n", None),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 100_000}]}, "messages",
         "context_length_exceeded"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_before_it_is_tokenised(
    client, monkeypatch, path, body, param, code
):
    def never(*_):
        raise AssertionError("tokenised")

    wait_until(lambda: client.serving.state == "ready")
    monkeypatch.setattr(Tokenizer, "encode", never)
    monkeypatch.setattr(Tokenizer, "encode_batch", never)
    error = error_of(client.post(path, json=body))
    assert (error.status, error.param, error.code) == (400, param, code)


def test_a_body_without_its_type_is_refused(client):
    # A page elsewhere can make a browser send that without asking, but not JSON.
    for headers in ({}, {"Content-Type": "text/plain"}):
        response = client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
        assert error_of(response).status == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("GET", "/v1/models/cat", 404, "model_not_found"),
    ],
)
def test_other_paths_and_methods_are_refused(client, method, path, status, code):
    error = error_of(client.request(method, path))
    assert (error.status, error.code) == (status, code)


def test_another_models_name_is_refused(client):
    error = error_of(client.post(CHAT, json={"messages": HELLO, "model": "gpt"}))
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


def test_what_asks_for_nothing_is_let_through(client):
    idle = {
        "presence_penalty": 0,
        "logit_bias": {},
        "tools": [],
        "user": "me",
        "metadata": {"a": "b"},
        "priority": 0,
        "bad_words": [],
        "options": {},
        "spaces_between_special_tokens": True,
        "reasoning_effort": "none",
        "prompt_cache_retention": "24h",
    }
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    message = {"role": "user", "content": [part], "name": "me", "type": "text"}
    body = {"messages": [message], **idle, "service_tier": "auto", "top_logprobs": 0}
    assert client.post(CHAT, json=body).status_code == 200
    body = {"prompt": "a", **idle, "add_special_tokens": True}
    assert client.post(COMPLETIONS, json=body).status_code == 200


def test_the_key_is_required_under_v1_alone():
    with client_of(api_key="secret-1") as client:
        for header in ("", "secret-1", "Bearer", "Bearer secret", "Basic secret-1", "Bearer é"):
            headers = {"Authorization": header.encode()} if header else {}
            error = error_of(client.get("/v1/models", headers=headers))
            assert (error.status, error.code) == (401, "invalid_api_key")
        assert client.post(COMPLETIONS, json={"prompt": "a"}).status_code == 401
        headers = {"Authorization": "Bearer secret-1"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_a_body_past_the_bound_is_refused():
    with client_of(max_body_bytes=100) as client:
        assert client.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
        for content in (b"x" * 101, iter([b"x" * 60, b"x" * 60])):  # announced, and in chunks
            error = error_of(client.post(COMPLETIONS, content=content))
            assert (error.status, error.code) == (413, "body_too_large")


def test_a_body_may_be_as_large_as_what_the_model_reads():
    most = body_limit(64, 4)
    assert most == (1 << 18) + 8 * 64 * 4
    assert body_limit(1_000_000, 128) == 8 << 20
    with client_of(max_choices=4) as client:
        head, tail = b'{"prompt": "a", "user": "', b'"}'
        for size, status in [(most, 200), (most + 1, 413)]:
            content = head + b"x" * (size - len(head) - len(tail)) + tail
            headers = {"Content-Type": "application/json"}
            assert client.post(COMPLETIONS, content=content, headers=headers).status_code == status


def test_a_queue_that_is_full_takes_all_prompts_or_none():
    with client_of(wait, room=3) as client:
        others = client.engine.submit_all([Request(token_ids=(1,), max_new_tokens=1)])
        error = error_of(client.post(COMPLETIONS, json={"prompt": ["a"] * 3}))
        assert (error.status, error.type, error.code) == (429, "rate_limit_error", "queue_full")
        assert client.engine.runs == others
        assert client.serving.idle
        response = client.post(COMPLETIONS, json={"prompt": ["a"] * 3, "stream": True})
        assert response.status_code == 429  # and no stream
        assert response.headers["Retry-After"] == "1"


def test_a_server_is_not_ready_until_its_model_is():
    import threading

    go = threading.Event()
    engine = FakeEngine(say())
    loaded = make_app(engine).state.serving._load

    def slowly():
        go.wait(60)
        return loaded()

    app = make_app(engine, load=slowly)
    with TestClient(app) as client:
        assert client.get("/health").status_code == 503
        assert client.get("/health").json() == {"status": "loading"}
        for response in (client.get("/v1/models"), client.post(COMPLETIONS, json={"prompt": "a"})):
            assert (error_of(response).status, error_of(response).code) == (503, "loading")
        assert client.get("/metrics").status_code == 200
        go.set()
        wait_until(lambda: client.get("/health").status_code == 200)
        assert client.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200


def test_a_model_that_cannot_be_loaded_is_told():
    def fails():
        raise CheckpointError("no model")

    app = make_app(FakeEngine(say()), load=fails)
    with TestClient(app) as client:
        wait_until(lambda: app.state.serving.failure is not None)
        assert client.get("/health").json() == {"status": "failed"}
        assert error_of(client.post(COMPLETIONS, json={"prompt": "a"})).status == 503


def test_a_draining_server_takes_nothing_new():
    with client_of() as client:
        client.serving.drain()
        assert client.get("/health").json() == {"status": "draining"}
        error = error_of(client.post(COMPLETIONS, json={"prompt": "a"}))
        assert (error.status, error.code, error.type) == (503, "draining", "server_error")


def test_an_engine_that_died_makes_the_server_unhealthy():
    with client_of() as client:
        client.engine.alive = False
        assert client.get("/health").status_code == 503
        assert error_of(client.post(COMPLETIONS, json={"prompt": "a"})).code == "failed"


@pytest.mark.parametrize(
    ("reason", "status", "code"), [("error", 500, "engine_error"), ("cancelled", 503, "draining")]
)
def test_a_choice_that_comes_to_no_good_end_is_an_error(reason, status, code):
    def breaks(run):
        run.token(language_model().tokenizer.encode("a")[0])
        run.finish(reason, error="the logits are not finite" if reason == "error" else None)

    with client_of(breaks) as client:
        error = error_of(client.post(COMPLETIONS, json={"prompt": "a"}))
        assert (error.status, error.code) == (status, code)
        body = {"messages": HELLO, "stream": True}
        *_, last = events_of(client.post(CHAT, json=body))
        assert last["error"]["code"] == code
        assert client.serving.idle


def test_a_schema_that_fails_on_the_way_is_the_callers(client):
    said = f"{TOO_COMPLEX} (2100 items): ask for a simpler one"
    client.engine.script = lambda run: run.finish("error", error=said)
    try:
        error = error_of(client.post(COMPLETIONS, json={"prompt": "a"}))
        assert (error.status, error.type) == (400, "invalid_request_error")
        assert (error.param, error.message) == (SCHEMA, said)
        *_, last = events_of(client.post(CHAT, json={"messages": HELLO, "stream": True}))
        assert (last["error"]["param"], last["error"]["message"]) == (SCHEMA, said)
    finally:
        client.engine.script = say()


def test_a_mistake_of_ours_tells_no_more_than_that(client, monkeypatch):
    def breaks(*_):
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr("openmythos.inference.server.completions.of_completion", breaks)
    with TestClient(client.app, raise_server_exceptions=False) as other:
        wait_until(lambda: client.serving.state == "ready")
        error = error_of(other.post(COMPLETIONS, json={"prompt": "a"}))
        assert (error.status, error.type) == (500, "server_error")
        assert "secret" not in error.message
        counted = 'http_requests_total{path="/v1/completions",status="500"} 1.0'
        assert counted in other.get("/metrics").text
