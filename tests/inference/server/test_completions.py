"""`/v1/completions`: the forms of a prompt, of an answer and of its chunks."""

import threading

import pytest
from fake_engine import SAID, client_of, error_of, events_of, language_model, wait_until

from openmythos.inference.server import answers, room
from openmythos.inference.server.logprobs import LogprobLists
from openmythos.inference.server.schemas import Completion
from openmythos.inference.thinking import Thinking

TEXT = "The mice ran"


@pytest.fixture(scope="module")
def client():
    with client_of() as client:
        yield client


@pytest.fixture
def tokenizer():
    return language_model().tokenizer


def complete(client, **fields):
    response = client.post("/v1/completions", json={"max_tokens": 40, **fields})
    assert response.status_code == 200, response.text
    Completion.model_validate(response.json())
    return response.json()


def stream(client, **fields):
    body = {"max_tokens": 40, "stream": True, **fields}
    return events_of(client.post("/v1/completions", json=body))


def test_an_answer_has_the_text_its_end_and_its_usage(client, tokenizer):
    answer = complete(client, prompt=TEXT, model="mouse")
    made, read = len(tokenizer.encode(SAID)) + 1, len(tokenizer.encode(TEXT)) + 1
    choice = {"index": 0, "text": SAID, "logprobs": None, "finish_reason": "stop"}
    assert answer["choices"] == [choice]
    assert answer["object"] == "text_completion"
    assert answer["model"] == "mouse"
    assert answer["usage"] == {
        "prompt_tokens": read,
        "completion_tokens": made,
        "total_tokens": read + made,
        "prompt_tokens_details": {"cached_tokens": 1},
        "loops": 3 * made,
        "mean_loops": 3.0,
    }


def test_every_form_of_a_prompt_reaches_the_engine(client, tokenizer):
    end, ids = tokenizer.end_id, tokenizer.encode(TEXT)
    for prompt, expected in [
        (TEXT, [[end, *ids]]),
        ("", [[end]]),
        (None, [[end]]),
        ([TEXT, "a"], [[end, *ids], [end, *tokenizer.encode("a")]]),
        (ids, [ids]),
        ([ids, [7]], [ids, [7]]),
    ]:
        client.engine.runs.clear()
        answer = complete(client, prompt=prompt)
        assert [list(run.request.token_ids) for run in client.engine.runs] == expected
        assert [choice["text"] for choice in answer["choices"]] == [SAID] * len(expected)


def test_the_choices_of_several_prompts_are_numbered_through(client):
    answer = complete(client, prompt=["a", "bc"], n=3)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    usage = answer["usage"]
    assert usage["prompt_tokens"] == sum(len(r.request.token_ids) for r in client.engine.runs[-2:])
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}  # one of each prompt, read once
    assert usage["completion_tokens"] == 6 * (len(language_model().tokenizer.encode(SAID)) + 1)


def test_fields_become_the_engines(client):
    complete(
        client,
        prompt="a",
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        seed=12,
        stop="zz",
        n=2,
        loops=5,
        halting="delta",
        threshold=0.25,
        cache_policy="last",
        ignore_eos=True,
    )
    request = client.engine.runs[-1].request
    assert (request.max_new_tokens, request.choices, request.stop) == (7, 2, ("zz",))
    assert not request.stop_at_end
    sampling, thinking = request.sampling, request.thinking
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 0)
    assert (sampling.min_p, sampling.seed) == (0.1, 12)
    assert (thinking.loops, thinking.halting, thinking.threshold) == (5, "delta", 0.25)
    assert thinking.cache_policy == "last"


def test_what_the_engine_calls_otherwise_becomes_its_own(client):
    complete(client, prompt="a", draft_loops=2, priority=-3)
    request = client.engine.runs[-1].request
    assert (request.draft_loops, request.priority) == (2, 3)  # lower is earlier here, as in vLLM
    complete(client, prompt="a", priority=None, seed=None)
    request = client.engine.runs[-1].request
    assert (request.draft_loops, request.priority, request.sampling.seed) == (None, 0, None)
    for seed, taken in [(5, 5), (-1, 2**63 - 1), (-(2**63), 0), (2**63 - 1, 2**63 - 1)]:
        complete(client, prompt="a", seed=seed)
        assert client.engine.runs[-1].request.sampling.seed == taken


