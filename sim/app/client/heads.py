"""Train the client's own heads and rank users under them; a head never leaves, only its report and metric sums."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.disclosed.sums import count_models
from fedmerge.client.evaluate import Ranks, TextVectors, encode_text
from fedmerge.client.heads.federated import federated_ranks, federated_weights
from fedmerge.client.heads.heads import LocalHead, head_ranks, head_report, load_or_train_head, why_no_head
from fedmerge.client.heads.vectors import item_vectors
from fedmerge.config import HeadVectors
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.errors import ClientError
from fedmerge.evaluation.sums import (
    BACKBONE,
    EXPERT,
    FEDERATED_FUSED,
    FEDERATED_HEAD,
    FEDERATED_SOURCES,
    VARIANTS,
    fused_label,
    head_label,
)
from fedmerge.federated.head import Weights
from fedmerge.privacy.policy import check_may_leave
from sim.app.client.experts import own_expert
from sim.app.client.node import Client, open_client
from sim.app.client.replies import neutral_errors
from sim.app.messages import records

logger = logging.getLogger("fedmerge.client")
Encoders = dict[HeadVectors, Adapter | None]


def train_heads(message: Message, context: Context) -> RecordDict:
    """Train the client's own heads, or reuse those in its cache, and send their reports."""
    client = open_client(context)
    config, domain, name = client.config, client.domain, client.domain.manifest.name
    check_may_leave(config.privacy.policy, "training report", name)
    request, models = records.read_head_request(message.content)
    anchor = models.pop(FEDERATED_HEAD, None)
    encoders = encoders_of(client, request.vectors, request.served, request.expert_sha256, models)
    if client.own is not None:  # each takes minutes and space on the disk
        rows = head_models(encoders, anchor, models.get(request.served))
        count_models(client.disclosed, str(config.run_id), rows, client.own.max_models)
    if reason := why_no_head(domain):
        logger.warning("%s: no head of its own, since %s", name, reason)
        none = {"trained": False, "reason": reason}
        shared = [] if anchor is None else [records.FEDERATED]
        return records.head_reports_record(dict.fromkeys([*encoders, *shared], none))
    limit = config.evaluation.validation_users
    num_validated = len(evaluation_examples(domain.interactions, "valid", limit, config.seed))
    exact = config.privacy.metrics == "exact" and num_validated >= config.privacy.min_users
    with neutral_errors(client, "the training of its heads failed"):
        reports: dict[str, dict[str, Any]] = {
            vectors: head_report(_own_head(client, vectors, adapter, anchor), exact=exact)
            for vectors, adapter in encoders.items()
        }
        if anchor is not None:
            chosen = _federated_weights(client, anchor, _served(client, request.served, models))
            weights = {variant: dict(zip(FEDERATED_SOURCES, chosen[variant], strict=True)) for variant in VARIANTS}
            reports[records.FEDERATED] = {"trained": True, "reason": ""} | ({"weights": weights} if exact else {})
    return records.head_reports_record(reports)


def encoders_of(
    client: Client, vectors: str, served: str, expert_sha256: str, models: Mapping[str, Adapter]
) -> Encoders:
    """Return the encoders of the item vectors that a request names.

    Args:
        client: this node.
        vectors: names of the encoders, comma-separated; empty for none.
        served: label of the model that ``merge`` means.
        expert_sha256: as for :func:`sim.app.client.experts.own_expert`.
        models: label -> adapter, of the request.

    Raises:
        ClientError: the run has no such heads, or the request lacks a model.
    """
    names = records.read_vectors(vectors)
    head, name = client.config.head, client.domain.manifest.name
    if strange := [one for one in names if head.kind is None or one not in head.vectors]:
        raise ClientError(
            f"domain {name}: the server asks for heads on {', '.join(strange)}, which the run's [head] does not name; "
            "use one fedmerge version everywhere"
        )
    if "merge" in names and served not in models:
        raise ClientError(f"domain {name}: the server asks for a head on the merge {served[:80]!r}, but sent none")
    of_name = {"merge": models.get(served), "backbone": None}
    return {one: own_expert(client, expert_sha256) if one == "expert" else of_name[one] for one in names}


def _served(client: Client, served: str, models: Mapping[str, Adapter]) -> Adapter:
    """Return the served merge, which encodes the items for the federated head."""
    if client.config.head.kind != "federated" or served not in models:
        raise ClientError(
            f"domain {client.domain.manifest.name}: the server sent a federated head for the merge {served[:80]!r}; "
            f"the run has head.kind = '{client.config.head.kind or 'none'}', and the request the models "
            f"{sorted(models)[:3]}. Use one configuration and one fedmerge version everywhere"
        )
    return models[served]


