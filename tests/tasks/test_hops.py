"""Chains of hops: answers from the permutations, drawn as asked for."""

import numpy as np
import pytest

from openmythos.errors import InputError
from openmythos.tasks.hops import HopTask

TASK = HopTask(entities=5, relations=3, seed=4)


def random(seed=0):
    return np.random.default_rng(seed)


def slow_answers(task, token_ids):
    """Follow one chain at a time, in plain Python."""
    rows = []
    for ids in token_ids.tolist():
        here, row = None, []
        for token in ids:
            if token < task.entities:
                here = token
            elif token != task.no_op:
                here = int(task.tails[token - task.entities][here])
            row.append(here)
        rows.append(row)
    return np.array(rows)


def test_every_relation_is_a_permutation_and_the_seed_decides_it():
    assert (np.sort(TASK.tails, axis=1) == np.arange(5)).all()
    assert (TASK.tails == HopTask(entities=5, relations=3, seed=4).tails).all()
    assert (TASK.tails != HopTask(entities=5, relations=3, seed=5).tails).any()


@pytest.mark.parametrize(("hops", "slots"), [(4, None), (3, 9), (0, 5), (0, None)])
def test_answers_are_those_of_following_the_chain(hops, slots):
    chains = TASK.chains(random(), 6, hops, slots)
    assert chains.token_ids.shape == (6, 1 + (hops if slots is None else slots))
    assert (chains.answers == slow_answers(TASK, chains.token_ids)).all()
    assert (chains.hops[:, -1] == hops).all()
    assert ((chains.token_ids[:, 1:] != TASK.no_op).cumsum(1) == chains.hops[:, 1:]).all()


def test_no_ops_fall_on_every_place():
    """200 chains with 4 no-ops in 8 slots: a place without one has a chance of 2^-200."""
    chains = TASK.chains(random(), 200, 4, 8)
    assert (chains.token_ids[:, 1:] == TASK.no_op).any(axis=0).all()


def test_packed_sequences_hold_chains_one_after_another():
    packed = TASK.packed(random(), 7, 40, hops=4, no_ops=0.5)
    assert packed.token_ids.shape == (7, 40)
    assert (packed.answers == slow_answers(TASK, packed.token_ids)).all()
    starts = packed.token_ids < TASK.entities
    assert starts[:, 0].all()
    assert starts.sum(1).min() >= 40 // 9  # at most 4 hops, 4 no-ops and the entity each
    assert packed.hops.max() == 4
    assert (packed.hops[starts] == 0).all()


@pytest.mark.parametrize(("share", "found"), [(0.0, False), (1.0, True)])
def test_packed_chains_have_no_ops_as_asked(share, found):
    packed = TASK.packed(random(), 7, 40, hops=4, no_ops=share)
    assert (packed.token_ids == TASK.no_op).any() == found


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: HopTask(entities=1), "entities=1 must be 2 or more"),
        (lambda: HopTask(relations=0), "relations=0 must be 1 or more"),
        (lambda: TASK.chains(random(), 2, 5, 4), "hops=5 must be from 0 to slots=4"),
        (lambda: TASK.packed(random(), 2, 9, 0, 0.5), "hops=0 must be 1 or more"),
        (lambda: TASK.packed(random(), 2, 9, 2, 1.5), "no_ops=1.5 from 0 to 1"),
        (lambda: TASK.follow(np.array([[7, 5]])), "must be entities, 0 to 4"),
        (lambda: TASK.follow(np.array([[1, 4]])), "must be relations, 5 to 7, or the no-op 8"),
        (lambda: TASK.follow(np.array([[1, 9]])), "must be relations, 5 to 7, or the no-op 8"),
    ],
)
def test_bad_input_is_refused_with_one_sentence(call, sentence):
    with pytest.raises(InputError) as error:
        call()
    assert sentence in str(error.value)
