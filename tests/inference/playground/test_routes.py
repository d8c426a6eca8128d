"""The playground's routes: what the page is told, and what is refused."""

import asyncio
import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_engine import SAID, client_of, error_of, events_of, language_model, say, wait_until
from fastapi.exceptions import RequestValidationError
from tiny import tiny

from openmythos.inference.playground import routes
from openmythos.inference.playground.lens import Unwanted, look
from openmythos.inference.playground.routes import STATIC, Turns, playground
from openmythos.inference.reasoner import Reasoner
from openmythos.inference.server.errors import unavailable
from openmythos.inference.thinking import Thinking
from openmythos.model.halting import HALTING
from openmythos.model.transformer import OpenMythos
from openmythos.tasks.rooms import HOUSE, ROOMS, read_walk

BASE = "/v1/playground"


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "walker"
    model = tiny(vocab_size=HOUSE.vocab_size, experts=0, max_length=40)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(reasoner):
    with client_of(routers=[playground(reasoner)], static=STATIC) as client:
        yield client


def post(client, path, **body):
    response = client.post(f"{BASE}/{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_ids():
    tokenizer = language_model().tokenizer
    return [tokenizer.end_id, *tokenizer.encode("The mice ran")]


def test_the_page_and_its_parts_are_served_and_name_nothing_elsewhere(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.text
    named = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert {"app.js", "style.css", "vendor/uPlot.iife.min.js"} <= set(named)
    for name in named:
        assert client.get(f"/{name}").status_code == 200, name
    for file in Path(STATIC).glob("*.*"):
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, f"{file.name} names another place"
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write", text), file.name
        assert not re.search(r' (?:style|onclick)="', text), f"{file.name}: forbidden by its policy"
        for module in re.findall(r'from "\./([^"]+)"', text):
            assert (STATIC / module).is_file()
    assert (STATIC / "vendor" / "uPlot.LICENSE").read_text().startswith("The MIT License")
    assert client.get("/routes.py").status_code == 404


def test_the_page_learns_what_the_model_can_do(client):
    info = client.get(f"{BASE}/info").json()
    config = language_model().model.config
    assert (info["model"], info["mean_loops"], info["max_loops"]) == ("mouse", 3, 64)
    assert (info["core_layers"], info["experts"]) == (config.core_layers, config.experts)
    rules = {rule["name"]: rule for rule in info["rules"]}
    assert list(rules) == [name for name in HALTING if name != "act"]  # it did not learn that one
    assert rules["delta"]["threshold"] == pytest.approx(0.03)
    assert info["reasoner"]["missing"] is None
    assert info["reasoner"]["rooms"] == list(ROOMS)


def fires(model):
    return {rule["name"]: rule["fires"] for rule in routes.rules(model)}


def test_a_gate_that_learned_nothing_is_told_from_one_that_can_fire():
    model = tiny(learned_act=True, spread=0)
    learned = model.core.learned_exits()
    assert fires(model) == {name: name not in learned for name in HALTING}
    with torch.no_grad():
        model.core.gate.weight[0] = 1
    assert fires(model)["gate"]


def test_a_stream_is_described_as_nothing_else(client):
    described = client.get("/openapi.json").json()["paths"][f"{BASE}/stream"]["post"]
    assert set(described["responses"]["200"]["content"]) == {"text/event-stream"}


def test_a_stream_tells_each_token_with_its_loops_and_loss(client):
    body = {"prompt": "The mice ran", "max_tokens": 40, "loops": 5, "halting": "delta"}
    *chunks, last = events_of(client.post(f"{BASE}/stream", json=body))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [token["id"] for token in choices[0]["prompt"]] == prompt_ids()
    assert "".join(token["text"] for token in choices[0]["prompt"]) == "The mice ran"
    tokens = [token for choice in choices[1:] for token in choice["tokens"]]
    tokenizer = language_model().tokenizer
    assert [token["id"] for token in tokens] == [*tokenizer.encode(SAID), tokenizer.end_id]
    assert {(token["loops"], token["loss"]) for token in tokens} == {(3, 0.5)}
    assert "".join(token["text"] for token in tokens) == SAID
    assert choices[-1]["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == len(tokens)
    asked = client.engine.runs[-1].request.thinking
    assert (asked.loops, asked.halting) == (5, "delta")


def test_text_that_was_held_back_comes_at_the_end():
    with client_of(say("mice ru"), routers=[playground("none")]) as client:
        body = {"prompt": "a", "max_tokens": 40, "stop": "run"}
        chunks = events_of(client.post(f"{BASE}/stream", json=body))
    choices = [choice for chunk in chunks for choice in chunk["choices"]][1:]
    text = "".join(token["text"] for choice in choices for token in choice["tokens"])
    assert text + "".join(choice["rest"] for choice in choices) == "mice ru"
    assert choices[-1]["rest"] == "ru"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"prompt": "a", "n": 2}, "prompt must be one text, and n and echo be left out"),
        ({"prompt": [1, 2]}, "prompt must be one text"),
        ({"prompt": ["a"]}, "prompt must be one text"),
        ({"prompt": "a", "loops": 65}, "loops=65 must be at most 64"),
        ({"prompt": "a", "tool_choice": "any"}, "tool_choice='any' must be 'none' or 'auto'"),
    ],
)
def test_a_stream_that_cannot_be_is_refused_before_it_begins(client, body, sentence):
    error = error_of(client.post(f"{BASE}/stream", json=body))
    assert (error.status, error.message[: len(sentence)]) == (400, sentence)


