"""The difference between models of two runs, whose users' outcomes were never multiplied with each other.

A run keeps sums of products of its own rows alone, so a paired interval across runs does not follow from them. But runs
on the same users share rows: popularity, the last item, the backbone, an expert that both took from the cache. These
tie the two models to each other, and what remains open is bounded by the largest value that it can have.
"""

import math
from collections.abc import Sequence

import numpy as np

from fedmerge.evaluation.ranks import METRICS, FloatArray
from fedmerge.evaluation.sums import INTERVAL_95, Estimate, MetricSums

_CLOSE = 1e-9  # relative size of eigenvalues that count as zero


def shared_rows(left: MetricSums, right: MetricSums) -> list[str]:
    """Return the rows that are the same outcomes of the same users in both: equal names, sums and products.

    Rows of inexact sums are never shared, since their products are bounds.
    """
    if left.noise or right.noise or left.num_users != right.num_users:
        return []
    shared: list[str] = []
    for name in left.methods:
        if name not in right.methods:
            continue
        p, q = left.methods.index(name), right.methods.index(name)
        others = [*shared, name]
        ps, qs = ([sums.methods.index(other) for other in others] for sums in (left, right))
        same_sums = np.array_equal(left.sums[p], right.sums[q]) and not np.isnan(left.sums[p]).any()
        if same_sums and np.array_equal(left.products[:, p, ps], right.products[:, q, qs]):
            shared.append(name)
    return shared


def difference_across(left: MetricSums, right: MetricSums, row: str, other: str, metric: str) -> Estimate:
    """Estimate ``other`` of right minus ``row`` of left, with a standard error that is at least the paired one.

    With the shared rows S and outcomes a, b, all centred over users, a = P a + r and b = P b + s, where P projects on
    the span of S. P(b - a), |r| and |s| follow from the sums; the angle between r and s does not, so

        |b - a|^2 <= |P(b - a)|^2 + (|r| + |s|)^2,  SE = |b - a| / sqrt(U (U - 1)).

    Without a shared row this is the sum of the two standard errors; if both models are in S it is the paired one.

    Args:
        left, right: metric sums of one domain in two runs, over the same users, at least two.
        row, other: a method of ``left`` and one of ``right``.
        metric: one of METRICS.
    """
    m, num_users = METRICS.index(metric), left.num_users
    shared = shared_rows(left, right)
    of_left, of_right = _centred(left, [*shared, row], m), _centred(right, [*shared, other], m)
    means = (left.mean(row, metric), right.mean(other, metric))
    k = len(shared)
    gram = (of_left[:k, :k] + of_right[:k, :k]) / 2  # equal but for rounding
    across = of_right[:k, k] - of_left[:k, k]
    values, vectors = np.linalg.eigh(gram) if k else (np.zeros(0), np.zeros((0, 0)))
    kept = values > _CLOSE * max(values.max(initial=0.0), _CLOSE)
    basis: FloatArray = vectors[:, kept] / np.sqrt(values[kept])  # (k, rank): orthonormal combinations of S

    def remainder(of_run: FloatArray) -> float:
        total = float(of_run[k, k])
        left_over = total - float(((basis.T @ of_run[:k, k]) ** 2).sum())
        return math.sqrt(left_over) if left_over > _CLOSE * total else 0.0

    squares = float(((basis.T @ across) ** 2).sum()) + (remainder(of_left) + remainder(of_right)) ** 2
    return _with_interval(means[1] - means[0], math.sqrt(squares / num_users / (num_users - 1)))


def difference_of_mean(differences: Sequence[Estimate]) -> Estimate:
    """Return the difference of the unweighted mean over domains, whose users are independent."""
    mean = math.fsum(each.mean for each in differences) / len(differences)
    return _with_interval(mean, math.sqrt(math.fsum(each.standard_error**2 for each in differences)) / len(differences))


def _centred(sums: MetricSums, rows: Sequence[str], m: int) -> FloatArray:
    """Return the products of some rows' outcomes after their means are taken off, (P, P)."""
    places = [sums.methods.index(row) for row in rows]
    totals = sums.sums[places, m]
    centred: FloatArray = sums.products[m][np.ix_(places, places)] - np.outer(totals, totals) / sums.num_users
    return centred


def _with_interval(mean: float, standard_error: float) -> Estimate:
    half_width = INTERVAL_95 * standard_error
    return Estimate(mean, standard_error, mean - half_width, mean + half_width)
