"""Full-ranking evaluation of models on a client's own users; only sums leave."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.adapter import Adapter
from fedmerge.client.baselines.rankers import Ranker
from fedmerge.client.local_domain import LocalDomain
from fedmerge.config import Split
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.evaluation.ranks import FloatArray, IntArray, per_user_metrics, rank_targets
from fedmerge.evaluation.sums import VARIANTS, MetricSums, Variant, metric_sums

NO_BASELINES: Mapping[str, Ranker] = MappingProxyType({})
Ranks = dict[Variant, npt.NDArray[np.int64]]
NO_RANKS: Mapping[str, Ranks] = MappingProxyType({})


@dataclass(frozen=True, slots=True, eq=False)
class TextVectors:
    """Vectors of U histories and of the N items under one model.

    Attributes:
        users: float32 (U, d).
        items: float32 (N, d).
    """

    users: torch.Tensor
    items: torch.Tensor


NOT_ENCODED: Mapping[str, TextVectors] = MappingProxyType({})


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
    heads: Mapping[str, Ranks] = NO_RANKS,
    encoded: Mapping[str, TextVectors] = NOT_ENCODED,
) -> dict[Variant, dict[str, FloatArray]]:
    """Return variant -> label -> (U, M) outcomes of every user; private to the client.

    Args:
        domain, models, baselines, progress: as for :func:`evaluate`.
        examples: U users.
        heads: label -> ranks of the same users under heads.
        encoded: label -> vectors of models that are encoded already.
    """
    ranks = {
        **model_ranks(domain, models, examples, progress, encoded),
        **heads,
        **baseline_ranks(examples, baselines),
    }
    return {
        variant: {label: per_user_metrics(found[variant]) for label, found in ranks.items()} for variant in VARIANTS
    }


def encode_text(
    domain: LocalDomain,
    adapter: Adapter | None,
    histories: Sequence[IntArray],
    items: torch.Tensor | None = None,
) -> TextVectors:
    """Encode histories and items by their texts under a model.

    Args:
        domain: the client's domain.
        adapter: None is the backbone alone.
        histories: U arrays of item indices, oldest first.
        items: (N, d) vectors of the items under the same model, if they are known.
    """
    users = domain.packed(histories)
    with applied(domain.backbone, adapter):
        if items is None:
            items = domain.backbone_item_vectors if adapter is None else encode(domain.backbone, domain.item_sequences)
        return TextVectors(encode(domain.backbone, users), items)


def model_ranks(
    domain: LocalDomain,
    models: Mapping[str, Adapter | None],
    examples: Examples,
    progress: Callable[[str], None] = lambda line: None,
    encoded: Mapping[str, TextVectors] = NOT_ENCODED,
) -> dict[str, Ranks]:
    """Compute every user's rank of the target under each model; these ranks never leave the client.

    Args:
        domain, models, progress: as for :func:`evaluate`.
        examples: U users.
        encoded: label -> vectors of models that are encoded already.

    Returns:
        label -> variant -> (U,).
    """
    found: dict[str, Ranks] = {}
    for label, adapter in models.items():
        text = encoded.get(label) or encode_text(domain, adapter, examples.histories)
        found[label] = {
            variant: rank_targets(text.users, text.items, examples.targets, seen_items(examples, variant))
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
