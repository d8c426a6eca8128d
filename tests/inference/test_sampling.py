"""Drawing a token: against plain loops, and against chance."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from typecheck import unchecked

from openmythos.errors import InputError
from openmythos.inference.sampling import Sampling, distribution


def plain_distribution(logits, sampling):
    """One row, token by token, in float64."""
    scaled = [x / sampling.temperature for x in logits]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    chances = [w / sum(weights) for w in weights]
    ranked = sorted(range(len(chances)), key=lambda token: (-chances[token], token))
    kept, before = [], 0.0
    for rank, token in enumerate(ranked):
        within_k = not sampling.top_k or rank < sampling.top_k
        likely = chances[token] >= sampling.min_p * chances[ranked[0]]
        if within_k and likely and before < sampling.top_p:
            kept.append(token)
        before += chances[token]
    total = sum(chances[token] for token in kept)
    return np.array([chances[t] / total if t in kept else 0.0 for t in range(len(chances))])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 4, 50])
@pytest.mark.parametrize("top_p", [0.2, 0.75, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.9])
def test_probabilities_are_those_of_plain_loops(temperature, top_k, top_p, min_p):
    logits = torch.randn(3, 11, dtype=torch.float64) * 2
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = np.stack([plain_distribution(row.tolist(), sampling) for row in logits])
    assert_close(distribution(logits, sampling), torch.from_numpy(expected))


def test_of_tokens_that_tie_the_lower_ids_are_kept():
    logits = torch.zeros(1, 6)
    kept = distribution(logits, Sampling(temperature=1, top_k=2))
    assert kept.tolist() == [[0.5, 0.5, 0, 0, 0, 0]]


def test_no_more_tokens_are_kept_than_reach_top_p():
    kept = distribution(torch.zeros(1, 4), Sampling(temperature=1, top_p=0.5))
    assert kept.tolist() == [[0.5, 0.5, 0, 0]]


@pytest.mark.parametrize(
    "extreme", [{"temperature": 1e39}, {"temperature": 1e-300}, {"top_p": 1e-46}, {"min_p": 1e-300}]
)
def test_no_setting_makes_what_is_forbidden_possible(extreme):
    logits = torch.tensor([-math.inf, 0.5, 0.25, -math.inf])
    chances = distribution(logits, Sampling(**{"temperature": 1.0, **extreme}))
    assert float(chances.sum()) == pytest.approx(1)
    assert chances[0] == chances[3] == 0
    assert chances.argmax() == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_temperatures_take_the_likeliest_token(temperature, dtype):
    logits = torch.tensor([[-30.0, 12.5, 12.0, 11.0]], dtype=dtype)
    weights = distribution(logits, Sampling(temperature=temperature))
    assert_close(weights, torch.tensor([[0.0, 1, 0, 0]]))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be 0 or more"),
        ({"temperature": math.nan}, "temperature=nan must be a finite number"),
        ({"temperature": math.inf}, "temperature=inf must be a finite number"),
        ({"temperature": "1"}, "temperature='1' must be a finite number"),
        ({"temperature": None}, "temperature=None must be a finite number"),
        ({"top_k": -1}, "top_k=-1 must be an integer of 0 (no limit) or more"),
        ({"top_k": 2.5}, "top_k=2.5 must be an integer of 0 (no limit) or more"),
        ({"top_p": True}, "top_p=True must be a finite number"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1"),
        ({"min_p": 1.0}, "min_p=1.0 must be from 0 to below 1"),
        ({"seed": -1}, "seed=-1 must be an integer from 0 to 2^63 - 1, or None"),
        ({"seed": 1.5}, "seed=1.5 must be an integer from 0 to 2^63 - 1, or None"),
        ({"seed": 2**63}, f"seed={2**63} must be an integer from 0 to 2^63 - 1, or None"),
    ],
)
def test_values_out_of_range_are_refused(values, sentence):
    with unchecked(), pytest.raises(InputError) as error:
        Sampling(**values)
    assert str(error.value) == sentence
