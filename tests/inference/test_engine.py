"""What the engine writes is what each request writes alone, whatever happens around it."""

import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from tiny import tiny

from openmythos.errors import EngineStopped, InputError, QueueFull
from openmythos.inference.engine import Engine, EngineSettings
from openmythos.inference.generate import generate
from openmythos.inference.language_model import LanguageModel
from openmythos.inference.pages import Pages, Table
from openmythos.inference.passes import Passes, page_bytes
from openmythos.inference.request import (
    FinishEvent,
    PromptEvent,
    Request,
    TokenEvent,
)
from openmythos.inference.sampling import Sampling
from openmythos.inference.scoring import Continuation, score
from openmythos.inference.thinking import Thinking
from openmythos.inference.ticks import Ticker, likeliest
from openmythos.model.halting import HALTING
from openmythos.model.quantised import quantise
from openmythos.training.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(
    ["the cat sat on the mat and the cat ate the rat " * 20], vocab_size=270
)
GREEDY = Sampling(temperature=0)
THINKING = {
    "none": Thinking(loops=3),
    "delta": Thinking(loops=6, halting="delta", threshold=0.45),
    "gate": Thinking(loops=6, halting="gate", threshold=0.4),
    "kl": Thinking(loops=6, halting="kl", threshold=0.015),
    "act": Thinking(loops=5, halting="act", threshold=0.9),
    "last": Thinking(loops=3, cache_policy="last"),
}
MODELS = {
    "gqa, experts": {},
    "mla, experts": {"attention": "mla"},
    "gqa, dense, no outer layers": {"experts": 0, "prelude_layers": 0, "coda_layers": 0},
    "mla, dense, one core layer": {"attention": "mla", "experts": 0, "core_layers": 1},
    "lora, linear injection": {"lora_rank": 2, "injection": "linear", "coda_layers": 0},
}


def model_of(name="gqa, experts", **changes):
    fields = {"vocab_size": TOKENIZER.vocab_size, "max_length": 128, "learned_act": True}
    return LanguageModel(tiny(**{**fields, **MODELS[name], **changes}), TOKENIZER)


def with_weights(lm, weights):
    if weights != "fp32":
        quantise(lm.model) if weights == "int8" else lm.model.bfloat16()
    return lm


@pytest.fixture(autouse=True)
def _check_shapes_in_one_test(request):
    # The checks take more than half of the time, and one test goes through every kind of pass.
    wanted = request.node.name.startswith("test_a_request_writes_what_generate_writes[gqa, experts")
    jaxtyping.config.update("jaxtyping_disable", not wanted)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def lm():
    return model_of()


def prompt(length, seed=0):
    chance = random.Random(seed)
    return tuple(chance.randrange(1, TOKENIZER.vocab_size) for _ in range(length))


def request(length=9, *, seed=0, **fields):
    fields = {"max_new_tokens": 6, "sampling": GREEDY, "stop_at_end": False, "logprobs": 3} | fields
    return Request(token_ids=fields.pop("token_ids", None) or prompt(length, seed), **fields)


def ticker_of(lm, *, pages=600, budget=16, chunk=5, deterministic=True, prefix_sharing=True):
    return Ticker(
        lm,
        pages=pages,
        budget=budget,
        chunk=chunk,
        deterministic=deterministic,
        prefix_sharing=prefix_sharing,
    )


def run(ticker, requests, *, gap=0):
    """Submit requests, `gap` ticks apart; return each one's events."""
    events = []
    with torch.inference_mode():
        for one in requests:
            ticker.prepare(one)
            events.append([])
            ticker.add(one, events[-1].append)
            for _ in range(gap):
                ticker.tick()
                ticker.scheduler.check()
        for _ in range(20_000):
            if ticker.idle:
                break
            ticker.tick()
    assert ticker.idle
    ticker.scheduler.check()
    assert ticker.pages.free + ticker.pages.cached == ticker.pages.total
    return events


def written(events, *, exact=True):
    """All that must not depend on company: tokens, loops and, where bits are promised, logprobs."""
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    parts = ["choice", "token_id", "loops", "text"] + ["logprob", "top_logprobs"] * exact
    return sorted(
        [tuple(getattr(event, part) for part in parts) for event in tokens], key=lambda t: t[0]
    )


def alone(lm, one, **settings):
    return run(ticker_of(lm, **settings), [one])[0]


@torch.inference_mode()
def reference(model, one):
    """Token ids, loops and logprobs by the naive way."""
    token_ids = torch.tensor([one.token_ids])
    new = generate(
        model,
        token_ids,
        max_new_tokens=one.max_new_tokens,
        thinking=one.thinking,
        sampling=one.sampling,
    )
    return [(int(token.token_ids), int(token.loops)) for token in new]


@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize("name", MODELS)
def test_a_request_writes_what_generate_writes(name, thinking):
    lm = model_of(name)
    one = request(18, thinking=THINKING[thinking], max_new_tokens=4)
    expected = reference(lm.model, one)
    for deterministic in (True, False):
        tokens = written(alone(lm, one, deterministic=deterministic), exact=False)
        assert [(token_id, loops) for _, token_id, loops, _ in tokens] == expected


@pytest.mark.parametrize("thinking", ["none", "gate", "last"])
@pytest.mark.parametrize("name", ["gqa, experts", "mla, experts"])
def test_int8_weights_write_what_generate_writes_with_keys_in_bf16(name, thinking):
    lm = with_weights(model_of(name), "int8")
    one = request(18, thinking=THINKING[thinking], max_new_tokens=6)
    tokens = written(alone(lm, one), exact=False)
    assert [(token_id, loops) for _, token_id, loops, _ in tokens] == reference(lm.model, one)
    kept = {entries.dtype for pages in ticker_of(lm).passes.storage for entries in pages.values()}
    assert kept == {torch.bfloat16}


SEVERAL_SLOTS = {"prelude_layers": 3, "coda_layers": 2, "core_output": "norm"}


