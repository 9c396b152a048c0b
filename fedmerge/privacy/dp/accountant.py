"""What was released of one unit, and the (ε, δ) that it adds up to.

Every release here is a Gaussian mechanism: a sum over units, each bounded by a clip norm C, plus noise of standard
deviation ``noise_multiplier`` · C per coordinate; ``sample_rate`` < 1 where each unit took part with that probability,
independently (Poisson sampling). Adjacency: one unit added or removed, which changes the sum by at most C. Replacing
one unit by another changes it by at most 2C: it is covered by counting with half the noise multiplier.

Source: Rényi differential privacy of the sampled Gaussian mechanism, arXiv:1908.10530; privacy loss random variables,
arXiv:2106.02848; both from Opacus (pip install fedmerge[dp]).
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from fedmerge.config import DP
from fedmerge.errors import ConfigError
from fedmerge.privacy.dp.releases import Counted

Method = Literal["prv", "rdp"]

ORDERS = (*range(2, 64), 72, 80, 96, 112, 128, 160, 192, 256, 512)  # of the divergences; libraries agree on whole ones
RELATIVE_PRECISION = 0.002  # of a calibrated noise multiplier
LARGEST_NOISE = 1e4
LARGEST_GRID = 2**24  # points of the privacy loss; PRV takes about a gigabyte for them
_PRV_ERROR = 0.01  # of ε; Opacus' own


@dataclass(frozen=True)
class Release:
    """So many Gaussian mechanisms of one kind.

    Attributes:
        noise_multiplier: noise over the sensitivity.
        sample_rate: probability with which a unit takes part, in (0, 1].
        steps: how many.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


def spent_epsilon(releases: Sequence[Release], delta: float, method: Method) -> float:
    """The ε of :func:`accounted`."""
    return accounted(releases, delta, method)[0]


def accounted(releases: Sequence[Release], delta: float, method: Method) -> tuple[float, Method]:
    """The ε, at this δ, of everything that was released of one unit; infinite where something had no noise.

    Returns:
        ε, and what it was counted by: ``rdp``, an upper bound, also where ``prv`` was asked for and its grid, which
        grows with the privacy loss and the root of the number of steps, would be too large or too coarse.

    Raises:
        ConfigError: Opacus is not installed.
    """
    history = [(r.noise_multiplier, r.sample_rate, r.steps) for r in releases if r.steps]
    if not history:
        return 0.0, method
    if any(noise <= 0 for noise, _, _ in history):
        return math.inf, method
    accountants = opacus_accountants()
    with warnings.catch_warnings():  # on orders that are not the best, and divisions by zero that are handled
        warnings.simplefilter("ignore")
        if method == "prv" and _grid_points(accountants, history, delta) <= LARGEST_GRID:
            accountant = accountants.PRVAccountant()
            accountant.history = history
            with suppress(RuntimeError):  # too coarse for so little noise
                return float(accountant.get_epsilon(delta=delta, eps_error=_PRV_ERROR)), "prv"
        accountant = accountants.RDPAccountant()
        accountant.history = history
        return float(accountant.get_epsilon(delta=delta, alphas=list(ORDERS))), "rdp"


def _grid_points(accountants: Any, history: Sequence[tuple[float, float, int]], delta: float) -> float:
    """How many points Opacus' PRV accountant takes."""
    prv, delta_error, steps = accountants.analysis.prv, delta / 1000, [steps for _, _, steps in history]
    reach = prv.compute_safe_domain_size(
        prvs=[prv.PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in history],
        max_self_compositions=steps,
        eps_error=_PRV_ERROR,
        delta_error=delta_error,
    )
    points = 2 * reach / _PRV_ERROR * math.sqrt(sum(steps) * math.log(12 / delta_error) / 2)
    return float(points) if math.isfinite(points) else math.inf


def agreed_noise(dp: DP, releases: tuple[Counted, ...] = ((1.0, 1),)) -> float:
    """The noise multiplier that a configuration asks for: the given one, or the least that meets (ε, δ).

    Args:
        dp: epsilon, delta, noise_multiplier and accountant are read.
        releases: everything that a unit has a part in, all with this noise.

    Raises:
        ConfigError: as :func:`calibrated_noise`.
    """
    if dp.epsilon is not None and dp.delta is not None:
        return calibrated_noise(dp.epsilon, dp.delta, releases, dp.accountant)
    return float(dp.noise_multiplier or 0.0)


@cache
def calibrated_noise(epsilon: float, delta: float, releases: tuple[Counted, ...], method: Method) -> float:
    """The least noise multiplier, to a relative 0.2 % and never below, with which the releases together meet (ε, δ).

    Raises:
        ConfigError: no reasonable noise does; or Opacus is not installed.
    """

    def enough(noise: float, by: Method) -> bool:
        return spent_epsilon([Release(noise, rate, steps) for rate, steps in releases], delta, by) <= epsilon

    def raised(low: float, high: float, by: Method) -> tuple[float, float]:
        while not enough(high, by):
            low, high = high, 2 * high
            if high > LARGEST_NOISE:
                raise ConfigError(
                    f"dp.epsilon = {epsilon:g} with dp.delta = {delta:g}: {counted} would take a noise multiplier "
                    f"above {LARGEST_NOISE:g}. Raise epsilon, or make fewer steps: train.max_steps, those of the "
                    "coefficients, their granularities; or by user smaller batches, by domain "
                    f"through_clients.mode = 'local-steps'{remedies[by]}."
                )
        return low, high

    counted = " and ".join(f"{steps} steps with sample rate {rate:.3g}" for rate, steps in releases)
    remedies = {"rdp": "", "prv": f", or set dp.accountant = 'rdp': 'prv' adds an error of {_PRV_ERROR:g} to epsilon"}
    low, high = _bisected(*raised(0.0, 1.0, "rdp"), lambda noise: enough(noise, "rdp"))  # quick, and near the other one
    if method == "rdp":
        return high
    _, high = _bisected(*raised(0.5 * low, high, "prv"), lambda noise: enough(noise, "prv"))
    return high


def _bisected(low: float, high: float, enough: Any) -> tuple[float, float]:
    while high - low > RELATIVE_PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return low, high


def opacus_accountants() -> Any:
    """Opacus' module of accountants, imported when it is needed: it takes seconds.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus import accountants  # noqa: PLC0415 - only for those who use differential privacy
    except ImportError as error:
        raise ConfigError(
            f"dp.mode needs Opacus, which cannot be imported ({error}). Install it with: pip install 'fedmerge[dp]'"
        ) from error
    return accountants