def test_a_look_inside_is_the_lens_in_json(client):
    lm, ids = language_model(), prompt_ids()
    body = {"loops": 5, "halting": "delta", "threshold": 0.45, "top": 3}
    seen = post(client, "lens", token_ids=ids, first=1, **body)
    with torch.no_grad():
        out = lm.model(torch.tensor([ids]), 5, halting="delta", threshold=0.45, return_routing=True)
    logprobs = out.logits[0, :, : lm.tokenizer.vocab_size].log_softmax(-1)
    assert seen["first"] == 1
    assert [place["loops"] for place in seen["places"]] == out.loops[0, 1:].tolist()
    for number, place in enumerate(seen["places"], start=1):
        last = place["rows"][-1]
        assert len(place["rows"]) == place["loops"]
        following = ids[number + 1] if number + 1 < len(ids) else None
        if following is None:
            assert last["loss"] is None
        else:
            assert last["loss"] == pytest.approx(-float(logprobs[number, following]), abs=1e-4)
        assert last["top"][0][0] == int(logprobs[number].argmax())
        assert len(last["top"]) == 3
        for loop, row in enumerate(place["rows"]):
            assert row["experts"] == out.routing[loop, :, 0, number].tolist()
            for token, p in row["top"]:
                assert str(token) in seen["names"]
                assert 0 <= p <= 1


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"token_ids": []}, "token_ids must hold at least one token id"),
        ({"token_ids": [0] * 65}, "token_ids holds 65 tokens, must hold at most 64"),
        ({"token_ids": [0, 290]}, "token_ids holds 290, must hold ids below vocab_size="),
        ({"token_ids": [0, -1]}, "token_ids[1]=-1 must be a token id: an integer from 0 to"),
        ({"token_ids": [0], "first": 1}, "first=1 must be below the 1 tokens"),
        ({"token_ids": [0], "top": 11}, "top=11 must be less than or equal to 10"),
        ({"token_ids": [0], "loops": 65}, "loops=65 must be at most 64"),
        ({"token_ids": [0], "loops": 0}, "loops=0 must be greater than or equal to 1"),
        ({"token_ids": [0], "threshold": 0.1}, "threshold=0.1 must be left out with halting="),
        ({"token_ids": [0], "halting": "act"}, "halting='act' needs a model trained with it"),
        ({"token_ids": [0], "depth": 3}, "depth=3 must be left out"),
    ],
)
def test_what_the_lens_cannot_show_is_refused(client, body, sentence):
    error = error_of(client.post(f"{BASE}/lens", json=body))
    assert (error.status, error.message[: len(sentence)]) == (400, sentence)


