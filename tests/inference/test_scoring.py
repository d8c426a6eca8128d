"""Log-likelihoods in batches against plain loops: one token at a time, nothing shared or padded."""

import pytest
import torch
from tiny import SIZES, some_ids, tiny
from typecheck import unchecked

from openmythos.errors import InputError
from openmythos.inference import scoring
from openmythos.inference.scoring import Continuation, encode_pairs, score, windows
from openmythos.inference.thinking import Thinking
from openmythos.model.attention import ATTENTION
from openmythos.training.tokenizer import Tokenizer

MOST = 6  # max_length of the models here
TEXT = "the cat sat on the mat; the rat ate. naïve 😀 " * 9
WAYS = [
    {"loops": None},
    {"loops": 5, "halting": "delta", "threshold": 0.5},
    {"loops": 5, "halting": "gate", "threshold": 0.5},
]


def continuations():
    """Contexts shared and alone, short, too long, and continuations of every length."""
    ids = iter(some_ids(1, 400)[0].tolist())

    def some(count):
        return tuple(next(ids) for _ in range(count))

    first, second, one, long = some(3), some(2), some(1), some(8)
    return [
        Continuation(first, some(2)),
        Continuation(second, some(1)),
        Continuation(first, some(4)),
        Continuation(long, some(2)),
        Continuation(one, some(3)),
        Continuation(first, some(1)),
        Continuation(long, some(3)),
        Continuation(some(4), ()),
        Continuation(second, some(MOST)),
        Continuation(some(3), some(2 * MOST + 1)),
        Continuation(one, some(2)),
    ]


@torch.no_grad()
def plain(model, one, loops=None, **rule):
    """Nats, greediness and loops of one whose continuation fits, token by token."""
    loops = model.config.mean_loops if loops is None else loops
    whole = [*one.context, *one.token_ids][-(model.config.max_length + 1) :]
    nats, greedy, taken = 0.0, True, 0
    for place in range(len(whole) - len(one.token_ids), len(whole)):
        out = model(torch.tensor([whole[:place]]), loops, **rule)
        chances = out.logits[0, -1].log_softmax(-1)
        nats += float(chances[whole[place]])
        greedy &= int(chances.argmax()) == whole[place]
        taken += int(out.loops[0, -1])
    return nats, greedy, taken


def in_windows(model, one, **how):
    """The same for any: parts of max_length tokens behind what fits before them."""
    nats, greedy, taken, done = 0.0, True, 0, 0
    while done < len(one.token_ids):
        part = one.token_ids[done : done + MOST]
        before = one.context + one.token_ids[:done]
        new = plain(model, Continuation(before, part), **how)
        nats, greedy, taken = nats + new[0], greedy and new[1], taken + new[2]
        done += len(part)
    return nats, greedy, taken


def numbers(scores):
    return [(one.log_likelihood, one.greedy, one.loops) for one in scores]


def same(scores, expected):
    # float64, the same sums in another order, up to 13 tokens of up to 10 nats.
    for got, (nats, greedy, taken) in zip(scores, expected, strict=True):
        assert got.log_likelihood == pytest.approx(nats, rel=0, abs=1e-9)
        assert (got.greedy, got.loops) == (greedy, taken)


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("attention", ATTENTION)
def test_scores_are_those_of_plain_loops(how, attention):
    model = tiny(attention=attention, max_length=MOST, dtype=torch.float64)
    asked = continuations()
    with unchecked():  # checks of shapes would take most of the time
        expected = [in_windows(model, one, **how) for one in asked]
    same(score(model, asked, Thinking(**how)), expected)
    if "halting" in how:
        loops, tokens = (
            sum(taken for *_, taken in expected),
            sum(len(r.token_ids) for r in asked),
        )
        assert tokens < loops < 5 * tokens  # the rule does something


def test_scores_do_not_depend_on_the_batches(monkeypatch):
    model = tiny(max_length=MOST, dtype=torch.float64)
    asked, wanted = continuations(), numbers(score(model, continuations(), Thinking(loops=3)))
    for most in (1, 24):
        monkeypatch.setattr(scoring, "MOST_TOKENS", most)
        same(score(model, asked, Thinking(loops=3)), wanted)
    same(score(model, asked[::-1], Thinking(loops=3)), wanted[::-1])


def test_equal_continuations_are_scored_once_and_tie_to_the_bit():
    model, read = tiny(max_length=40), []
    model.embed.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    context = tuple(some_ids(1, 20)[0].tolist())
    twice, others = Continuation(context, (3, 4)), [Continuation(context, (n, 9)) for n in (5, 6)]
    first, *middle, last = score(model, [twice, *others, twice], Thinking(loops=2))
    assert sum(read) == 19 + 3 * 2
    assert first == last
    assert [first, *middle] == score(model, [twice, *others], Thinking(loops=2))


