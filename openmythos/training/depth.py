"""How many loops each training sequence runs, drawn per sequence (Parcae, and Geiping et al. 2025).

A draw is a pure function of (seed, step, global sample index). Resuming, accumulating gradients
or splitting a batch over processes therefore gives every sequence the depth it would have had.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from openmythos.errors import ConfigError, InputError

Probabilities = Float64[np.ndarray, " loops"]
"""(3 * mean_loops,): the probability of 1, 2, ... loops; sums to 1."""

LONGEST = 3
"""No sequence runs more than this many times the mean, so that the memory of a step is bounded."""

SIGMA = 0.5
"""Deviation of the log-normal law's exponent (Geiping et al. 2025, arXiv 2502.05171)."""


def sample_loops(
    law: str,
    mean_loops: int,
    *,
    seed: int,
    step: int,
    indices: Sequence[int] | Int64[np.ndarray, " batch"],
) -> Int64[np.ndarray, " batch"]:
    """Return the loops of the samples with these global indices at this step, int64 (batch,).

    Each is at least 1 and at most 3 * mean_loops.

    Args:
        law: a name in `DEPTH`.
        mean_loops: 1 or more.
        seed: of the training.
        step: of the training.
        indices: those of one call should lie close together, as those of one batch do: time and
            memory grow with their range.

    Raises:
        ConfigError: an unknown law, or mean_loops below 1.
        InputError: a negative number.
    """
    chances = loop_probabilities(law, mean_loops)
    samples = np.asarray(indices, dtype=np.int64)
    if min(seed, step, samples.min(initial=0)) < 0:
        raise InputError(
            f"seed={seed}, step={step} and every sample index must be 0 or more: count from 0"
        )
    if len(samples) == 0:
        return samples
    cumulative = np.cumsum(chances)
    cumulative[-1] = 1.0  # whatever rounding left of the sum
    numbers = _uniform_numbers(seed, step, samples)
    return np.searchsorted(cumulative, numbers, side="right").astype(np.int64) + 1


def backprop_loops(mean_loops: int) -> int:
    """Return how many last loops carry gradient: all up to a mean of 8, else half the mean.

    Full gradient buys more capacity per loop where it is affordable; beyond, the last half of
    the mean costs less for the same loss (Parcae trains 4 of 8).
    """
    return LONGEST * mean_loops if mean_loops <= 8 else max(4, mean_loops // 2)


def loop_probabilities(law: str, mean_loops: int) -> Probabilities:
    """Return the probability of 1, 2, ..., 3 * mean_loops loops under a law of `DEPTH`.

    A mean of 1 is 1 always, as in a plain transformer: there is nothing below. Of other means,
    what a law puts below 1 counts as 1, and what it puts above 3 * mean_loops as that.

    Raises:
        ConfigError: an unknown law, or mean_loops below 1.
    """
    if law not in DEPTH:
        raise ConfigError(f"depth={law} must be a known law: choose one of {', '.join(DEPTH)}")
    if mean_loops < 1:
        raise ConfigError(f"mean_loops={mean_loops} must be 1 or more: the core runs at least once")
    return DEPTH[law](mean_loops) if mean_loops > 1 else fixed(1)


def fixed(mean_loops: int) -> Probabilities:
    """Every sequence runs the mean."""
    chances = np.zeros(LONGEST * mean_loops)
    chances[mean_loops - 1] = 1.0
    return chances


def near(mean_loops: int) -> Probabilities:
    """The mean, one loop fewer or one more, each as often.

    Costs a language model less than a wide law, and still keeps it from binding to one depth.
    """
    chances = np.zeros(LONGEST * mean_loops)
    chances[mean_loops - 2 : mean_loops + 1] = 1 / 3
    return chances


def uniform(mean_loops: int) -> Probabilities:
    """1 to 2 * mean_loops - 1, each as often: the mean is exact."""
    chances = np.zeros(LONGEST * mean_loops)
    chances[: 2 * mean_loops - 1] = 1 / (2 * mean_loops - 1)
    return chances


def poisson(mean_loops: int) -> Probabilities:
    """Poisson around the mean, as Parcae trains."""
    return _clipped_poisson(float(mean_loops), longest=LONGEST * mean_loops)


def lognormal_poisson(mean_loops: int) -> Probabilities:
    """Poisson whose rate is itself log-normal: many shallow sequences and a long tail of deep ones.

    rate = exp(N(ln mean - sigma^2 / 2, sigma)), so its mean is mean_loops (Geiping et al. 2025,
    arXiv 2502.05171; theirs adds 1). The normal is integrated by Gauss-Hermite quadrature, so
    that one uniform number decides a draw, as for the other laws.
    """
    points, weights = np.polynomial.hermite.hermgauss(64)
    rates = mean_loops * np.exp(math.sqrt(2) * SIGMA * points - SIGMA**2 / 2)
    chances = np.zeros(LONGEST * mean_loops)
    for rate, weight in zip(rates, weights / math.sqrt(math.pi), strict=True):
        chances += weight * _clipped_poisson(float(rate), longest=LONGEST * mean_loops)
    return chances


DEPTH: dict[str, Callable[[int], Probabilities]] = {
    "fixed": fixed,
    "near": near,
    "uniform": uniform,
    "poisson": poisson,
    "lognormal_poisson": lognormal_poisson,
}


def _clipped_poisson(rate: float, longest: int) -> Probabilities:
    counts = np.arange(longest)
    log_factorials = np.array([math.lgamma(count + 1) for count in counts])
    below = np.exp(counts * math.log(rate) - rate - log_factorials)  # of 0 .. longest - 1
    chances = np.append(below[1:], max(0.0, 1.0 - below.sum()))  # of 1 .. longest
    chances[0] += below[0]
    return chances


def _uniform_numbers(
    seed: int, step: int, indices: Int64[np.ndarray, " batch"]
) -> Float64[np.ndarray, " batch"]:
    """Return one number in [0, 1) for each index, whichever others are asked for with it.

    Philox enciphers a counter, so the sample's index can be the counter (Salmon et al. 2011).
    """
    key = np.random.SeedSequence([seed, step]).generate_state(2, np.uint64)
    first, last = int(indices.min()), int(indices.max())
    words = np.random.Philox(counter=first, key=key).random_raw(4 * (last - first + 1))
    chosen = words[::4][indices - first]  # a counter gives four words; the first serves
    numbers: Float64[np.ndarray, " batch"] = (chosen >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers
