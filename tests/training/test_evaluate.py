"""Bits per byte against plain loops: one window, one depth, one token at a time."""

import math

import pytest
import torch
from tiny import tiny
from torch.testing import assert_close

from openmythos.errors import DataError, InputError
from openmythos.training.evaluate import Reading, evaluate, evaluate_halting, tokenised
from openmythos.training.tokenizer import Tokenizer

DOCUMENTS = ["the cat sat on the mat", "the rat ate; naïve 😀", "and the cat sat again on it"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(DOCUMENTS * 3, vocab_size=270)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny(vocab_size=tokenizer.vocab_size, dtype=torch.float64)


def plain(model, tokenizer, loops, length, stride, **halting):
    """Nats of every token given at least `length - stride` before it, and the loops taken."""
    ids = [i for text in DOCUMENTS for i in [*tokenizer.encode(text), tokenizer.end_id]]
    context = [tokenizer.end_id, *ids]  # what is seen before each prediction, oldest first
    nats, taken, done, end = 0.0, [], 0, min(length, len(ids))
    ring = [ids[k % len(ids)] for k in range(-length - 1, 0)]
    while done < len(ids):
        start = end - min(length, len(ids))
        before = context[start] if start >= 0 else ring[start]
        window = [before, *ids[start:end]]
        out = model(torch.tensor([window[:-1]]), loops, **halting)
        chances = out.logits[0].log_softmax(-1)
        for place, target in enumerate(window[1:]):
            if start + place >= done:
                nats -= float(chances[place, target])
                taken.append(int(out.loops[0, place]))
        done, end = end, min(end + stride, len(ids))
    size = sum(len(text.encode()) for text in DOCUMENTS)
    return nats / math.log(2) / size, sum(taken) / len(taken), len(ids), size


@pytest.mark.parametrize(("length", "stride"), [(8, 4), (8, 8), (9, 2), (64, None)])
def test_bits_per_byte_at_each_depth_are_those_of_plain_loops(model, tokenizer, length, stride):
    with tokenised(DOCUMENTS, tokenizer) as file, torch.no_grad():
        reading = Reading.usual(None, 64, length=length, stride=stride)
        result = evaluate(model, file, tokenizer.token_bytes, [1, 2, 5], reading=reading)
        for loops, bits in zip(result.loops, result.bits_per_byte, strict=True):
            step = length // 2 if stride is None else stride
            expected, _, tokens, size = plain(model, tokenizer, loops, length, step)
            assert_close(bits, expected)
    assert (result.tokens, result.bytes) == (tokens, size)


@pytest.mark.parametrize(("halting", "threshold"), [("delta", 0.45), ("gate", 0.4)])
def test_a_rule_is_measured_with_the_loops_it_takes(model, tokenizer, halting, threshold):
    rule = {"halting": halting, "threshold": threshold}
    with tokenised(DOCUMENTS, tokenizer) as file, torch.no_grad():
        result = evaluate_halting(
            model, file, tokenizer.token_bytes, budget=6, reading=Reading.of(8), **rule
        )
        bits, loops, tokens, size = plain(model, tokenizer, 6, 8, 4, **rule)
    assert_close(result.bits_per_byte, bits)
    assert_close(result.mean_loops, loops)
    assert 1 < result.mean_loops < 6
    assert (result.tokens, result.bytes, result.budget) == (tokens, size, 6)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_quick_look_measures_the_first_tokens(model, tokenizer, batch_size):
    options = {
        "reading": Reading(length=8, stride=8, max_tokens=10),
        "batch_size": batch_size,
    }
    with tokenised(DOCUMENTS, tokenizer) as file:
        quick = evaluate(model, file, tokenizer.token_bytes, [2], **options)
    assert quick.tokens == 16


def test_without_a_reading_windows_are_the_models_longest(model, tokenizer):
    with tokenised(DOCUMENTS, tokenizer) as file:
        usual = evaluate(model, file, tokenizer.token_bytes, [1])
        longest = evaluate(model, file, tokenizer.token_bytes, [1], reading=Reading.of(64))
    assert usual == longest


def test_enough_documents_are_those_that_hold_the_windows(tokenizer):
    documents = DOCUMENTS * 50
    reading = Reading.usual(8, 64, max_tokens=30)
    assert (reading.length, reading.stride, reading.enough) == (8, 4, 38)
    assert str(reading) == "windows of 8 tokens, 4 apart, for the first 30 tokens"
    with tokenised(documents, tokenizer, reading.enough) as file:
        assert file.tokens >= 38
        assert file.documents < 50
    with tokenised(documents, tokenizer) as file:
        assert file.documents == 150


def test_the_model_is_left_in_the_mode_it_was_in(model, tokenizer):
    model.train()
    with tokenised(DOCUMENTS, tokenizer) as file:
        evaluate(model, file, tokenizer.token_bytes, [1], reading=Reading.of(8))
        assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("loops", "reading", "error", "sentence"),
    [
        ([], (8, 4), InputError, "loops must hold a depth of 1 or more, and holds none"),
        ([0], (8, 4), InputError, "loops=0 must be 1 or more"),
        ([1], (65, 4), InputError, "length=65 must be from 1 to the model's max_length=64"),
        ([1], (0, 4), InputError, "length=0 must be from 1 to the model's max_length=64"),
        ([1], (8, 9), DataError, "stride=9 must be from 1 to length=8"),
        ([1], (8, 0), DataError, "stride=0 must be from 1 to length=8"),
        ([1], (8, 4, 0), InputError, "max_tokens=0 must be 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, tokenizer, loops, reading, error, sentence):
    windows = Reading(**dict(zip(("length", "stride", "max_tokens"), reading, strict=False)))
    with tokenised(DOCUMENTS, tokenizer) as file, pytest.raises(error, match=sentence):
        evaluate(model, file, tokenizer.token_bytes, loops, reading=windows)
