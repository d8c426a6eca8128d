"""Rotary embedding against complex numbers."""

import math
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from openmythos.config import RopePairing
from openmythos.model.rope import Rope, rope_table, rotate

PAIRINGS = get_args(RopePairing)


def rotated(x, positions, pairing, base=100.0):
    return rotate(x, rope_table(positions, x.shape[-1], base, pairing, x.dtype), pairing)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_each_pair_is_a_complex_number_turned_by_its_angle(pairing):
    x, positions = torch.randn(5, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 7, 1000])
    angles = positions.unsqueeze(1) * 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    first, second = (x[:, :4], x[:, 4:]) if pairing == "half" else (x[:, ::2], x[:, 1::2])
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    parts = torch.stack([turned.real, turned.imag], dim=1 if pairing == "half" else 2)
    assert_close(rotated(x, positions, pairing), parts.flatten(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_products_depend_on_the_difference_of_positions_alone(pairing):
    query, key = torch.randn(2, 6, dtype=torch.float64)
    positions = torch.tensor([[3, 5], [103, 105], [10**6, 10**6 + 2]])
    products = [
        rotated(query[None], p[:1], pairing)[0] @ rotated(key[None], p[1:], pairing)[0]
        for p in positions
    ]
    assert_close(products[1:], products[:1] * 2, rtol=0, atol=1e-8)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_position_zero_changes_nothing_and_lengths_never_change(pairing):
    x = torch.randn(4, 8)
    assert torch.equal(rotated(x, torch.zeros(4, dtype=torch.int64), pairing), x)
    assert_close(rotated(x, torch.arange(4) * 77, pairing).norm(dim=1), x.norm(dim=1))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_half_precision_turns_in_fp32(pairing):
    x = torch.randn(4, 8).bfloat16()
    positions = torch.arange(4) * 1000
    table = rope_table(positions, 8, 100.0, pairing, torch.bfloat16)
    assert table.cos.dtype == torch.float32
    assert torch.equal(rotate(x, table, pairing), rotated(x.float(), positions, pairing).bfloat16())


def test_angles_at_a_million_are_right_to_fp32():
    table = rope_table(torch.tensor([999_999]), 4, 10_000.0, "half", torch.float32)
    expected = [math.cos(999_999), math.cos(999_999 / 100)]
    assert table.cos[0, :2].tolist() == pytest.approx(expected, abs=1e-7)


def test_a_table_can_be_cut_to_rows_and_given_an_axis_for_heads():
    table = rope_table(torch.arange(5), 4, 100.0, "half", torch.float32)
    few = table.select(torch.tensor([3, 1]))
    assert torch.equal(few.sin, table.sin[[3, 1]])
    assert few.per_head().cos.shape == (2, 1, 4)
    assert isinstance(few, Rope)
