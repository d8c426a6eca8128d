"""Loops that follow need: the oracle, the rank correlation, and what is said of them."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import tiny
from torch.testing import assert_close

from openmythos import OpenMythos, Tokenizer
from openmythos.evidence import graves_exits, text_exits
from openmythos.evidence.adaptive_computation import (
    QUICK,
    _cheapest,
    conclude,
    draw_figure,
    run,
    run_twin,
)
from openmythos.evidence.chain_exits import first_lasting, spearman
from openmythos.evidence.forced_routing import windows_of
from openmythos.evidence.gate_study import GateFit, shown_chains
from openmythos.inference.language_model import LanguageModel
from openmythos.model.transformer import cross_entropy
from openmythos.training.evaluate import Reading, evaluate, tokenised


def test_the_oracle_stops_where_a_token_becomes_right_for_good():
    right = torch.tensor(
        [
            [0, 1, 0, 1, 0],
            [1, 0, 0, 1, 0],
            [1, 1, 0, 1, 1],
        ]
    ).bool()
    assert first_lasting(right.unsqueeze(1)).tolist() == [[2, 3, 1, 1, 3]]


def test_rank_correlation_shares_the_ranks_of_ties():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([4, 3, 2, 1], [10, 20, 30, 40]) == pytest.approx(-1)
    # by hand: ranks 1.5 1.5 3 4 and 1 2 3.5 3.5
    ranks = np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 3.5, 3.5])[0, 1]
    assert spearman([5, 5, 6, 7], [1, 2, 3, 3]) == pytest.approx(ranks)


def test_test_chains_have_one_length_and_every_number_of_hops():
    chains = shown_chains(QUICK)
    assert chains.token_ids.shape == (20 * QUICK.chains, 41)
    assert sorted(chains.hops[:, -1]) == sorted([*range(1, 21)] * QUICK.chains)


def test_a_study_runs_and_is_concluded_from(tmp_path):
    training = dataclasses.replace(
        QUICK.training, hidden_size=16, feed_forward_size=16, steps=2, loops=(2, 3)
    )
    gate = GateFit(steps=2, cost=0.05)
    study = dataclasses.replace(
        QUICK,
        training=training,
        budget=4,
        gates=(gate,) * 3,
        exit_steps=2,
        held_out=1,
        chains=1,
    )
    result = run(study, tmp_path, lambda line: None)
    assert (tmp_path / "reasoner" / "config.json").is_file()
    section = conclude({"hops/seed-0": result})
    assert "rank correlation" in section.sentences[0]
    left, right = draw_figure({"hops/seed-0": result, "hops/seed-1": result}).axes
    assert "gate at 0.5 to 0.999" in [text.get_text() for text in left.get_legend().get_texts()]
    assert left.texts[0].get_text() == "0.5"
    assert len(right.get_legend().get_texts()) == len(right.get_lines()) == 2
    wanted = {e.what: e.met for e in section.expectations}
    assert not wanted["rank correlation of loops and hops"]  # an untrained model's
    assert result["before"]["random"]["mean_loops"] == pytest.approx(
        result["before"]["chosen"]["mean_loops"]
    )
    twin = run_twin(study, tmp_path / "twin", lambda line: None)
    assert set(twin["rules"]) == {"gate", "delta", "kl"}
    section = conclude({"hops/seed-0": result, "twin/seed-0": twin})
    said = " ".join(section.sentences)
    assert "Full depth, 4 loops, is more than these chains need" in said
    assert "A twin that trains on alike, without exits" in said
    assert "| fixed depth, enough | alike, no exits |" in section.tables[0]
    assert "With a gate of its own it takes" in said
    assert "| gate, as chosen | alike, no exits |" in section.tables[0]


def exits(worth):
    point = {"bits_per_byte": 1.2, "mean_loops": 2.0}
    fixed = {str(n): {"bits_per_byte": 1.2 + worth / n, "mean_loops": n} for n in text_exits.FIXED}
    fixed["8"]["bits_per_byte"] = 1.2
    rules = {"gate": [{"threshold": 0.5, **point}]}
    return {"fixed": fixed, "rules": rules, "gate": point, "random": point, "oracle": point}


@pytest.mark.parametrize(("worth", "said"), [(0.2, "are worth 0.200"), (0.01, "no depth")])
def test_text_is_asked_first_whether_depth_is_worth_anything(worth, said):
    section = conclude({"text": exits(worth)})
    assert said in section.sentences[0]
    assert ("With its gate" in section.sentences[0]) == (worth > text_exits.WORTH)
    assert "| gate at 0.5 | 1.2000 | 2.00 |" in section.tables[0]
    assert any("the held-out messages of odd number, in windows of 512" in n for n in section.notes)
    assert not conclude({}).sentences


def test_exits_learnt_on_text_stand_beside_a_twin_trained_on_alike():
    point = {"bits_per_byte": 1.21, "mean_loops": 2.5}
    learnt = {"twin": {n: {**point, "mean_loops": int(n)} for n in "12468"}, "act": {"0.01": point}}
    section = conclude({"text": exits(0.2), "text-act": learnt})
    assert "1.2100 with 2.50 loops (at 0.01 nats each)" in section.sentences[1]
    assert "| act, 0.01 nats a loop, trained on | 1.2100 | 2.50 |" in section.tables[0]
    assert "| none, loops: 8, trained on | 1.2100 | 8.00 |" in section.tables[0]


def test_exits_on_text_read_the_same_tokens_and_the_oracle_leaves_at_the_first_good_loop(tmp_path):
    tokenizer = Tokenizer.train(["the cat sat on the mat and ate the rat " * 20], vocab_size=270)
    lm = LanguageModel(tiny(vocab_size=270, max_length=512), tokenizer)
    with tokenised(["the rat sat on the cat and ate the mat " * 60], tokenizer) as text:
        reader = text_exits.Reader(text, tokenizer, tokens=512)
        found = text_exits.measure(lm.model, reader, lambda _: None)
        windows = windows_of(text, text_exits.LENGTH, 512)
        full = evaluate(lm.model, text, tokenizer.token_bytes, [8], reading=Reading.of(512, 512))
    assert found["fixed"]["8"]["mean_loops"] == 8
    assert found["fixed"]["8"]["bits_per_byte"] == pytest.approx(full.bits_per_byte[0], rel=0.05)
    assert found["random"]["mean_loops"] == pytest.approx(found["gate"]["mean_loops"])
    with torch.no_grad():
        states = lm.model(windows[:, :-1], 8, return_states=True).states
        losses = torch.stack([cross_entropy(lm.model.decode(h), windows[:, 1:]) for h in states])
        assert_close(reader.losses(lm.model), losses)
    leaves = text_exits.first_good(losses)
    at = losses.gather(0, leaves.unsqueeze(0) - 1)[0]
    assert (at <= losses.amin(0) + text_exits.MARGIN).all()
    earlier = torch.arange(8).view(-1, 1, 1) < leaves - 1
    assert (losses[earlier] > (losses.amin(0) + text_exits.MARGIN).expand_as(losses)[earlier]).all()


def test_exits_learnt_jointly_are_dearer_where_a_loop_costs_more(tmp_path):
    training = graves_exits.ActTraining(
        prices=(0.0, 10.0), steps=10, sequences=2, rate=20.0, exit_bias=-1.0
    )
    study = dataclasses.replace(QUICK, chains=1)
    model = OpenMythos(
        dataclasses.replace(QUICK.training, hidden_size=16, feed_forward_size=16).config
    ).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    points = graves_exits.measure(
        model, shown_chains(study), 6, training, tmp_path, lambda line: None
    )
    assert points["10"]["mean_loops"] < points["0"]["mean_loops"] <= 6
    for name, tensor in model.state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=0)


def test_exits_are_learnt_on_text_and_the_model_given_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(text_exits, "LENGTH", 32)
    tokenizer = Tokenizer.train(["the cat sat on the mat and ate the rat " * 20], vocab_size=270)
    model = tiny(vocab_size=270, experts=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = graves_exits.ActTraining(
        prices=(0.0, 10.0), steps=10, sequences=2, rate=10.0, exit_bias=-1.0
    )
    with tokenised(["the rat sat on the cat and ate the mat " * 60], tokenizer) as text:
        reader = text_exits.Reader(text, tokenizer, tokens=512)
        untrained = text_exits.measure(model, reader, lambda _: None)["fixed"]["8"]
        learnt = text_exits.learn(model, reader, text, training, tmp_path, lambda _: None)
    assert learnt["act"]["10"]["mean_loops"] < learnt["act"]["0"]["mean_loops"] <= 8
    assert learnt["twin"]["8"]["bits_per_byte"] < untrained["bits_per_byte"]
    for name, tensor in model.state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=0)


def test_the_cheapest_point_loses_no_more_than_half_a_point():
    part = {
        "budget": 4,
        "fixed": {"1": 0.5, "2": 0.896, "3": 0.9, "4": 0.9},
        "rules": {"delta": [[0.1, 0.897, 1.5], [0.2, 0.7, 1.1]], "kl": [[0.1, 0.6, 1.2]]},
    }
    assert _cheapest(part, "fixed") == {"accuracy": 0.896, "mean_loops": 2.0}
    assert _cheapest(part, "delta") == {"accuracy": 0.897, "mean_loops": 1.5}
    assert _cheapest(part, "kl") == {"accuracy": 0.9, "mean_loops": 4.0}