def test_a_long_list_of_wrong_ids_is_refused_at_the_first(client, monkeypatch):
    """An error for each item would hold up everybody for half a minute."""
    found, errors = [], RequestValidationError.errors

    def counted(self):
        found.append(len(errors(self)))
        return errors(self)

    monkeypatch.setattr(RequestValidationError, "errors", counted)
    error = error_of(client.post(f"{BASE}/lens", json={"token_ids": [-1] * 30_000}))
    assert (error.status, error.param) == (400, "token_ids[0]")
    assert found == [1]


def test_the_work_of_a_look_is_bounded_however_little_is_shown(client, monkeypatch):
    monkeypatch.setattr(routes, "MOST_RUN", 28)
    body = {"token_ids": [0] * 9, "first": 8}
    error = error_of(client.post(f"{BASE}/lens", json={**body, "loops": 4}))
    assert error.param == "loops"
    assert error.message.startswith("loops=4 with 9 tokens must be at most 3: ask for fewer")
    assert len(post(client, "lens", **body, loops=3)["places"]) == 1


def test_without_loops_a_look_takes_the_mean_or_as_many_as_are_allowed():
    with client_of(routers=[playground("nowhere")], max_loops=2) as client:
        (place,) = post(client, "lens", token_ids=[0])["places"]
        assert (place["loops"], language_model().model.config.mean_loops) == (2, 3)


def in_turns(server, visitors):
    """Give each visitor's work its turn; return what it said, or its error."""

    async def main():
        turns = Turns()
        return await asyncio.gather(
            *(turns.take(work, server, http) for work, http in visitors), return_exceptions=True
        )

    return asyncio.run(main())


class Visitor:
    """A client that goes once it is told to."""

    def __init__(self):
        self.went = threading.Event()

    async def is_disconnected(self):
        return self.went.is_set()

    async def receive(self):
        while not self.went.is_set():
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}


def test_work_that_nobody_waits_for_makes_way_for_the_next():
    def forever(unwanted):
        gone.went.set()
        look(language_model(), [0], thinking=Thinking(), top=1, unwanted=waiting(unwanted))

    gone, server = Visitor(), SimpleNamespace(given_up=False)
    error, said = in_turns(server, [(forever, gone), (lambda _: "next", Visitor())])
    assert (error.status, said) == (499, "next")


def waiting(unwanted):
    """Ask until it is so, as a look of a thousand loops would."""

    def asked():
        wait_until(unwanted)
        return True

    return asked


def test_looks_end_when_the_server_has_no_time_left():
    def forever(unwanted):
        server.given_up = True
        look(language_model(), [0], thinking=Thinking(), top=1, unwanted=waiting(unwanted))

    server = SimpleNamespace(given_up=False, unavailable=lambda: unavailable("stopped", "draining"))
    errors = in_turns(server, [(forever, Visitor()), (forever, Visitor())])
    assert [(error.status, error.code) for error in errors] == [(503, "draining")] * 2


def test_a_look_asks_before_each_loop_whether_it_is_wanted(monkeypatch):
    asked, places, readout = [], [], OpenMythos.readout

    def counted(self, y):
        places.append(y.shape[:-1].numel())
        return readout(self, y)

    monkeypatch.setattr(OpenMythos, "readout", counted)
    lm, how = language_model(), {"thinking": Thinking(loops=3), "top": 1, "first": 4}
    look(lm, [0] * 6, **how, unwanted=lambda: bool(asked.append(1)))
    assert len(asked) == 1 + 3
    assert places == [6, 2, 2, 2]  # the call's own, and then what is shown
    with pytest.raises(Unwanted):
        look(lm, [0] * 6, **how, unwanted=lambda: True)
    assert len(places) == 4