def test_a_deep_run_has_smaller_batches(monkeypatch):
    model, rows = tiny(max_length=MOST), []
    model.embed.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    monkeypatch.setattr(scoring, "MOST_SLOTS", 4 * 2 * 8)  # four at 2 loops
    asked = [Continuation(tuple(ids), (1, 2, 3, 4)) for ids in some_ids(8, 4).tolist()]
    score(model, asked, Thinking(loops=2))
    assert max(rows) == 4
    rows.clear()
    score(model, asked, Thinking(loops=8))
    assert max(rows) == 1


def test_what_the_model_would_write_itself_is_greedy():
    model = tiny(dtype=torch.float64)
    context = [7, 8]
    for _ in range(4):
        context.append(int(model(torch.tensor([context]), 3).logits[0, -1].argmax()))
    best, other = tuple(context[2:]), (*context[2:5], (context[5] + 1) % SIZES["vocab_size"])
    asked = [Continuation((7, 8), best), Continuation((7, 8), other)]
    scores = score(model, asked, Thinking(loops=3))
    assert [one.greedy for one in scores] == [True, False]
    assert scores[0].log_likelihood > scores[1].log_likelihood


def test_ids_without_text_play_no_part():
    model = tiny(dtype=torch.float64)
    logits = model(torch.tensor([[7, 8]]), 3).logits[0, -1].detach()
    most = int(logits.argmax())  # from here on the tokenizer has none
    best = int(logits[:most].argmax())
    (one,) = score(model, [Continuation((7, 8), (best,))], Thinking(loops=3), vocab_size=most)
    assert one.greedy
    assert one.log_likelihood == pytest.approx(float(logits[:most].log_softmax(-1)[best]))
    with pytest.raises(InputError, match=f"token_ids holds {most}, must be below vocab_size"):
        score(model, [Continuation((7,), (most,))], Thinking(loops=3), vocab_size=most)


def test_a_shared_context_is_read_once():
    model, read = tiny(max_length=40), []
    model.embed.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    context = tuple(some_ids(1, 20)[0].tolist())
    score(model, [Continuation(context, (token, 3)) for token in range(6)], Thinking(loops=2))
    assert sum(read) == 19 + 6 * 2
    read.clear()
    score(model, [Continuation((0,), (token, 3)) for token in range(6)], Thinking(loops=2))
    assert read == [6 * 2]  # nothing to share: all at once


def test_a_long_text_is_scored_in_the_windows_of_the_harness():
    # The example in the documentation of lm-evaluation-harness: ten tokens, four at a time.
    parts = list(windows(Continuation((99,), tuple(range(10))), 4))
    assert parts == [
        Continuation((99,), (0, 1, 2, 3)),
        Continuation((3,), (4, 5, 6, 7)),
        Continuation((5, 6, 7), (8, 9)),
    ]


def test_a_context_is_cut_on_the_left_and_the_cut_is_counted():
    one = Continuation(tuple(range(9)), (20, 21, 22))
    assert list(windows(one, 6)) == [Continuation((5, 6, 7, 8)[-4:], (20, 21, 22))]
    assert [one.cut(length) for length in (6, 10, 11, 12)] == [5, 1, 0, 0]


def test_tokens_belong_to_the_context_or_to_the_continuation():
    tokenizer = Tokenizer.train([TEXT], vocab_size=290)
    pairs = [("the cat", " sat"), ("the cat ", "sat"), ("", "the"), (" \n", "x"), ("the c", "at")]
    made = encode_pairs(tokenizer, pairs)
    assert made[0] == made[1]  # the space goes with its word
    for one, (context, continuation) in zip(made, pairs, strict=True):
        assert one.context[0] == tokenizer.end_id
        before, after = map(tokenizer.decode, (one.context, one.token_ids))
        assert before + after == context + continuation
        assert before == context.rstrip()
    assert encode_pairs(tokenizer, []) == []


def test_progress_is_told_to_the_end():
    told, asked = [], continuations()
    model = tiny(max_length=MOST)
    score(model, asked, Thinking(loops=1), progress=lambda *counts: told.append(counts))
    assert told[-1][0] == told[-1][1] == 12  # one in three parts, and none for the empty one
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"loops": 0}, "loops=0 must be 1 or more"),
        ({"halting": "gate", "threshold": 2.0}, "threshold=2.0 must be above 0 and at most 1"),
        ({"threshold": 0.5}, "threshold=0.5 must be left out"),
    ],
)
def test_what_does_not_fit_is_refused(how, sentence):
    with pytest.raises(InputError, match=sentence):
        score(tiny(), continuations(), Thinking(**how))
