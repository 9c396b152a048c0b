"""Attacks as statistics of scores: membership, pairs bought together, memorised canaries.

No model is needed: the holder of data and adapters computes the scores. A higher score means "was trained on".
"""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Pairs = npt.NDArray[np.int64]

FALSE_POSITIVE_RATES = (0.001, 0.01)
AGAINST_BACKBONE = "loss against the backbone's"  # calibrated: some users are easy for every model
SMALLEST_DEVIATION = 1e-6


def membership(members: Floats, others: Floats) -> dict[str, float | None]:
    """Measure how well a score separates members from others: AUC with its standard error, and TPR at small FPR.

    Args:
        members: (m,) scores of units that were trained on.
        others: (n,) scores of units of the same kind that were not.

    Returns:
        ``auc``; ``auc_error`` (DeLong's standard error); ``tpr_at_fpr_…``, None where n is too small to see that rate.
    """
    area, error = auc(members, others)
    rates = {f"tpr_at_fpr_{rate:g}": tpr_at_fpr(members, others, rate) for rate in FALSE_POSITIVE_RATES}
    return {"auc": area, "auc_error": error, **rates}


def auc(members: Floats, others: Floats) -> tuple[float, float]:
    """Return P(member's score > other's) + ½ P(equal), and its standard error.

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988).
    """
    of_members, of_others = _share_below(members, others), 1 - _share_below(others, members)
    variances = [float(part.var(ddof=1)) / len(part) if len(part) > 1 else 0.25 for part in (of_members, of_others)]
    return float(of_members.mean()), math.sqrt(sum(variances))


def tpr_at_fpr(members: Floats, others: Floats, rate: float) -> float | None:
    """Return the largest true positive rate at a threshold whose false positive rate is at most ``rate``.

    None with fewer than 1 / rate others, which cannot resolve the rate.
    """
    allowed = math.floor(rate * len(others) + 1e-9)
    if allowed < 1:
        return None
    threshold = np.sort(others)[::-1][allowed]  # above it lie at most ``allowed`` others
    return float((members > threshold).mean())


def likelihood_ratios(scores: Floats, shadow_scores: Floats, shadow_members: npt.NDArray[np.bool_]) -> Floats:
    """Return log p(score | trained on) − log p(score | not), Gaussians fitted on shadow models (online LiRA).

    Args:
        scores: (U,) of the attacked model.
        shadow_scores: (S, U) of S shadow models.
        shadow_members: (S, U) True where the shadow model was trained on the user.

    Returns:
        (U,). A user in all or none of the shadow trainings gets the mean of the other users on the missing side.

    Source: Membership Inference Attacks From First Principles, arXiv:2112.03570, with one variance a side for all
    users, as it recommends for few shadows.
    """
    densities = []
    for side in (shadow_members, ~shadow_members):
        counts = side.sum(axis=0)
        means = np.where(side, shadow_scores, 0.0).sum(axis=0) / np.maximum(counts, 1)
        means = np.where(counts > 0, means, means[counts > 0].mean() if (counts > 0).any() else 0.0)
        squares = np.where(side, (shadow_scores - means) ** 2, 0.0).sum()
        deviation = max(math.sqrt(squares / max(1, side.sum() - (counts > 0).sum())), SMALLEST_DEVIATION)
        densities.append(-np.log(deviation) - (scores - means) ** 2 / (2 * deviation**2))
    return np.asarray(densities[0] - densities[1])


def exposures(ranks: npt.NDArray[np.int64], num_candidates: int) -> Floats:
    """Return log₂ N − log₂ rank of each canary's secret among N candidates; rank 1 is the most likely.

    Without memorisation ranks are uniform, and the mean is log₂ e = 1.44 bits.

    Source: The Secret Sharer, arXiv:1802.08232.
    """
    return np.asarray(math.log2(num_candidates) - np.log2(ranks.astype(np.float64)))


def top_pairs(rows: Iterable[tuple[int, Floats]], count: int) -> Pairs:
    """Return the highest-scored pairs i < j of a symmetric matrix given in blocks of rows, best first.

    Args:
        rows: (first row, (b, N) scores).
        count: number of pairs.

    Returns:
        (count, 2), fewer where there are fewer pairs.
    """
    pairs, values = np.empty((0, 2), dtype=np.int64), np.empty(0)
    for first, block in rows:
        upper = np.arange(block.shape[1])[None, :] > (first + np.arange(len(block)))[:, None]
        i, j = np.nonzero(upper)
        found = block[i, j]
        if len(found) > count:
            best = np.argpartition(-found, count - 1)[:count]
            i, j, found = i[best], j[best], found[best]
        pairs = np.concatenate([pairs, np.stack([i + first, j], axis=1)])
        values = np.concatenate([values, found])
        order = np.argsort(-values, kind="stable")[:count]
        pairs, values = pairs[order], values[order]
    return pairs


def precision_at(pairs: Pairs, true: set[tuple[int, int]], counts: Iterable[int]) -> Mapping[str, float]:
    """Return precision@k of the predicted pairs, for every k up to their number."""
    hits = np.cumsum([(int(i), int(j)) in true for i, j in pairs])
    return {str(k): float(hits[k - 1]) / k for k in counts if k <= len(pairs)}


def consecutive_pairs(sequences: Iterable[npt.NDArray[np.integer]]) -> set[tuple[int, int]]:
    """Return the pairs of different items that some user had consecutively, the smaller index first."""
    steps = ((int(a), int(b)) for sequence in sequences for a, b in pairwise(sequence))
    return {(min(step), max(step)) for step in steps if step[0] != step[1]}


def _share_below(values: Floats, others: Floats) -> Floats:
    """Return, for each value, the share of the others below it; ties count half."""
    ordered = np.sort(others)
    left, right = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return np.asarray((left + right) / (2 * len(others)))