@pytest.mark.parametrize("changes", [{}, SEVERAL_SLOTS], ids=["", "outer layers in several slots"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_logits_are_those_of_one_uncached_pass(deterministic, changes):
    lm = model_of(**changes)
    one = request(21, thinking=THINKING["delta"], prompt_logprobs=True)
    events = alone(lm, one, deterministic=deterministic)
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    whole = [*one.token_ids, *(token.token_id for token in tokens)]
    with torch.inference_mode():
        out = lm.model(torch.tensor([whole]), 6, halting="delta", threshold=0.45)
    logprobs = out.logits[0].log_softmax(-1)
    (read,) = (event for event in events if isinstance(event, PromptEvent))
    assert events.index(read) == 0
    assert read.logprobs[0] is None
    assert list(read.loops) == out.loops[0, : len(one.token_ids)].tolist()
    assert len(set(read.loops)) > 1
    given = [*read.logprobs[1:], *(token.logprob for token in tokens)]
    expected = [float(logprobs[at, token]) for at, token in enumerate(whole[1:])]
    assert given == pytest.approx(expected, abs=1e-4)
    for event, place in zip(tokens, logprobs[len(one.token_ids) - 1 :], strict=False):
        ids, values = zip(*event.top_logprobs, strict=True)
        assert values == pytest.approx(place.topk(3).values.tolist(), abs=1e-4)
        assert ids == tuple(place.topk(3).indices.tolist())


def mixture():
    """Requests of all kinds, some that begin alike."""
    seeded = Sampling(temperature=1.3, top_k=40, seed=5)
    begin = prompt(20, seed=9)
    return [
        request(3, seed=1, thinking=THINKING["gate"]),
        request(26, seed=2, thinking=THINKING["none"], sampling=seeded),
        request(token_ids=begin + prompt(4, 3), thinking=THINKING["delta"], sampling=seeded),
        request(token_ids=begin + prompt(9, 4), thinking=THINKING["delta"], max_new_tokens=9),
        request(17, seed=5, thinking=THINKING["kl"], choices=2, sampling=seeded),
        request(1, seed=6, thinking=THINKING["act"]),
        request(16, seed=7, thinking=THINKING["last"], choices=2, sampling=seeded),
        request(20, seed=8, thinking=THINKING["none"], prompt_logprobs=True),
    ]


@pytest.mark.parametrize(
    ("name", "threads", "weights"),
    [
        ("gqa, experts", 1, "fp32"),
        ("mla, experts", 2, "fp32"),
        ("gqa, experts", 1, "bf16"),
        ("mla, experts", 1, "int8"),
    ],
)
def test_company_order_and_chunks_change_no_bit(name, threads, weights):
    torch.set_num_threads(threads)
    try:
        lm, requests = with_weights(model_of(name), weights), mixture()
        expected = [written(alone(lm, one)) for one in requests]
        for settings in ({"chunk": 3}, {"chunk": 16, "budget": 7, "prefix_sharing": False}):
            together = run(ticker_of(lm, **settings), requests)
            assert [written(events) for events in together] == expected
        reversed_ = run(ticker_of(lm), requests[::-1], gap=3)
        assert [written(events) for events in reversed_[::-1]] == expected
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("name", "thinking", "weights"),
    [
        *((name, thinking, "fp32") for name in MODELS for thinking in THINKING),
        *(("gqa, experts", thinking, "bf16") for thinking in ("none", "gate")),
        *(("mla, experts", thinking, "int8") for thinking in ("none", "gate")),
    ],
)
def test_joined_calls_change_no_bit(name, thinking, weights, monkeypatch):
    """Prelude, loops and coda in one native call, in two, and each by itself."""
    lm = with_weights(model_of(name), weights)
    joins = Passes._joins
    ways = {
        "none": lambda *_, **__: False,
        "what enters": lambda self, rows, new, **does: new and joins(self, rows, new, **does),
        "what leaves": lambda self, rows, new, **does: not new and joins(self, rows, new, **does),
        "all": joins,
    }
    deep = {"thinking": THINKING[thinking], "max_new_tokens": 5}
    requests = [request(7, seed=seed, **deep) for seed in range(3)]
    requests.append(request(3, thinking=Thinking(loops=2), draft_loops=1))
    told = request(5, seed=4, **deep, prompt_logprobs=True)
    at_once = {"thinking": Thinking(loops=1)}
    loads = [
        (requests, {"budget": 12, "chunk": 3}),  # three rows cannot run all loops in a tick
        ([told], {}),  # rows that have left wait for one before them
        # a prompt that came first ends in a tick in which a later request writes
        ([request(6, seed=1, **at_once), request(3, seed=2, **at_once)], {"chunk": 5}),
        ([request(2), request(1, max_new_tokens=12)], {"budget": 2, "chunk": 1}),
    ]
    found = {}
    for way, does in ways.items():
        monkeypatch.setattr(Passes, "_joins", does)
        found[way] = [
            [written(events) for events in run(ticker_of(lm, **settings), some)]
            for some, settings in loads
        ]
    assert all(found[way] == found["none"] for way in ways)
    assert all(tokens for load in found["all"] for tokens in load)


@pytest.mark.parametrize("thinking", ["act", "kl", "delta"])
def test_rules_of_many_rows_at_once_change_no_bit(thinking):
    """Torch's elementwise functions have other bits in the last few numbers of an array."""
    lm = model_of("gqa, experts")
    for seed in range(4):
        one = request(52, seed=seed, max_new_tokens=3, thinking=THINKING[thinking])
        expected = written(run(ticker_of(lm, chunk=32, budget=4), [one])[0])
        for settings in ({"chunk": 32, "budget": 100}, {"chunk": 5, "budget": 100}):
            assert written(run(ticker_of(lm, **settings), [one])[0]) == expected


def test_company_changes_no_token_and_hardly_a_logprob_without_deterministic_mode(lm):
    requests = mixture()
    expected = [alone(lm, one, deterministic=False) for one in requests]
    together = run(ticker_of(lm, deterministic=False), requests)
    for events, wanted in zip(together, expected, strict=True):
        assert written(events, exact=False) == written(wanted, exact=False)
        ours, theirs = (
            sorted((e.choice, e.logprob) for e in some if isinstance(e, TokenEvent))
            for some in (events, wanted)
        )
        assert np.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("thinking", "deterministic"), [("none", True), ("delta", True), ("kl", True), ("delta", False)]
)
def test_a_prefix_found_changes_nothing_but_the_work(lm, thinking, deterministic):
    one = request(40, thinking=THINKING[thinking], sampling=Sampling(temperature=1.0, seed=3))
    ticker = ticker_of(lm, deterministic=deterministic)
    (first,) = run(ticker, [one])
    done = ticker.counts.row_loops
    (second,) = run(ticker, [one])
    assert ticker.counts.row_loops - done < done
    assert first[-1].cached_tokens == 0
    assert second[-1].cached_tokens == 32
    assert written(first, exact=deterministic) == written(second, exact=deterministic)


def test_what_a_request_wrote_is_found_by_one_that_goes_on_from_it(lm):
    ticker = ticker_of(lm)
    one = request(20, max_new_tokens=30, thinking=THINKING["gate"])
    (events,) = run(ticker, [one])
    longer = one.token_ids + tuple(e.token_id for e in events[:-1])
    following = request(token_ids=longer, thinking=THINKING["gate"])
    (found,) = run(ticker, [following])
    assert found[-1].cached_tokens == 48  # of 50, of which the last never entered the core
    assert written(found) == written(alone(lm, following))


@pytest.mark.parametrize(
    "other", [THINKING["gate"], Thinking(loops=4), Thinking(loops=3, cache_policy="last")]
)
def test_another_way_to_think_finds_nothing(lm, other):
    ticker = ticker_of(lm)
    run(ticker, [request(40, thinking=Thinking(loops=3))])
    (events,) = run(ticker, [request(40, thinking=other)])
    assert events[-1].cached_tokens == 0


