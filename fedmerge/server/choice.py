"""Choose on validation: the variant of each method, the merge to serve, and the model that each domain is served.

A domain's own validation users decide between the merge and its expert, so the score of the chosen one *there* is too
good on average (the winner's curse), most of all where those users are few and the two are close. Test tells what the
choice is worth.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedmerge.evaluation.sums import EXPERT, MetricSums, paired_difference
from fedmerge.merging.candidate import Candidate


def choose(
    candidates: Sequence[Candidate], validation: Mapping[str, MetricSums], train_domains: Sequence[str], metric: str
) -> tuple[dict[str, str], str, dict[str, float]]:
    """Choose each method's variant, and the merge to serve, on validation.

    Args:
        candidates: all merges.
        validation: domain -> unmasked metric sums of all candidates.
        train_domains: whose unweighted mean decides; unseen domains have no say.
        metric: the deciding one.

    Returns:
        Method -> label of its best variant; label of the best of all; every label's score. Of equal scores the first
        counts.
    """
    scores = {
        candidate.label: float(
            np.mean([validation[domain].mean(candidate.label, metric) for domain in sorted(train_domains)])
        )
        for candidate in candidates
    }
    best: dict[str, str] = {}
    for candidate in candidates:
        if candidate.method not in best or scores[candidate.label] > scores[best[candidate.method]]:
            best[candidate.method] = candidate.label
    return best, max(best.values(), key=lambda label: scores[label]), scores


MERGED = "merged"
SERVED = "served (with fallback)"


def choose_per_domain(
    validation: Mapping[str, MetricSums], served: str, metric: str, fallback: bool
) -> dict[str, dict[str, Any]]:
    """Which model each training domain is served.

    Args:
        validation: domain -> unmasked metric sums of the served merge and the domain's own expert, if it has one.
        served: label of the merge that is served where there is no reason for another.
        metric: the deciding one.
        fallback: False: the merge for everybody.

    Returns:
        domain -> ``serve`` (``merged`` or ``expert``) and the scores. Of equal scores the merge's counts.
    """
    chosen = {}
    for domain, sums in sorted(validation.items()):
        labels = {MERGED: served} | ({EXPERT: EXPERT} if EXPERT in sums.methods else {})
        scores = {model: sums.mean(label, metric) for model, label in labels.items()}
        chosen[domain] = {"serve": max(scores, key=scores.__getitem__) if fallback else MERGED, **scores}
    return chosen


def with_served(sums: MetricSums, model: str) -> MetricSums:
    """The sums with one more row, :data:`SERVED`, a copy of the row of the model that this domain is served.

    So means and paired differences of the choice come from what was evaluated, exactly and without another evaluation.
    """
    row = sums.methods.index(model)
    rows = [*range(len(sums.methods)), row]
    return MetricSums(
        (*sums.methods, SERVED),
        sums.variant,
        sums.num_users,
        sums.sums[rows],
        np.ascontiguousarray(sums.products[:, rows][:, :, rows]),
    )


FALLBACK = "fallback"
LONGEST_NAMES = 100


def dropped_domains(validation: Mapping[str, MetricSums], merge: str, metric: str) -> dict[str, dict[str, float]]:
    """Domains whose own expert ranks their validation users better than a merge, beyond noise.

    Args:
        validation: domain -> unmasked sums of the merge and of the domain's own expert, if it has one.
        merge: its label.
        metric: what is compared.

    Returns:
        domain -> ``mean``, ``low`` and ``high`` of merge minus expert, whose 95 % interval lies below 0.
    """
    found = {}
    for domain, sums in sorted(validation.items()):
        if EXPERT in sums.methods:
            difference = paired_difference(sums, merge, EXPERT, metric)
            if difference.high < 0:
                found[domain] = {"mean": difference.mean, "low": difference.low, "high": difference.high}
    return found


def suffix_without(domains: Sequence[str]) -> str:
    """What the labels of merges without some domains end in; labels become names of folders, so it stays short."""
    names = " ".join(domains)
    if len(names) > LONGEST_NAMES:
        names = f"{len(domains)} domains {hashlib.sha256(names.encode()).hexdigest()[:8]}"
    return f" without {names}" if domains else ""


def roll_back(
    validation: Mapping[str, MetricSums], served: str, without: Sequence[str], failed: Sequence[str], metric: str
) -> dict[str, Any] | None:
    """What to serve in place of a merge that drops a domain below its own expert.

    Of the merges without the domains that failed a check, the best on the other domains is taken if it is better there
    and drops fewer of them. Else the dropped domains are served their own experts. Those that failed have no say.

    Args:
        validation: domain -> unmasked sums of all merges and of the domain's own expert.
        served: the label that was chosen.
        without: labels of the merges without those that failed.
        failed: who that is.
        metric: what decides.

    Returns:
        ``from``, ``to`` (a label, or "fallback") and ``dropped``; None where no domain that counts is dropped.
    """
    judges = {domain: sums for domain, sums in validation.items() if domain not in failed}
    dropped = dropped_domains(judges, served, metric)
    if not dropped:
        return None
    scores = {
        label: float(np.mean([sums.mean(label, metric) for sums in judges.values()])) for label in (served, *without)
    }
    better = [
        label
        for label in without
        if scores[label] > scores[served] and len(dropped_domains(judges, label, metric)) < len(dropped)
    ]
    to = max(better, key=lambda label: scores[label], default=FALLBACK)
    return {"from": served, "to": to, "dropped": sorted(dropped)}
