"""Facts seen alone: what a batch may hold, how the controls work, and what is concluded."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from openmythos.evidence import systematic_generalisation as claim
from openmythos.evidence.cells import run_cells
from openmythos.evidence.fact_models import StepByStep
from openmythos.evidence.fact_training import ADDED, COURSE, FactTraining, lens, right
from openmythos.evidence.fit import IGNORE
from openmythos.evidence.report import as_markdown
from openmythos.model.transformer import MythosOutput, OpenMythos

TINY = FactTraining(
    entities=9,
    relations=6,
    alone=0.4,
    later=9,
    apart=0.4,
    hops=3,
    hidden_size=16,
    feed_forward_size=24,
    loops=(1, 3),
    stairs=True,
    batch_size=20,
    steps=4,
    added_steps=2,
    measure_every=2,
    questions=12,
)
UNTIED = dataclasses.replace(TINY, plain_layers=3)


def shaken(training):
    """A model whose out-projections, zero at the start, are not."""
    model = training.new_model().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def some_ids(training):
    return training.batch(0).token_ids


@pytest.mark.parametrize("waits", [False, True])
def test_a_fact_seen_alone_never_stands_beside_another(waits):
    training = dataclasses.replace(TINY, waits=waits)
    task = training.task
    for step in range(30):
        token_ids = training.batch(step).token_ids.numpy()
        relations = (token_ids >= task.entities) & (token_ids != task.no_op)
        beside = relations.sum(axis=1) > 1
        followed = np.where(relations, token_ids - task.entities, 0)
        at = token_ids[:, 0]
        for place in range(1, token_ids.shape[1]):
            used = beside & relations[:, place]
            assert (task.kinds[followed[used, place], at[used]] == 0).all()
            at = np.where(relations[:, place], task.tails[followed[:, place], at], at)


def test_facts_kept_for_later_are_in_no_batch_before():
    alone = {(int(r), int(e)) for r, e in zip(*TINY.task.having("later").nonzero(), strict=True)}
    for step in range(30):
        batch = TINY.batch(step)
        count = round(TINY.lone_share * TINY.batch_size)
        for entity, relation in batch.token_ids[:count, :2].tolist():
            assert (relation - TINY.entities, entity) not in alone


def test_with_stairs_no_answer_is_asked_for_after_more_hops_than_loops():
    seen = set()
    for step in range(20):
        batch = TINY.batch(step)
        assert (batch.targets[:, batch.loops + 1 :] == IGNORE).all()
        assert (batch.targets[-1, : batch.loops + 1] != IGNORE).all()  # the last row is a chain
        seen.add(batch.loops)
    assert seen == {1, 2, 3}


def test_all_layers_of_an_untied_model_are_the_plain_transformer():
    model, token_ids = shaken(UNTIED), some_ids(UNTIED)
    plain = OpenMythos(UNTIED.config).eval()
    plain.load_state_dict(model.state_dict())
    out = model(token_ids, 3, return_states=True)
    assert isinstance(model, StepByStep)
    assert_close(out.logits, plain(token_ids, 1).logits)
    assert_close(model.decode(out.states[1]), model(token_ids, 2).logits)
    assert len(model.core.layers) == 3


def test_layers_that_do_not_run_get_no_gradient():
    model = shaken(UNTIED)
    model(some_ids(UNTIED), 2).logits.sum().backward()
    moved = [layer.attention_norm.weight.grad is not None for layer in model.core.layers]
    assert moved == [True, True, False]


@pytest.mark.parametrize("hands_on", ["answer", "both"])
@pytest.mark.parametrize("injection", ["lti", "none"])
def test_a_loop_hands_on_the_expected_embedding_of_its_answer(injection, hands_on):
    training = dataclasses.replace(TINY, injection=injection, hands_on=hands_on)
    model, token_ids = shaken(training), some_ids(training)
    plain = OpenMythos(training.config).eval()
    plain.load_state_dict(model.state_dict())
    first = plain(token_ids, 1, return_states=True)
    read = torch.einsum("bsv,vh->bsh", first.logits.softmax(-1), plain.embed.weight)
    h = plain.config.embedding_scale * read + (first.states[0] if hands_on == "both" else 0)
    assert isinstance(model, StepByStep)
    assert_close(model(token_ids, 1).logits, first.logits)
    second = model(token_ids, 2, return_states=True)
    assert_close(second.logits, plain(token_ids, 1, h0=h).logits)
    assert_close(second.states[0], first.states[0])


def test_a_sure_answer_that_is_handed_on_is_the_token_itself():
    training = dataclasses.replace(TINY, hands_on="answer")
    model, token_ids = training.new_model(), some_ids(training)
    logits = 1e4 * torch.nn.functional.one_hot(token_ids, training.task.vocab_size).float()
    assert_close(model._expected(logits), model.encode(token_ids))


def test_layers_hand_on_their_answers_too():
    training = dataclasses.replace(UNTIED, hands_on="answer")
    model, token_ids = shaken(training), some_ids(training)
    assert not torch.equal(model(token_ids, 1).logits, model(token_ids, 2).logits)
    state = dataclasses.replace(UNTIED, hands_on="state").new_model().eval()
    state.load_state_dict(model.state_dict())
    assert_close(model(token_ids, 1).logits, state(token_ids, 1).logits)
    assert (model(token_ids, 2).logits - state(token_ids, 2).logits).abs().max() > 0.01


def test_a_model_that_knows_every_answer_is_right_at_the_loops_it_needs():
    task = TINY.task

    class Oracle(OpenMythos):
        """Names, after n loops, the entity that each place's first n hops lead to."""

        def forward(self, token_ids, loops, *, return_states):
            rows = torch.from_numpy(task._answered(token_ids.numpy()).answers)
            places = torch.arange(token_ids.shape[1])
            known = [
                rows.gather(1, places.clamp(max=n).expand_as(rows)) for n in range(1, loops + 1)
            ]
            states = torch.nn.functional.one_hot(torch.stack(known), task.vocab_size).float()
            taken = torch.full_like(token_ids, loops)
            return MythosOutput(states[-1], taken, states=states)

        def decode(self, h):
            return h

    shares = right(Oracle(TINY.config), task, 40, [1, 2, 3, 4], COURSE)
    for name, (kinds, _) in COURSE.items():
        assert shares[name][4] == 1.0
        assert len(kinds) == 1 or shares[name][len(kinds) - 1] < 0.7
    read = lens(Oracle(TINY.config), task, 40, 3)["alone"]
    assert read["bridge"] == [1.0, 1.0, 1.0]
    assert read["answer"][0] < 0.7
    assert read["answer"][1:] == [1.0, 1.0]


