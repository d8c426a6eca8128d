"""What a training at any rate leaves, what A is in floating point, and what is said of it."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from few_messages import few_messages

from openmythos.evidence import raw_decay, state_growth, stress_rows, text_training
from openmythos.evidence import stability as claim
from openmythos.evidence.cells import run_cells
from openmythos.evidence.claims import CLAIMS
from openmythos.evidence.report import as_markdown
from openmythos.evidence.stability import cells, conclude, draw_figure
from openmythos.evidence.stress_rows import KINDS, OURS, RATES
from openmythos.evidence.stress_training import (
    Course,
    StressTraining,
    at_many_loops,
    nats_by_frequency,
    state_size,
)
from openmythos.model.accounting import on_meta
from openmythos.model.transformer import OpenMythos
from openmythos.training.token_file import TokenFile

TINY = {
    "hidden_size": 16,
    "loops": 2,
    "steps": 12,
    "batch_size": 2,
    "length": 16,
    "vocab_size": 270,
    "measured_tokens": 64,
    "deepest": 8,
}
FREQUENCIES = 6.0


def stress(kind=OURS, rate=1e-3, recipe="stress", **more):
    return StressTraining(injection=kind, rate=rate, recipe=recipe, **{**TINY, **more})


def a_run(rate, loss=5.0, *, diverged_at=None, radius=0.5, grows=1.0):
    sizes = {str(2**n): 2.0 if n <= 3 else 2.0 * grows ** (n - 3) for n in range(11)}
    course = {"loss": [6.0, loss], "radius": [radius, radius], "state": [1.0, 2.0]}
    finite = diverged_at is None
    return {
        "settings": StressTraining(injection=OURS, recipe="stress", rate=rate).as_json(),
        "rate": rate,
        "trained_loops": 8,
        "diverged_at": diverged_at,
        "frequencies": FREQUENCIES,
        "largest_radius": radius,
        "course": course,
        "loss": loss if finite else None,
        "states": sizes if finite else None,
        "losses": {str(2**n): loss + 0.01 * max(0, n - 3) for n in range(11)} if finite else None,
    }


def a_row(kind, losses, recipe="stress", seeds=2, **more):
    """Runs of a row by loss at each rate; None diverges at step 7."""
    made = {}
    for (rate, loss), seed in itertools.product(losses.items(), range(seeds)):
        run = a_run(rate, 0.0 if loss is None else loss, **more)
        if loss is None:
            run |= {"diverged_at": 7 + seed, "loss": None, "states": None}
        made[f"{recipe}/{kind}/rate-{rate:g}/seed-{seed}"] = run
    return made


def losses(*values):
    return dict(zip(RATES, values, strict=True))


STANDS = losses(5.05, 5.0, 5.0, 5.02, 5.3)
BREAKS = losses(5.05, 5.0, 5.2, None, None)
GOOD = a_row(OURS, STANDS) | a_row("add", BREAKS, radius=1.0, grows=2.0)
EVEN = a_row(OURS, STANDS) | a_row("add", STANDS, radius=1.0)


@pytest.mark.parametrize("dtype", raw_decay.DTYPES.values(), ids=raw_decay.DTYPES)
def test_a_is_below_1_for_all_raw_values_where_the_form_on_paper_is_not(dtype):
    ours, paper = raw_decay.ours(dtype), raw_decay.on_paper(dtype)
    assert ours["outside"] == ours["outside_rounded"] == ours["no_number"] == ours["dead"] == 0
    assert ours["gradients_finite"]
    assert 0.99 < ours["largest"] < 1
    assert ours["pairs"] == paper["pairs"] == 131**2
    assert paper["outside"] > 0.2 * paper["pairs"]
    assert paper["no_number"] > 0


@pytest.fixture
def texts(monkeypatch, tmp_path):
    monkeypatch.setattr(text_training, "open_corpus", lambda _: few_messages(tmp_path))
    return text_training.read_texts(tmp_path, "embedded", 270)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_keeps_its_course(tmp_path, texts, kind):
    result = stress(kind).run(tmp_path, texts, lambda _: None)
    assert result["diverged_at"] is None
    assert {name: len(points) for name, points in result["course"].items()} == {
        "loss": 2,  # of 10 steps and of 2
        "gradient": 2,
        "radius": 2,
        "state": 2,
    }
    assert result["course"]["loss"][1] < result["course"]["loss"][0]
    assert 0 < result["loss"] < 8
    assert list(result["states"]) == [1, 2, 4, 8]
    assert result["largest_radius"] == pytest.approx(max(result["course"]["radius"]), rel=1e-3)
    assert not (tmp_path / "training").exists()


def test_a_training_that_diverges_ends_there_and_says_where(tmp_path, texts, monkeypatch):
    watched = Course.note

    def overflow(self, step, loss, gradient):
        if step == 5:
            with torch.no_grad():
                self.model.core.injection.diagonal.fill_(math.inf)
        return watched(self, step, loss, gradient)

    monkeypatch.setattr(Course, "note", overflow)
    said = []
    result = stress("free").run(tmp_path, texts, said.append)
    assert result["diverged_at"] == 6
    assert said[-1] == "not finite at step 6"
    assert result["loss"] is result["states"] is None
    assert len(result["course"]["loss"]) == 1
    assert result["course"]["loss"][0] is None
    assert not stress_rows.learns(result)


def test_the_recipes_differ_in_what_keeps_a_training_together():
    bare, full = stress(rate=0.008), stress(rate=0.008, recipe="full")
    assert (bare.optimizer.matrices, bare.optimizer.clip) == ("adamw", 0)
    assert (full.optimizer.matrices, full.optimizer.clip) == ("muon", 1)
    assert full.optimizer.muon_lr == pytest.approx(0.04)  # 5 times AdamW's, as by default
    assert not bare.text.config.qk_norm
    assert full.text.config.qk_norm
    assert bare.text.config.norm == full.text.config.norm == "pre"


def test_the_size_of_the_state_is_that_of_a_run_of_so_many_loops():
    training = stress(deepest=8)
    model = OpenMythos(training.text.config).eval()
    token_ids = torch.arange(12).view(2, 6)
    sizes = at_many_loops(model, token_ids, 8).sizes
    for loops, size in sizes.items():
        states = model(token_ids[:, :-1], loops, return_states=True).states
        assert size == pytest.approx(state_size(states[-1]), rel=1e-5)
    assert state_size(3 * torch.ones(2, 4, 6)) == 3


def test_frequencies_are_worth_what_a_count_says(texts):
    ids = texts.training.read(np.array([0]), texts.training.tokens - 1)[0]
    assert len(ids) == texts.training.tokens
    counts = {token: list(ids).count(token) + 1 for token in set(ids.tolist())}
    total = len(ids) + texts.training.vocab_size
    test = texts.test.read(np.array([0]), texts.test.tokens - 1)[0].tolist()
    wanted = -sum(math.log(counts.get(token, 1) / total) for token in test) / len(test)
    assert isinstance(texts.test, TokenFile)
    assert nats_by_frequency(texts.training, texts.test) == pytest.approx(wanted)


def test_the_hours_are_those_of_the_operations():
    names = {field.name for field in dataclasses.fields(StressTraining)}
    trainings = [
        StressTraining(**{key: value for key, value in cell.settings.items() if key in names})
        for cell in cells(quick=False, seeds=2)[1:]
    ]
    assert len(trainings) == len({t.rate for t in trainings}) * 2 * len(KINDS) * 2
    total = sum(t.text.training_flops(on_meta(t.text.config)) for t in trainings)
    seconds = 3600 * CLAIMS["stability"].hours
    assert 5e9 < total / seconds < 50e9  # small operations, far from a core's peak


def test_rates_that_only_ours_stands_are_said_and_meet_what_was_expected():
    section = conclude(GOOD)
    text = as_markdown(section)
    assert "ours (A h + B e) stays finite at 5 of 5 rates and is usable at 0.0003, 0.001," in text
    assert "h + e stays finite at 3 of 5 rates (diverging first at step 7) and is usable" in text
    assert "nothing diverges" not in text
    assert "Under stress, ours is never worse" in text
    factor = next(e for e in section.expectations if "worst alternative" in e.what)
    assert (factor.measured, factor.met) == ("10.0", True)
    assert all(e.met for e in section.expectations)
    assert "over all rates, by these factors: ours (A h + B e) 1.00; h + e 128.00." in text
    assert "At each one's best rate, at most: ours (A h + B e) 1.00; h + e 128.00." in text
    assert "nats a token more: ours (A h + B e) +0.070; h + e +0.070." in text
    assert "400 steps of 16 × 64 tokens at width 64" in text


def test_where_nothing_diverges_the_claim_shrinks_and_says_so():
    section = conclude(EVEN)
    text = as_markdown(section)
    assert "At this size nothing diverges: all 20 trainings" in text
    assert [e.what for e in section.expectations if not e.met] == [
        "stress: largest usable rate over the worst alternative's"
    ]
    worse = conclude(EVEN | a_row("linear", losses(4.9, 4.9, 4.9, 4.9, 4.9)))
    assert "ours is worse than one matrix (W [h, e]) most at 0.03, by 0.400 nats." in as_markdown(
        worse
    )


def test_a_training_that_learnt_only_frequencies_has_failed():
    results = a_row(OURS, STANDS) | a_row("free", losses(5, 5, 5, 5, 6.5), radius=1.2)
    text = as_markdown(conclude(results))
    assert "nothing diverges: all 20 trainings" in text  # and yet:
    assert "than by frequencies of tokens end a free diagonal (a h + B e) at 0.03 (str" in text
    assert "6.500 (nothing learnt)" in text
    assert "Of 2 trainings of the free diagonal that failed, 2 had learnt a radius of 1" in text


def test_of_two_seeds_one_that_learnt_nothing_is_counted():
    results = a_row(OURS, STANDS) | a_row("free", losses(5, 5, 5, 5, 6.5))
    results["stress/free/rate-0.03/seed-0"]["loss"] = 5.0
    text = as_markdown(conclude(results))
    assert "a free diagonal (a h + B e) at 0.03 in 1 of 2 seeds (stress)" in text
    assert "5.750 (nothing learnt in 1 of 2 seeds)" in text


def test_ours_that_diverges_misses():
    section = conclude(a_row(OURS, losses(5.5, 5.0, 5.05, None, None)) | a_row("add", STANDS))
    missed = {e.what: e.measured for e in section.expectations if not e.met}
    assert missed == {
        "stress: rates at which ours is finite": "3 of 5",
        "stress: rates within 0.1 nat of its best": "2 of 5",
        "stress: largest usable rate over the worst alternative's": "0.3",
    }
    assert "ours is worse than h + e most at 0.01, where ours diverges." in as_markdown(section)


def test_a_rate_at_which_nothing_is_learnt_is_not_usable():
    nothing = losses(5.95, 5.95, 5.95, 5.95, 5.95)  # by frequencies alone: 6
    section = conclude(a_row(OURS, nothing) | a_row("add", STANDS))
    factor = next(e for e in section.expectations if "worst alternative" in e.what)
    assert (factor.measured, factor.met) == ("none of ours is usable", False)
    section = conclude(a_row(OURS, STANDS) | a_row("add", nothing))
    factor = next(e for e in section.expectations if "worst alternative" in e.what)
    assert (factor.measured, factor.met) == ("none of that one is usable", True)


def test_a_state_that_goes_on_growing_misses():
    section = conclude(a_row(OURS, {3e-3: 5.0}, grows=1.2))
    assert [(e.wanted, e.measured, e.met) for e in section.expectations] == [
        ("≤ 1.05", "1.2000", False)
    ]


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1.0821, "1.09"), (134.124, "134.13"), (7.4003e10, "7.5e+10"), (9.99e3, "1.0e+04")],
)
def test_the_most_that_a_state_grows_is_rounded_up(factor, said):
    assert state_growth._times(factor) == said


def test_a_state_that_leaves_the_panel_is_marked_where_it_does():
    runs = a_row("linear", {3e-3: 5.0}, seeds=1, grows=1e6)
    middle = draw_figure(runs).axes[1]
    curve, mark = middle.get_lines()[:2]
    assert curve.get_ydata().max() <= claim.LARGEST_DRAWN
    assert mark.get_marker() == "^"
    assert mark.get_xydata().tolist() == [curve.get_xydata()[-1].tolist()]


def test_what_needs_no_training_is_measured(tmp_path):
    cell = claim._untrained(TINY)
    result = run_cells([cell], tmp_path, lambda _: None)
    section = conclude(result)
    assert [e.met for e in section.expectations if "raw values" in e.what] == [True] * 3
    text = as_markdown(section)
    assert "Untrained, from 2 to 8, at most:" in text
    assert "for 17,161 pairs of raw values" in text
    assert set(result["untrained"]["states"]) == {
        f"{recipe}/{kind}" for recipe in ("stress", "full") for kind in KINDS
    }


def test_any_part_of_the_grid_can_be_concluded_and_drawn():
    everything = GOOD | a_row("free", {3e-2: None}) | a_row(OURS, STANDS, recipe="full")
    assert conclude({}).sentences == []
    for size in (1, 2, len(everything) - 1):
        for names in itertools.islice(itertools.combinations(everything, size), 0, None, 7):
            assert as_markdown(conclude({name: everything[name] for name in names}))
    draw_figure(everything)
    draw_figure({})
    draw_figure(a_row("free", {3e-2: None}))


def test_a_cell_trains_for_real(tmp_path, monkeypatch):
    monkeypatch.setattr(text_training, "open_corpus", lambda _: few_messages(tmp_path))
    cell = claim._cell(stress("linear", 3e-3, steps=2))
    assert cell.name == "stress/linear/rate-0.003/seed-0"
    results = run_cells([cell], tmp_path, lambda _: None)
    assert conclude(results).tables
    assert list(tmp_path.glob("text-embedded-*"))
