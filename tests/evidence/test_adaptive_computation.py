"""Loops that follow need: the oracle, the rank correlation, and what is said of them."""

import dataclasses

import numpy as np
import pytest
import torch

from openmythos.evidence.adaptive_computation import (
    QUICK,
    conclude,
    constant_length,
    first_lasting,
    run,
    spearman,
)


def test_the_oracle_stops_where_a_token_becomes_right_for_good():
    right = torch.tensor(
        [
            [0, 1, 0, 1, 0],
            [1, 0, 0, 1, 0],
            [1, 1, 0, 1, 1],
        ]
    ).bool()
    assert first_lasting(right.unsqueeze(1)).tolist() == [[2, 3, 1, 1, 3]]


def test_rank_correlation_shares_the_ranks_of_ties():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([4, 3, 2, 1], [10, 20, 30, 40]) == pytest.approx(-1)
    # by hand: ranks 1.5 1.5 3 4 and 1 2 3.5 3.5
    ranks = np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 3.5, 3.5])[0, 1]
    assert spearman([5, 5, 6, 7], [1, 2, 3, 3]) == pytest.approx(ranks)


def test_test_chains_have_one_length_and_every_number_of_hops():
    chains = constant_length(QUICK, range(1, 4), 9)
    assert chains.token_ids.shape == (3 * QUICK.chains, 10)
    assert sorted(set(chains.hops[:, -1])) == [1, 2, 3]


def test_a_study_runs_and_is_concluded_from(tmp_path):
    training = dataclasses.replace(
        QUICK.training, hidden_size=16, feed_forward_size=16, steps=2, loops=(2, 3)
    )
    study = dataclasses.replace(
        QUICK, training=training, budget=4, gate_steps=2, exit_steps=2, chains=1
    )
    result = run(study, tmp_path, lambda line: None)
    assert (tmp_path / "reasoner" / "config.json").is_file()
    section = conclude({"hops/seed-0": result})
    assert "rank correlation" in section.sentences[0]
    wanted = {e.what: e.met for e in section.expectations}
    assert not wanted["rank correlation of loops and hops"]  # an untrained model's
    assert result["before"]["random"]["mean_loops"] == pytest.approx(
        result["before"]["chosen"]["mean_loops"]
    )


@pytest.mark.parametrize(("worth", "said"), [(0.2, "are worth 0.200"), (0.01, "no depth")])
def test_text_is_asked_first_whether_depth_is_worth_anything(worth, said):
    section = conclude({"text": {"bits_per_byte": {"1": 1.2 + worth, "8": 1.2}}})
    assert said in section.sentences[0]
    assert not conclude({"text": {"bits_per_byte": {}}}).sentences
