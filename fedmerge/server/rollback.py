"""After the merge: which domains does the served merge drop below their own expert, and what is served instead."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedmerge.client.metrics import EXPERT, MetricSums, paired_difference

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
