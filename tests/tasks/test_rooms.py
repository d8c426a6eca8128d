"""The hop task in words."""

import numpy as np
import pytest

from openmythos.errors import InputError
from openmythos.tasks.rooms import DOORS, HOUSE, ROOMS, WAIT, WORDS, read_walk, write_walk


def test_every_token_has_a_word_of_its_own():
    assert len(ROOMS) == HOUSE.entities
    assert len(DOORS) == HOUSE.relations
    assert len(set(WORDS)) == len(WORDS) == HOUSE.vocab_size
    assert WORDS[HOUSE.no_op] == WAIT


def test_a_walk_is_read_as_it_is_written():
    chain = HOUSE.chains(np.random.default_rng(1), 1, 5, 8)
    assert (read_walk(write_walk(chain.token_ids[0].tolist())) == chain.token_ids).all()


def test_joining_words_are_passed_over():
    plain = read_walk("library red wait gold")
    said = read_walk("From the Library take the red door, then wait, and go through the gold door.")
    assert (plain == said).all()


@pytest.mark.parametrize(
    ("walk", "sentence"),
    [
        ("", "must begin in a room"),
        ("red library", "walk begins with 'red', must begin in a room"),
        ("library kitchen", "walk names the room 'kitchen' on its way, must name doors only"),
        ("library rad", "walk has the word 'rad', must have rooms and doors: did you mean 'red'?"),
        ("library xyzzy", "doors are red, orange"),
    ],
)
def test_bad_walks_are_refused_with_one_sentence(walk, sentence):
    with pytest.raises(InputError) as error:
        read_walk(walk)
    assert sentence in str(error.value)
