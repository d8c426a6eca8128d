"""What the lens shows is what the model's own states say, decoded one by one."""

import pytest
import torch
from fake_engine import language_model
from tiny import tiny
from torch.testing import assert_close

from openmythos.inference.language_model import LanguageModel
from openmythos.inference.playground.lens import look
from openmythos.inference.thinking import Thinking

TEXT = "The mice ran up the clock"
EXITS = {"delta": 0.45, "gate": 0.5}
"""Thresholds at which tokens of the tiny model leave at different loops."""


@pytest.fixture(scope="module")
def lm():
    return language_model()


@pytest.fixture(scope="module")
def ids(lm):
    return [lm.tokenizer.end_id, *lm.tokenizer.encode(TEXT)]


def logprobs_of(lm, logits):
    return logits[0, :, : lm.tokenizer.vocab_size].log_softmax(-1)


@torch.no_grad()
def expect(lens, loop, place, logprobs, following):
    """Compare one cell with the log-probabilities of its place, counted by hand."""
    likely = sorted(enumerate(logprobs.exp().tolist()), key=lambda one: -one[1])[:3]
    assert lens.top[loop, place].tolist() == [token for token, _ in likely]
    for p, (_, wanted) in zip(lens.probabilities[loop, place].tolist(), likely, strict=True):
        assert p == pytest.approx(wanted, abs=1e-5)
    entropy = -float((logprobs.exp() * logprobs).sum())
    assert float(lens.entropy[loop, place]) == pytest.approx(entropy, abs=1e-4)
    if following is None:
        assert lens.losses[loop, place].isnan()
    else:
        assert float(lens.losses[loop, place]) == pytest.approx(
            -float(logprobs[following]), abs=1e-4
        )


def test_without_exits_row_t_is_a_whole_pass_of_so_many_loops(lm, ids):
    lens = look(lm, ids, thinking=Thinking(loops=4), top=3)
    assert lens.loops.tolist() == [4] * len(ids)
    for loop in range(4):
        with torch.no_grad():
            logprobs = logprobs_of(lm, lm.model(torch.tensor([ids]), loop + 1).logits)
        for place, following in enumerate([*ids[1:], None]):
            expect(lens, loop, place, logprobs[place], following)


@pytest.mark.parametrize("rule", EXITS)
def test_with_exits_the_last_row_is_what_the_token_is_drawn_from(lm, ids, rule):
    thinking = Thinking(loops=6, halting=rule, threshold=EXITS[rule])
    lens = look(lm, ids, thinking=thinking, top=3)
    with torch.no_grad():
        out = lm.model(
            torch.tensor([ids]),
            6,
            halting=rule,
            threshold=EXITS[rule],
            return_states=True,
            return_routing=True,
        )
        decoded = [logprobs_of(lm, lm.model.decode(h)) for h in out.states]
    final = logprobs_of(lm, out.logits)
    assert lens.loops.tolist() == out.loops[0].tolist()
    assert len(set(lens.loops.tolist())) > 1  # there is something to tell apart
    for place, following in enumerate([*ids[1:], None]):
        taken = int(lens.loops[place])
        for loop in range(taken - 1):
            expect(lens, loop, place, decoded[loop][place], following)
        expect(lens, taken - 1, place, final[place], following)
    assert torch.equal(lens.experts, out.routing[:, :, 0])


def test_the_last_row_of_a_rule_that_mixes_states_is_their_mixture():
    tokenizer = language_model().tokenizer
    lm = LanguageModel(tiny(vocab_size=tokenizer.vocab_size, learned_act=True), tokenizer)
    ids = [tokenizer.end_id, *tokenizer.encode(TEXT)]
    lens = look(lm, ids, thinking=Thinking(loops=5, halting="act", threshold=0.9), top=3)
    with torch.no_grad():
        out = lm.model(torch.tensor([ids]), 5, halting="act", threshold=0.9, return_states=True)
    final, states = logprobs_of(lm, out.logits), logprobs_of(lm, lm.model.decode(out.states[-1]))
    assert (final - states).abs().max() > 1e-3  # it is another distribution
    for place, following in enumerate([*ids[1:], None]):
        expect(lens, int(lens.loops[place]) - 1, place, final[place], following)


def test_a_dense_core_has_no_experts_and_one_token_no_loss():
    tokenizer = language_model().tokenizer
    lm = LanguageModel(tiny(vocab_size=tokenizer.vocab_size, experts=0), tokenizer)
    lens = look(lm, [tokenizer.end_id], thinking=Thinking(loops=2), top=10_000)
    assert lens.experts is None
    assert lens.losses.isnan().all()
    assert lens.top.shape == (2, 1, tokenizer.vocab_size)  # no more than there are
    assert_close(lens.probabilities.sum(-1), torch.ones(2, 1))
