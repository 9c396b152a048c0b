"""ε for one unit replaced by another: against integration, closed forms and a second library."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import optimize, stats

from fedmerge.config import DP
from fedmerge.privacy.dp.accountant import calibrate_noise, spent_epsilon
from fedmerge.privacy.dp.releases import METRIC_SUMS, Release
from fedmerge.privacy.dp.replacement import replaced_epsilon
from fedmerge.privacy.dp.statement import privacy_statement

DELTA = 1e-5


def mixture(x: np.ndarray, q: float, noise: float, mean: float) -> np.ndarray:
    return np.asarray((1 - q) * stats.norm.pdf(x, 0, noise) + q * stats.norm.pdf(x, mean, noise))


def solve(delta_at: Callable[[float], float], delta: float = DELTA) -> float:
    return float(optimize.brentq(lambda epsilon: delta_at(epsilon) - delta, 0, 200))


def gaussian_epsilon(sensitivity: float) -> float:
    """δ(ε) = Φ(s/2 − ε/s) − e^ε Φ(−s/2 − ε/s) for a sensitivity s in deviations, Balle and Wang, arXiv:1805.06530."""
    half = sensitivity / 2
    cdf = stats.norm.cdf
    return solve(lambda e: float(cdf(half - e / sensitivity) - math.exp(e) * cdf(-half - e / sensitivity)))


@pytest.mark.parametrize(("q", "noise"), [(0.107, 0.8), (0.5, 1.0), (0.01, 0.6), (0.3, 5.0), (0.9, 0.5)])
def test_one_step_is_the_integral(q: float, noise: float) -> None:
    x = np.linspace(-1 - 15 * noise, 1 + 15 * noise, 400_001)
    p, other = mixture(x, q, noise, 1.0), mixture(x, q, noise, -1.0)
    exact = solve(lambda e: float(np.trapezoid(np.maximum(0, p - math.exp(e) * other), x)))
    assert exact <= replaced_epsilon([Release(noise, q, 1)], DELTA) <= exact + 1e-3


@pytest.mark.parametrize(("noise", "steps"), [(0.3, 1), (0.7, 1), (0.7, 10), (2.0, 1), (2.0, 10), (10.0, 10)])
def test_without_sampling_it_is_the_gaussian_mechanism_of_twice_the_sensitivity(noise: float, steps: int) -> None:
    exact = gaussian_epsilon(2 * math.sqrt(steps) / noise)
    assert exact <= replaced_epsilon([Release(noise, 1.0, steps)], DELTA) <= exact + 1e-3
    exact = gaussian_epsilon(math.sqrt(steps) / noise)
    assert exact <= replaced_epsilon([Release(noise, 1.0, steps, replaced=1.0)], DELTA) <= exact + 1e-3


def test_two_steps_are_the_integral_over_both() -> None:
    """By brute force over the plane, for releases of two kinds."""
    one, two = Release(0.9, 0.2, 1), Release(1.5, 1.0, 1)
    x, y = np.linspace(-10, 10, 2001)[:, None], np.linspace(-14, 14, 2001)[None, :]
    p = mixture(x, 0.2, 0.9, 1.0) * mixture(y, 1.0, 1.5, 1.0)
    other = mixture(x, 0.2, 0.9, -1.0) * mixture(y, 1.0, 1.5, -1.0)
    cell = (x[1, 0] - x[0, 0]) * (y[0, 1] - y[0, 0])
    exact = solve(lambda e: float(np.maximum(0, p - math.exp(e) * other).sum() * cell))
    assert replaced_epsilon([one, two], DELTA) == pytest.approx(exact, abs=2e-3)


def test_many_steps_equal_google_s_composition_of_the_same_pair() -> None:
    """The pair's loss, written down as a mixture's, composed by dp-accounting."""
    pytest.importorskip("dp_accounting")
    from dp_accounting.pld import privacy_loss_distribution  # noqa: PLC0415

    q, noise, steps = 0.107, 0.7242, 40
    x = np.linspace(-1 - 12 * noise, 1 + 12 * noise, 40_001)
    p, other = mixture(x, q, noise, 1.0), mixture(x, q, noise, -1.0)
    # As probabilities of cells, which any composition of two discrete distributions takes; rounded upwards.
    of_p = {int(i): float(math.log(v)) for i, v in enumerate(p / p.sum()) if v > 1e-300}
    of_q = {int(i): float(math.log(v)) for i, v in enumerate(other / other.sum()) if v > 1e-300}
    pld = privacy_loss_distribution.from_two_probability_mass_functions(
        of_q, of_p, value_discretization_interval=2e-4, symmetric=True
    )
    expected = pld.self_compose(steps).get_epsilon_for_delta(1e-4)
    assert replaced_epsilon([Release(noise, q, steps)], 1e-4) == pytest.approx(expected, abs=0.01)


@pytest.mark.long
def test_it_is_between_the_number_for_addition_and_that_of_half_the_noise() -> None:
    """The audit's case: at ε = 8, 40 to 100 steps at q = .107, half the noise gives 38, the exact worst pair 10 to 12.

    The exact numbers bracket the auditor's 10.7.
    """
    found = []
    for steps in (40, 100):
        noise = calibrate_noise(8.0, 1e-4, ((0.107, steps),), "prv")
        found.append(replaced_epsilon([Release(noise, 0.107, steps)], 1e-4))
        assert spent_epsilon([Release(noise / 2, 0.107, steps)], 1e-4, "prv") > 37
    assert 8 < found[0] < 10.7 < found[1] < 12


def test_nothing_released_spends_nothing_and_nothing_without_noise_is_bounded() -> None:
    assert replaced_epsilon([], DELTA) == 0.0
    assert replaced_epsilon([Release(1.0, 0.1, 0)], DELTA) == 0.0
    assert replaced_epsilon([Release(1.0, 0.1, 5), Release(0.0, 0.1, 1)], DELTA) == math.inf
    assert replaced_epsilon([Release(1e4, 0.01, 1)], 0.01) == 0.0


@pytest.mark.long
def test_little_noise_and_many_steps_have_a_finite_upper_bound() -> None:
    """With hardly any noise a user's taking part in a step is seen, at a loss of 1/2σ² + log q each time."""
    each = 1 / (2 * 0.05**2) + math.log(0.05)
    times = stats.binom.isf(DELTA, 60, 0.05)
    assert replaced_epsilon([Release(0.05, 0.05, 60)], DELTA) == pytest.approx(times * each, rel=0.1)
    assert 0 < replaced_epsilon([Release(1.0, 0.05, 10**6)], DELTA) < math.inf


def test_more_steps_and_less_noise_cost_more() -> None:
    costs = [replaced_epsilon([Release(noise, 0.1, steps)], DELTA) for noise, steps in ((2, 10), (2, 20), (1, 20))]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


def test_the_statement_counts_a_replaced_user_s_metric_sums_once() -> None:
    """Outcomes lie between 0 and 1, so one user's for another's changes the sums by no more than one user's."""
    record = {"what": METRIC_SUMS, "noise_multiplier": 2.0, "clip": 1.0, "sample_rate": 1.0, "num_units": 9, "steps": 2}
    statement = privacy_statement(DP(), {"books": [record]}, evaluated=False, noised_metrics=True)
    found = statement["domains"]["books"]
    assert found["epsilon_replaced"] == pytest.approx(found["epsilon"], abs=0.02)
    assert (statement["unit"], statement["adjacency"], found["accountant_replaced"]) == ("user", "add-remove", "pld")
