"""The accountant: the (ε, δ) of everything that was released about one unit, and the noise that meets a given (ε, δ).

Every release is a Gaussian mechanism: a sum over units, each bounded by a clip norm C, plus noise of standard deviation
``noise_multiplier`` · C per coordinate. With ``sample_rate`` < 1 each unit takes part with that probability,
independently (Poisson sampling). Adjacency: one unit added or removed, which changes the sum by at most C. For one unit
replaced by another see :mod:`fedmerge.privacy.dp.replacement`.

Source: Rényi differential privacy of the sampled Gaussian mechanism, arXiv:1908.10530; privacy loss random variables,
arXiv:2106.02848; both from Opacus (pip install fedmerge[dp]).
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Literal

from fedmerge.config import DP
from fedmerge.errors import ConfigError
from fedmerge.privacy.dp.releases import Counted, Release

Method = Literal["prv", "rdp"]

ORDERS = (*range(2, 64), 72, 80, 96, 112, 128, 160, 192, 256, 512)  # Rényi orders; libraries agree on whole ones
RELATIVE_PRECISION = 0.002  # of a calibrated noise multiplier
LARGEST_NOISE = 1e4
LARGEST_GRID = 2**24  # points of the privacy loss; PRV takes about a gigabyte for them
_PRV_ERROR = 0.01  # of ε; Opacus' own


def spent_epsilon(releases: Sequence[Release], delta: float, method: Method) -> float:
    """Return the ε of :func:`account`."""
    return account(releases, delta, method)[0]


def account(releases: Sequence[Release], delta: float, method: Method) -> tuple[float, Method]:
    """Return the ε at this δ of all releases about one unit; infinite if one of them had no noise.

    Returns:
        ε and the accountant. If ``prv`` was asked for but its grid, which grows with the privacy loss and the root of
        the number of steps, would be too large or too coarse, the accountant is ``rdp``, an upper bound.

    Raises:
        ConfigError: Opacus is not installed.
    """
    history = [(r.noise_multiplier, r.sample_rate, r.steps) for r in releases if r.steps]
    if not history:
        return 0.0, method
    if any(noise <= 0 for noise, _, _ in history):
        return math.inf, method
    accountants = opacus_accountants()
    with warnings.catch_warnings():  # about orders that are not optimal, and divisions by zero that are handled
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
    """Return the number of grid points of Opacus' PRV accountant."""
    prv, delta_error, steps = accountants.analysis.prv, delta / 1000, [steps for _, _, steps in history]
    reach = prv.compute_safe_domain_size(
        prvs=[prv.PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in history],
        max_self_compositions=steps,
        eps_error=_PRV_ERROR,
        delta_error=delta_error,
    )
    points = 2 * reach / _PRV_ERROR * math.sqrt(sum(steps) * math.log(12 / delta_error) / 2)
    return float(points) if math.isfinite(points) else math.inf


def agreed_noise(dp: DP, releases: tuple[Counted, ...] = ((1.0, 1),), others: tuple[Release, ...] = ()) -> float:
    """Return the configured noise multiplier: the given one, or the smallest that meets (ε, δ).

    Args:
        dp: epsilon, delta, noise_multiplier and accountant are read.
        releases: releases in which a unit takes part, all with this noise.
        others: its other releases, whose noise is given.

    Raises:
        ConfigError: as :func:`calibrate_noise`.
    """
    if dp.epsilon is not None and dp.delta is not None:
        return calibrate_noise(dp.epsilon, dp.delta, releases, dp.accountant, others)
    return float(dp.noise_multiplier or 0.0)


@cache
def calibrate_noise(
    epsilon: float, delta: float, releases: tuple[Counted, ...], method: Method, others: tuple[Release, ...] = ()
) -> float:
    """Return the smallest noise multiplier, 0.2 % too large at most, with which all releases together meet (ε, δ).

    Args:
        epsilon, delta: the guarantee.
        releases: whose noise is chosen.
        method: accountant.
        others: further releases, whose noise is given.

    Raises:
        ConfigError: the noise multiplier would exceed 10,000, or the others alone take all of ε; or Opacus is not
            installed.
    """
    if others and (alone := spent_epsilon(others, delta, method)) >= epsilon:
        raise ConfigError(
            f"dp.epsilon = {epsilon:g} with dp.delta = {delta:g}: the noised metric sums alone take ε = {alone:.3g}. "
            "Raise privacy.metrics_noise, or dp.epsilon."
        )

    def enough(noise: float, by: Method) -> bool:
        chosen = [Release(noise, rate, steps) for rate, steps in releases]
        return spent_epsilon([*chosen, *others], delta, by) <= epsilon

    def raised(low: float, high: float, by: Method) -> tuple[float, float]:
        while not enough(high, by):
            low, high = high, 2 * high
            if high > LARGEST_NOISE:
                raise ConfigError(
                    f"dp.epsilon = {epsilon:g} with dp.delta = {delta:g}: {counted} need a noise multiplier "
                    f"above {LARGEST_NOISE:g}. Raise epsilon, or make fewer steps (train.max_steps, steps and "
                    "granularities of the coefficients). By user, smaller batches also help; by domain, "
                    f"through_clients.mode = 'local-steps'{remedies[by]}."
                )
        return low, high

    counted = " and ".join(f"{steps} steps with sample rate {rate:.3g}" for rate, steps in releases)
    remedies = {"rdp": "", "prv": f", or set dp.accountant = 'rdp': 'prv' adds an error of {_PRV_ERROR:g} to epsilon"}
    low, high = _bisected(*raised(0.0, 1.0, "rdp"), lambda noise: enough(noise, "rdp"))  # fast, and close to prv
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
    """Import Opacus' accountants, which takes seconds.

    Raises:
        ConfigError: Opacus is not installed.
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
