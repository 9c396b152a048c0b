"""Collect the clients' similarity factors of shared items, and average them for each target."""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import RecordDict

from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import ClientError
from fedmerge.federated.shared_items import (
    MeanSimilarity,
    SharedItems,
    factor_width,
    find_shared_items,
    mean_similarity,
)
from fedmerge.runs import checkpoints
from sim.app.messages import records
from sim.app.server.asking import ask
from sim.app.server.members import join_names
from sim.app.server.questions import Question, own_noise
from sim.app.server.run import Run

BYTES_OF_A_FACTOR = 2  # float16

logger = logging.getLogger("fedmerge.server")


def mean_similarities(
    run: Run, backbone: Backbone, catalogs: Mapping[str, Catalog], sources: Mapping[str, str]
) -> dict[str, MeanSimilarity]:
    """Return domain -> the mean similarity of its shared items; the factors of all domains are on disk.

    A client that does not send its factors is excluded. Once all have arrived, the set that is averaged is final.

    Args:
        run: the run.
        backbone: the frozen encoder, for its width.
        catalogs: of the training domains; not read once the factors are final.
        sources: domain -> hash of its expert, of all domains that are merged.

    Raises:
        ClientError: too few clients, or factors that were averaged are missing and their client does not send the same.
        DomainError: without the domains that dropped out since the start, a domain shares too few items.
    """
    # 1. Find the factors on disk.
    ended = checkpoints.read_factor_hashes(run.folder)
    found = {name: kept for name in sorted(ended or sources) if (kept := checkpoints.read_factors(run.folder, name))}
    if ended is None:
        shared = find_shared_items({name: catalogs[name].item_ids for name in sources if name in catalogs})
        found = {name: kept for name, kept in found.items() if name in shared and _is_same(kept[0], shared[name])}
    else:
        found = {name: kept for name, kept in found.items() if kept[2] == ended[name]}
        if missing := sorted({*ended} - {*found}):
            raise ClientError(
                f"{run.folder}: the similarity factors of {join_names(missing)} were averaged, but are missing or "
                "damaged on disk. Restore them, or start a new run."
            )
        shared = {name: kept[0] for name, kept in found.items()}
    # 2. Ask for the others.
    in_training = run.members.in_role("train")
    missing = [name for name in sources if name in in_training and name in shared and name not in found]
    hashes = {name: kept[2] for name, kept in found.items()}
    factors = {name: kept[1] for name, kept in found.items()}
    if missing:
        logger.info("similarity factors of shared items: %s", join_names(missing))
        _ask_for_factors(run, backbone, missing, shared, sources, factors, hashes)
    # 3. Fix the set that is averaged.
    if ended is None:
        run.require_quorum(list(factors))
        checkpoints.write_factor_hashes(run.folder, hashes)
    return {name: mean_similarity(name, {name: shared[name] for name in factors}, factors) for name in sorted(factors)}


def _ask_for_factors(
    run: Run,
    backbone: Backbone,
    domains: list[str],
    shared: Mapping[str, SharedItems],
    sources: Mapping[str, str],
    factors: dict[str, torch.Tensor],
    hashes: dict[str, str],
) -> None:
    config = run.config
    shapes = {
        name: (
            len(shared[name].items),
            factor_width(len(shared[name].items), backbone.width, config.weave.similarity_rank),
        )
        for name in domains
    }

    def request(name: str) -> RecordDict:
        asked = records.SimilarityRequest(sources[name], config.weave.similarity_rank)
        return records.similarity_request_record(asked, shared[name].items)

    def receive(name: str, content: RecordDict) -> None:
        sent = records.read_similarity(content, shapes[name])
        hashes[name] = checkpoints.write_factors(run.folder, name, shared[name], sent)
        factors[name] = sent

    question = Question(
        records.SIMILARITY,
        config.server.timeout_seconds,
        request,
        lambda name: BYTES_OF_A_FACTOR * shapes[name][0] * shapes[name][1] + 2**12,
        noise=own_noise(config.dp.mode),  # of the expert, whose items these are
    )
    ask(run, run.members.nodes_of(domains), question, receive)


def _is_same(kept: SharedItems, wanted: SharedItems) -> bool:
    return np.array_equal(kept.items, wanted.items) and np.array_equal(kept.shared, wanted.shared)
