"""Choices of experts: what loops share, what forcing them costs, and what is said of it."""

import dataclasses
import itertools

import pytest
import torch
from few_messages import few_messages
from tiny import some_ids, tiny

from openmythos.evidence import routing as claim
from openmythos.evidence import text_training
from openmythos.evidence.cells import run_cells
from openmythos.evidence.claims import CLAIMS
from openmythos.evidence.expert_choice import (
    chance,
    jitter,
    members,
    mutual_information,
    statistics_of,
    variation,
)
from openmythos.evidence.forced_routing import FORCED, bootstrap, costs, read, windows_of
from openmythos.evidence.report import as_markdown
from openmythos.evidence.routing import (
    CORRECTIONS,
    FROZEN,
    MAIN,
    ROWS,
    cells,
    conclude,
    draw_figure,
    trainings,
)
from openmythos.evidence.text_training import TextTraining
from openmythos.model.accounting import on_meta
from openmythos.model.transformer import OpenMythos

TINY = TextTraining(
    shape={**claim.MODEL.shape, "hidden_size": 16, "expert_size": 8, "mean_loops": 2},
    steps=6,
    batch_size=2,
    length=16,
    corpus="embedded",
    vocab_size=270,
    measured_tokens=64,
)


def drawn(loops=3, layers=2, tokens=4000, experts=8, chosen=2):
    return torch.rand(loops, layers, tokens, experts).topk(chosen, -1).indices


def a_choice(identical=0.1, disjoint=0.5, jitter=0.95, variation=0.1):
    loops = {"identical": identical, "disjoint": disjoint, "jaccard": 0.2}
    return {
        "loops": loops,
        "identical_by_pair": {"1 and 2": identical, "3 and 4": identical + 0.05},
        "other_tokens": {**loops, "identical": 0.04},
        "information": 0.1,
        "variation": variation,
        "load": [[[0.125] * 8, [0.125] * 8]] * 4,
        "jitter": jitter,
    }


def a_run(nats=3.0, cost=0.05, half=0.01, **choice):
    interval = {"mean": cost, "low": cost - half, "high": cost + half}
    depth = {"nats": nats, "forced": dict.fromkeys(FORCED, interval), **a_choice(**choice)}
    return {
        "parameters": 1e6,
        "trained_loops": 4,
        "tokens": 4096,
        "depths": {"4": depth, "8": {**depth, "nats": nats + 0.1}},
        "windows": [nats + 0.01 * (n % 3) for n in range(16)],
        "untrained": a_choice(identical=0.7),
    }


GOOD = {
    f"{name}/seed-{seed}": a_run(3.0 + 0.03 * (name == FROZEN))
    for name in ROWS
    for seed in range(2)
}


def test_chance_is_that_of_two_draws():
    assert chance(8, 2).identical == pytest.approx(1 / 28)
    assert chance(8, 2).disjoint == pytest.approx(15 / 28)
    assert chance(8, 2).jaccard == pytest.approx(1 / 28 + 12 / 28 / 3)
    assert chance(5, 5) == (1, 0, 1)
    found = statistics_of(drawn(), 8)["loops"]  # 24,000 pairs: a deviation of 0.0012 and 0.0032
    assert found["identical"] == pytest.approx(1 / 28, abs=0.006)
    assert found["disjoint"] == pytest.approx(15 / 28, abs=0.016)


def test_loops_that_choose_alike_are_identical_whatever_the_order():
    first = drawn(loops=1)
    choices = torch.cat([first, first.flip(-1)])
    found = statistics_of(choices, 8)
    assert found["loops"] == {"identical": 1, "disjoint": 0, "jaccard": 1}
    assert found["other_tokens"]["identical"] < 0.1
    assert found["information"] == pytest.approx(0, abs=1e-9)


def test_what_loops_share_is_counted_as_by_hand():
    choices = torch.tensor([[[[0, 1], [2, 3], [4, 0]]], [[[1, 0], [3, 1], [2, 1]]]])
    found = statistics_of(choices, 5)
    assert found["loops"] == pytest.approx(
        {"identical": 1 / 3, "disjoint": 1 / 3, "jaccard": (1 + 1 / 3) / 3}
    )
    assert found["identical_by_pair"] == {"1 and 2": pytest.approx(1 / 3)}
    assert found["load"][0][0] == pytest.approx([2 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6])
    assert members(choices, 5).sum().item() == 12


def test_information_is_all_where_each_loop_has_its_own_experts():
    assert mutual_information(torch.eye(4, dtype=torch.int64) * 7) == pytest.approx(1)
    assert mutual_information(torch.full((4, 8), 3)) == pytest.approx(0, abs=1e-9)