def test_null_means_the_default(client):
    nothing = dict.fromkeys(["temperature", "top_p", "n", "stop", "seed", "max_tokens", "stream"])
    complete(client, prompt="a", **nothing, loops=None, halting=None, user=None, anything=None)
    request = client.engine.runs[-1].request
    assert request.sampling.temperature == request.sampling.top_p == 1
    assert (request.max_new_tokens, request.choices) == (16, 1)
    assert request.thinking == Thinking()


@pytest.mark.parametrize("named", [{}, {"max_tokens": None}])
def test_the_usual_length_is_cut_where_less_fits(client, named):
    for prompt, most in [([5] * 60, 4), ([5], 16)]:
        response = client.post("/v1/completions", json={"prompt": prompt, **named})
        assert response.status_code == 200, response.text
        assert client.engine.runs[-1].request.max_new_tokens == most


def test_without_loops_there_are_as_many_as_the_model_has_and_the_server_allows(client):
    complete(client, prompt="a")
    assert client.engine.runs[-1].request.thinking == Thinking()
    with client_of(max_loops=2) as other:
        complete(other, prompt="a")
        assert other.engine.runs[-1].request.thinking == Thinking(loops=2)
        body = {"messages": [{"role": "user", "content": "a"}]}
        assert other.post("/v1/chat/completions", json=body).status_code == 200
        assert other.engine.runs[-1].request.thinking == Thinking(loops=2)


