"""Curves over loops: how they are measured, fitted, and judged."""

import math

import pytest
from tiny import tiny

from openmythos.errors import CheckpointError
from openmythos.evidence import test_time_scaling as claim
from openmythos.evidence.cells import run_cells
from openmythos.evidence.report import as_markdown
from openmythos.evidence.test_time_scaling import LOOPS, cells, conclude, saturating_fit
from openmythos.evidence.text_training import novel
from openmythos.training.corpus import open_corpus
from openmythos.training.evaluate import Reading, evaluate, tokenised
from openmythos.training.tokenizer import Tokenizer


def a_curve(limit=1.2, gain=0.1, rate=0.8, slope=0.0):
    return {n: limit + gain * math.exp(-rate * (n - 1)) + slope * max(0, n - 4) for n in LOOPS}


def a_run(**changes):
    curve = {str(loops): bits for loops, bits in a_curve(**changes).items()}
    tokens = {"messages": 1000, "novel": 500}
    bits = {"messages": curve, "novel": curve}
    return {"parameters": 10, "trained": 4, "bits": bits, "tokens": tokens}


@pytest.mark.parametrize("rate", [0.02, 0.3, 1.7, 6.0])
@pytest.mark.parametrize("gain", [0.3, -0.05])
def test_a_fit_finds_the_curve_it_is_given(gain, rate):
    fit = saturating_fit(a_curve(1.3, gain, rate))
    assert (fit.limit, fit.gain, fit.rate) == pytest.approx((1.3, gain, rate), rel=1e-3)
    assert fit.error < 1e-5
    assert fit.at(3) == pytest.approx(a_curve(1.3, gain, rate)[3], abs=1e-5)


def test_a_flat_curve_is_its_own_limit():
    fit = saturating_fit(dict.fromkeys(LOOPS, 1.5))
    assert fit.at(1) == pytest.approx(1.5)
    assert fit.error < 1e-9


def test_noise_stays_in_the_error_of_the_fit():
    curve = {n: bits + 0.01 * (-1) ** n for n, bits in a_curve().items()}
    assert 0.002 < saturating_fit(curve).error < 0.01  # no curve of this form follows the zigzag


def test_a_curve_that_saturates_meets_what_was_expected():
    section = conclude({"openmythos-lm/seed-0": a_run(), "small-fixed/seed-0": a_run(slope=0.01)})
    assert all(e.met for e in section.expectations)
    assert len(section.expectations) == 4
    text = as_markdown(section)
    assert "openmythos-lm has 1.3000 bits per byte at 1 loop, 1.2091 at the 4 of its" in text
    assert "170.7 at 16: +27 % in bits" in text
    assert "https://github.com/kyegomez/OpenMythos/issues/28" in text
    assert "windows of 256 tokens, each with half of it as context. Other sections read" in text
    assert "on messages: small-fixed 9.17 %" in text  # 1.32 over 1.2091, read at 16 loops


def test_a_curve_that_rises_is_said_to_miss():
    section = conclude({"small-near/seed-0": a_run(), "small-near/seed-1": a_run(slope=0.01)})
    missed = [e for e in section.expectations if not e.met]
    assert [e.wanted for e in missed] == ["≤ 1 %", "≤ 1 %"]  # the worst seed counts
    upwards = conclude({"small-near/seed-0": a_run(gain=-0.1)})
    assert [e.met for e in upwards.expectations] == [False, False, False, False]


def test_the_model_that_comes_with_the_package_goes_first():
    section = conclude({"small-near/seed-0": a_run(), "a-model/seed-0": a_run(limit=1.0)})
    assert "a-model has 1.1000" in section.sentences[0]
    claim.draw_figure({"small-near/seed-0": a_run(), "a-model/seed-0": a_run()})


def test_the_other_text_is_of_another_source():
    documents = novel()
    assert 5 <= len(documents) < open_corpus("embedded").validation.documents
    assert any("Longbourn" in text for text in documents)
    assert not any("Fellow-Citizens" in text or "fiscal" in text for text in documents)


def test_a_given_model_is_measured_on_both_texts_at_all_depths(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "LOOPS", (1, 2, 3))
    tokenizer = Tokenizer.train(["the cat sat on the mat"], vocab_size=260)
    sizes = {"vocab_size": tokenizer.vocab_size, "max_length": 16, "core_layers": 1, "experts": 0}
    model = tiny(**sizes, mean_loops=3)
    folder = tmp_path / "mine"
    model.save_pretrained(folder, tokenizer)
    claim_cells = cells(quick=True, seeds=3, model=folder)
    assert [cell.name for cell in claim_cells] == ["mine/seed-0"]
    cell = claim._given(folder, 40)
    result = run_cells([cell], tmp_path, lambda _: None)[cell.name]
    assert list(result["bits"]["novel"]) == ["1", "2", "3", "6", "12"]
    with tokenised(novel(), tokenizer) as file:
        own = evaluate(model, file, tokenizer.token_bytes, [3, 12], reading=Reading.of(16, 40))
    found = [result["bits"]["novel"][loops] for loops in ("3", "12")]
    assert found == pytest.approx(list(own.bits_per_byte), rel=1e-5)
    assert result["bits"]["messages"] != result["bits"]["novel"]
    assert conclude({cell.name: result}).expectations


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a model's folder"):
        cells(quick=True, seeds=1, model=tmp_path)


def test_without_a_model_in_the_package_small_ones_are_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(claim, "find_model", lambda _: tmp_path / "absent")
    assert [cell.name for cell in cells(quick=True, seeds=3)] == ["small-near/seed-0"]
    names = [cell.name for cell in cells(quick=False, seeds=2)]
    assert names[:2] == ["small-near/seed-0", "small-near/seed-1"]
    assert {"small-fixed/seed-0", "small-poisson/seed-0"} <= set(names)
