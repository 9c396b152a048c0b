"""Full-ranking evaluation of models on a client's own users; only sums leave (METHODS 1)."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.client.baselines import last_item_similarity, popularity_ranks, popularity_scores
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.metrics import VARIANTS, MetricSums, Variant, metric_sums, per_user_metrics, rank_targets
from fedmerge.config import Split
from fedmerge.domain.splits import evaluation_examples, train_sequences
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import Adapter, applied
from fedmerge.encoder.text import pack_sequences

BACKBONE = "backbone"
POPULARITY = "popularity"
LAST_ITEM = "last item"


def evaluate(
    domain: LocalDomain,
    models: Mapping[str, Adapter | None],
    split: Split,
    max_users: int | None,
    seed: int,
    baselines: bool,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[Variant, MetricSums]:
    """Evaluate models on the same users, so that they can be compared pairwise.

    Args:
        domain: the client's own.
        models: label -> adapter; None is the backbone alone.
        split: ``valid`` or ``test``.
        max_users: at most so many users, the same for every call with this seed; None takes all.
        seed: of the draw of users.
        baselines: also popularity and the similarity to the last item under the backbone alone.
        progress: receives one line a model.

    Returns:
        Per variant, sums and cross-products over the users.
    """
    examples = evaluation_examples(domain.interactions, split, max_users, seed)
    seen: dict[Variant, list[npt.NDArray[np.int32]] | None] = {"unmasked": None, "masked": examples.histories}
    outcomes: dict[Variant, dict[str, npt.NDArray[np.float64]]] = {variant: {} for variant in VARIANTS}
    users = pack_sequences(
        domain.table, examples.histories, domain.backbone.special, domain.text.max_items, domain.text.max_tokens
    )
    backbone_items: torch.Tensor | None = None
    for label, adapter in models.items():
        with applied(domain.backbone, adapter):
            items = encode(domain.backbone, domain.item_sequences)
            vectors = encode(domain.backbone, users)
        if adapter is None:
            backbone_items = items
        for variant in VARIANTS:
            ranks = rank_targets(vectors, items, examples.targets, seen[variant])
            outcomes[variant][label] = per_user_metrics(ranks)
        progress(f"{domain.manifest.name}: {label} evaluated on {len(examples)} users ({split})")
    if baselines:
        popularity = popularity_scores(train_sequences(domain.interactions), len(domain.catalog))
        if backbone_items is None:
            backbone_items = encode(domain.backbone, domain.item_sequences)
        for variant in VARIANTS:
            ranks = popularity_ranks(popularity, examples.targets, seen[variant])
            outcomes[variant][POPULARITY] = per_user_metrics(ranks)
            ranks = last_item_similarity(backbone_items, examples.histories, examples.targets, seen[variant])
            outcomes[variant][LAST_ITEM] = per_user_metrics(ranks)
    return {variant: metric_sums(outcomes[variant], variant) for variant in VARIANTS}
