"""Comparisons of strategies with a baseline over several seeds, and ranks of strategies over blocks.

The input is :class:`fedmerge.evaluation.sums.MetricSums` alone (counts, sums and sums of products), which may leave a
client. No single user's outcome is read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from fedmerge.errors import LayoutMismatchError
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import (
    INTERVAL_95,
    Estimate,
    MetricSums,
    paired_difference,
    paired_difference_of_mean,
)
from fedmerge.report.bench_tables import MEAN
from fedmerge.report.tables import Role

LEVEL = 0.05  # of tests; intervals are 1 - LEVEL

FloatArray = npt.NDArray[np.float64]


# Over seeds


@dataclass(frozen=True, slots=True)
class OverSeeds:
    """A paired difference over seeds: mean, half-width of the 95 % interval, and two-sided p-value of no difference."""

    num_seeds: int
    mean: float
    half_width: float
    p_value: float


def difference_over_seeds(differences: Sequence[Estimate]) -> OverSeeds:
    """Combine the paired differences of several seeds into one with an interval.

    mean = sum_s m_s / S
    half-width^2 = (z · users)^2 + (t_{S-1} · seeds)^2
    users = sum_s SE_s / S,  seeds^2 = sum_s (m_s - mean)^2 / (S - 1) / S

    z and t are the 97.5 % points of the normal and of Student's distribution; the p-value is the level at which the
    interval just reaches 0.

    Assumptions: (1) Every seed is evaluated on the same users, so noise of users does not average out over seeds.
    ``users`` treats it as fully shared, the worst case: products of outcomes of two seeds are never computed, so the
    shared part is unknown. (2) Seeds are independent, normal draws of everything else (training order, initial
    adapters); ``seeds`` is their spread, with S - 1 degrees of freedom. Noise of one user under one seed is in both
    parts. (3) m_s of one seed is normal over users, of whom there are hundreds. Then the interval covers at least
    95 %; a test simulates this with three seeds. With one seed the second part is absent, and the interval holds for
    that seed alone.

    Args:
        differences: one per seed, of the same method, baseline, metric and domains.

    Raises:
        LayoutMismatchError: there are no differences.
    """
    num_seeds = len(differences)
    if not num_seeds:
        raise LayoutMismatchError("difference over seeds: found 0 seeds; expected at least one")
    mean = math.fsum(difference.mean for difference in differences) / num_seeds
    users = math.fsum(difference.standard_error for difference in differences) / num_seeds
    seeds = 0.0
    if num_seeds > 1:
        scatter = math.fsum((difference.mean - mean) ** 2 for difference in differences)
        seeds = math.sqrt(scatter / (num_seeds - 1) / num_seeds)

    dof = num_seeds - 1

    def half_width(t: float) -> float:
        return math.hypot(-special.ndtri(special.stdtr(dof, -t)) * users, t * seeds)

    if seeds == 0.0:
        p_value = float(2 * special.ndtr(-abs(mean) / users)) if users else float(mean == 0.0)
        return OverSeeds(num_seeds, mean, INTERVAL_95 * users, p_value)
    # half_width(t) is at least t · seeds; the bound is a little higher, so that rounding cannot exclude the root.
    t = optimize.brentq(lambda t: half_width(t) - abs(mean), 0.0, abs(mean) / seeds * (1 + 1e-9))
    wide = half_width(special.stdtrit(dof, 1 - LEVEL / 2))
    return OverSeeds(num_seeds, mean, wide, float(2 * special.stdtr(dof, -t)))


def comparison_rows(
    sums: Mapping[tuple[int, str], MetricSums],
    *,
    dataset: str,
    baseline: str,
    role: Role,
    left_out: str = "",
    metrics: Sequence[str] = METRICS,
    by_domain: bool = True,
) -> list[dict[str, Any]]:
    """Return rows of ``comparisons``: every strategy against the baseline, by domain and for the mean over domains.

    A seed counts for a strategy if strategy and baseline were evaluated on the same users; for the mean, in all
    domains. A strategy without such a seed has no row. p-values are corrected by Holm for each metric: those of the
    mean over all strategies, those of single domains over all strategies and domains.

    Args:
        sums: (seed, domain) -> sums, whose methods are the strategies. For unseen domains of leave-one-domain-out
            folds, each domain's sums come from the fold that left it out.
        dataset: written into the rows.
        baseline: the strategy that the others are compared with.
        role: of the domains; written into the rows.
        left_out: "" or ``EVERY_FOLD``; written into the rows.
        metrics: of METRICS.
        by_domain: False gives the rows of the mean alone.

    Raises:
        LayoutMismatchError: there are no sums, several variants, or no sums of the baseline.
        ClientError: a domain has fewer than two users, or sums that no users can have.
    """
    variants = sorted({of_domain.variant for of_domain in sums.values()})
    if len(variants) != 1:
        raise LayoutMismatchError(
            f"comparisons of {dataset}: sums of the variants {variants}; expected at least one domain, and one variant"
        )
    strategies = list(dict.fromkeys(name for of_domain in sums.values() for name in of_domain.methods))
    if baseline not in strategies:
        raise LayoutMismatchError(
            f"comparisons of {dataset}: no sums of the baseline {baseline!r}; found {strategies}. Add it to the "
            "strategies, or choose another baseline"
        )
    domains = sorted({domain for _, domain in sums})
    rows: list[dict[str, Any]] = []
    of_domains = {domain: [domain] for domain in domains if by_domain}
    for metric in metrics:
        for groups in ({MEAN: domains}, of_domains):
            found = {
                (domain, strategy): difference_over_seeds(differences)
                for domain, members in groups.items()
                for strategy in strategies
                if strategy != baseline and (differences := _by_seed(sums, members, strategy, baseline, metric))
            }
            adjusted = holm([difference.p_value for difference in found.values()])
            rows += [
                {
                    "dataset": dataset,
                    "strategy": strategy,
                    "baseline": baseline,
                    "left_out": left_out,
                    "domain": domain,
                    "role": role,
                    "variant": variants[0],
                    "metric": metric,
                    "num_seeds": difference.num_seeds,
                    "difference": difference.mean,
                    "half_width": difference.half_width,
                    "p_value": difference.p_value,
                    "p_adjusted": p_adjusted,
                    "significant": p_adjusted < LEVEL,
                }
                for ((domain, strategy), difference), p_adjusted in zip(found.items(), adjusted, strict=True)
            ]
    return rows


def _by_seed(
    sums: Mapping[tuple[int, str], MetricSums], domains: Sequence[str], strategy: str, baseline: str, metric: str
) -> list[Estimate]:
    differences = []
    for seed in sorted({seed for seed, _ in sums}):
        members = [of_domain for domain in domains if (of_domain := sums.get((seed, domain)))]
        if len(members) == len(domains) and all(
            {strategy, baseline} <= set(member.methods)
            and not any(math.isnan(member.mean(method, metric)) for method in (strategy, baseline))
            for member in members
        ):
            differences.append(
                paired_difference(members[0], strategy, baseline, metric)
                if len(members) == 1
                else paired_difference_of_mean(members, strategy, baseline, metric)
            )
    return differences


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm: those below a level hold a false positive with at most that probability.

    p of rank i among m (smallest first) becomes max over j <= i of min(1, (m - j + 1) p_j). The
    p-values may depend on each other.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


# Over blocks


@dataclass(frozen=True, slots=True)
class Friedman:
    """Mean ranks (k,), 1 is best; the test statistic, corrected for ties; its p-value."""

    mean_ranks: FloatArray
    statistic: float
    p_value: float


def friedman(scores: FloatArray) -> Friedman:
    """Test the hypothesis that k strategies rank alike over N blocks; higher is better, ties share their rank.

    statistic = (k - 1) · sum_j (R_j - N(k+1)/2)^2 / sum_ij (r_ij - (k+1)/2)^2,  chi-square with k - 1 degrees.

    Args:
        scores: (N, k), N and k at least 2.

    Raises:
        LayoutMismatchError: N or k is smaller, or a score is not finite.

    Source: Friedman, JASA 32 (1937); Conover, Practical Nonparametric Statistics, for ties.
    """
    if scores.ndim != 2 or min(scores.shape) < 2 or not np.isfinite(scores).all():
        raise LayoutMismatchError(
            f"Friedman's test: found scores of shape {scores.shape}; expected finite scores of at least 2 blocks and "
            "2 strategies"
        )
    num_strategies = scores.shape[1]
    centred = stats.rankdata(-scores, axis=1) - (num_strategies + 1) / 2  # (N, k)
    scatter = float((centred**2).sum())
    statistic = (num_strategies - 1) * float((centred.sum(axis=0) ** 2).sum()) / scatter if scatter else 0.0
    p_value = special.chdtrc(num_strategies - 1, statistic)
    return Friedman(centred.mean(axis=0) + (num_strategies + 1) / 2, statistic, float(p_value))


def critical_difference(num_strategies: int, num_blocks: int, level: float = LEVEL) -> float:
    """Return the smallest difference of mean ranks that is significant in Nemenyi's test.

    q / sqrt(2) · sqrt(k(k+1) / (6N)),  q: upper point of the studentised range of k normal values.

    Source: Demšar, JMLR 7 (2006).
    """
    quantile = _studentized_range(level, num_strategies)
    return quantile / math.sqrt(2) * math.sqrt(num_strategies * (num_strategies + 1) / (6 * num_blocks))


@cache
def _studentized_range(level: float, num_values: int) -> float:
    """Return the upper point for infinitely many degrees of freedom; SciPy takes a second for it."""
    return float(stats.studentized_range.isf(level, num_values, math.inf))


def rank_rows(scores: Mapping[tuple[str, str, int], Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return rows of ``ranks``: for each dataset and, if there are several, for all of them under "".

    Blocks are (dataset, domain, seed). Nemenyi's test assumes independent blocks, and the seeds of one domain are not
    fully independent: read the ranks as a summary and the intervals as the evidence.

    Args:
        scores: (dataset, domain, seed) -> strategy -> score, higher is better. Only blocks with a score of
            every strategy count, as ``num_blocks`` says; there are no rows for fewer than two blocks or strategies.
    """
    datasets = sorted({dataset for dataset, _, _ in scores})
    rows: list[dict[str, Any]] = []
    for name in [*([""] if len(datasets) > 1 else []), *datasets]:
        blocks = [of_block for (dataset, _, _), of_block in sorted(scores.items()) if name in ("", dataset)]
        strategies = list(dict.fromkeys(strategy for of_block in blocks for strategy in of_block))
        whole = [[of_block[s] for s in strategies] for of_block in blocks if len(of_block) == len(strategies)]
        if len(whole) < 2 or len(strategies) < 2:
            continue
        test = friedman(np.array(whole, dtype=np.float64))
        rows += [
            {
                "dataset": name,
                "strategy": strategy,
                "mean_rank": mean_rank,
                "num_blocks": len(whole),
                "critical_difference": critical_difference(len(strategies), len(whole)),
                "p_friedman": test.p_value,
            }
            for strategy, mean_rank in zip(strategies, test.mean_ranks.tolist(), strict=True)
        ]
    return rows
