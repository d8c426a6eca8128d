"""The grid is fair, nothing is chosen on the test text, and sentences follow the numbers."""

import dataclasses
import itertools
import math
import statistics

import pytest
from few_messages import few_messages

from openmythos.evidence import hop_training, reasoning_leg, text_training
from openmythos.evidence import parameter_efficiency as claim
from openmythos.evidence.cells import run_cells
from openmythos.evidence.claims import CLAIMS
from openmythos.evidence.efficiency_rows import (
    ISO_FLOP,
    MAIN,
    RATES,
    RATIOS,
    SEEDED,
    VARIANTS,
    trainings,
)
from openmythos.evidence.parameter_efficiency import (
    cells,
    conclude,
    draw_figure,
    published,
    share_of_gap,
)
from openmythos.evidence.plain import trained_parameters
from openmythos.evidence.report import as_markdown
from openmythos.evidence.text_training import TextTraining
from openmythos.model.accounting import on_meta

TINY = TextTraining(
    shape={"hidden_size": 16, "core_layers": 1, "mean_loops": 2},
    steps=16,
    batch_size=2,
    length=16,
    corpus="embedded",
    vocab_size=270,
    measured_tokens=100,
)
PARAMETERS = {**dict.fromkeys(VARIANTS, 1.0), ISO_FLOP: 1.0, **RATIOS}
ROWS = trainings(quick=False)


def a_run(bits, *, ratio=1.0, choice=None, rate=1.0):
    return {
        "parameters": round(1e6 * ratio),
        "without_embedding": round(8e5 * ratio),
        "tokens": 6_500_000,
        "flops": 1e14 * ratio,
        "flops_per_token": 5e6 * ratio,
        "cache_bytes": {"per_loop": 4096, "last": 2048},
        "rate": rate,
        "choice": bits if choice is None else choice,
        "test": bits,
    }


def some_results(bits, seeds=3, noise=0.001):
    """Bits per byte by row; seeds differ by `noise`."""
    return {
        f"{name}/seed-{seed}": a_run(value + noise * seed, ratio=PARAMETERS[name])
        for name, value in bits.items()
        for seed in range(seeds)
    }


GOOD = {"plain-1.0x": 1.20, MAIN: 1.17, "plain-1.69x": 1.18, "plain-2x": 1.16, ISO_FLOP: 1.19}
BAD = {"plain-1.0x": 1.20, MAIN: 1.195, "plain-1.69x": 1.18}
HOPS = {
    "hops-looped/seed-0": {"validation": 1.0, "fresh": 0.99, "loops": 24},
    "hops-plain-1.69x-lr-0.01/seed-0": {"validation": 0.4, "fresh": 0.7, "loops": 1},
    "hops-plain-1.69x-lr-0.02/seed-0": {"validation": 0.5, "fresh": 0.3, "loops": 1},
}
HOPS = {name: {"parameters": 1e6, "flops": 1e13} | run for name, run in HOPS.items()}


@pytest.mark.parametrize("quick", [False, True])
def test_plain_models_have_the_parameters_that_their_names_say(quick):
    rows = trainings(quick=quick)
    base = rows[MAIN].costs()["parameters"]
    for name in rows.keys() & RATIOS.keys():
        assert rows[name].costs()["parameters"] / base == pytest.approx(RATIOS[name], rel=0.01)
        assert rows[name].config.mean_loops == 1


def test_every_looped_shape_has_the_same_parameters():
    base = ROWS[MAIN].costs()["parameters"]
    for name in VARIANTS:
        wide = ROWS[name].config.hidden_size > ROWS[MAIN].config.hidden_size
        within = 0.05 if wide else 0.015
        assert ROWS[name].costs()["parameters"] == pytest.approx(base, rel=within)


def test_rows_share_all_but_shape_and_the_iso_flop_row_its_operations():
    wanted = max(ROWS[name].costs()["flops"] for name in SEEDED)
    assert ROWS[ISO_FLOP].costs()["flops"] == pytest.approx(wanted, rel=0.01)
    for name, training in ROWS.items():
        steps = training.steps if name != ISO_FLOP else ROWS[MAIN].steps
        alike = {"shape": ROWS[MAIN].shape, "steps": steps, "depth": "near", "lanes": 1}
        same = dataclasses.replace(training, **alike)
        assert same == ROWS[MAIN]