@pytest.mark.parametrize("n", [1, 2])
def test_chunks_join_to_the_whole(client, n):
    whole = complete(client, prompt=["a", "b"], n=n, logprobs=1)
    chunks = stream(client, prompt=["a", "b"], n=n, logprobs=1)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    for expected in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["stop"]
        assert parts[-1]["finish_reason"] == "stop"
        for name, values in expected["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values


def test_usage_is_the_last_chunk_where_it_is_wanted(client):
    *chunks, last = stream(client, prompt="a", stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == complete(client, prompt="a")["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert all("usage" not in chunk for chunk in stream(client, prompt="a"))


def test_usage_so_far_is_in_every_chunk_where_that_is_wanted(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = stream(client, prompt="a", stream_options=options)
    so_far = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert so_far == sorted(so_far)
    assert so_far[-1] == last["usage"]["completion_tokens"] > 0
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {last["usage"]["prompt_tokens"]}
    alone = stream(client, prompt="a", stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in alone)


def test_logprobs_are_four_lists_with_the_token_drawn_among_the_likeliest(client, tokenizer):
    given = complete(client, prompt="a", logprobs=2)["choices"][0]["logprobs"]
    ids = [*tokenizer.encode(SAID), tokenizer.end_id]
    assert len(given["tokens"]) == len(ids)
    assert given["token_logprobs"] == [-0.5] * len(ids)
    assert given["tokens"][0] == "The"
    assert given["top_logprobs"][0] == {"The": -0.5, tokenizer.decode([1]): -3.0}
    none = complete(client, prompt="a", logprobs=0)["choices"][0]["logprobs"]
    assert none["top_logprobs"][0] == {"The": -0.5}


def test_offsets_are_characters_of_the_text_and_parts_of_characters_are_bytes(client):
    given = complete(client, prompt="a", logprobs=0)["choices"][0]["logprobs"]
    assert given["text_offset"][0] == 0
    for token, offset in zip(given["tokens"], given["text_offset"], strict=True):
        assert "\ufffd" not in token
        if not token.startswith("bytes:") and token != "<|end|>":
            assert SAID[offset:].startswith(token)
    assert any(token.startswith("bytes:\\x") for token in given["tokens"])  # of the dash


@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_gives_the_prompt_back_with_its_logprobs(client, tokenizer, as_ids):
    ids = tokenizer.encode(TEXT)
    fields = {"prompt": [ids] if as_ids else TEXT, "echo": True, "logprobs": 1}
    choice = complete(client, **fields)["choices"][0]
    assert choice["text"] == TEXT + SAID
    given = choice["logprobs"]
    assert given["tokens"][: len(ids)] == [tokenizer.decode([token]) for token in ids]
    # The engine's -1, -2, ... for the tokens after the first. Before a text stands the mark that
    # starts a document, so its first token has a probability; token ids begin with nothing.
    places = [float(-place) for place in range(1, len(ids) + 1)]
    expected = [None, *places[:-1]] if as_ids else places
    assert given["token_logprobs"][: len(ids)] == expected
    assert (given["top_logprobs"][0] is None) == as_ids
    assert given["text_offset"][len(ids)] == len(TEXT)
    joined = stream(client, **fields)
    assert "".join(chunk["choices"][0]["text"] for chunk in joined) == TEXT + SAID
    assert joined[0]["choices"][0]["text"].startswith(TEXT)


@pytest.mark.parametrize("streams", [False, True])
def test_a_prompt_is_formatted_once_for_all_its_choices_and_not_on_the_event_loop(
    client, monkeypatch, streams
):
    added, threads, add = [], set(), LogprobLists.add

    def counted(self, token_id, logprob, top):
        added.append(token_id)
        threads.add(threading.current_thread().name)
        add(self, token_id, logprob, top)

    ids = [5, 6, 7]
    monkeypatch.setattr(LogprobLists, "add", counted)
    fields = {"prompt": [ids, ids], "n": 4, "echo": True, "logprobs": 1, "max_tokens": 0}
    if streams:
        choices = [chunk["choices"][0] for chunk in stream(client, **fields)]
        choices = [choice for choice in choices if choice["logprobs"]["tokens"]]
    else:
        choices = complete(client, **fields)["choices"]
    assert added == ids * 2
    assert threads == {"AnyIO worker thread"}
    assert len(choices) == 8
    assert all(choice["logprobs"] == choices[0]["logprobs"] for choice in choices)


def test_an_answer_is_written_where_nobody_waits_for_it(client, monkeypatch):
    threads, written = [], answers.json_text

    def noted(content):
        threads.append(threading.current_thread().name)
        return written(content)

    monkeypatch.setattr(answers, "json_text", noted)
    complete(client, prompt="a", n=2)
    assert set(threads) == {"AnyIO worker thread"}
    assert len(threads) == 3  # each choice by itself, or one call would hold up the others


def test_log_probabilities_of_one_answer_have_a_bound(client):
    most = room.ANSWER_LOGPROBS // (2 * 64 * 21)  # as many positions
    fields = {"echo": True, "logprobs": 20, "n": 64, "max_tokens": 0}
    with client_of(max_length=1024) as other:
        assert complete(other, prompt=[[5] * most, [5] * most], **fields)["choices"]
        body = {"prompt": [[5] * (most + 1)] * 2, **fields}
        asked = len(other.engine.runs)
        error = error_of(other.post("/v1/completions", json=body))
        assert (error.status, error.param) == (400, "logprobs")
        assert error.message == (
            f"logprobs=20 with n=64 would give {64 * 21 * 2 * (most + 1)} log-probabilities, must "
            f"give at most {room.ANSWER_LOGPROBS} in one answer: ask for less of logprobs, n, "
            "max_tokens, prompt with echo"
        )
        assert len(other.engine.runs) == asked
        assert other.post("/v1/completions", json={**body, "stream": True}).status_code == 400
        body = {"prompt": "a", "max_tokens": 1000, "n": 64, "logprobs": 5}
        assert error_of(other.post("/v1/completions", json=body)).param == "logprobs"
        assert stream(other, **body)  # whose tokens go out as they come


def test_echo_without_logprobs_asks_for_none(client):
    assert complete(client, prompt=TEXT, echo=True)["choices"][0]["text"] == TEXT + SAID
    assert not client.engine.runs[-1].request.prompt_logprobs
    assert stream(client, prompt=TEXT, echo=True)[0]["choices"][0]["text"] == TEXT


def test_a_prompt_alone_can_be_measured(client, tokenizer):
    fields = {"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = complete(client, **fields)
    choice, ids = answer["choices"][0], tokenizer.encode(TEXT)
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert choice["logprobs"]["token_logprobs"] == [-float(n) for n in range(1, len(ids) + 1)]
    assert answer["usage"]["completion_tokens"] == answer["usage"]["loops"] == 0
    assert answer["usage"]["mean_loops"] is None
    chunks = stream(client, **fields)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT


def test_loops_of_each_token_are_given_where_they_are_wanted(client, tokenizer):
    choice = complete(client, prompt="a", return_loops=True)["choices"][0]
    assert choice["loops"] == [3] * (len(tokenizer.encode(SAID)) + 1)
    chunks = stream(client, prompt="a", return_loops=True)
    loops = [n for chunk in chunks for n in chunk["choices"][0]["loops"]]
    assert loops == choice["loops"]


def test_a_stop_string_over_token_boundaries_never_shows(client):
    for stop, text in [("e mic", "Th"), (["zz", "run"], SAID), (["☃", "clock —"], SAID[:20])]:
        body = {"prompt": "a", "stop": stop}
        assert complete(client, **body)["choices"][0]["text"] == text
        assert "".join(c["choices"][0]["text"] for c in stream(client, **body)) == text


def test_every_request_is_closed(client):
    complete(client, prompt="a")
    stream(client, prompt="a")
    wait_until(lambda: client.serving.idle)


def test_a_character_split_between_prompt_and_text_is_whole():
    tokenizer = language_model().tokenizer
    first, second = (
        next(t for t in range(257) if tokenizer.decode_bytes([t]) == byte)
        for byte in (b"\xc3", b"\xa9")
    )

    def rest(run):
        for token in (second, tokenizer.encode("a")[0], tokenizer.end_id):
            run.token(token)

    with client_of(rest) as client:
        ids = [*tokenizer.encode("caf"), first]
        whole = complete(client, prompt=ids, echo=True)["choices"][0]["text"]
        assert whole == "caféa"
        chunks = stream(client, prompt=ids, echo=True)
        assert "".join(c["choices"][0]["text"] for c in chunks) == whole
        assert complete(client, prompt=ids)["choices"][0]["text"] == "éa"
        alone = {"prompt": ids, "echo": True, "max_tokens": 0}
        client.engine.script = lambda run: run.finish("length")
        assert complete(client, **alone)["choices"][0]["text"] == "caf\ufffd"


def test_offsets_go_on_within_a_character_that_the_prompt_began():
    tokenizer = language_model().tokenizer
    snow, man, a = (
        [next(t for t in range(257) if tokenizer.decode_bytes([t]) == bytes([b])) for b in part]
        for part in (b"\xe2", b"\x98\x83", b"a")
    )

    def rest(run):
        for token in (*man, *a, tokenizer.end_id):
            run.token(token)

    with client_of(rest) as client:
        for echo, begin in [(False, 0), (True, 1)]:
            fields = {"prompt": [*a, *snow], "echo": echo}
            choice = complete(client, **fields, logprobs=None)["choices"][0]
            assert choice["text"] == "a☃a"[1 - begin :]
            client.engine.script = with_prompt(rest) if echo else rest
            given = complete(client, **fields, logprobs=0)["choices"][0]["logprobs"]
            assert given["text_offset"][-4:] == [begin, begin, begin + 1, begin + 2]


def with_prompt(script):
    def both(run):
        run.prompt()
        script(run)

    return both


def test_a_lone_byte_and_nothing_else_is_replaced():
    def half(run):
        tokenizer = language_model().tokenizer
        first = next(t for t in range(257) if tokenizer.decode_bytes([t]) == b"\xc3")
        for token in (first, tokenizer.encode("a")[0], first, tokenizer.end_id):
            run.token(token)

    with client_of(half) as client:
        assert complete(client, prompt="a")["choices"][0]["text"] == "\ufffda\ufffd"
