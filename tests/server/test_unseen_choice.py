"""The choice between the shared merge and the federated head for a domain that trained neither."""

import numpy as np
import pytest

from fedmerge.evaluation.ranks import METRICS, SELECTION_METRIC
from fedmerge.evaluation.sums import FEDERATED_FUSED, FEDERATED_HEAD, LAST_ITEM, MetricSums, inexact_sums
from fedmerge.server.choice import choose_for_unseen, served_row


def sums_with(merge: float, head: float, fused: float, last: float) -> MetricSums:
    """Sums with these means; NaN is withheld."""
    sums = 8 * np.repeat([[merge], [head], [fused], [last]], len(METRICS), axis=1)
    return inexact_sums(("average", FEDERATED_HEAD, FEDERATED_FUSED, LAST_ITEM), "unmasked", 8, sums, noise=0.3)


@pytest.mark.parametrize(
    ("scores", "serve"),
    [
        ((0.3, 0.5, 0.4, 0.2), FEDERATED_HEAD),
        ((0.3, 0.4, 0.5, 0.2), FEDERATED_FUSED),
        ((0.3, 0.5, 0.5, 0.2), FEDERATED_HEAD),
        ((0.3, 0.1, 0.4, 0.35), FEDERATED_FUSED),
        ((0.3, 0.4, 0.4, 0.5), "merged"),  # below last item
        ((0.5, 0.4, 0.4, 0.3), "merged"),  # below the merge
        ((0.3, 0.3, 0.3, 0.2), "merged"),
        ((0.3, 0.5, 0.4, float("nan")), "merged"),
        ((float("nan"), 0.5, 0.4, 0.2), "merged"),
    ],
)
def test_the_head_is_served_where_it_is_above_the_merge_and_last_item(
    scores: tuple[float, float, float, float], serve: str
) -> None:
    chosen = choose_for_unseen({"toys": sums_with(*scores)}, "average", SELECTION_METRIC, fallback=True)
    assert chosen["toys"]["serve"] == serve
    told = [chosen["toys"][key] for key in ("merged", FEDERATED_HEAD, FEDERATED_FUSED, LAST_ITEM)]
    assert told == [None if np.isnan(score) else pytest.approx(score) for score in scores]
    assert served_row(chosen, "average", "toys") == ("average" if serve == "merged" else serve)


def test_without_fallback_every_unseen_domain_is_served_the_merge() -> None:
    sums = {"toys": sums_with(0.3, 0.5, 0.4, 0.2), "books": sums_with(0.3, 0.4, 0.5, 0.2)}
    chosen = choose_for_unseen(sums, "average", SELECTION_METRIC, fallback=False)
    assert {name: entry["serve"] for name, entry in chosen.items()} == {"books": "merged", "toys": "merged"}