def test_variation_is_the_deviation_over_the_mean():
    assert variation(torch.tensor([1, 3])) == pytest.approx(0.5)
    assert variation(torch.tensor([4, 4, 4])) == 0


def test_noise_is_compared_on_the_same_state(monkeypatch):
    model, token_ids = tiny(spread=0), some_ids()
    whole = model(token_ids, 3).logits
    assert 0.7 < jitter(model, token_ids, 3) <= 1
    assert torch.equal(model(token_ids, 3).logits, whole)  # no hook is left
    monkeypatch.setattr("openmythos.evidence.expert_choice.NOISE", 100.0)
    assert jitter(model, token_ids, 3) < 0.5
    monkeypatch.setattr("openmythos.evidence.expert_choice.NOISE", 0.0)
    assert jitter(model, token_ids, 3) == 1


@pytest.mark.parametrize("name", FORCED)
def test_forced_routing_gives_distinct_experts_from_where_it_says(name):
    own = torch.rand(3, 2, 4, 5, 8).topk(2, -1).indices
    given = FORCED[name](own, 8, torch.Generator().manual_seed(1))
    assert (given[..., 0] != given[..., 1]).all()
    assert 0 <= int(given.min()) <= int(given.max()) < 8
    assert given.shape[1:] == own.shape[1:]
    assert not torch.equal(given.expand(own.shape), own)
    if name == "first loop's":
        assert torch.equal(given, own[:1])
    if name == "shuffled between loops":
        assert torch.equal(members(given, 8).sum(0), members(own, 8).sum(0))
    if name == "another token's":
        assert torch.equal(members(given, 8).sum(3), members(own, 8).sum(3))


def test_a_models_own_routing_costs_nothing_and_another_something():
    model, windows = tiny(), some_ids(batch=5, sequence=9)
    forced = {"own": lambda own, experts, generator: own, "random": FORCED["random"]}
    found = read(model, windows, 3, forced, batch_size=2)
    assert found.forced["own"] == pytest.approx(found.own, abs=1e-5)  # fp32, sums of 8 terms
    assert max(abs(a - b) for a, b in zip(found.forced["random"], found.own, strict=True)) > 1e-3
    assert len(found.own) == 5
    assert found.choices.shape == (3, 2, 5 * 8, 2)
    assert costs(found)["own"].mean == pytest.approx(0, abs=1e-5)
    alone = read(model, windows[3:4], 3, {})
    assert alone.own[0] == pytest.approx(found.own[3], abs=1e-5)
    assert torch.equal(alone.choices, found.choices[:, :, 24:32])


