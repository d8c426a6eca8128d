"""The server on the real engine with a small model: what it answers is what the library writes."""

import contextlib
import json
import re
import threading

import pytest
import torch
from fake_engine import error_of, events_of, language_model, wait_until
from starlette.testclient import TestClient
from torch.testing import assert_close
from typecheck import unchecked

from openmythos.cli import serve_command
from openmythos.errors import InputError
from openmythos.inference.chat import ChatLayout
from openmythos.inference.engine import Engine
from openmythos.inference.engine_settings import EngineSettings
from openmythos.inference.passes import layout, page_bytes
from openmythos.inference.server.app import create_app
from openmythos.inference.server.serving import Loaded, Serving
from openmythos.inference.server.settings import ServerSettings

PROMPT = "The mice ran"


@pytest.fixture(autouse=True)
def _no_shape_checks():
    with unchecked():  # the engine's own tests have them
        yield


@pytest.fixture(scope="module")
def lm():
    return language_model()


@pytest.fixture(scope="module")
def client(lm):
    with client_of(lm, 1 << 23) as client:
        yield client


@contextlib.contextmanager
def client_of(lm, cache_bytes):
    engine = Engine(lm, EngineSettings(cache_bytes=cache_bytes))

    def load():
        engine.start()
        return Loaded(
            lm=lm,
            layout=ChatLayout(lm.tokenizer),
            engine=engine,
            max_length=lm.model.config.max_length,
            pages=engine.statistics().pages_total,
        )

    app = create_app(Serving(load, "mouse", ServerSettings()))
    with TestClient(app) as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        client.engine = engine
        yield client


def complete(client, **fields):
    response = client.post("/v1/completions", json={"temperature": 0, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_the_text_is_the_librarys(client, lm):
    thinking = {"loops": 5, "halting": "delta", "threshold": 0.45}
    answer = complete(client, prompt=PROMPT, max_tokens=20, return_loops=True, **thinking)
    pieces = list(lm.stream(PROMPT, max_new_tokens=20, temperature=0, **thinking))
    assert answer["choices"][0]["text"] == "".join(piece.text for piece in pieces)
    loops = [piece.loops for piece in pieces if piece.token_id is not None]
    # The library does not show the token that ends a document, the server counts it.
    assert answer["choices"][0]["loops"][: len(loops)] == loops
    assert answer["usage"]["loops"] == sum(answer["choices"][0]["loops"])


def test_no_events_are_kept_beside_those_that_the_server_reads(client, monkeypatch):
    accepted, submit_all = [], client.engine.submit_all

    def noted(requests):
        accepted.extend(submit_all(requests))
        return accepted

    monkeypatch.setattr(client.engine, "submit_all", noted)
    body = {"prompt": PROMPT, "max_tokens": 4, "stream": True}
    assert events_of(client.post("/v1/completions", json=body))
    with pytest.raises(InputError, match="the events were handed over"):
        list(accepted[0])


def test_a_conversation_is_the_text_that_the_chat_command_writes(client, lm):
    text = lm.generate("Mice.\nThe mice", max_new_tokens=9, temperature=0)
    messages = [{"role": "system", "content": "Mice."}, {"role": "user", "content": "The mice"}]
    body = {"messages": messages, "max_tokens": 9, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == text


def test_the_logprobs_of_a_prompt_are_the_models(client, lm):
    ids = lm.tokenizer.encode("The mice ran up the clock")
    answer = complete(client, prompt=ids, max_tokens=1, echo=True, logprobs=2, loops=4)
    given = answer["choices"][0]["logprobs"]
    with torch.inference_mode():
        logits = lm.model(torch.tensor([ids]), 4).logits[0, :, : lm.tokenizer.vocab_size]
    expected = logits.log_softmax(-1)
    assert given["token_logprobs"][0] is None
    own = expected[torch.arange(len(ids) - 1), ids[1:]]
    assert_close(torch.tensor(given["token_logprobs"][1:-1]), own, atol=1e-4, rtol=1e-4)
    # As lm-eval reads them: a token is greedy where no other of its place is likelier.
    tops = given["top_logprobs"][1:-1]
    likeliest = [max(top, key=top.get) for top in tops]
    greedy = [token == best for token, best in zip(given["tokens"][1:-1], likeliest, strict=True)]
    assert greedy == (expected[:-1].argmax(-1) == torch.tensor(ids[1:])).tolist()


def test_a_seed_repeats_and_choices_differ(client):
    fields = {"prompt": PROMPT, "max_tokens": 16, "temperature": 2.0, "n": 2}
    first, again, other = (
        [c["text"] for c in complete(client, **fields, seed=seed)["choices"]] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first[0] != first[1]


def test_a_reply_of_a_schema_obeys_it(client):
    schema = {
        "type": "object",
        "properties": {"mice": {"enum": [1, 2]}, "ran": {"type": "boolean"}},
        "required": ["mice", "ran"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "mice", "schema": schema}}
    fields = {"prompt": "a", "max_tokens": 40, "n": 4, "temperature": 2, "seed": 0}
    for choice in complete(client, response_format=form, **fields)["choices"]:
        value = json.loads(choice["text"])
        assert value["mice"] in (1, 2)
        assert isinstance(value["ran"], bool)
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"halting": "gate", "threshold": 2}, "threshold", "threshold=2.0 must be above 0"),
        ({"threshold": 0.5}, "threshold", "threshold=0.5 must be left out with halting='none'"),
        ({"halting": "act"}, "halting", "halting='act' needs a model trained with it"),
        ({"n": 65}, "n", "n=65 must be at most 64, the rows of a tick"),
        ({"draft_loops": 3, "loops": 3}, "draft_loops", "draft_loops=3 must be below loops=3"),
    ],
)
def test_what_the_model_cannot_do_is_refused_in_the_apis_words(client, fields, param, sentence):
    error = error_of(client.post("/v1/completions", json={"prompt": "a", **fields}))
    assert (error.status, error.param) == (400, param)
    assert error.message.startswith(sentence)


