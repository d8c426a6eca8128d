"""Draws depend on seed, choice and position alone, and follow the distribution."""

import math

import numpy as np
import pytest
import torch

from openmythos.inference.noise import draw_at, exponentials
from openmythos.inference.sampling import Sampling, distribution


def test_noise_is_a_function_of_its_arguments_and_of_each_of_them():
    at = (3, 1, 50)
    values = exponentials(*at, 20)
    exponentials(9, 9, 9, 5)  # no draw changes another
    assert np.array_equal(exponentials(*at, 20), values)
    assert np.array_equal(exponentials(*at, 7), values[:7])
    others = [exponentials(*(x + (n == m) for n, x in enumerate(at)), 20) for m in range(3)]
    assert len({float(x[0]) for x in [values, *others]}) == 4
    assert (values >= 0).all()
    assert exponentials(2**63 - 1, 0, 2**40, 1) != values[0]


def test_no_number_comes_twice_at_neighbouring_places_seeds_or_choices():
    places = [(s, c, position) for s in range(3) for c in range(3) for position in range(30)]
    values = np.concatenate([exponentials(*place, 64) for place in places])
    assert len(np.unique(values)) == len(values)


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected)[expected > 0].sum())


# The chance of exceeding it with d degrees of freedom is below 1e-6 (Laurent and Massart 2000).
def bound(degrees, chance=1e-6):
    x = -math.log(chance)
    return degrees + 2 * math.sqrt(degrees * x) + 2 * x


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=9)]
)
def test_draws_follow_the_distribution(sampling):
    logits = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 2
    draws = [draw_at(logits, sampling, 5, 0, position) for position in range(4000)]
    counts = torch.bincount(torch.tensor(draws), minlength=16)
    probabilities = distribution(logits, sampling)
    assert not counts[probabilities == 0].any()
    assert chi_square(counts, probabilities) < bound(15)


@pytest.mark.parametrize("other", [{"choice": 1}, {"seed": 6}, {"position": 2000}])
def test_draws_of_another_seed_choice_or_place_are_independent(other):
    pairs, flat = torch.zeros(4, 4), torch.zeros(4)
    for place in range(800):
        at = {"seed": 5, "choice": 0, "position": place}
        away = at | {key: value + (key == "position") * place for key, value in other.items()}
        first, second = (draw_at(flat, Sampling(temperature=1.0), **where) for where in (at, away))
        pairs[first, second] += 1
    assert chi_square(pairs.flatten(), torch.full((16,), 1 / 16)) < bound(15)


def test_nearly_equal_distributions_mostly_give_the_same_token():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    near = logits + 0.1 * torch.randn(50, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(temperature=1.0)
    distance = (distribution(logits, sampling) - distribution(near, sampling)).abs().sum() / 2
    same = sum(
        draw_at(logits, sampling, 1, 0, place) == draw_at(near, sampling, 1, 0, place)
        for place in range(1000)
    )
    # At least (1 - d) / (1 + d) of the time; five deviations below that by chance: 3e-7.
    least = float((1 - distance) / (1 + distance))
    assert same / 1000 > least - 5 * (least * (1 - least) / 1000) ** 0.5


def test_a_token_without_weight_is_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0])
    drawn = {draw_at(logits, Sampling(temperature=1.0), 1, 0, place) for place in range(100)}
    assert drawn == {1, 3}


def test_without_temperature_the_likeliest_token_is_taken_and_of_equal_ones_the_lower():
    logits = torch.tensor([0.0, 2.0, 2.0, 1.0])
    assert draw_at(logits, Sampling(temperature=0), 1, 0, 0) == 1
