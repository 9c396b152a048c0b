"""Serve a domain the merge, or its own expert where that did better: decided for each domain, on validation.

The domain's own validation users decide between two models, so what the chosen one scores *there* is too good on
average (the winner's curse), most of all where those users are few and the two are close. What the choice is worth,
test tells.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedmerge.client.metrics import EXPERT, MetricSums

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