@pytest.mark.parametrize("training", [TINY, UNTIED], ids=["looped", "plain"])
def test_a_cell_measures_all_that_is_concluded_from(training, tmp_path):
    cell = claim._cell("looped", training, seed=1)
    results = run_cells([cell], tmp_path, lambda _: None)
    result = results["looped/graph-1"]
    assert list(result["course"]) == ["2", "4"]
    assert set(result["right"]) == set(COURSE)
    assert set(result["added"]["rehearsed"]["after"]) == set(ADDED)
    again = run_cells([claim._cell("looped", training, seed=1)], tmp_path, lambda _: None)
    section = claim.conclude(again)
    assert len(section.tables) == 4
    assert claim.draw_figure(again).axes


def a_run(*, two=0.95, four=0.8, apart=0.97, bridge=(0.9, 1.0), answer=(0.1, 0.9), out=300):
    known = dict.fromkeys(COURSE, 1.0) | {"alone-2": two, "alone-4": four, "apart-2": apart}
    early = dict.fromkeys(COURSE, 0.1) | {"chained-1": 0.95, "alone-1": 0.92}
    middle = {**early, "chained-2": 0.99, "chained-4": 0.95, "alone-2": 0.3}
    read = {"bridge": list(bridge), "answer": list(answer)}
    added = dict.fromkeys(ADDED, 0.5)
    return {
        "parameters": 123_000,
        "flops": 2e12,
        "alone": 200,
        "later": 50,
        "entities": 50,
        "depth": 6,
        "right": {name: {"6": share, "7": 0.0} for name, share in known.items()},
        "course": {"100": early, "200": middle, str(out): known},
        "lens": {"chained": read, "alone": read},
        "added": {how: {"before": added, "after": added} for how in ("rehearsed", "by themselves")},
    }


def test_figures_as_hoped_for_meet_every_expectation():
    plain = a_run(two=0.1, four=0.02)
    results = {"looped/graph-0": a_run(), "looped/graph-1": a_run(), "plain-8/graph-0": plain}
    section = claim.conclude(results)
    assert [e.met for e in section.expectations] == [True] * 7
    text = as_markdown(section)
    assert "seen alone only works in chains: with 200 such facts on each of 2 graphs" in text
    assert "plain transformers that learn the chains of training (plain-8) have 0.10 or" in text
    assert "hand on their state" not in text
    both = claim.conclude({**results, "looped-state/graph-0": a_run(two=0.85, four=0.4)})
    assert "with loops that hand on their state, as elsewhere in this package, 0.85 and 0.40" in (
        as_markdown(both)
    )
    first = {e.what: e for e in both.expectations if e.what.startswith("looped-state")}
    assert [e.met for e in first.values()] == [False, False, True]  # as it was asked first
    assert [e for e in both.expectations if e.what not in first] == section.expectations
    assert all(bool(e.later) == e.what.startswith("looped, ") for e in both.expectations)
    assert "| looped | 100, 100 | 200, 200 | 300, 300 |" in text
    assert "| plain-8 | 100 | 200 | never |" in text
    assert len(claim.draw_figure(results).axes) == 4  # two rows of two


def test_the_worst_graph_and_the_best_plain_model_decide():
    results = {
        "looped/graph-0": a_run(),
        "looped/graph-1": a_run(two=0.4, four=0.1, apart=0.5, bridge=(0.1, 0.9)),
        "plain-2/graph-0": a_run(two=0.2),
        "plain-8-stairs/graph-0": a_run(two=0.6),
    }
    section = claim.conclude(results)
    met = {e.what: e.met for e in section.expectations}
    assert [what for what, hit in met.items() if hit] == ["facts seen alone, each graph"]
    assert "does not work in chains" in section.sentences[0]
    assert "with 0.400 right or more and chains of four with 0.100" in section.sentences[0]


@pytest.mark.parametrize("name", ["plain-8", "looped", "state-waits", "looped-prelude"])
def test_any_cell_alone_can_be_concluded_from(name):
    results = {f"{name}/graph-0": a_run()}
    section = claim.conclude(results)
    assert bool(section.sentences) == (name == "looped")
    assert f"| {name} |" in as_markdown(section)
    claim.draw_figure(results)


def test_without_results_nothing_is_said():
    section = claim.conclude({})
    assert (list(section.sentences), list(section.tables), list(section.expectations)) == (
        [],
        [],
        [],
    )


def test_every_graph_has_the_main_rows_and_names_are_unique():
    cells = claim.cells(quick=False, seeds=3)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("looped/") for name in names) == 3
    assert min(FactTraining().task.count("alone"), claim.MAIN.task.count("alone")) >= 200
    assert {cell.name for cell in claim.cells(quick=True, seeds=1)} <= set(names)
