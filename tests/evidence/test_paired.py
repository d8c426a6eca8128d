"""Differences between rows: paired by seed, with an interval that few seeds make wide."""

import math

import pytest

from openmythos.evidence.paired import common_seeds, difference, interval, mean, rows_of, runs_of

RESULTS = {
    "one/seed-0": {"bits": 1.5},
    "one/seed-1": {"bits": 1.7},
    "one/seed-3": {"bits": 9.0},
    "two/seed-0": {"bits": 1.4},
    "two/seed-1": {"bits": 1.5},
    "tune/one/rate-1": {"bits": 7.0},
}
ROWS = rows_of(RESULTS, ("one", "two"))


def test_the_interval_is_students():
    mean_, low, high = interval([1.0, 2.0, 6.0])
    half = 4.303 * math.sqrt(7 / 3)  # the variance of 1, 2, 6 is 7
    assert mean_ == pytest.approx(3)
    assert (low, high) == pytest.approx((3 - half, 3 + half))
    many = [0.0, 1.0] * 10
    assert interval(many).high - 0.5 == pytest.approx(2.262 * math.sqrt(5 / 19 / 20))


def test_one_seed_settles_nothing():
    alone = interval([-5.0])
    assert (alone.low, alone.high) == (-math.inf, math.inf)
    assert alone.verdict == "at or below, but one seed does not settle it"
    assert str(alone) == "-5.0000 (one seed)"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([-1.0, -1.1], "better, and the interval shows it"),
        ([1.0, 1.1], "worse, and the interval shows it"),
        ([-1.0, 0.5], "at or below, but the interval does not settle it"),
        ([1.0, -0.5], "above, but the interval does not settle it"),
    ],
)
def test_a_verdict_says_what_the_interval_shows(values, verdict):
    assert interval(values).verdict == verdict


def test_runs_of_a_row_are_those_whose_cells_begin_with_its_whole_name():
    others = {"one-wide/seed-0": {"bits": 2.0}, "two/graph-5": {"bits": 3.0}}
    assert [run["bits"] for run in runs_of(RESULTS | others, "one")] == [1.5, 1.7, 9.0]
    assert [run["bits"] for run in runs_of(RESULTS | others, "two")] == [1.4, 1.5, 3.0]
    assert runs_of(RESULTS, "three") == []


def test_differences_are_of_the_seeds_that_both_rows_have():
    assert common_seeds(ROWS, "one", "two") == [0, 1]
    assert difference(ROWS, "one", "two", "bits") == interval([1.5 - 1.4, 1.7 - 1.5])
    assert difference(ROWS, "one", "absent", "bits") is None
    assert mean(ROWS["two"], "bits") == pytest.approx(1.45)
