"""What is said of deeper chains comes from the numbers; a model that fails is said to fail."""

import dataclasses

import pytest

from openmythos.evidence.depth_extrapolation import (
    HOPS,
    LOOPED,
    PLAIN,
    QUICK,
    _looped,
    _plain,
    cells,
    conclude,
    worth_trying,
)
from openmythos.evidence.hop_training import FRESH, LOOPS, VALIDATION
from openmythos.model.accounting import on_meta
from openmythos.model.transformer import OpenMythos


def result(right=1.0, loops=None):
    """A looped model's numbers, as its cell keeps them: keys are strings."""
    depth = {hops: hops + 4 if loops is None else loops for hops in HOPS}
    return {
        "parameters": 500_000,
        "curves": {str(h): {str(n): right * (n >= depth[h]) for n in LOOPS} for h in HOPS},
        "needed": {str(h): depth[h] if right >= 0.99 else None for h in HOPS},
        "fresh": {
            str(h): {"loops": depth[h], "right": right, "right_at_twice": right} for h in HOPS
        },
        "with_no_ops": {str(h): right for h in HOPS[:4]},
        "path_independence": {"loops": 24, "agree": right, "right": right},
    }


def test_a_model_that_solves_all_meets_what_was_wanted():
    section = conclude({"core-1/seed-0": result(), "core-1/seed-1": result()})
    assert "chains of 100 hops with 1.000 right or more" in section.sentences[0]
    assert "2 seeds" in section.sentences[0]
    fixed = conclude({"core-1-fixed/seed-0": result()})
    assert "a core of one layer that always ran 20 loops in training (1 seed)" in fixed.sentences[0]
    assert not fixed.expectations
    assert all(expected.met for expected in section.expectations)


def test_what_is_left_among_no_ops_is_said_of_the_worst_seed():
    section = conclude({"core-1/seed-0": result(), "core-1/seed-1": result(right=0.75)})
    said = next(sentence for sentence in section.sentences if "no-ops" in sentence)
    assert "answers 0.750 of 20, 0.750 of 25, 0.750 of 30, 0.750 of 40 hops in the worst" in said


def test_a_row_that_the_rule_was_set_on_is_scored_on_other_chains():
    settings = {cell.name: cell.settings for cell in cells(quick=False, seeds=1)}
    assert settings["core-1/seed-0"]["scored_on"] not in (VALIDATION, FRESH)
    assert "scored_on" not in settings["core-1-fixed/seed-0"]


def test_a_model_that_fails_is_said_to_fail():
    section = conclude({"core-1/seed-0": result(), "core-1/seed-1": result(right=0.5)})
    assert "does not solve 20 hops" in section.sentences[0]
    assert not any(e.met for e in section.expectations if "worst seed" in e.what)


def test_the_worst_seed_counts():
    section = conclude({"core-3/seed-0": result(), "core-3/seed-1": result(right=0.97)})
    met = {e.what: e.met for e in section.expectations}
    assert not met["core-3: 20 hops, worst seed"]
    assert met["core-3: 40 hops, worst seed"]


def test_plain_transformers_are_tested_past_their_own_best():
    plain = {
        "parameters": 1e6,
        "longest": 6,
        "beyond": 9,
        "right_beyond": 0.1,
        "right": {"20": 0.04},
        "flops": 1e15,
    }
    section = conclude({"plain-8-lr-0.01/seed-0": plain})
    assert "| plain-8-lr-0.01 | 1.00 M | 6 | 9 | 0.100 | 1.0e+15 |" in section.tables[1]
    better = {**plain, "longest": 7, "right_beyond": 0.2}
    looped = {**result(), "flops": 2e14}
    section = conclude(
        {"core-1/a": looped, "plain-8-lr-0.01/a": plain, "plain-16-lr-0.01/a": better}
    )
    assert section.sentences[-1] == (
        "Plain transformers (plain-8-lr-0.01, plain-16-lr-0.01), trained with 5.0 times the "
        "operations of the core of one layer, answer chains of up to 7 hops at 0.95 or more, and "
        "of half as long again as each one's own best 0.200 or less. That still is within "
        "training: of its 20 hops they answer 0.040 or less, so that they never reach the depth "
        "from which to go on."
    )
    deeper = {**plain, "longest": 20, "beyond": 30, "right": {"20": 0.97}}
    section = conclude({"plain-8-lr-0.01/a": deeper})
    assert section.sentences[-1].endswith("as each one's own best 0.100 or less.")


@pytest.mark.parametrize("name", PLAIN)
def test_plain_transformers_get_three_times_the_operations(name):
    plain, looped = (
        training.training_flops(on_meta(training.config))
        for training in (PLAIN[name], LOOPED["core-1"])
    )
    assert 3 <= plain / looped < 3.1


@pytest.mark.parametrize(
    ("curve", "tried"),
    [
        ({1: 0.0, 2: 0.5, 4: 0.93, 8: 1.0, 16: 1.0, 32: 1.0}, range(3, 17)),
        ({1: 0.95, 2: 0.98, 4: 1.0}, range(1, 5)),  # only one depth reaches it: to the end
        ({1: 0.996, 2: 0.8, 4: 1.0, 8: 1.0}, range(1, 5)),
        ({1: 0.0, 2: 0.5}, range(0)),
    ],
)
def test_every_number_of_loops_is_tried_where_a_curve_rises(curve, tried):
    assert worth_trying(curve) == tried


@pytest.mark.parametrize("plain_layers", [0, 2])
def test_a_model_is_measured_as_its_cell_needs(monkeypatch, plain_layers):
    monkeypatch.setattr("openmythos.evidence.depth_extrapolation.HOPS", (2, 3, 4, 5, 6, 7))
    monkeypatch.setattr("openmythos.evidence.depth_extrapolation.LOOPS", (1, 2))
    monkeypatch.setattr("openmythos.evidence.depth_extrapolation.TRAINED_HOPS", 2)
    monkeypatch.setattr("openmythos.evidence.depth_extrapolation.NEAR", 0.0)
    training = dataclasses.replace(
        QUICK["core-1"], hidden_size=16, feed_forward_size=16, plain_layers=plain_layers
    )
    model = OpenMythos(training.config).eval()
    if plain_layers:
        assert set(_plain(model, training)["right"]) == {2}
        return
    measured = _looped(model, training, FRESH)
    assert set(measured["curves"]) == {2, 3, 4, 5, 6, 7}
    assert all(set(tried) == {1, 2} for tried in measured["choice"].values())
    assert 0 <= measured["path_independence"]["agree"] <= 1
    assert LOOPED["core-1"].config.mean_loops == 20
