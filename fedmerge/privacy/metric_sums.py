"""Metric sums as a client discloses them: exact, suppressed, or with noise.

    exact       sums and cross-products, from which outcomes of single users can be computed by whoever may ask twice
    suppressed  rounded sums of two metrics, of cells with enough hits and misses; a heuristic that crafted models can
                still get around
    noised      sums of two metrics with Gaussian noise; (ε, δ) by user, whatever is asked of given models

Inexact sums are of one variant and one cutoff: the difference of two cutoffs, or of two variants, is a small cell.

The user is the unit. Source: cell suppression of statistical disclosure control; the Gaussian mechanism, see
:mod:`fedmerge.privacy.dp.accountant`.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import get_args

import numpy as np
import numpy.typing as npt

from fedmerge.config.privacy import Disclosure
from fedmerge.errors import ClientError
from fedmerge.evaluation.ranks import METRICS, FloatArray
from fedmerge.evaluation.sums import MetricSums, Variant, inexact_sums, metric_sums
from fedmerge.privacy.dp.discrete_gaussian import sample_discrete_gaussian
from fedmerge.privacy.dp.randomness import Source

DISCLOSURES: tuple[Disclosure, ...] = get_args(Disclosure)
STATED_METRICS = ("recall@10", "ndcg@10")
STATED_VARIANT: Variant = "unmasked"  # the one that selects
ROUNDING = math.sqrt(1 / 12)  # standard deviation of rounding to whole numbers
_STEPS = 2**10  # per unit: outcomes are rounded to this grid, and the noise is drawn on it

Outcomes = Mapping[str, FloatArray]  # method -> (U, M)


def disclose(
    outcomes: Mapping[Variant, Outcomes],
    disclosure: Disclosure,
    min_users: int,
    noise_multiplier: float,
    source: Source | None,
) -> dict[Variant, MetricSums]:
    """Compute the metric sums that may leave the client.

    Args:
        outcomes: variant -> method -> (U, M) outcomes of the same users in the same order.
        disclosure: see the module.
        min_users: smallest number of hits, and of misses, of a cell that is stated (suppressed).
        noise_multiplier: standard deviation of the noise over the sensitivity (noised).
        source: randomness of the noise (noised).
    """
    if disclosure == "suppressed":
        return {variant: suppress(of_variant, variant, min_users) for variant, of_variant in outcomes.items()}
    if disclosure == "noised":
        if source is None:
            raise ValueError("noised metric sums need a source of randomness")
        return {
            variant: add_noise_to_sums(of_variant, variant, noise_multiplier, source)
            for variant, of_variant in outcomes.items()
        }
    return {variant: metric_sums(of_variant, variant) for variant, of_variant in outcomes.items()}


def suppress(outcomes: Outcomes, variant: Variant, min_users: int) -> MetricSums:
    """Return rounded sums, and only those of cells with at least ``min_users`` hits and as many misses.

    Only STATED_METRICS in the variant that selects are stated. A hit of recall@k and of ndcg@k is a rank up to k.

    Args:
        outcomes: method -> (U, M).
        variant: of the ranks.
        min_users: smallest number of hits, and of misses.
    """
    num_users = len(next(iter(outcomes.values())))
    sums = np.full((len(outcomes), len(METRICS)), np.nan)
    if variant == STATED_VARIANT:
        may_be_stated = np.isin(METRICS, STATED_METRICS)
        for row, of_method in zip(sums, outcomes.values(), strict=True):
            hits = (of_method > 0).sum(axis=0)  # (M,)
            stated = may_be_stated & (hits >= min_users) & (num_users - hits >= min_users)
            row[stated] = np.round(of_method.sum(axis=0))[stated]
    return inexact_sums(tuple(outcomes), variant, num_users, sums, ROUNDING)


def sensitivity(num_methods: int) -> float:
    """Return the largest L2 norm of one user's part in the noised sums: each outcome is at most 1."""
    return math.sqrt(num_methods * len(STATED_METRICS))


def add_noise_to_sums(outcomes: Outcomes, variant: Variant, noise_multiplier: float, source: Source) -> MetricSums:
    """Return the sums of STATED_METRICS with Gaussian noise, in the variant that selects; nothing of the other variant.

    The number of users is public, as everywhere. Sum and noise are whole numbers of grid steps, and the noise is an
    exact discrete Gaussian, so floating-point numbers leak nothing.

    Args:
        outcomes: method -> (U, M).
        variant: of the ranks.
        noise_multiplier: standard deviation of the noise over the sensitivity, positive.
        source: randomness of the noise.
    """
    num_users, num_methods = len(next(iter(outcomes.values()))), len(outcomes)
    sums = np.full((num_methods, len(METRICS)), np.nan)
    if variant == STATED_VARIANT:
        columns = [METRICS.index(metric) for metric in STATED_METRICS]
        whole = grid_sums(outcomes)
        variance = Fraction(noise_multiplier) ** 2 * num_methods * len(columns) * _STEPS**2
        drawn = sample_discrete_gaussian(math.ceil(variance), whole.size, source)
        sums[:, columns] = (whole + np.array(drawn, dtype=np.int64).reshape(whole.shape)) / _STEPS
    return inexact_sums(tuple(outcomes), variant, num_users, sums, noise_multiplier * sensitivity(num_methods))


def grid_sums(outcomes: Outcomes) -> npt.NDArray[np.int64]:
    """Return the sums of STATED_METRICS over users in steps of 2^-10, (P, 2).

    Each outcome is rounded by itself, which leaves the sensitivity as it is and makes the sums exact.
    """
    columns = [METRICS.index(metric) for metric in STATED_METRICS]
    return np.array(
        [np.round(of_method[:, columns] * _STEPS).astype(np.int64).sum(axis=0) for of_method in outcomes.values()]
    )


def check_disclosure(domain: str, sums: Mapping[Variant, MetricSums], disclosure: Disclosure, noise: float) -> None:
    """Refuse metric sums that are not disclosed as the run says, so that rows of different kinds do not mix.

    Args:
        domain: that sent them.
        sums: of each variant.
        disclosure: of the run.
        noise: the noise multiplier of the run.

    Raises:
        ClientError: what was found and what is expected.
    """
    for of_variant in sums.values():
        expected = {
            "exact": 0.0,
            "suppressed": ROUNDING,
            "noised": noise * sensitivity(len(of_variant.methods)),
        }[disclosure]
        if not math.isclose(of_variant.noise, expected, rel_tol=1e-9):
            raise ClientError(
                f"domain {domain}: its {of_variant.variant} metric sums have an error of deviation "
                f"{of_variant.noise:.4g}; privacy.metrics = {disclosure!r} gives {expected:.4g}. Use one configuration "
                "and one fedmerge version everywhere."
            )