def test_another_threshold_finds_nothing(lm):
    ticker, thinking = ticker_of(lm), THINKING["delta"]
    run(ticker, [request(40, thinking=thinking)])
    other = request(40, thinking=replace(thinking, threshold=0.2))
    (events,) = run(ticker, [other])
    assert events[-1].cached_tokens == 0
    assert written(events) == written(alone(lm, other))


def test_choices_read_the_prompt_once_and_write_what_they_write_alone(lm):
    sampling = Sampling(temperature=1.5, seed=4)
    one = request(21, choices=3, sampling=sampling, thinking=THINKING["delta"])
    ticker = ticker_of(lm, prefix_sharing=False)
    (events,) = run(ticker, [one])
    texts = {
        choice: [e.token_id for e in events if isinstance(e, TokenEvent) and e.choice == choice]
        for choice in range(3)
    }
    assert len({tuple(text) for text in texts.values()}) == 3
    one_choice = request(21, sampling=sampling, thinking=THINKING["delta"])
    assert [t for t in written(events) if t[0] == 0] == written(alone(lm, one_choice))
    assert ticker.counts.prompt_tokens == 21
    assert [type(e) for e in events].count(FinishEvent) == 3


def test_a_full_cache_gives_up_what_nobody_uses_and_admits_in_turn(lm):
    requests = [request(30, seed=seed, max_new_tokens=10) for seed in range(4)]
    needed = ticker_of(lm)._job(requests[0], 0).pages
    ticker = ticker_of(lm, pages=needed * 2)
    together = run(ticker, requests)
    (again,) = run(ticker, [requests[0]])
    assert again[-1].cached_tokens == 0  # it was given up
    assert [written(events) for events in together] == [written(alone(lm, one)) for one in requests]


def test_priority_is_admitted_first(lm):
    low, high = request(seed=1), request(seed=2, priority=1)
    ticker, ended = ticker_of(lm, budget=1), []
    with torch.inference_mode():
        for one in (low, high):
            ticker.add(one, lambda e, one=one: isinstance(e, FinishEvent) and ended.append(one))
        while not ticker.idle:
            ticker.tick()
    assert ended == [high, low]


DEEP = {"thinking": Thinking(loops=16), "sampling": Sampling(temperature=1.0, seed=7)}
COMPANY = {
    "a deep prompt is read": [request(100, max_new_tokens=1, **DEEP)],
    "six prompts are read": [request(100, seed=at, max_new_tokens=1, **DEEP) for at in range(6)],
    "deep ones wait for pages": [request(seed=at, max_new_tokens=50, **DEEP) for at in range(4)],
    "the choices fill the budget": [request(max_new_tokens=20, choices=16, **DEEP)],
}


@pytest.mark.parametrize("company", COMPANY)
def test_a_short_and_shallow_request_waits_for_none_of_these(lm, company):
    deep, seen = COMPANY[company], []
    pages = 2 * ticker_of(lm)._job(COMPANY["deep ones wait for pages"][0], 0).pages + 10
    ticker = ticker_of(lm, pages=pages if "pages" in company else 4000)
    events = [[] for _ in deep]
    short = request(2, seed=9, max_new_tokens=2, thinking=Thinking(loops=1))
    with torch.inference_mode():
        for one, heard in zip(deep, events, strict=True):
            ticker.add(one, heard.append)
        for _ in range(20):
            ticker.tick()
        ticker.add(short, seen.append)
        for _ in range(3):  # one for each token, one more where the budget is full
            ticker.tick()
            ticker.scheduler.check()
    assert isinstance(seen[-1], FinishEvent)
    assert not any(isinstance(heard[-1], FinishEvent) for heard in events if heard)
    run(ticker, [])
    assert written(seen) == written(alone(lm, short))
    for one, heard in zip(deep, events, strict=True):
        assert written(heard) == written(alone(lm, one, pages=4000))


# Drafts


@pytest.mark.parametrize(("draft_loops", "thinking"), [(1, "none"), (1, "delta"), (3, "gate")])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.3, seed=5)])
def test_drafts_change_no_bit_of_what_is_written(lm, draft_loops, thinking, sampling):
    think = Thinking(loops=4) if thinking == "none" else THINKING[thinking]
    one = request(18, max_new_tokens=16, thinking=think, sampling=sampling, choices=2)
    drafting = replace(one, draft_loops=draft_loops)
    plain, ticker = ticker_of(lm), ticker_of(lm)
    (expected,) = run(plain, [one])
    others = [request(7, seed=4, max_new_tokens=5), replace(drafting, token_ids=prompt(5, 8))]
    (events, *_) = run(ticker, [drafting, *others])
    assert written(events) == written(expected)
    counts = ticker.counts
    assert 0 < counts.accepted_tokens < counts.drafted_tokens


def test_right_drafts_take_fewer_ticks_and_no_more_loops(monkeypatch):
    monkeypatch.setattr(Passes, "may_run_ahead", lambda *_: False)  # a loop in each tick
    lm = model_of(core_layers=1, injection="none", h0="e", experts=0, out_init=0.0)
    with torch.no_grad():  # a core that changes nothing: every draft is right
        for layer in lm.model.core.layers:
            layer.attention.out.weight.zero_()
            layer.feed_forward.w_out.weight.zero_()
    one = request(1, max_new_tokens=20, thinking=Thinking(loops=6))
    plain, drafting = ticker_of(lm), ticker_of(lm)
    (expected,) = run(plain, [one])
    (events,) = run(drafting, [replace(one, draft_loops=1)])
    assert written(events) == written(expected)
    assert plain.counts.ticks == 6 * 20
    assert drafting.counts.ticks == 6 + 19
    assert drafting.counts.row_loops == plain.counts.row_loops
    assert drafting.counts.drafted_tokens == drafting.counts.accepted_tokens == 19


class Sixteen:
    """A tokenizer of 16 tokens that stand for letters."""

    vocab_size, end_id = 16, 0

    def text_stream(self, after=()):
        return self

    def push(self, token_id):
        return "abcdefghijklmnop"[token_id]

    def finish(self):
        return ""


@torch.inference_mode()
def second_token(model, token_ids, loops):
    """The exact distribution of the second token after a prompt."""
    first = model(torch.tensor([token_ids]), loops).logits[0, -1].softmax(-1)
    both = [
        model(torch.tensor([[*token_ids, token]]), loops).logits[0, -1].softmax(-1)
        for token in range(16)
    ]
    return first @ torch.stack(both)


def test_with_drafts_tokens_follow_the_whole_models_distribution():
    lm = LanguageModel(tiny(vocab_size=16, experts=0), Sixteen())
    one = request(
        token_ids=(1, 2, 3),
        max_new_tokens=3,
        thinking=Thinking(loops=4),
        sampling=Sampling(temperature=1.0, seed=11),
        draft_loops=1,
        logprobs=None,
        choices=600,
    )
    ticker = ticker_of(lm, budget=600, pages=20_000, deterministic=False)
    (events,) = run(ticker, [one])
    texts = {}
    for event in events:
        if isinstance(event, TokenEvent):
            texts.setdefault(event.choice, []).append(event.token_id)
    counts = torch.bincount(torch.tensor([text[1] for text in texts.values()]), minlength=16)
    expected = second_token(lm.model, one.token_ids, 4) * 600
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Above 15 + 2 sqrt(15 x) + 2 x with chance e^-x (Laurent and Massart 2000): 1e-6.
    assert statistic < 15 + 2 * (15 * 13.8) ** 0.5 + 2 * 13.8
    assert 0 < ticker.counts.accepted_tokens < ticker.counts.drafted_tokens


