"""Log-probabilities in JSON: names of tokens, and numbers that JSON lacks."""

import math

from fake_engine import language_model

from openmythos.inference.server.logprobs import CompletionLogprobs, chat_logprob, token_text

TOKENIZER = language_model().tokenizer


def of_bytes(content):
    return next(t for t in range(257) if TOKENIZER.decode_bytes([t]) == content)


def test_no_two_tokens_that_can_be_drawn_have_one_name():
    names = [token_text(TOKENIZER, token) for token in range(TOKENIZER.vocab_size)]
    assert len(set(names)) == len(names)
    assert names[TOKENIZER.end_id] == "<|end|>"
    assert names[of_bytes(b"\xc3")] == "bytes:\\xc3"
    assert not any("\ufffd" in name for name in names)


def test_what_cannot_happen_has_a_finite_number():
    assert chat_logprob(TOKENIZER, 5, -math.inf, [(6, -math.inf)])["logprob"] == -9999
    lists = CompletionLogprobs(TOKENIZER)
    lists.add(5, -math.inf, [(6, -1.0)])
    assert lists.take()["token_logprobs"] == [-9999]


def test_an_offset_waits_for_its_character():
    lists = CompletionLogprobs(TOKENIZER)
    for part in (b"\xe2", b"\x98", b"\x83", b"!"):
        lists.add(of_bytes(part), -1.0, [])
    assert lists.take()["text_offset"] == [0, 0, 0, 1]
    assert lists.take()["text_offset"] == []
