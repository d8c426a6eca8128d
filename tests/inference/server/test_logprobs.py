"""Log-probabilities in JSON: names of tokens, and numbers that JSON lacks."""

import math

import pytest
from fake_engine import language_model

from openmythos.inference.server.logprobs import (
    LogprobLists,
    Offsets,
    chat_logprob,
    token_text,
)

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
    lists = LogprobLists(TOKENIZER)
    lists.add(5, -math.inf, [(6, -1.0)])
    assert lists.take()["token_logprobs"] == [-9999]


def test_an_offset_waits_for_its_character():
    lists = LogprobLists(TOKENIZER)
    for part in (b"\xe2", b"\x98", b"\x83", b"!"):
        lists.add(of_bytes(part), -1.0, [])
    assert lists.take()["text_offset"] == [0, 0, 0, 1]
    assert lists.take()["text_offset"] == []


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([b"\xe2", b"\x98", b"a", b"b"], [0, 0, 1, 2]),  # U+FFFD is the first two tokens' text
        ([b"a", b"\xe2", b"\xe2", b"\x98", b"\x83"], [0, 1, 2, 2, 2]),
        ([b"\xc3", b"\xff", b"a"], [0, 1, 2]),
        ([b"\xf0", b"\x9f", b"\x98", b"\x80", b"a"], [0, 0, 0, 0, 1]),
        ([b"\xc3", b"", b"\xa9", b"a"], [0, 0, 0, 1]),
    ],
)
def test_an_offset_is_where_the_tokens_own_text_begins(parts, expected):
    offsets, seen = Offsets(TOKENIZER), b""
    for part, start in zip(parts, expected, strict=True):
        assert offsets.next(of_bytes(part) if part else TOKENIZER.end_id) == start
        seen += part
        text = seen.decode("utf-8", "replace")
        if part.isascii() and part:
            assert text[start:] == part.decode()


def test_a_copy_of_offsets_goes_on_within_the_character_but_from_its_own_place():
    offsets = Offsets(TOKENIZER)
    for part in (b"a", b"\xe2", b"\x98"):
        offsets.next(of_bytes(part))
    for begun, (part, start) in [(1, (b"\x83", 1)), (0, (b"\x83", 0)), (0, (b"!", 1))]:
        assert offsets.copy(begun).next(of_bytes(part)) == start