# How texts end


class Spelling:
    """Allows the tokens of one list after another."""

    def __init__(self, *steps, packed=False, fails=False):
        self.steps, self.packed, self.fails = list(steps), packed, fails

    def allowed(self):
        if self.fails:
            raise RuntimeError("no grammar")
        mask = np.zeros(TOKENIZER.vocab_size, dtype=bool)
        mask[self.steps[0]] = True
        if self.packed:
            padded = np.zeros(-(-len(mask) // 32) * 32, dtype=bool)
            padded[: len(mask)] = mask
            return np.packbits(padded, bitorder="little").view(np.int32)
        return mask

    def accept(self, token_id):
        assert token_id in self.steps.pop(0)

    def finished(self):
        return not self.steps

    def copy(self):
        return Spelling(*self.steps, packed=self.packed, fails=self.fails)


def letters(text):
    """Constraint steps that spell a text byte by byte."""
    ids = {TOKENIZER.decode_bytes([i]): i for i in range(TOKENIZER.vocab_size)}
    return [[ids[bytes([byte])]] for byte in text.encode()]


def text_of(events, choice=0):
    return "".join(e.text for e in events if not isinstance(e, PromptEvent) and e.choice == choice)


def ending(lm, spelled, **fields):
    fields = {"max_new_tokens": 50, "constraint": Spelling(*letters(spelled))} | fields
    return alone(lm, request(**fields))


def test_a_text_ends_where_its_stop_begins(lm):
    events = ending(lm, "one STO two STOP three", stop=("STOP", "STOR"))
    assert text_of(events) == "one STO two "
    assert events[-1].reason == "stop"
    assert events[-1].stop == "STOP"


def test_what_was_held_back_is_told_at_the_end(lm):
    events = ending(lm, "one STO", stop=("STOP",))
    assert text_of(events) == "one STO"
    assert events[-1].text == "STO"
    assert events[-1].stop is None


def test_characters_come_whole(lm):
    events = ending(lm, "né 日本")
    assert text_of(events) == "né 日本"
    assert all("\ufffd" not in e.text for e in events)


def test_a_character_cut_off_by_the_length_is_marked(lm):
    events = ending(lm, "日本", max_new_tokens=4)
    assert text_of(events) == "日\ufffd"
    assert events[-1].reason == "length"
    assert events[-1].new_tokens == 4


def test_a_stop_that_the_last_character_completes_is_why_a_text_ends(lm):
    events = ending(lm, "日本", max_new_tokens=4, stop=("\ufffd",))
    assert text_of(events) == "日"
    assert (events[-1].reason, events[-1].stop) == ("stop", "\ufffd")


@pytest.mark.parametrize("packed", [False, True])
def test_a_constraint_bounds_every_choice_and_finishes_it(lm, packed):
    constraint = Spelling(*letters("ab"), [5, 6, 7], packed=packed)
    events = alone(
        lm,
        request(constraint=constraint, choices=2, max_new_tokens=9, sampling=Sampling(seed=1)),
    )
    for choice in (0, 1):
        ids = [e.token_id for e in events if isinstance(e, TokenEvent) and e.choice == choice]
        assert TOKENIZER.decode(ids[:2]) == "ab"
        assert len(ids) == 3
        assert ids[2] in (5, 6, 7)
    assert {e.reason for e in events if isinstance(e, FinishEvent)} == {"stop"}


def test_a_constraint_changes_no_logprob(lm):
    one = request(max_new_tokens=1, logprobs=TOKENIZER.vocab_size)
    free, _ = alone(lm, one)
    unlikely, logprob = free.top_logprobs[-1]
    bound, _ = alone(lm, replace(one, constraint=Spelling([unlikely])))
    assert (bound.token_id, bound.logprob) == (unlikely, logprob)
    assert bound.top_logprobs == free.top_logprobs


def test_the_end_of_the_document_ends_a_text_unless_it_shall_not(lm):
    steps = [*letters("ab"), [TOKENIZER.end_id], *letters("cd")]

    class Free(Spelling):
        def accept(self, token_id):
            self.steps.pop(0)

        def copy(self):
            return Free(*self.steps)

    events = alone(lm, request(constraint=Free(*steps), stop_at_end=True))
    assert text_of(events) == "ab"
    assert events[-1].reason == "stop"
    assert events[-1].new_tokens == 3


def test_counts_of_the_last_event_add_up(lm):
    one = request(21, thinking=THINKING["delta"], max_new_tokens=7)
    events = alone(lm, one)
    last = events[-1]
    assert (last.prompt_tokens, last.new_tokens, last.reason) == (21, 7, "length")
    assert last.loops == sum(e.loops for e in events[:-1])
    with torch.inference_mode():
        out = lm.model(torch.tensor([one.token_ids]), 6, halting="delta", threshold=0.45)
    assert last.prompt_loops == int(out.loops.sum())


# What fails, fails alone


def test_a_constraint_that_fails_ends_its_own_request_alone(lm):
    good = request(12, seed=1, thinking=THINKING["gate"])
    bad = request(12, seed=2, constraint=Spelling([1], fails=True), choices=2)
    empty = request(12, seed=3, constraint=Spelling([]))
    ours, theirs, last = run(ticker_of(lm), [good, bad, empty])
    assert written(ours) == written(alone(lm, good))
    assert [(e.reason, e.error) for e in theirs] == [("error", "RuntimeError: no grammar")] * 2
    assert last[-1].reason == "error"
    assert "allows no token" in last[-1].error


def test_a_constraint_that_cannot_be_copied_ends_its_own_request_alone(lm):
    class Single(Spelling):
        def copy(self):
            raise RuntimeError("there is but one")

    with Engine(lm, EngineSettings(cache_bytes=1 << 22)) as engine:
        bad = engine.submit(request(constraint=Single([1]), choices=2))
        assert [e.error for e in bad] == ["RuntimeError: there is but one"] * 2
        assert list(engine.submit(request()))[-1].reason == "length"


def thresholds(halting, count):
    """Requests under one kind of rule, each with a threshold of its own."""
    middle = THINKING[halting].threshold
    at = [middle * (0.5 + number / count / 2) for number in range(count)]
    kinds = [Thinking(loops=6, halting=halting, threshold=threshold) for threshold in at]
    return [
        request(9, seed=number, max_new_tokens=3, thinking=thinking)
        for number, thinking in enumerate(kinds)
    ]


def test_thresholds_of_requests_long_gone_are_forgotten(lm):
    ticker = ticker_of(lm)
    rules = ticker.passes.rules
    for one in thresholds("kl", 5):
        run(ticker, [one])
        assert len(rules.kept) == 1


@pytest.mark.parametrize("halting", ["kl", "act"])
def test_rules_of_one_kind_are_asked_together_whatever_their_thresholds(lm, halting, monkeypatch):
    kind, asked = HALTING[halting], []
    real = kind.decide

    def decide(self, before, *rest):
        asked.append(len(before))
        return real(self, before, *rest)

    requests = thresholds(halting, 4)
    expected = [written(alone(lm, one)) for one in requests]
    assert len({loops for one in expected for _, _, loops, *_ in one}) > 1
    monkeypatch.setattr(kind, "decide", decide)
    ticker, calls = ticker_of(lm), []
    for some in ([replace(requests[0], choices=4)], requests):
        asked.clear()
        events = run(ticker, some)
        calls.append(len(asked) / ticker.counts.ticks)
    assert [written(one) for one in events] == expected
    assert calls[1] < 1.5 * calls[0]
    memory = ticker.passes.rules.memories
    assert list(memory) == [kind]
    assert len(memory[kind][0]) == len(ticker.passes.h)


def test_a_tick_that_fails_ends_those_in_flight_and_the_engine_goes_on(lm, monkeypatch, caplog):
    with Engine(lm, EngineSettings(cache_bytes=1 << 22, budget=2)) as engine:
        real, at = engine._ticker.passes.run, []

        def run(rows, loops, *, through):
            at.append(len(rows))
            if len(at) == 4:
                raise RuntimeError("out of memory")
            return real(rows, loops, through=through)

        monkeypatch.setattr(engine._ticker.passes, "run", run)
        one = request(9, thinking=Thinking(loops=3))
        failing = [engine.submit(one), engine.submit(one)]
        waiting = engine.submit(one)
        for submission in failing:
            *_, last = submission
            assert (last.reason, last.error) == ("error", "RuntimeError: out of memory")
        assert written(list(waiting)) == written(alone(lm, one))
        assert "a tick failed" in caplog.text
    statistics = engine.statistics()
    assert statistics.pages_free + statistics.pages_cached == statistics.pages_total


def test_an_engine_that_fails_itself_tells_everybody_and_takes_no_more(lm, monkeypatch, caplog):
    engine = Engine(lm, EngineSettings(cache_bytes=1 << 22, budget=2))

    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(engine._ticker, "tick", broken)
    monkeypatch.setattr(engine._ticker, "fail", broken)
    submissions = [engine.submit(request(choices=2)) for _ in range(3)]
    engine.start()
    for submission in submissions:
        assert [e.reason for e in submission] == ["error"] * 2
    engine.stop()
    with pytest.raises(EngineStopped):
        engine.submit(request())
    assert "the engine failed" in caplog.text


def test_logits_that_are_not_numbers_are_an_error(monkeypatch):
    lm = model_of()
    monkeypatch.setattr(
        lm.model, "readout", lambda y: torch.full((*y.shape[:-1], TOKENIZER.vocab_size), torch.nan)
    )
    events = alone(lm, request())
    assert [(e.reason, e.error) for e in events] == [("error", "the model's logits are not finite")]


@pytest.mark.parametrize("chosen", [2, 8])
def test_a_state_that_grows_past_all_numbers_ends_its_request_alone(chosen):
    lm = model_of(injection="free", experts=8, experts_per_token=chosen)
    with torch.no_grad():
        lm.model.core.injection.diagonal.fill_(1.3)
    with Engine(lm) as engine:
        *_, last = engine.submit(request(9, thinking=Thinking(loops=500)))
        *_, other = engine.submit(request(9, thinking=Thinking(loops=2)))
    assert (last.reason, last.error) == ("error", "the model's logits are not finite")
    assert other.reason == "length"


@pytest.mark.parametrize("name", ["embed", "prelude.0", "core.layers.0", "coda.0.attention"])
def test_a_model_with_a_new_hook_is_an_error_until_it_is_gone(name):
    lm = model_of()
    ticker = ticker_of(lm)
    if not ticker.passes.native:
        pytest.skip("torch calls every module, hooks included")
    expected = written(run(ticker, [request()])[0])
    hook = lm.model.get_submodule(name).register_forward_hook(lambda *_: None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="make a new engine"):
            run(ticker, [request()])
        ticker.fail("it was changed")
    hook.remove()
    assert written(run(ticker, [request()])[0]) == expected


@pytest.mark.parametrize("change", [torch.nn.Module.bfloat16, quantise])
def test_a_model_that_was_cast_asks_for_a_new_engine(change):
    lm = model_of()
    ticker = ticker_of(lm)
    run(ticker, [request()])
    change(lm.model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="make a new engine"):
            run(ticker, [request()])
        ticker.fail("it was changed")
    assert written(run(ticker_of(lm), [request()])[0])


def test_weights_that_move_write_the_same_and_new_ones_are_read():
    lm = model_of()
    ticker = ticker_of(lm, prefix_sharing=False)
    expected = written(run(ticker, [request()])[0])
    for parameter in lm.model.parameters():
        parameter.data = parameter.data.clone()
    assert written(run(ticker, [request()])[0]) == expected
    layer = lm.model.core.layers[0].attention.out
    layer.weight = torch.nn.Parameter(-layer.weight.detach())
    found = written(run(ticker, [request()])[0])
    assert found != expected
    assert found == written(alone(lm, request()))


def replaced(lm):
    layer = lm.model.core.layers[0].attention.out
    layer.weight = torch.nn.Parameter(-layer.weight.detach())


@torch.no_grad()
def written_in_place(lm):
    lm.model.core.layers[0].attention.out.weight.neg_()


@torch.no_grad()
def learned_exit(lm):
    lm.model.core.gate.bias.add_(3.0)


@pytest.mark.parametrize("name", ["gqa, experts", "lora, linear injection"])
@pytest.mark.parametrize("change", [replaced, written_in_place, learned_exit])
def test_nothing_that_other_weights_have_read_is_found(name, change):
    lm = model_of(name)
    ticker = ticker_of(lm)
    one = request(40, max_new_tokens=3, thinking=THINKING["gate"])
    first, found = run(ticker, [one])[0], run(ticker, [one])[0]
    assert found[-1].cached_tokens == 32
    change(lm)
    events, again = run(ticker, [one])[0], run(ticker, [one])[0]
    assert events[-1].cached_tokens == 0
    assert again[-1].cached_tokens == 32
    assert written(first) != written(events) == written(again) == written(alone(lm, one))


def test_what_weights_that_are_gone_still_write_is_never_found(lm):
    lm, started = model_of(), []
    ticker = ticker_of(lm, budget=1)  # the second waits until the first has ended
    one = request(20, max_new_tokens=20)
    with torch.inference_mode():
        ticker.add(one, started.append)
        while not any(isinstance(event, TokenEvent) for event in started):
            ticker.tick()
    written_in_place(lm)
    (waited,) = run(ticker, [replace(one, max_new_tokens=2)])
    assert isinstance(started[-1], FinishEvent)
    assert waited[-1].cached_tokens == 0
    assert written(waited) == written(alone(lm, replace(one, max_new_tokens=2)))


def test_only_prompts_that_are_looked_up_count_as_such(lm):
    one = request(20, max_new_tokens=1)
    unseen = [
        replace(one, prompt_logprobs=True),
        replace(one, thinking=Thinking(loops=3, cache_policy="last")),
    ]
    ticker = ticker_of(lm)
    run(ticker, [one, *unseen])
    assert (ticker.counts.prompt_tokens, ticker.counts.looked_up_tokens) == (60, 20)
    ticker = ticker_of(lm, prefix_sharing=False)
    run(ticker, [one])
    assert (ticker.counts.prompt_tokens, ticker.counts.looked_up_tokens) == (20, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_likeliest_are_those_of_a_stable_sort(dtype):
    generator = torch.Generator().manual_seed(0)
    for turn in range(60):
        logprobs = torch.randn(97, generator=generator).to(dtype).float()
        if turn % 3:
            logprobs = (logprobs * 2).round()  # ties
        if turn % 2:
            logprobs[torch.rand(97, generator=generator) < 0.9] = -torch.inf
        values, ids = logprobs.sort(descending=True, stable=True)
        for count in (0, 1, 5, 20, 97, 200):
            expected = list(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
            assert list(likeliest(logprobs, count)) == expected


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.3, top_k=40, seed=5), GREEDY])
def test_choices_write_what_the_rows_of_generate_write(lm, sampling):
    one = request(9, choices=3, sampling=sampling, max_new_tokens=8)
    new = generate(
        lm.model,
        torch.tensor([one.token_ids] * 3),
        max_new_tokens=one.max_new_tokens,
        sampling=sampling,
    )
    rows = torch.stack([token.token_ids for token in new], 1).tolist()
    events = alone(lm, one)
    for choice, row in enumerate(rows):
        assert [event[1] for event in written(events) if event[0] == choice] == row


def test_without_a_seed_each_text_is_another(lm):
    one = request(max_new_tokens=16, sampling=Sampling(temperature=2.0))
    first, second = (written(alone(lm, one)) for _ in range(2))
    assert first != second


def test_logprobs_are_those_of_scores_where_the_model_has_ids_without_text():
    lm = model_of(vocab_size=TOKENIZER.vocab_size + 50)
    one = request(12, max_new_tokens=4)
    tokens = [event for event in alone(lm, one) if isinstance(event, TokenEvent)]
    written_ids = tuple(event.token_id for event in tokens)
    asked = [Continuation(one.token_ids, written_ids)]
    (found,) = score(lm.model, asked, one.thinking, vocab_size=TOKENIZER.vocab_size)
    assert found.log_likelihood == pytest.approx(sum(e.logprob for e in tokens), abs=1e-4)
    assert found.greedy


def test_a_listener_that_fails_loses_its_request_alone(lm, caplog):
    with Engine(lm, EngineSettings(cache_bytes=1 << 22)) as engine:
        one = request(9, max_new_tokens=30)
        bad, good = engine.submit(one), engine.submit(one)

        def listener(event):
            raise RuntimeError("the loop is closed")

        bad.add_listener(listener)
        assert list(bad)[-1].reason in ("cancelled", "length")
        assert written(list(good)) == written(alone(lm, one))


# The thread, and callers on others


def test_listeners_and_readers_get_every_event_in_order(lm):
    with Engine(lm, EngineSettings(cache_bytes=1 << 22)) as engine:
        submission, early, late = engine.submit(request(choices=2)), [], []
        submission.add_listener(early.append)
        read = list(submission)
        submission.add_listener(late.append)
        assert early == late == read == list(submission)
        assert submission.finished


def test_a_listener_of_a_request_that_could_not_start_may_wait_for_one_who_cancels(lm):
    class Single(Spelling):
        def copy(self):
            raise RuntimeError("there is but one")

    engine, waited = Engine(lm, EngineSettings(cache_bytes=1 << 22)), []
    bad, other = engine.submit(request(constraint=Single([1]))), engine.submit(request())

    def listener(event):
        canceller = threading.Thread(target=other.cancel, daemon=True)
        canceller.start()
        canceller.join(5)
        waited.append(not canceller.is_alive())

    bad.add_listener(listener)
    with engine:
        assert list(bad)[-1].reason == "error"
        assert list(other)[-1].reason in ("cancelled", "length")
    assert waited == [True]


def test_a_full_queue_refuses_and_says_so(lm):
    engine = Engine(lm, EngineSettings(cache_bytes=1 << 22, max_waiting=2))
    accepted = [engine.submit(request()) for _ in range(2)]
    with pytest.raises(QueueFull, match="max_waiting=2 must not be passed, and 2 requests wait"):
        engine.submit(request())
    engine.start()
    assert all(list(submission)[-1].reason == "length" for submission in accepted)
    engine.stop()


def test_requests_together_are_all_taken_or_none_and_where_none_waits_all(lm):
    engine = Engine(lm, EngineSettings(cache_bytes=1 << 22, max_waiting=2))
    with pytest.raises(InputError, match="must be below vocab_size"):
        engine.submit_all([request(), request(token_ids=(99999,))])
    accepted = engine.submit_all([request() for _ in range(3)])
    with pytest.raises(QueueFull):
        engine.submit_all([request()])
    engine.start()
    assert all(list(submission)[-1].reason == "length" for submission in accepted)
    engine.stop()


def test_no_document_is_empty_and_where_nothing_else_may_be_drawn_it_is(lm):
    end = lm.tokenizer.end_id
    fields = {"token_ids": (end,), "stop_at_end": True, "max_new_tokens": 4}
    for seed in range(30):
        sampling = Sampling(temperature=50.0, seed=seed)
        events = alone(lm, request(**fields, sampling=sampling))
        first = next(event for event in events if isinstance(event, TokenEvent))
        assert first.token_id != end
    only_end = alone(lm, request(**fields, constraint=Spelling([end], [end])))
    assert only_end[0].token_id == end


def test_a_prompt_can_be_read_without_a_token_drawn(lm):
    whole = prompt(lm.model.config.max_length, 3)
    one = request(token_ids=whole, max_new_tokens=0, choices=2, prompt_logprobs=True)
    ticker = ticker_of(lm)
    (events,) = run(ticker, [one])
    read, *ends = events
    assert isinstance(read, PromptEvent)
    assert len(read.logprobs) == len(whole)
    assert [(end.choice, end.reason, end.new_tokens) for end in ends] == [
        (0, "length", 0),
        (1, "length", 0),
    ]
    with_one = request(token_ids=whole[:-1], max_new_tokens=1, prompt_logprobs=True)
    assert run(ticker, [with_one])[0][0].logprobs == read.logprobs[:-1]


@pytest.mark.parametrize("drain", [True, False])
def test_stopping_ends_everything_and_leaves_no_thread(lm, drain):
    engine = Engine(lm, EngineSettings(cache_bytes=1 << 22, budget=2))
    engine.start()
    submissions = [engine.submit(request(max_new_tokens=20, seed=seed)) for seed in range(5)]
    engine.stop(drain=drain)
    engine.stop()
    reasons = [list(submission)[-1].reason for submission in submissions]
    assert set(reasons) == {"length"} if drain else "cancelled" in reasons
    assert all(thread.name != "openmythos-engine" for thread in threading.enumerate())
    with pytest.raises(EngineStopped):
        engine.submit(request())
    with pytest.raises(EngineStopped):
        engine.start()
    statistics = engine.statistics()
    assert statistics.running == statistics.waiting == statistics.pages_used == 0


def test_stopping_an_engine_that_never_ran_ends_what_waits(lm):
    engine = Engine(lm, EngineSettings(cache_bytes=1 << 22))
    submission = engine.submit(request(choices=2))
    engine.stop()
    assert [e.reason for e in submission] == ["cancelled"] * 2


def test_cancelling_twice_or_late_is_harmless(lm):
    with Engine(lm, EngineSettings(cache_bytes=1 << 22)) as engine:
        submission = engine.submit(request(max_new_tokens=100))
        submission.cancel()
        submission.cancel()
        assert list(submission)[-1].reason == "cancelled"
        submission.cancel()
        other = engine.submit(request())
        assert list(other)[-1].reason == "length"
        other.cancel()
        assert list(other)[-1].reason == "length"


def test_the_pages_that_a_request_needs_are_told_for_any_number_of_tokens(lm):
    engine = Engine(lm, EngineSettings(cache_bytes=1 << 22))
    one = request(20, max_new_tokens=30, choices=2)
    longer = replace(one, max_new_tokens=60)
    assert engine.pages_needed(one) == engine._ticker._job(one, 0).pages
    assert engine.pages_needed(one, 60) == engine.pages_needed(longer) > engine.pages_needed(one)
    engine.stop()


def test_tables_of_choices_that_share_a_long_prompt_count_as_pages(lm):
    job = ticker_of(lm)._job(request(100, max_new_tokens=2, choices=16), 0)
    table = Table(Pages(1), job.layout, 101, 0)
    tables = 16 * (table.addresses.nbytes + table.exits.nbytes)
    of_keys = replace(job.layout, page_bytes=None)
    without = of_keys.pages(100, 1) + 15 * of_keys.fork_pages(100, 1)
    assert (job.pages - without) * page_bytes(lm.model) >= tables


REFUSED = [
    ({"token_ids": (1, 999)}, {}, "token_ids holds 999, must be below vocab_size=270"),
    ({"max_new_tokens": 200}, {}, "max_new_tokens=200 after a prompt of 9 tokens must end by"),
    ({"max_new_tokens": 100}, {"pages": 4}, "max_new_tokens=100 after a prompt of 9 tokens needs"),
    ({"choices": 17}, {}, "choices=17 must be at most 16"),
    ({"draft_loops": 3}, {}, "draft_loops=3 must be below loops=3"),
    ({"thinking": Thinking(loops=0)}, {}, "loops=0 must be 1 or more"),
    ({"thinking": Thinking(halting="gate", threshold=2.0)}, {}, "threshold=2.0 must be above 0"),
]


@pytest.mark.parametrize(("fields", "settings", "sentence"), REFUSED)
def test_what_can_never_be_served_is_refused_at_once(lm, fields, settings, sentence):
    with pytest.raises(InputError) as error:
        ticker_of(lm, **settings).prepare(request(**fields))
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("name", ["halting", "cache_policy"])
def test_names_that_the_model_does_not_know_are_refused(lm, name):
    thinking = Thinking()
    object.__setattr__(thinking, name, "what")  # as from a caller whose types nobody checks
    with pytest.raises(InputError, match=f"{name}='what' must be one of"):
        ticker_of(lm).prepare(request(thinking=thinking))


@pytest.mark.parametrize("name", ["cache_bytes", "budget", "chunk", "max_waiting"])
def test_settings_below_one_are_refused(lm, name):
    with pytest.raises(InputError, match=f"{name}=0 must be an integer of 1 or more"):
        EngineSettings(**{name: 0})
    with pytest.raises(InputError, match="cache_bytes=1 must hold at least one page"):
        Engine(lm, EngineSettings(cache_bytes=1))


# Load


def load_test(lm, count, *, deterministic, seed):
    """Many requests, a third of them cancelled at some tick from 0 to 40; survivors as alone."""
    chance = random.Random(seed)
    kinds = list(THINKING.values())[:4]
    requests = [
        request(
            chance.randrange(1, 50),
            seed=chance.randrange(3),  # some begin alike
            max_new_tokens=chance.randrange(1, 12),
            thinking=chance.choice(kinds),
            sampling=chance.choice([GREEDY, Sampling(temperature=1.2, seed=7)]),
            choices=chance.choice([1, 1, 1, 2]),
            draft_loops=chance.choice([None, None, 1, 2]),
            priority=chance.choice([0, 0, 1]),
        )
        for _ in range(count)
    ]
    ticker = ticker_of(lm, pages=300, budget=12, chunk=7, deterministic=deterministic)
    events, works, cancel_at = [], [], {}
    waiting = list(enumerate(requests))
    with torch.inference_mode():
        for tick in range(100_000):
            while waiting and chance.random() < 0.5:
                number, one = waiting.pop(0)
                events.append([])
                works.append(ticker.add(one, events[-1].append))
                if chance.random() < 0.35:
                    cancel_at[number] = tick + chance.randrange(41)
            for number in [n for n, at in cancel_at.items() if at <= tick]:
                del cancel_at[number]
                for _ in range(2):  # the second without effect
                    if not works[number].finished:
                        ticker.end(works[number], "cancelled")
            ticker.tick()
            ticker.scheduler.check()
            if not waiting and ticker.idle:
                break
    ticker.scheduler.check()
    assert ticker.idle
    assert ticker.pages.used == ticker.pages.promised == 0
    assert ticker.pages.free + ticker.pages.cached == ticker.pages.total
    assert ticker.counts.cached_tokens or count < 50  # or sharing was not tried
    survivors = 0
    for one, heard in zip(requests, events, strict=True):
        ends = [e for e in heard if isinstance(e, FinishEvent)]
        assert sorted(e.choice for e in ends) == list(range(one.choices))
        assert isinstance(heard[-1], FinishEvent)
        assert {e.reason for e in ends} <= {"length", "cancelled"}
        if all(e.reason == "length" for e in ends):
            survivors += 1
            expected = alone(lm, one, deterministic=deterministic)
            assert written(heard, exact=deterministic) == written(expected, exact=deterministic)
    assert count / 3 < survivors < count


def test_survivors_of_random_cancellations_write_what_they_write_alone(lm):
    for seed in (1, 2):
        load_test(lm, 10, deterministic=True, seed=seed)


@pytest.mark.soak
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_survivors_of_many_random_cancellations_write_what_they_write_alone(name, deterministic):
    for seed in (1, 2):
        load_test(model_of(name), 150, deterministic=deterministic, seed=seed)


@pytest.mark.parametrize("tick", [0, 3, 9, 20, 40])
def test_a_request_cancelled_at_any_tick_leaves_the_others_as_they_are(lm, tick):
    ticker, events = ticker_of(lm, budget=4), []
    other = request(12, thinking=THINKING["delta"], max_new_tokens=8)
    with torch.inference_mode():
        victim = ticker.add(request(40, seed=3, choices=2, max_new_tokens=9), lambda event: None)
        ticker.add(other, events.append)
        for at in range(10_000):
            if at == tick and not victim.finished:
                ticker.end(victim, "cancelled")
                ticker.scheduler.check()
            if ticker.idle:
                break
            ticker.tick()
    assert ticker.pages.used == 0
    assert written(events) == written(alone(lm, other))


def callers(lm, count, *, threads):
    """Threads that submit, read and cancel at once, on a running engine."""
    settings = EngineSettings(cache_bytes=1 << 20, budget=12, chunk=7)
    failures, before = [], threading.active_count()

    def call(number):
        try:
            chance = random.Random(number)
            for turn in range(count):
                one = request(
                    chance.randrange(1, 30),
                    seed=turn % 3,
                    max_new_tokens=chance.randrange(1, 10),
                    thinking=chance.choice(list(THINKING.values())),
                    choices=chance.choice([1, 2]),
                )
                submission = engine.submit(one)
                if cancels := chance.random() < 0.4:
                    heard = iter(submission)
                    for _ in range(chance.randrange(3)):
                        next(heard, None)
                    submission.cancel()
                ends = [e for e in submission if isinstance(e, FinishEvent)]
                assert len(ends) == one.choices
                if not cancels:
                    with lock:
                        kept.append((one, list(submission)))
        except Exception as error:  # noqa: BLE001 - to be shown on the test's thread
            failures.append(error)

    lock, kept = threading.Lock(), []
    with Engine(lm, settings) as engine:
        workers = [threading.Thread(target=call, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failures
    assert threading.active_count() <= before
    statistics = engine.statistics()
    assert statistics.running == statistics.waiting == statistics.pages_used == 0
    assert statistics.pages_free + statistics.pages_cached == statistics.pages_total
    for one, events in kept:
        assert written(events) == written(alone(lm, one))


def test_callers_on_many_threads_get_what_they_would_alone(lm):
    callers(lm, 3, threads=3)


@pytest.mark.soak
def test_many_callers_on_many_threads_get_what_they_would_alone(lm):
    callers(lm, 40, threads=8)


@pytest.mark.parametrize("halting", ["none", "gate", "delta"])
@pytest.mark.parametrize("draft_loops", [None, 2])
@pytest.mark.parametrize("cache_policy", ["per_loop", "last"])
def test_loops_run_at_once_are_those_run_tick_by_tick(
    lm, draft_loops, cache_policy, halting, monkeypatch
):
    if draft_loops and cache_policy == "last":
        pytest.skip("refused: drafts need every loop's slot")
    threshold = None if halting == "none" else THINKING[halting].threshold
    thinking = Thinking(loops=7, cache_policy=cache_policy, halting=halting, threshold=threshold)
    asked = [
        request(9, max_new_tokens=12, thinking=thinking, draft_loops=draft_loops),
        request(4, seed=2, max_new_tokens=5, thinking=replace(thinking, loops=3)),
    ]
    quick, slow = ticker_of(lm), ticker_of(lm)
    expected = run(quick, asked)
    if quick.passes.native:
        assert quick.counts.ticks < quick.counts.row_loops / 2
    monkeypatch.setattr(Passes, "may_run_ahead", lambda *_: False)
    found = run(slow, asked)
    for one, other in zip(found, expected, strict=True):
        assert written(one) == written(other)
    assert slow.counts.row_loops == quick.counts.row_loops
    assert slow.counts.ticks > quick.counts.ticks or not quick.passes.native


def test_a_script_that_fails_beside_a_running_engine_ends():
    script = """
from tests.tiny import tiny
from openmythos.inference.engine import Engine
from openmythos.inference.language_model import LanguageModel
from openmythos.training.tokenizer import Tokenizer
tokenizer = Tokenizer.train(["abc " * 50], vocab_size=260)
Engine(LanguageModel(tiny(vocab_size=260), tokenizer)).start()
raise SystemExit("failed")
"""
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=120
    )
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (1, "failed")


def test_rows_of_whatever_end_leave_their_seats(lm):
    # Where a seat were kept, states and memories of the rules would grow for ever.
    ticker = ticker_of(lm)
    one = request(18, max_new_tokens=16, thinking=THINKING["delta"], draft_loops=1)
    with torch.inference_mode():
        for tick in range(12):
            cancelled = ticker.add(replace(one, choices=2), lambda event: None)
            for _ in range(tick):
                ticker.tick()
            if not cancelled.finished:
                ticker.end(cancelled, "cancelled")
    (events,) = run(ticker, [one])
    run(ticker, [replace(one, stop=(end,)) for end in set(text_of(events))])  # amid drafts
    passes = ticker.passes
    assert sorted(passes.seats) == list(range(1, len(passes.h)))


@pytest.mark.parametrize("length", [16, 32])
def test_of_a_prompt_that_is_kept_whole_the_last_page_is_read_again(lm, length):
    ticker, one = ticker_of(lm), request(length)
    first, second = run(ticker, [one])[0], run(ticker, [one])[0]
    assert second[-1].cached_tokens == length - 16
    assert written(first) == written(second)


def test_what_a_seat_remembers_of_a_row_before_says_nothing_of_the_next():
    lm = model_of(h0="e")
    one = request(9, thinking=Thinking(loops=6, halting="delta", threshold=50.0))
    ticker = ticker_of(lm, prefix_sharing=False)
    for _ in range(2):  # all loops are quiet: two of them, and one more to show the state
        (events,) = run(ticker, [one])
        assert {e.loops for e in events if isinstance(e, TokenEvent)} == {3}


def test_those_who_wait_for_admission_count_in_the_queue(lm):
    engine = Engine(lm, EngineSettings(cache_bytes=1 << 22, budget=1, max_waiting=2))
    accepted = engine.submit_all([request() for _ in range(3)])
    running, go = threading.Event(), threading.Event()

    def listener(event):  # on the engine's thread, which has taken all three
        running.set()
        go.wait(60)

    accepted[0].add_listener(listener)
    with engine:
        assert running.wait(60)
        try:
            with pytest.raises(QueueFull, match="2 requests wait already"):
                engine.submit(request())
        finally:
            go.set()
        assert all(list(submission)[-1].reason == "length" for submission in accepted)


def test_an_engine_that_drains_can_still_be_stopped_at_once(lm):
    engine = Engine(lm, EngineSettings(cache_bytes=1 << 22))
    submission, go = engine.submit(request(max_new_tokens=50)), threading.Event()
    submission.add_listener(lambda event: go.wait(60))
    engine.start()
    engine._stopping = "drain"  # as by a `stop` on another thread, which waits
    threading.Timer(0.2, go.set).start()
    engine.stop(drain=False)
    assert list(submission)[-1].reason == "cancelled"
