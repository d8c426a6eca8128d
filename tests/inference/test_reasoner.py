"""What a reasoner says after each loop is what its model's states say."""

import numpy as np
import pytest
import torch
from tiny import tiny

from openmythos.errors import CheckpointError, InputError
from openmythos.inference.reasoner import Reasoner, load_reasoner
from openmythos.inference.shipped import find_model, shipped
from openmythos.inference.thinking import Thinking
from openmythos.tasks.rooms import HOUSE


@pytest.fixture(scope="module")
def reasoner():
    return Reasoner(tiny(vocab_size=HOUSE.vocab_size, experts=0))


def chain(hops=4, slots=6):
    return HOUSE.chains(np.random.default_rng(0), 1, hops, slots)


def test_beliefs_are_the_answers_at_each_number_of_loops(reasoner):
    walk = chain()
    trace = reasoner.solve(walk.token_ids, Thinking(loops=3))
    assert trace.beliefs.shape == (3, 7)
    for loops in (1, 2, 3):
        logits = reasoner.model(torch.from_numpy(walk.token_ids), loops).logits
        wanted = logits[0, :, : HOUSE.entities].argmax(-1).numpy()
        assert (trace.beliefs[loops - 1] == wanted).all()
    assert (trace.right == (trace.beliefs == walk.answers)).all()
    assert trace.solved == (trace.answer == walk.answers[0, -1])
    assert (trace.stopped == 3).all()


def test_a_place_that_has_stopped_keeps_its_belief(reasoner):
    thinking = Thinking(loops=6, halting="delta", threshold=0.9)
    trace = reasoner.solve(chain().token_ids, thinking)
    assert trace.stopped.min() < 6
    for place, stopped in enumerate(trace.stopped):
        later = trace.beliefs[stopped - 1 :, place]
        assert (later == later[0]).all()


def test_more_hops_get_more_loops_by_default(reasoner):
    assert len(reasoner.solve(chain(20, 20).token_ids).beliefs) == reasoner.enough(20)
    assert reasoner.enough(40) > reasoner.enough(20) > 20
    waiting = reasoner.solve(chain(20, 50).token_ids)
    assert len(waiting.beliefs) == reasoner.enough(20, waits=30) == reasoner.enough(20) + 7


@pytest.mark.parametrize(("hops", "waits"), [(10, 70), (20, 80)])
def test_the_shipped_reasoner_finds_its_way_through_waits_with_the_loops_it_takes(hops, waits):
    # Of 30 such walks at most one was wrong: that three of six are is a chance below 1 in 1,000.
    random, shipped_one = np.random.default_rng(1), load_reasoner()
    walks = [HOUSE.chains(random, 1, hops, hops + waits).token_ids for _ in range(6)]
    assert sum(shipped_one.solve(walk).solved for walk in walks) >= 4
    few = Thinking(loops=shipped_one.enough(hops))
    assert sum(shipped_one.solve(walk, few).solved for walk in walks) <= 5


def test_what_is_no_chain_or_no_reasoner_is_refused(reasoner):
    with pytest.raises(InputError, match="must be entities"):
        reasoner.solve(np.array([[40, 41]]))
    with pytest.raises(InputError, match="walk has 81 words, and must have at most max_length=64"):
        reasoner.solve(chain(80, 80).token_ids)
    with pytest.raises(CheckpointError, match="vocab_size=50, and must have 49 to reason"):
        Reasoner(tiny())
    with pytest.raises(CheckpointError, match="must be a model's folder or 'openmythos-reasoner'"):
        load_reasoner("nowhere")


def test_a_reasoner_loads_from_a_folder(reasoner, tmp_path):
    reasoner.model.save_pretrained(tmp_path / "own")
    again = load_reasoner(tmp_path / "own")
    walk = chain().token_ids
    assert (again.solve(walk).beliefs == reasoner.solve(walk).beliefs).all()


def test_a_folder_of_ones_own_goes_before_a_model_in_the_package(tmp_path, monkeypatch):
    for name in shipped():
        assert (find_model(name) / "config.json").is_file()
        monkeypatch.chdir(tmp_path)
        (tmp_path / name).mkdir()
        assert not find_model(name).is_absolute()
    assert find_model(tmp_path) == tmp_path
