"""The facts: random tails, disjoint kinds, and chains of exactly the facts asked for."""

import numpy as np
import pytest

from openmythos.errors import InputError
from openmythos.tasks.facts import FactTask

TASK = FactTask(entities=11, relations=7, alone=0.25, later=9, apart=0.2, seed=3)


def some(*kinds, pairs="usual", count=60):
    return TASK.chains(np.random.default_rng(0), count, kinds, pairs)


def of_each_hop(chains):
    """The kind of each hop's fact, read off the tokens."""
    entities, relations = chains.answers[:, :-1], chains.token_ids[:, 1:] - TASK.entities
    return TASK.kinds[relations, entities]


def test_every_fact_is_of_one_kind_and_the_counts_are_those_asked_for():
    counted = [int(TASK.having(kind).sum()) for kind in ("chained", "alone", "later")]
    assert counted == [49, 19, 9] == [TASK.count(kind) for kind in ("chained", "alone", "later")]
    assert sum(counted) == TASK.facts


def test_the_default_graph_holds_out_two_hundred_facts():
    assert FactTask().count("alone") == 200
    assert FactTask().count("later") == 50


def test_lone_facts_are_all_facts_of_their_kind_with_their_tails():
    lone = TASK.lone("alone", "later")
    assert lone.token_ids.shape == (28, 2)
    assert len(np.unique(lone.token_ids, axis=0)) == 28
    for (entity, relation), (first, tail) in zip(lone.token_ids, lone.answers, strict=True):
        assert first == entity
        assert tail == TASK.tails[relation - TASK.entities, entity]


def test_each_hop_of_a_chain_is_of_the_kind_asked_for():
    kinds = of_each_hop(some("chained", "alone", "later"))
    assert (kinds == [0, 1, 2]).all()


def test_a_chain_goes_on_where_the_hop_before_ended():
    chains = some("chained", "chained", "alone")
    at = chains.token_ids[:, 0]
    for place in range(1, 4):
        at = TASK.tails[chains.token_ids[:, place] - TASK.entities, at]
        assert (chains.answers[:, place] == at).all()


@pytest.mark.parametrize(("pairs", "apart"), [("usual", False), ("apart", True)])
def test_relations_kept_apart_follow_each_other_only_where_asked(pairs, apart):
    relations = some("chained", "chained", "chained", pairs=pairs).token_ids[:, 1:] - TASK.entities
    assert (TASK.kept_apart[relations[:, :-1], relations[:, 1:]] == apart).all()


def test_no_ops_leave_one_where_one_stands():
    chains = some("chained", "alone")
    waiting = TASK.waiting(np.random.default_rng(1), chains, slots=5)
    assert waiting.token_ids.shape == (60, 6)
    assert (waiting.answers[:, -1] == chains.answers[:, -1]).all()
    assert (waiting.hops[:, -1] == 2).all()
    idle = waiting.token_ids[:, 1:] == TASK.no_op
    assert (idle.sum(axis=1) == 3).all()
    assert (waiting.answers[:, 1:] == waiting.answers[:, :-1])[idle].all()
    kept = waiting.token_ids[:, 1:][~idle].reshape(60, 2)
    assert (kept == chains.token_ids[:, 1:]).all()
    assert len(np.unique(idle, axis=0)) == 10  # 60 rows miss one of 10 with a chance of 0.02


def test_the_graph_depends_on_its_seed_alone():
    again = FactTask(entities=11, relations=7, alone=0.25, later=9, apart=0.2, seed=3)
    other = FactTask(entities=11, relations=7, alone=0.25, later=9, apart=0.2, seed=4)
    for part in ("tails", "kinds", "kept_apart"):
        assert (getattr(again, part) == getattr(TASK, part)).all()
        assert (getattr(other, part) != getattr(TASK, part)).any()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: FactTask(entities=1), "entities=1 must be 2 or more"),
        (lambda: FactTask(later=-1), "later=-1 must be 0 or more"),
        (lambda: FactTask(alone=1.0), "alone=1.0 must be at least 0 and below 1"),
        (
            lambda: FactTask(entities=5, relations=4, alone=0.5, later=10),
            "alone=0.5 and later=10 must leave some of the 20 facts for chains",
        ),
        (
            lambda: TASK.waiting(np.random.default_rng(0), some("alone", "alone"), slots=1),
            "slots=1 must be at least the chains' 2 hops",
        ),
        (some, r"kinds=\(\) must name the kind of at least one hop"),
        (
            lambda: FactTask(later=0).chains(np.random.default_rng(0), 4, ("later",)),
            "must allow chains, but hardly any entity does",
        ),
    ],
)
def test_bad_sizes_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