def federated_head_ranks(
    client: Client,
    anchor: Adapter | None,
    request: records.EvaluationRequest,
    models: Mapping[str, Adapter],
    examples: Examples,
    encoded: Mapping[str, TextVectors],
) -> tuple[dict[str, Ranks], dict[str, TextVectors]]:
    """Rank users under the federated head, alone and fused; arguments and results as for :func:`own_head_ranks`.

    Args:
        request: says which model encodes the items, and the weights of the fusion, if the client is not to choose them.
        models: label -> adapter, of the request.
        encoded: label of a model -> its vectors of the examples, as far as they are known.
    """
    if anchor is None:
        return {}, {}
    domain, adapter = client.domain, _served(client, request.served, models)
    weights = records.read_fusion(request.fusion) if request.fusion else _federated_weights(client, anchor, adapter)
    text = encoded.get(request.served)
    if text is None:
        items = item_vectors(domain, adapter, client.config.cache_dir)
        text = encode_text(domain, adapter, examples.histories, items)
    ranks = federated_ranks(anchor, text, weights, examples)
    logger.info("%s: %s evaluated on %d users", domain.manifest.name, FEDERATED_HEAD, len(examples))
    return ranks, {request.served: text}


def _federated_weights(client: Client, anchor: Adapter, adapter: Adapter) -> Weights:
    config = client.config
    limit = config.evaluation.validation_users
    return federated_weights(client.domain, anchor, adapter, limit, config.seed, config.cache_dir, logger.info)


def head_models(encoders: Encoders, anchor: Adapter | None, served: Adapter | None, fusion: str = "") -> set[str]:
    """Return one name for each row of heads, by which an organisation counts the evaluated models.

    Args:
        encoders: of :func:`encoders_of`.
        anchor: the federated head; None without one.
        served: encoder of the items for the federated head.
        fusion: weights of its fusion, as in the request; empty if the client chooses them.
    """
    shared = "" if anchor is None else adapter_sha256(anchor)
    own = {
        f"{label(vectors)} {'' if adapter is None else adapter_sha256(adapter)} {shared}".rstrip()
        for vectors, adapter in encoders.items()
        for label in (head_label, fused_label)
    }
    if anchor is None:
        return own
    over = f"{shared} {'' if served is None else adapter_sha256(served)}".rstrip()
    weights = hashlib.sha256(fusion.encode()).hexdigest()
    return own | {f"{FEDERATED_HEAD} {over}", f"{FEDERATED_FUSED} {over} {weights}"}


def own_head_ranks(
    client: Client, encoders: Encoders, served: str, anchor: Adapter | None, examples: Examples
) -> tuple[dict[str, Ranks], dict[str, TextVectors]]:
    """Rank users under the client's own heads.

    Args:
        client: this node.
        encoders: of :func:`encoders_of`.
        served: label of the model that ``merge`` means.
        anchor: the federated head; None without one.
        examples: U users.

    Returns:
        label -> ranks, empty if the domain has too few users for a head; label of a model -> its vectors of the
        examples, so that the model's own row needs no second encoding.
    """
    domain = client.domain
    if not encoders or why_no_head(domain):
        return {}, {}
    ranks: dict[str, Ranks] = {}
    encoded: dict[str, TextVectors] = {}
    labels: Mapping[HeadVectors, str] = {"merge": served, "expert": EXPERT, "backbone": BACKBONE}
    for vectors, adapter in encoders.items():
        head = _own_head(client, vectors, adapter, anchor)
        text = encode_text(domain, adapter, examples.histories, item_vectors(domain, adapter, client.config.cache_dir))
        ranks |= head_ranks(domain, vectors, adapter, head, examples, text)
        encoded[labels[vectors]] = text
        logger.info("%s: %s evaluated on %d users", domain.manifest.name, head_label(vectors), len(examples))
    return ranks, encoded


def _own_head(client: Client, vectors: HeadVectors, adapter: Adapter | None, anchor: Adapter | None) -> LocalHead:
    """Only the head on the merge continues the federated one: the others are the organisation alone."""
    config = client.config
    return load_or_train_head(
        client.domain,
        adapter,
        config.head,
        config.evaluation.validation_users,
        config.seed,
        config.cache_dir,
        logger.info,
        anchor if vectors == "merge" else None,
    )
