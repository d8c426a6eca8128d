"""Numbers in every form that callers have them in."""

import math

import numpy as np
import pytest
import torch

from openmythos.numbers import at_least, real, whole


@pytest.mark.parametrize("three", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_integers_are_taken_in_every_form(three):
    assert whole(three) == 3
    assert type(whole(three)) is int
    assert at_least(three, 3)
    assert not at_least(three, 4)


@pytest.mark.parametrize(
    "other",
    [
        *(True, np.True_, torch.tensor(True), 3.0, np.float32(3), torch.tensor(3.0), "3", None),
        *(torch.tensor([3]), np.array([3]), torch.zeros((), dtype=torch.int64, device="meta")),
    ],
    ids=str,
)
def test_nothing_else_is_taken_for_one(other):
    assert whole(other) is None
    assert not at_least(other, 0)


@pytest.mark.parametrize("half", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_numbers_are_taken_in_every_form(half):
    assert real(half) == 0.5
    assert type(real(half)) is float
    assert real(3) == 3.0


@pytest.mark.parametrize(
    "other",
    [True, torch.tensor(True), "0.5", None, math.nan, math.inf, 10**400, torch.ones(2), [1.0]],
    ids=lambda value: str(value)[:20],
)
def test_nothing_else_is_taken_for_a_number(other):
    assert real(other) is None