def test_a_schema_that_is_too_complex_on_the_way_is_refused(client):
    lists = [{"type": "array", "minItems": n, "items": {"type": "string"}} for n in range(900)]
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"anyOf": lists}}}
    body = {"prompt": "a", "response_format": form, "loops": 1}
    error = error_of(client.post("/v1/completions", json=body))
    assert (error.status, error.param) == (400, "response_format.json_schema.schema")
    assert error.message.startswith("schema is too complex to be kept")


def test_drafts_give_the_text_of_the_full_depth(client):
    fields = {"prompt": PROMPT, "max_tokens": 12, "loops": 5, "seed": 3, "temperature": 1}
    plain, drafted = complete(client, **fields), complete(client, **fields, draft_loops=2)
    assert drafted["choices"] == plain["choices"]
    done, page = client.engine.statistics().done, client.get("/metrics").text
    assert 0 < done.accepted_tokens <= done.drafted_tokens
    for name, count in (("draft", done.drafted_tokens), ("accepted", done.accepted_tokens)):
        counted = rf"openmythos:spec_decode_num_{name}_tokens_total{{.*}} {float(count)}$"
        assert re.search(counted, page, re.M)


def test_a_reply_without_a_limit_is_fitted_to_the_pages_there_are(lm):
    columns, loops, n = 2, 6, 3
    pages = n * layout(lm.model, loops, "per_loop").pages(2, columns * 16 - 2)  # and their tables
    messages = {"messages": [{"role": "user", "content": "a"}], "loops": loops, "n": n}
    with client_of(lm, pages * page_bytes(lm.model)) as client:
        body = {**messages, "ignore_eos": True}
        answer = client.post("/v1/chat/completions", json=body).json()
        # Of the two columns of 16 positions the prompt has 2; the last token never enters the core.
        assert answer["usage"]["completion_tokens"] == n * (columns * 16 - 2 + 1)
        error = error_of(client.post("/v1/chat/completions", json={**body, "max_tokens": 32}))
        assert (error.status, error.param) == (400, "max_tokens")
        assert "max_tokens=32 with loops=6 and n=3" in error.message
        assert "--cache-bytes" in error.message
        error = error_of(client.post("/v1/chat/completions", json={**body, "loops": 60}))
        assert (error.status, error.param) == (400, "loops")
        assert error.message.startswith("loops=60 and n=3 after a prompt of 2 tokens needs")
        text = {"prompt": "a", "loops": loops, "n": n, "ignore_eos": True, "max_tokens": None}
        assert complete(client, **text)["usage"]["completion_tokens"] == n * 16


def test_the_command_says_how_many_pages_there_are():
    loaded = serve_command._load(serve_command.Settings())
    try:
        assert loaded.pages == loaded.engine.statistics().pages_total > 0
    finally:
        loaded.engine.stop()


def test_many_clients_at_once_get_the_texts_they_get_alone(client):
    bodies = [
        {"prompt": PROMPT[: 3 + n], "max_tokens": 12, "loops": 1 + n % 5, "seed": n, "n": 1 + n % 2}
        for n in range(10)
    ]
    alone = [[c["text"] for c in complete(client, **body)["choices"]] for body in bodies]
    together = [None] * len(bodies)

    def ask(number):
        body = {**bodies[number], "stream": True, "temperature": 0}
        chunks = events_of(client.post("/v1/completions", json=body))
        texts = [""] * bodies[number]["n"]
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            texts[choice["index"]] += choice["text"]
        together[number] = texts

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    wait_until(lambda: client.engine.statistics().pages_used == 0)
