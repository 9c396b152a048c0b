"""The federated head at a client: weights of its fusion, and its rows, alone and fused with text and recent items."""

from collections.abc import Sequence
from pathlib import Path

from fedmerge.adapter import Adapter
from fedmerge.client.cache.folders import inputs_key
from fedmerge.client.evaluate import Ranks, TextVectors, encode_text
from fedmerge.client.heads.heads import (
    ItemSide,
    Progress,
    alone_and_fused,
    fusion_models,
    head_inputs,
    item_side,
    load_or_choose_fusion,
    text_inputs,
    text_sources,
)
from fedmerge.client.heads.vectors import item_vectors
from fedmerge.client.local_domain import LocalDomain
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.evaluation.ranks import IntArray
from fedmerge.evaluation.sums import FEDERATED_FUSED, FEDERATED_HEAD
from fedmerge.federated.head import Weights
from fedmerge.files import make_folder
from fedmerge.sequence.anchored import anchored_source
from fedmerge.sequence.model import SequenceSettings
from fedmerge.sequence.ranking import Source


def federated_weights(
    domain: LocalDomain,
    head: Adapter,
    adapter: Adapter | None,
    validation_users: int | None,
    seed: int,
    cache_dir: str,
    progress: Progress = lambda line: None,
) -> Weights:
    """Return the weights of the head's fusion that the domain's validation users prefer; once chosen they are cached.

    Args:
        domain: the client's domain.
        head: the federated head.
        adapter: encodes items and histories; None is the backbone alone.
        validation_users: users that choose; None takes all.
        seed: seed of the experiment.
        cache_dir: folder on the client's own disk.
        progress: receives a line for each variant that is chosen.

    Raises:
        DomainError: no user has enough items to be a validation user.
    """
    validation = evaluation_examples(domain.interactions, "valid", validation_users, seed)

    def sources() -> list[Source]:
        items = item_vectors(domain, adapter, cache_dir)
        return federated_sources(head, encode_text(domain, adapter, validation.histories, items), validation.histories)

    inputs = head_inputs(domain, adapter, SequenceSettings(inputs="text", validation_users=validation_users), seed)
    inputs |= {"users": text_inputs(domain, adapter), **fusion_models(adapter, head)}
    key, name = inputs_key(inputs), domain.manifest.name
    path = Path(cache_dir).expanduser() / "heads" / f"{name}-federated-{key}.json"
    make_folder(path.parent)
    of = fusion_models(adapter, head)
    fusion = load_or_choose_fusion(
        path,
        of,
        sources,
        validation,
        domain.interactions.num_users,
        lambda line: progress(f"{name}: federated head: {line}"),
    )
    return {variant: choice.weights for variant, choice in fusion.items()}


def federated_sources(
    head: Adapter, text: TextVectors, histories: Sequence[IntArray], side: ItemSide | None = None
) -> list[Source]:
    """Return FEDERATED_SOURCES: the federated head, text, and recent items.

    Args:
        head: the federated head.
        text: vectors of the histories and of the items.
        histories: U arrays of item indices, oldest first.
        side: of :func:`fedmerge.client.heads.heads.item_side`, if it is known.
    """
    side = side or item_side(text.items)
    shared = anchored_source(head, text.items, histories, FEDERATED_HEAD, items=side.whitened)
    return [shared, *text_sources(text, histories, side)]


def federated_ranks(head: Adapter, text: TextVectors, weights: Weights, examples: Examples) -> dict[str, Ranks]:
    """Compute every user's rank of the target under the head alone and fused; these ranks never leave the client.

    Args:
        head: the federated head.
        text: vectors of the users of ``examples`` and of the items.
        weights: of the fusion.
        examples: U users.

    Returns:
        label -> variant -> (U,).
    """
    alone, fused = alone_and_fused(federated_sources(head, text, examples.histories), weights, examples)
    return {FEDERATED_HEAD: alone, FEDERATED_FUSED: fused}