def test_windows_share_no_prediction(tmp_path, monkeypatch):
    monkeypatch.setattr(text_training, "open_corpus", lambda _: few_messages(tmp_path))
    text = text_training.read_texts(tmp_path, "embedded", 270).test
    windows = windows_of(text, 16)
    assert windows.shape == (text.tokens // 16, 17)
    assert torch.equal(windows[:-1, -1], windows[1:, 0])
    assert torch.equal(windows_of(text, 16, 40), windows[:2])
    assert len(windows_of(text, 16, 1)) == 1


def test_the_interval_is_that_of_the_mean():
    values = torch.randn(400, dtype=torch.float64) + 0.3
    found = bootstrap(values.tolist())
    half = 1.96 * float(values.std()) / 20
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert found == bootstrap(values.tolist())
    assert bootstrap([0.5]) == (0.5, 0.5, 0.5)


def test_a_frozen_router_stays_where_it_started_and_the_rest_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(text_training, "open_corpus", lambda _: few_messages(tmp_path))
    texts = text_training.read_texts(tmp_path, "embedded", 270)
    model, _ = TINY.train(tmp_path / "frozen", texts, lambda _: None, frozen=("router",))
    start = OpenMythos(TINY.config, seed=TINY.seed)
    for (name, parameter), before in zip(model.named_parameters(), start.parameters(), strict=True):
        still = torch.equal(parameter, before)
        assert still == (".router." in name or name.startswith("core.gate.")), name
    assert any(layer.router.balance.any() for layer in model.core.experts_layers())


def test_rows_differ_in_lora_alone():
    rows = trainings(quick=False)
    assert list(rows) == list(ROWS)
    assert rows[MAIN] == rows[FROZEN]
    for name, lora in CORRECTIONS.items():
        same = dataclasses.replace(rows[name], shape={**rows[MAIN].shape, **lora})
        assert same == rows[name]
    counts = {name: row.costs()["parameters"] for name, row in rows.items()}
    assert counts[MAIN] < counts["lora-shared"] < counts["lora-per-loop"]
    assert rows["lora-per-loop"].config.lora_loops == 4
    assert [cell.name for cell in cells(quick=True, seeds=3)] == [
        f"{MAIN}/seed-0",
        f"{FROZEN}/seed-0",
    ]


def test_the_hours_are_those_of_the_operations():
    total = 0.0
    for cell in cells(quick=False, seeds=2):
        names = {field.name for field in dataclasses.fields(TextTraining)}
        fields = {key: value for key, value in cell.settings.items() if key in names}
        training = TextTraining(**fields)
        total += training.training_flops(on_meta(training.config))
    seconds = 3600 * CLAIMS["routing"].hours
    assert 20e9 < total / seconds < 40e9  # small grouped products are slower


def test_a_good_outcome_is_said_and_meets_what_was_expected():
    section = conclude(GOOD)
    text = as_markdown(section)
    assert "(2 seeds), two loops choose the same 2 of 8 experts for 10.0 % of tokens" in text
    assert "chance would give 3.6 % and 53.6 %" in text
    assert "first loop's +0.0500 (+0.0400 to +0.0600) nats" in text
    assert "costs +0.0300 (+0.0300 to +0.0300) nats (by seed: +0.0300, +0.0300)" in text
    assert "learning to route is worth that much" in text
    assert "at the trained depth 3.0000 without, 3.0000 with one for all" in text
    assert "at twice that 3.1000 without" in text
    assert all(e.met for e in section.expectations)
    assert "hoped for" not in text
    assert len(section.expectations) == 7


def test_a_frozen_router_that_reads_as_well_is_admitted():
    results = {f"{MAIN}/seed-0": a_run(3.0), f"{FROZEN}/seed-0": a_run(2.99)}
    section = conclude(results)
    assert "it reads better, so learning to route adds nothing" in as_markdown(section)
    assert section.expectations[-1].met is False
    split = results | {f"{MAIN}/seed-1": a_run(3.0), f"{FROZEN}/seed-1": a_run(3.1)}
    text = as_markdown(conclude(split))  # one seed says otherwise
    assert "the seeds disagree, so learning to route adds nothing sure" in text
    alike = results | {f"{FROZEN}/seed-0": a_run(3.0)}
    text = as_markdown(conclude(alike))
    assert "that cannot be told from nothing, so learning to route adds nothing" in text


def test_one_seed_of_a_frozen_router_leaves_open_what_every_seed_is_asked():
    results = {f"{MAIN}/seed-0": a_run(3.0), f"{FROZEN}/seed-0": a_run(3.1)}
    wanted = conclude(results).expectations[-1]
    assert wanted.met is None
    assert wanted.measured.endswith("one seed")


def test_what_misses_is_said():
    runs = {
        f"{MAIN}/seed-0": a_run(),
        f"{MAIN}/seed-1": a_run(cost=0.005, identical=0.6, disjoint=0.1, jitter=0.8, variation=0.5),
    }
    section = conclude(runs)
    assert not any(e.met for e in section.expectations)  # the worst seed counts
    text = as_markdown(section)
    assert "of the first loop's experts cannot be told from nothing" in text
    assert "loops 1 and 2 agree least, on 35.0 % of tokens, loops 3 and 4 most" in text
    weak = conclude({f"{MAIN}/seed-0": a_run(cost=0.015)})
    assert "is there, but below the 0.02 hoped for" in as_markdown(weak)


def test_any_part_of_the_grid_can_be_concluded_and_drawn():
    assert conclude({}).sentences == []
    for size in (1, 2, 3, len(GOOD)):
        for names in itertools.combinations(GOOD, size):
            assert as_markdown(conclude({name: GOOD[name] for name in names}))
    draw_figure(GOOD)
    draw_figure({})


def test_a_cell_trains_and_measures_for_real(tmp_path, monkeypatch):
    monkeypatch.setattr(text_training, "open_corpus", lambda _: few_messages(tmp_path))
    small = [claim._cell(name, TINY, 0) for name in (MAIN, FROZEN)]
    results = run_cells(small, tmp_path, lambda _: None)
    run = results[f"{MAIN}/seed-0"]
    assert list(run["depths"]) == ["2", "4"]
    assert len(run["windows"]) == 4
    assert set(run["depths"]["4"]["forced"]) == set(FORCED)
    assert len(run["depths"]["4"]["load"]) == 4
    assert run["windows"] != results[f"{FROZEN}/seed-0"]["windows"]
    assert conclude(results).expectations
    draw_figure(results)