def test_an_answer_of_the_lens_is_bounded(client, monkeypatch):
    monkeypatch.setattr(routes, "MOST_SHOWN", 12)
    body = {"token_ids": [0] * 9, "loops": 3}
    error = error_of(client.post(f"{BASE}/lens", json=body))
    assert error.message == ("first=0 with loops=3 must leave at most 4 of 9 places: raise it to 5")
    assert len(post(client, "lens", **body, first=5)["places"]) == 4


def test_a_walk_is_solved_as_the_reasoner_solves_it(client, reasoner):
    walk = "library red green wait gold"
    told = post(client, "walk", walk=walk, loops=4, halting="delta", threshold=0.9)
    own = Reasoner(type(language_model().model).from_pretrained(reasoner))
    trace = own.solve(read_walk(walk), Thinking(loops=4, halting="delta", threshold=0.9))
    assert told["walk"] == walk.split()
    assert told["beliefs"] == trace.beliefs.tolist()
    assert told["truth"] == HOUSE.follow(read_walk(walk)).answers[0].tolist()
    assert told["stopped"] == trace.stopped.tolist()
    assert told["hops"] == [0, 1, 2, 2, 3]
    assert told["solved"] == trace.solved


def test_a_walk_is_drawn_by_its_seed(client):
    drawn = [post(client, "walk", hops=5, waits=2, seed=seed)["walk"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0].count("wait") == 2
    assert len(drawn[0]) == 8
    wanted = HOUSE.chains(np.random.default_rng(1), 1, 5, 7).token_ids
    assert (read_walk(" ".join(drawn[0])) == wanted).all()
    assert len(post(client, "walk")["walk"]) == 13


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"walk": "library puce"}, "walk has the word 'puce', must have rooms and doors"),
        ({"walk": ""}, "walk begins with '', must begin in a room"),
        ({"walk": "library", "hops": 3}, "walk must be left out with hops or waits"),
        ({"walk": "hall" + " red" * 128}, "walk has 129 words, must have at most 128"),
        ({"walk": "hall" + " red" * 50}, "walk has 51 words, and must have at most max_length"),
        ({"hops": 128}, "hops=128 must be less than 128"),
        ({"hops": 100, "waits": 50}, "walk has 151 words, must have at most 128"),
        ({"loops": 257}, "loops=257 must be less than or equal to 256"),
        ({"halting": "act"}, "halting='act' needs a model trained with it"),
        ({"rooms": 3}, "rooms=3 must be left out"),
    ],
)
def test_what_is_no_walk_is_refused(client, body, sentence):
    error = error_of(client.post(f"{BASE}/walk", json=body))
    assert (error.status, error.message[: len(sentence)]) == (400, sentence)


def test_an_installation_without_a_reasoner_says_so():
    with client_of(routers=[playground("nowhere")]) as client:
        assert client.get(f"{BASE}/info").json()["reasoner"]["missing"] == "nowhere"
        error = error_of(client.post(f"{BASE}/walk", json={}))
        assert (error.status, error.code) == (404, "no_reasoner")
        assert error.message.startswith("model='nowhere' must be a model's folder")


def test_the_key_guards_the_routes_and_not_the_page():
    routers = [playground("nowhere")]
    with client_of(routers=routers, static=STATIC, api_key="mouse") as client:
        assert client.get("/").status_code == client.get("/app.js").status_code == 200
        for path in ("info", "stream", "lens", "walk"):
            method = "GET" if path == "info" else "POST"
            refused = client.request(method, f"{BASE}/{path}", json={"token_ids": [0]})
            assert refused.status_code == 401, path
            assert json.loads(refused.text)["error"]["code"] == "invalid_api_key"
        headers = {"Authorization": "Bearer mouse"}
        assert client.get(f"{BASE}/info", headers=headers).status_code == 200
