"""A secure sum through Flower: four questions to the clients, whose answers come to nothing but the weighted mean."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedmerge.config import ExperimentConfig
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.federated.summed import adapter_of_mean, num_summed, summed_rank
from fedmerge.merging.candidate import Candidate
from fedmerge.privacy.dp.agreement import check_spent
from fedmerge.privacy.secagg.server import (
    added,
    check_advertisement,
    check_boxes,
    check_revealed,
    new_session,
    weighted_mean,
)
from fedmerge.privacy.secagg.session import Reals, default_threshold
from fedmerge.privacy.secagg.state import Advertisement, Revealed
from fedmerge.runs.checkpoints import end_training, keep_merge
from fedmerge.runs.secure_sums import keep_mean, kept_mean, note_reveal
from fedmerge.server.candidates import candidates_of_mean
from sim.app.messages import records
from sim.app.messages import secure_sum as secure_records
from sim.app.server.asking import DESCRIBE_SECONDS, Federation, Question, ask, listed, own_noise, require_quorum

REPORT_BYTES = 2**20
_BYTES_PER_CLIENT = 1024  # of keys, shares and names, at most
_BYTES_OF_A_MESSAGE = 2**16

logger = logging.getLogger("fedmerge.server")


@dataclass(frozen=True)
class SecureMean:
    """What came out.

    Attributes:
        values: (n,), the weighted mean over ``clients``.
        clients: whose values are in it, sorted.
        record: how it was made, as JSON: numbers and names, nothing secret.
    """

    values: Reals
    clients: tuple[str, ...]
    record: Mapping[str, Any]


def secure_candidates(
    federation: Federation, config: ExperimentConfig, backbone: Backbone, run_dir: Path
) -> tuple[dict[str, str], list[Candidate]]:
    """Training, and the merges that the mean of the experts gives; a mean that is on disk is not made again.

    Returns:
        Domain -> records.OWN_EXPERT, of those in the sum, and the merges.

    Raises:
        ClientError, AggregationError: too few clients are left.
    """
    federation.phase = "train"
    if (kept := kept_mean(run_dir)) is None:
        reports: dict[str, dict[str, Any]] = {}

        def receive(domain: str, content: RecordDict) -> None:
            reports[domain] = read_checked_report(federation, config, domain, content)

        nodes = {domain: federation.nodes[domain] for domain in federation.of("train")}
        logger.info("training: %s", listed(list(nodes)))
        limit = config.server.timeout_seconds
        ask(federation, nodes, Question(records.TRAIN, limit, limit_bytes=lambda _: REPORT_BYTES), receive)
        require_quorum(federation, config, list(reports))
        like = {domain: fresh_adapter(backbone, config.lora.of(domain), seed=0) for domain in sorted(reports)}
        num_values = num_summed("updates", next(iter(like.values())))
        note = partial(note_reveal, run_dir, 0, reports)
        summed = secure_mean(federation, config, dict.fromkeys(like, 1.0), num_values, note)
        rank = summed_rank({domain: like[domain] for domain in summed.clients})
        mean = adapter_of_mean("updates", summed.values, like[summed.clients[0]], rank)
        training = {domain: reports[domain] for domain in summed.clients}
        kept = mean, {**summed.record, "training": training}
        keep_mean(run_dir, *kept, backbone.name)
    mean, record = kept
    sources = dict.fromkeys(sorted(record["clients"]), records.OWN_EXPERT)
    end_training(run_dir, sources)
    for domain in federation.of("train"):
        if domain not in sources:
            federation.exclude(domain, "its expert is not in the sum that was made")
    candidates = candidates_of_mean(config, mean, record, backbone)
    for candidate in candidates:
        keep_merge(run_dir, candidate, backbone.name)
        logger.info("merged: %s", candidate.label)
    return sources, candidates


def read_checked_report(
    federation: Federation, config: ExperimentConfig, domain: str, content: RecordDict, number: int | None = None
) -> dict[str, Any]:
    """The report of a training whose adapter stays hidden, held to the noise that was agreed on.

    Args:
        federation, config: of the run.
        domain: whose.
        content: of its reply.
        number: of the round, where there are rounds.

    Raises:
        ClientError: it says something else than was agreed.
    """
    report = records.read_report(content)
    num_users = federation.descriptions[domain].num_users
    check_spent(domain, config, report.get("privacy"), num_users, number)
    return report


def secure_mean(
    federation: Federation,
    config: ExperimentConfig,
    weights: Mapping[str, float],
    num_values: int,
    before_it_shows: Callable[[Sequence[str]], None],
) -> SecureMean:
    """The weighted mean of what the clients have trained.

    Who fails or is late at a step is excluded, as in every phase, and the sum goes on without it as long as enough are
    left. Every call begins a session of its own, with fresh keys.

    Args:
        federation: the clients.
        config: privacy and server count.
        weights: client -> weight, of those that have trained.
        num_values: of each.
        before_it_shows: called with who is in the sum, before anything is asked that takes the masks off.

    Raises:
        AggregationError: too few clients are left.
    """
    started = time.monotonic()
    # A threshold that was set holds for all who were asked to train; of fewer, never less than a majority.
    wanted = config.privacy.threshold or 0
    threshold = max(min(wanted, len(weights)), default_threshold(len(weights)))
    session = new_session(weights, num_values, config.privacy.value_range, threshold)
    everybody = frozenset(session.clients)
    small = _BYTES_OF_A_MESSAGE + _BYTES_PER_CLIENT * len(everybody)

    def put(
        kind: str,
        clients: frozenset[str],
        request: Callable[[str], RecordDict],
        receive: Callable[[str, RecordDict], None],
        most: int = small,
        noise: str = "none",
    ) -> None:
        nodes = {client: federation.nodes[client] for client in sorted(clients) if client in federation.nodes}
        question = Question(kind, DESCRIBE_SECONDS, request, lambda _: most, noise=noise)
        ask(federation, nodes, question, receive)

    advertisements: dict[str, Advertisement] = {}

    def take_keys(client: str, content: RecordDict) -> None:
        advertisement = secure_records.read_advertisement(content)
        check_advertisement(client, advertisement)
        advertisements[client] = advertisement

    announced = secure_records.session_record(session)
    put(secure_records.ADVERTISE, everybody, lambda _: announced, take_keys)
    session.check_survivors(frozenset(advertisements), everybody, "keys")

    boxes: dict[str, dict[str, bytes]] = {}

    def take_boxes(client: str, content: RecordDict) -> None:
        sealed = secure_records.read_boxes(content)
        check_boxes(client, sealed, advertisements)
        boxes[client] = sealed

    keys = secure_records.advertisements_record(dict(sorted(advertisements.items())))
    put(secure_records.SHARE, frozenset(advertisements), lambda _: keys, take_boxes)
    shared = frozenset(boxes)
    session.check_survivors(shared, frozenset(advertisements), "shares")

    total = np.zeros(num_values, np.uint32)
    in_sum: set[str] = set()

    def take_masked(client: str, content: RecordDict) -> None:
        nonlocal total
        total = added(session, client, total, secure_records.read_masked(content))
        in_sum.add(client)

    def relayed(client: str) -> RecordDict:
        return secure_records.boxes_record({peer: boxes[peer][client] for peer in sorted(shared - {client})})

    put(secure_records.MASKED, shared, relayed, take_masked, _BYTES_OF_A_MESSAGE + 4 * num_values, own_noise(config))
    survivors = frozenset(in_sum)
    session.check_survivors(survivors, shared, "masked values")

    revealed: dict[str, Revealed] = {}

    def take_revealed(client: str, content: RecordDict) -> None:
        told = secure_records.read_revealed(content)
        check_revealed(client, told, survivors, shared)
        revealed[client] = told

    before_it_shows(sorted(survivors))
    asked = secure_records.survivors_record(sorted(survivors))
    put(secure_records.UNMASK, survivors, lambda _: asked, take_revealed)
    values = weighted_mean(session, advertisements, shared, survivors, total, revealed)
    seconds = time.monotonic() - started
    logger.info("secure sum of %d clients, %d values each, %.1f s", len(survivors), num_values, seconds)
    record = {
        "clients": {client: session.coefficients[client] for client in sorted(survivors)},
        "dropped_out": sorted(everybody - survivors),
        "threshold": session.threshold,
        "num_values": num_values,
        "value_range": session.value_range,
        "tolerance": session.tolerance / sum(session.coefficients[client] for client in sorted(survivors)),
        "bytes_up": 4 * num_values,
        "seconds": seconds,
    }
    return SecureMean(values, tuple(sorted(survivors)), record)