def test_the_hours_are_those_of_the_operations():
    total = 0.0
    for cell in cells(quick=False, seeds=3):
        if cell.name in {f"{name}/seed-0" for name in SEEDED}:
            continue  # one of the trainings that choose the rate
        kind = TextTraining if "shape" in cell.settings else reasoning_leg.HopTraining
        names = {field.name for field in dataclasses.fields(kind)} - {"rate"}
        fields = {key: value for key, value in cell.settings.items() if key in names}
        if kind is reasoning_leg.HopTraining:
            fields["loops"] = tuple(fields["loops"])
        training = kind(**fields)
        total += training.training_flops(on_meta(training.config))
    seconds = 3600 * CLAIMS["parameter-efficiency"].hours
    assert 35e9 < total / seconds < 50e9  # a core's operations a second


def test_the_compared_rows_are_tuned_alike_and_the_others_take_a_tuned_rate():
    made = {cell.name: cell for cell in cells(quick=False, seeds=3)}
    for row in (MAIN, "plain-1.0x", "plain-1.69x"):
        tuned = [name for name in made if name.startswith(f"tune/{row}/")]
        assert len(tuned) == len(RATES) >= 2
        assert {f"{row}/seed-{seed}" for seed in range(3)} <= set(made)
    for row in ROWS:
        tuned_as = made[f"{row}/seed-0"].settings["tuned_as"]
        assert tuned_as in SEEDED
        assert tuned_as.split("-")[0] == row.split("-")[0]  # looped as looped, plain as plain


def test_a_row_takes_the_rate_that_the_documents_for_choosing_prefer(tmp_path, monkeypatch):
    monkeypatch.setattr(text_training, "open_corpus", lambda _: few_messages(tmp_path))
    rates, rows = (1e-3, 1.0), {MAIN: TINY, "looped-other": dataclasses.replace(TINY, length=12)}

    def run(cell):
        return run_cells([cell], tmp_path, lambda _: None)[cell.name]

    tuned = run_cells(claim._tuning(MAIN, TINY, rates), tmp_path, lambda _: None)
    best = min(tuned.values(), key=lambda result: result["choice"])
    cell = claim._cell(MAIN, rows, 1, rates)
    result, other = run(cell), run(claim._cell("looped-other", rows, 0, rates))
    assert result["rate"] == other["rate"] == best["rate"] == 1.0
    assert result["choice"] == result["curve"]["2"] != result["test"]
    assert cell.settings["rate"] == [1e-3, 1.0]
    chosen = run(claim._cell(MAIN, rows, 0, rates))
    assert {key: chosen[key] for key in ("rate", "choice", "test", "training_seconds")} == {
        key: best[key] for key in ("rate", "choice", "test", "training_seconds")
    }
    assert len({run["test"] for run in (chosen, result, other)}) == 3


def test_the_share_is_0_for_the_twin_and_1_for_the_larger_model():
    assert share_of_gap(1.2, 1.2, 1.1) == 0
    assert share_of_gap(1.2, 1.1, 1.1) == 1
    assert share_of_gap(1.2, 1.15, 1.1) == pytest.approx(0.5)
    assert math.isnan(share_of_gap(1.1, 1.0, 1.2))


def test_a_gap_that_is_closed_is_said_with_its_interval():
    section = conclude(some_results(GOOD))
    text = as_markdown(section)
    assert "It closes 150 % (150 to 150 % by seed) of the gap" in text
    assert "-0.0100 (-0.0100 to -0.0100) bits per byte, better, and the interval shows it" in text
    assert "of twice its parameters: +0.0100" in text
    met = {e.what: e.met for e in section.expectations}
    assert met == {
        "share of the gap closed": True,
        "looped minus plain-1.69x": True,
        "its interval's upper end": True,
        "goal: looped minus plain-2x": False,
    }


def test_a_gap_that_stays_open_is_said_too():
    section = conclude(some_results(BAD, seeds=1))
    assert "It closes 25 % of the gap" in " ".join(section.sentences)
    assert not any(e.met for e in section.expectations)
    assert [e.measured for e in section.expectations] == ["25.0 %", "+0.0150", "one seed"]
    assert [e.met for e in section.expectations] == [
        False,
        False,
        None,
    ]  # one seed settles no interval


def test_a_row_of_fewer_seeds_stands_beside_the_compared_one_in_the_same_seeds():
    results = some_results({**GOOD, MAIN: 1.19})
    results[f"{MAIN}/seed-0"]["test"] = results["plain-1.0x/seed-0"]["test"] - 0.016
    results["looped-0+4x4+0/seed-0"] = a_run(1.19)
    cells = {line.split(" | ")[0]: line for line in conclude(results).tables[1].splitlines()}
    assert cells["| looped-0+4x4+0"].endswith("| 50 % (one seed) | 80 % (one seed) |")
    assert cells[f"| {MAIN}"].endswith("| 60 % |  |")


def test_no_gap_is_no_share():
    section = conclude(some_results({**BAD, "plain-1.69x": 1.3}))
    assert "no better than that of 1.0 times" in " ".join(section.sentences)
    assert section.expectations[0].measured == "no gap"
    assert not section.expectations[0].met


def test_the_compared_shape_is_chosen_on_other_documents_than_the_test_text():
    other, main = "looped-1+2x4+1", f"({MAIN.removeprefix('looped-')} layers"
    results = some_results({MAIN: 1.17, other: 1.18})
    assert main in conclude(results).sentences[0]
    for name in results:
        results[name]["choice"] = 1.0 if name.startswith(other) else 1.1
    assert "(1+2x4+1 layers" in conclude(results).sentences[0]
    fewer = {name: run for name, run in results.items() if name[-1] == "0" or MAIN in name}
    section = conclude(fewer)
    assert main in section.sentences[0]
    assert "looped-1+2x4+1 has fewer bits on the documents for choosing" in section.sentences[-1]


def test_a_rate_at_the_edge_is_admitted():
    inside = statistics.fmean(RATES)
    results = {
        "plain-2x/seed-0": a_run(1.2, rate=max(RATES)),
        "plain-1.3x/seed-0": a_run(1.2, rate=inside),
    }
    assert any("for plain-2x: a rate beyond" in note for note in conclude(results).notes)


def test_hops_are_compared_at_the_rate_that_validation_chains_prefer():
    section = conclude(HOPS)
    assert (
        "answers 0.990 right; a plain one of 1 times its parameters, trained with 1.00 times "
        "its operations, 0.300 (one seed)." in section.sentences[0]
    )
    assert [(e.wanted, e.met) for e in section.expectations] == [("≥ 0.300", True)]
    worse = {**HOPS, "hops-looped/seed-0": {**HOPS["hops-looped/seed-0"], "fresh": 0.1}}
    assert not conclude(worse).expectations[0].met


def test_any_part_of_the_grid_can_be_concluded_and_drawn():
    tuned = {"tune/plain-2x/rate-0.5": {"rate": 0.5, "choice": 1.5}}
    everything = some_results(GOOD, seeds=1) | HOPS | tuned
    for size in (1, 2, len(everything) - 1):
        for names in itertools.islice(itertools.combinations(everything, size), 0, None, 3):
            part = {name: everything[name] for name in names}
            assert as_markdown(conclude(part))
    draw_figure(everything)
    draw_figure(dict(list(everything.items())[:2]))


def test_plain_hop_models_have_their_ratio_and_twice_the_steps():
    model = reasoning_leg.MODEL
    for ratio in reasoning_leg.RATIOS:
        plain = reasoning_leg.plain_of(ratio, model)
        own, other = (trained_parameters(on_meta(t.config)) for t in (plain, model))
        assert own / other == pytest.approx(ratio, rel=0.01)
        assert plain.steps == 2 * model.steps


def test_the_reasoning_leg_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(reasoning_leg, "LOOPS", (1, 2))
    monkeypatch.setattr(reasoning_leg, "RATIOS", (1.5,))
    monkeypatch.setattr(hop_training, "LENGTH", 24)
    tiny = dataclasses.replace(
        reasoning_leg.MODEL, hidden_size=16, feed_forward_size=32, loops=(1, 2), steps=1
    )
    results = run_cells(reasoning_leg.cells(tiny), tmp_path, lambda _: None)
    rows = reasoning_leg.chosen(results)
    assert list(rows) == ["hops-looped", "hops-plain-1.5x"]
    assert rows["hops-plain-1.5x"]["loops"] == 1
    assert all(0 <= row["fresh"] <= 1 for row in rows.values())
    assert len(results) == 3


def test_the_published_claim_is_reported_with_both_of_its_shares():
    assert "87 % of the gap" in published()  # (25.07 - 22.42) / (25.45 - 22.42)
    assert "close 51 % of the gap in nats" in published()
