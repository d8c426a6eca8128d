"""`/v1/chat/completions`: conversations, replies and their chunks."""

import pytest
from fake_engine import SAID, client_of, error_of, events_of, language_model

from openmythos.inference.server.room import ANSWER_LOGPROBS
from openmythos.inference.server.schemas import ChatCompletion

HELLO = [{"role": "user", "content": "The mice"}]


@pytest.fixture(scope="module")
def client():
    with client_of() as client:
        yield client


def chat(client, messages=HELLO, **fields):
    body = {"max_tokens": 40, "messages": messages, **fields}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate(response.json())
    return response.json()


def stream(client, **fields):
    body = {"max_tokens": 40, "messages": HELLO, "stream": True, **fields}
    return events_of(client.post("/v1/chat/completions", json=body))


def asked(client):
    request = client.engine.runs[-1].request
    end, *ids = request.token_ids
    assert end == language_model().tokenizer.end_id
    return language_model().tokenizer.decode(ids)


def test_a_reply_is_a_message_of_the_assistant(client):
    answer = chat(client)
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": SAID, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert asked(client) == "The mice"


def test_a_conversation_is_laid_out_as_the_chat_command_does(client):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "clock"}]
    messages = [
        {"role": "developer", "content": "Mice."},
        *HELLO,
        {"role": "assistant", "content": " ran up", "refusal": None, "tool_calls": []},
        {"role": "user", "content": parts},
    ]
    chat(client, messages)
    assert asked(client) == "Mice.\nThe mice ran up\nthe clock"


def test_a_models_template_is_used():
    with client_of(
        template="{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    ) as c:
        chat(c)
        tokenizer = language_model().tokenizer
        assert tokenizer.decode(c.engine.runs[-1].request.token_ids) == "u:The mice;"


def test_the_length_of_a_reply_has_two_names_and_a_default(client):
    for fields, expected in [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6, "max_tokens": None}, 6),
        ({"max_completion_tokens": 7, "max_tokens": 7}, 7),
        ({"max_tokens": None}, 64 - len(language_model().tokenizer.encode("The mice")) - 1),
    ]:
        chat(client, **fields)
        assert client.engine.runs[-1].request.max_new_tokens == expected
    with client_of(chat_tokens=9) as other:
        chat(other, max_tokens=None)
        assert other.engine.runs[-1].request.max_new_tokens == 9


def test_a_reply_without_a_limit_is_fitted_to_what_an_answer_may_hold():
    fields = {"logprobs": True, "top_logprobs": 20, "n": 64}
    most = ANSWER_LOGPROBS // (64 * 21)
    with client_of(max_length=4096) as other:
        chat(other, **fields, max_tokens=None)
        assert other.engine.runs[-1].request.max_new_tokens == most
        body = {"messages": HELLO, **fields, "max_tokens": most + 1}
        error = error_of(other.post("/v1/chat/completions", json=body))
        assert (error.status, error.param) == (400, "top_logprobs")
        assert "ask for less of top_logprobs, n, max_tokens" in error.message


@pytest.mark.parametrize("n", [1, 3])
def test_chunks_begin_with_the_role_and_join_to_the_whole(client, n):
    chunks = stream(client, n=n, logprobs=True, top_logprobs=1, return_loops=True)
    whole = chat(client, n=n, logprobs=True, top_logprobs=1, return_loops=True)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    for expected in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in part["delta"] for part in parts[1:])
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == expected["message"]["content"] == SAID
        entries = [e for part in parts if part["logprobs"] for e in part["logprobs"]["content"]]
        assert entries == expected["logprobs"]["content"]
        assert [n for part in parts for n in part.get("loops", [])] == expected["loops"]
        reasons = [part["finish_reason"] for part in parts]
        assert reasons == [None] * (len(parts) - 1) + ["stop"]


def test_usage_comes_with_the_stream_where_it_is_wanted(client):
    *chunks, last = stream(client, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]) == ([], chat(client)["usage"])
    assert {chunk["usage"] for chunk in chunks} == {None}


def test_each_token_has_its_bytes_and_the_likeliest_beside_it(client):
    given = chat(client, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    assert given["refusal"] is None
    content = given["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == SAID
    first = content[0]
    assert (first["token"], first["bytes"], first["logprob"]) == ("The", [*b"The"], -0.5)
    assert [other["logprob"] for other in first["top_logprobs"]] == [-0.5, -3.0]
    assert content[-1]["token"] == "<|end|>"
    plain = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in plain)
