"""Full-ranking evaluation of models on a client's own users; only sums leave."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from fedmerge.adapter import Adapter
from fedmerge.client.baselines.rankers import Ranker
from fedmerge.client.local_domain import LocalDomain
from fedmerge.config import Split
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import pack_sequences
from fedmerge.evaluation.ranks import FloatArray, per_user_metrics, rank_targets
from fedmerge.evaluation.sums import VARIANTS, MetricSums, Variant, metric_sums

BACKBONE = "backbone"
NO_BASELINES: Mapping[str, Ranker] = MappingProxyType({})


def evaluate(
    domain: LocalDomain,
    models: Mapping[str, Adapter | None],
    split: Split,
    max_users: int | None,
    seed: int,
    baselines: Mapping[str, Ranker] = NO_BASELINES,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[Variant, MetricSums]:
    """Evaluate models on the same users, so that they can be compared pairwise.

    Args:
        domain: the client's domain.
        models: label -> adapter; None is the backbone alone.
        split: ``valid`` or ``test``.
        max_users: largest number of users, the same users for every call with this seed; None takes all.
        seed: seed of the draw of users.
        baselines: label -> ranker, of :func:`fedmerge.client.baselines.rankers.baseline_rankers`; their rows come last.
        progress: receives one line per model.

    Returns:
        Sums and cross-products over the users, for each variant.
    """
    examples = evaluation_examples(domain.interactions, split, max_users, seed)
    found = outcomes(domain, models, examples, baselines, progress)
    return {variant: metric_sums(of_variant, variant) for variant, of_variant in found.items()}


def outcomes(
    domain: LocalDomain,
    models: Mapping[str, Adapter | None],
    examples: Examples,
    baselines: Mapping[str, Ranker] = NO_BASELINES,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[Variant, dict[str, FloatArray]]:
    """Return variant -> label -> (U, M) outcomes of every user; private to the client."""
    ranks = {**model_ranks(domain, models, examples, progress), **baseline_ranks(examples, baselines)}
    return {
        variant: {label: per_user_metrics(found[variant]) for label, found in ranks.items()} for variant in VARIANTS
    }


Ranks = dict[Variant, npt.NDArray[np.int64]]


def model_ranks(
    domain: LocalDomain,
    models: Mapping[str, Adapter | None],
    examples: Examples,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Ranks]:
    """Compute every user's rank of the target under each model; these ranks never leave the client.

    Returns:
        label -> variant -> (U,).
    """
    users = pack_sequences(
        domain.table, examples.histories, domain.backbone.special, domain.text.max_items, domain.text.max_tokens
    )
    found: dict[str, Ranks] = {}
    for label, adapter in models.items():
        with applied(domain.backbone, adapter):
            items = domain.backbone_item_vectors if adapter is None else encode(domain.backbone, domain.item_sequences)
            vectors = encode(domain.backbone, users)
        found[label] = {
            variant: rank_targets(vectors, items, examples.targets, seen_items(examples, variant))
            for variant in VARIANTS
        }
        progress(f"{domain.manifest.name}: {label} evaluated on {len(examples)} users")
    return found


def baseline_ranks(examples: Examples, baselines: Mapping[str, Ranker]) -> dict[str, Ranks]:
    """Compute the same ranks as :func:`model_ranks`, under baselines."""
    return {
        label: {variant: ranks_of(examples, seen_items(examples, variant)) for variant in VARIANTS}
        for label, ranks_of in baselines.items()
    }


def seen_items(examples: Examples, variant: Variant) -> list[npt.NDArray[np.int32]] | None:
    """Return the items that a variant removes from the candidates."""
    return examples.histories if variant == "masked" else None
