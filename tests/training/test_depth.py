import numpy as np
import pytest

from openmythos.errors import ConfigError, InputError
from openmythos.training.depth import DEPTH, backprop_loops, loop_probabilities, sample_loops
from openmythos.training.settings import DepthLaw

DRAWS = 40_000


def draw(law, mean_loops, *, seed=7, step=11, indices=range(DRAWS)):
    return sample_loops(law, mean_loops, seed=seed, step=step, indices=list(indices))


def test_the_table_and_the_names_of_the_config_agree():
    assert tuple(DEPTH) == DepthLaw.__args__


@pytest.mark.parametrize("law", DEPTH)
@pytest.mark.parametrize("mean_loops", [1, 2, 8, 33])
def test_every_draw_is_at_least_1_and_at_most_3_times_the_mean(law, mean_loops):
    loops = draw(law, mean_loops)
    assert loops.dtype == np.int64
    assert loops.shape == (DRAWS,)
    assert loops.min() >= 1
    assert loops.max() <= 3 * mean_loops
    assert loop_probabilities(law, mean_loops).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("law", DEPTH)
def test_a_mean_of_one_is_a_plain_transformers_one_loop(law):
    assert (draw(law, 1) == 1).all()


@pytest.mark.parametrize("law", DEPTH)
@pytest.mark.parametrize("mean_loops", [8, 33])
def test_the_draws_have_the_asked_mean(law, mean_loops):
    loops = draw(law, mean_loops)
    standard_error = loops.std() / np.sqrt(DRAWS)
    # Clipping moves a mean by less than 0.5 %; 5 standard errors fail once in two million.
    assert abs(loops.mean() - mean_loops) <= 5 * standard_error + 0.005 * mean_loops


@pytest.mark.parametrize("law", DEPTH)
@pytest.mark.parametrize("mean_loops", [2, 5, 16])
def test_the_draws_follow_the_stated_probabilities(law, mean_loops):
    chances = loop_probabilities(law, mean_loops)
    seen = np.bincount(draw(law, mean_loops), minlength=3 * mean_loops + 1)[1:]
    expected = chances * DRAWS
    # 5 deviations, 12 cases of up to 48 values: one seed in 3,000 fails, and it is fixed.
    assert (np.abs(seen - expected) <= 5 * np.sqrt(expected) + 5).all()


@pytest.mark.parametrize("law", ["poisson", "lognormal_poisson"])
def test_the_probabilities_are_those_of_numpys_own_sampler(law):
    mean_loops, draws = 9, 400_000
    random = np.random.default_rng(3)
    rate = np.full(draws, float(mean_loops))
    if law == "lognormal_poisson":
        rate = np.exp(random.normal(np.log(mean_loops) - 0.5**2 / 2, 0.5, draws))
    plain = np.clip(random.poisson(rate), 1, 3 * mean_loops)
    seen = np.bincount(plain, minlength=3 * mean_loops + 1)[1:] / draws
    chances = loop_probabilities(law, mean_loops)
    # 5 deviations for 27 values: fails for one seed in 60,000.
    assert (np.abs(seen - chances) <= 5 * np.sqrt(chances / draws) + 1e-5).all()


def test_the_lognormal_law_has_the_heavier_tail():
    def beyond_twice_the_mean(law):
        return loop_probabilities(law, 16)[32:].sum()

    assert beyond_twice_the_mean("lognormal_poisson") > 50 * beyond_twice_the_mean("poisson")


def test_fixed_is_the_mean_every_time():
    assert set(draw("fixed", 5)) == {5}


def test_near_is_the_mean_and_its_neighbours():
    assert set(draw("near", 5)) == {4, 5, 6}
    assert set(draw("near", 1)) == {1}


@pytest.mark.parametrize("law", DEPTH)
def test_a_sample_has_the_same_depth_in_any_split_of_the_batch(law):
    whole = draw(law, 6, indices=range(96, 144))
    parts = [draw(law, 6, indices=range(start, start + 5)) for start in range(96, 141, 5)]
    assert np.array_equal(np.concatenate(parts), whole[:45])
    for rank in range(3):
        assert np.array_equal(draw(law, 6, indices=range(96 + rank, 144, 3)), whole[rank::3])
    assert np.array_equal(draw(law, 6, indices=range(143, 95, -1)), whole[::-1])
    assert [int(draw(law, 6, indices=[i])[0]) for i in range(96, 144)] == whole.tolist()


def test_seed_step_and_index_each_change_the_draws():
    draws = draw("uniform", 50, indices=range(64))
    others = [
        draw("uniform", 50, indices=range(64), seed=8),
        draw("uniform", 50, indices=range(64), step=12),
        draw("uniform", 50, indices=range(64, 128)),
    ]
    for other in others:  # of 99 values, 64 draws agree in 0.65 on average; 12 once in 10^11
        assert (draws == other).sum() < 12


def test_large_numbers_and_no_indices_are_fine():
    assert draw("poisson", 8, seed=2**63, step=2**40, indices=[2**50]).shape == (1,)
    assert draw("poisson", 8, indices=[]).shape == (0,)
    numbers = np.arange(5)
    loops = sample_loops("poisson", 8, seed=7, step=11, indices=numbers)
    assert loops.tolist() == draw("poisson", 8, indices=range(5)).tolist()


@pytest.mark.parametrize(
    ("mean_loops", "expected"), [(1, 3), (4, 12), (8, 24), (9, 4), (16, 8), (33, 16)]
)
def test_gradient_goes_through_all_loops_up_to_a_mean_of_8_and_then_half(mean_loops, expected):
    assert backprop_loops(mean_loops) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"law": "normal"}, ConfigError, r"depth=normal must be a known law: choose one of fixed"),
        ({"mean_loops": 0}, ConfigError, "mean_loops=0 must be 1 or more"),
        ({"seed": -1}, InputError, "seed=-1, step=11 and every sample index must be 0 or more"),
        ({"indices": [3, -2]}, InputError, "must be 0 or more: count from 0"),
    ],
)
def test_bad_input_is_refused_with_one_sentence(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        draw(**({"law": "poisson", "mean_loops": 8} | arguments))
