"""The discrete Gaussian against its probabilities, with every source of randomness."""

from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from fedmerge.privacy.dp.discrete_gaussian import sample_discrete_gaussian
from fedmerge.privacy.dp.randomness import Randomness, draw_below, source


def probabilities(variance: float, largest: int) -> np.ndarray:
    """P(k) for k from -largest to largest."""
    k = np.arange(-largest, largest + 1)
    mass = np.exp(-(k**2) / (2 * variance))
    return np.asarray(mass / mass.sum())


@pytest.mark.parametrize("randomness", ["system", "seeded"])
@pytest.mark.parametrize("variance", [Fraction(1, 5), Fraction(1), Fraction(49, 4), Fraction(90)])
def test_frequencies_are_the_probabilities(randomness: Randomness, variance: Fraction) -> None:
    size, largest = 4000, 60
    drawn = np.array(sample_discrete_gaussian(variance, size, source(randomness, 3, "test")))
    expected = size * probabilities(float(variance), largest)
    common = expected >= 8
    counts = np.array([(drawn == k).sum() for k in range(-largest, largest + 1)])
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    assert stats.chisquare(observed, wanted).pvalue > 1e-5


@pytest.mark.parametrize("deviation", [3, 1448, 10**6])
def test_moments_are_those_of_the_gaussian(deviation: int) -> None:
    size = 4000
    drawn = np.array(sample_discrete_gaussian(deviation**2, size, source("seeded", 5, "test")), dtype=float) / deviation
    assert abs(drawn.mean()) < 5 / np.sqrt(size)
    assert drawn.var() == pytest.approx(1, abs=5 * np.sqrt(2 / size))
    assert (drawn**4).mean() == pytest.approx(3, abs=5 * np.sqrt(96 / size))
    assert stats.kstest(drawn, stats.norm.cdf).pvalue > 1e-5 or deviation < 100


def test_a_variance_may_be_as_large_as_you_like() -> None:
    (drawn,) = sample_discrete_gaussian(Fraction(10**80, 3), 1, source("seeded", 1, "test"))
    assert 0 < abs(drawn) < 10**42


def test_seeded_draws_repeat_and_system_draws_do_not() -> None:
    one, two = (sample_discrete_gaussian(10**8, 4, source("seeded", 1, "test")) for _ in range(2))
    assert one == two
    one, two = (sample_discrete_gaussian(10**8, 4, source("system", 1, "test")) for _ in range(2))
    assert one != two


@pytest.mark.parametrize("bound", [1, 2, 5, 256, 257])
def test_whole_numbers_below_a_bound_are_uniform(bound: int) -> None:
    drawn = [draw_below(source("system", 0), bound) for _ in range(20 * bound)]
    assert 0 <= min(drawn) <= max(drawn) < bound
    counts = np.bincount(drawn, minlength=bound)
    assert bound == 1 or stats.chisquare(counts).pvalue > 1e-5
