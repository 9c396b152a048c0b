"""A secure sum through Flower: four questions to the clients, whose answers reveal only the weighted mean."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedmerge.adapter import Adapter
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.federated.summed import adapter_of_mean, num_summed, summed_rank
from fedmerge.merging.candidate import Candidate, Origin
from fedmerge.privacy.dp.agreement import check_spent, largest_entry
from fedmerge.privacy.secagg.agreement import Summand, agreed_threshold, agreement_of
from fedmerge.privacy.secagg.server import (
    add_values,
    check_advertisement,
    check_boxes,
    check_revealed,
    new_session,
    weighted_mean,
)
from fedmerge.privacy.secagg.session import Reals, Session
from fedmerge.privacy.secagg.state import Advertisement, Revealed
from fedmerge.runs.checkpoints import write_candidate, write_sources
from fedmerge.runs.secure_sums import note_reveal, read_mean, write_mean
from fedmerge.server.candidates import candidates_of_mean
from sim.app.messages import records
from sim.app.messages import secure_sum as secure_records
from sim.app.server.asking import DESCRIBE_SECONDS, ask
from sim.app.server.members import join_names
from sim.app.server.phases.training import REPORT_BYTES
from sim.app.server.questions import Question, own_noise
from sim.app.server.run import Run

_BYTES_PER_CLIENT = 1024  # of keys, shares and names, at most
_BYTES_OF_A_MESSAGE = 2**16

logger = logging.getLogger("fedmerge.server")


@dataclass(frozen=True)
class SecureMean:
    """The outcome of a secure sum.

    Attributes:
        values: (n,), the weighted mean over ``clients``.
        clients: that are in the sum, sorted.
        record: for the provenance, as JSON: numbers and names, nothing secret.
    """

    values: Reals
    clients: tuple[str, ...]
    record: Mapping[str, Any]


def secure_candidates(run: Run, backbone: Backbone) -> tuple[dict[str, str], list[Candidate]]:
    """Train, and make the merges that the mean of the experts gives; a mean on disk is not made again.

    Returns:
        Domain -> records.OWN_EXPERT, of the domains in the sum; and the merges.

    Raises:
        ClientError, AggregationError: too few clients are left.
    """
    with run.phase("train"):
        mean, record = read_mean(run.folder) or _mean_of_experts(run, backbone)
        sources = dict.fromkeys(sorted(record["clients"]), records.OWN_EXPERT)
        write_sources(run.folder, sources)
        for domain in run.members.in_role("train"):
            if domain not in sources:
                run.exclude(domain, "its expert is not in the sum")
        origin = Origin(dict.fromkeys(sources, ""), backbone.record, run.config.privacy.policy)
        candidates = candidates_of_mean(mean, record, origin, run.config.merge)
        for candidate in candidates:
            write_candidate(run.folder, candidate, backbone.name)
            logger.info("merged: %s", candidate.label)
    return sources, candidates


def _mean_of_experts(run: Run, backbone: Backbone) -> tuple[Adapter, dict[str, Any]]:
    """Return the mean of the experts with its record; both are written to disk."""
    # 1. Every client trains and keeps its expert.
    reports: dict[str, dict[str, Any]] = {}

    def receive(domain: str, content: RecordDict) -> None:
        reports[domain] = read_checked_report(run, domain, content)

    nodes = run.members.nodes_of(run.members.in_role("train"))
    logger.info("training: %s", join_names(list(nodes)))
    timeout_seconds = run.config.server.timeout_seconds
    ask(run, nodes, Question(records.TRAIN, timeout_seconds, limit_bytes=lambda _: REPORT_BYTES), receive)
    run.require_quorum(list(reports))
    # 2. The sum, in which every expert has equal weight.
    like = {domain: fresh_adapter(backbone, run.config.lora.of(domain), seed=0) for domain in sorted(reports)}
    num_values = num_summed("updates", next(iter(like.values())))
    summed = secure_mean(run, dict.fromkeys(like, 1.0), num_values, partial(note_reveal, run.folder, 0, reports))
    # 3. The mean as an adapter.
    rank = summed_rank({domain: like[domain] for domain in summed.clients})
    mean = adapter_of_mean("updates", summed.values, like[summed.clients[0]], rank)
    training = {domain: reports[domain] for domain in summed.clients}
    record = {**summed.record, "training": training}
    write_mean(run.folder, mean, record, backbone.name)
    return mean, record


def read_checked_report(run: Run, domain: str, content: RecordDict, number: int | None = None) -> dict[str, Any]:
    """Read the report of a training whose adapter stays at its client, and check its noise against the agreed one.

    Args:
        run: the run.
        domain: that trained.
        content: of its reply.
        number: of the round, in a federation of rounds.

    Raises:
        ClientError: the report differs from what was agreed.
    """
    report = records.read_report(content)
    num_users = run.members.descriptions[domain].num_users
    check_spent(domain, run.config, report.get("privacy"), num_users, number)
    return report


def secure_mean(
    run: Run,
    weights: Mapping[str, float],
    num_values: int,
    before_reveal: Callable[[Sequence[str]], None],
    number: int = 0,
    what: Summand = "adapter",
) -> SecureMean:
    """Return the weighted mean of what the clients have trained.

    A client that fails or is late at a step is excluded, as in every phase, and the sum continues without it while
    enough are left. Every call starts a session of its own, with fresh keys.

    Args:
        run: the run.
        weights: client -> weight, of the clients that have trained.
        num_values: of each client.
        before_reveal: called with the clients in the sum, before the message that takes the masks off.
        number: of the round; 0 outside of rounds.
        what: the sum is of.

    Raises:
        AggregationError: too few clients are left, or they weigh too differently.
    """
    started = time.monotonic()
    threshold, agreement = agreed_threshold(run.config, len(weights)), agreement_of(run.config, number, what)
    session = new_session(weights, num_values, largest_entry(run.config), threshold, agreement)
    everybody = frozenset(session.clients)
    small = _BYTES_OF_A_MESSAGE + _BYTES_PER_CLIENT * len(everybody)

    def ask_for(
        kind: str,
        clients: frozenset[str],
        request: Callable[[str], RecordDict],
        receive: Callable[[str, RecordDict], None],
        most: int = small,
        noise: str = "none",
    ) -> None:
        timeout_seconds = DESCRIBE_SECONDS
        question = Question(kind, timeout_seconds, request, lambda _: most, noise=noise)
        ask(run, run.members.nodes_of(sorted(clients)), question, receive)

    # 1. Every client advertises its keys.
    advertisements: dict[str, Advertisement] = {}

    def take_keys(client: str, content: RecordDict) -> None:
        advertisement = secure_records.read_advertisement(content)
        check_advertisement(client, advertisement)
        advertisements[client] = advertisement

    announced = secure_records.session_record(session)
    ask_for(secure_records.ADVERTISE, everybody, lambda _: announced, take_keys)
    session.check_survivors(frozenset(advertisements), everybody, "keys")

    # 2. Every client sends each other one sealed shares of its secrets.
    boxes: dict[str, dict[str, bytes]] = {}

    def take_boxes(client: str, content: RecordDict) -> None:
        sealed = secure_records.read_boxes(content)
        check_boxes(client, sealed, advertisements)
        boxes[client] = sealed

    keys = secure_records.advertisements_record(dict(sorted(advertisements.items())))
    ask_for(secure_records.SHARE, frozenset(advertisements), lambda _: keys, take_boxes)
    shared = frozenset(boxes)
    session.check_survivors(shared, frozenset(advertisements), "shares")

    # 3. Every client sends its masked values.
    total = np.zeros(num_values, np.uint32)
    in_sum: set[str] = set()

    def take_masked(client: str, content: RecordDict) -> None:
        nonlocal total
        total = add_values(session, client, total, secure_records.read_masked(content))
        in_sum.add(client)

    def relayed(client: str) -> RecordDict:
        return secure_records.boxes_record({peer: boxes[peer][client] for peer in sorted(shared - {client})})

    ask_for(
        secure_records.MASKED,
        shared,
        relayed,
        take_masked,
        _BYTES_OF_A_MESSAGE + 4 * num_values,
        own_noise(run.config.dp.mode),
    )
    survivors = frozenset(in_sum)
    session.check_survivors(survivors, shared, "masked values")

    # 4. The clients in the sum reveal what takes the masks off it.
    revealed: dict[str, Revealed] = {}

    def take_revealed(client: str, content: RecordDict) -> None:
        shares = secure_records.read_revealed(content)
        check_revealed(client, shares, survivors, shared)
        revealed[client] = shares

    before_reveal(sorted(survivors))
    asked = secure_records.survivors_record(sorted(survivors))
    ask_for(secure_records.UNMASK, survivors, lambda _: asked, take_revealed)
    values = weighted_mean(session, advertisements, shared, survivors, total, revealed)
    seconds = time.monotonic() - started
    logger.info("secure sum of %d clients, %d values each, %.1f s", len(survivors), num_values, seconds)
    largest = _largest_entry(session, values, survivors)
    record = {
        "clients": {client: session.coefficients[client] for client in sorted(survivors)},
        "dropped_out": sorted(everybody - survivors),
        "threshold": session.threshold,
        "num_values": num_values,
        "value_range": session.value_range,
        "largest": largest,
        "tolerance": session.tolerance / sum(session.coefficients[client] for client in sorted(survivors)),
        "bytes_up": 4 * num_values,
        "seconds": seconds,
    }
    return SecureMean(values, tuple(sorted(survivors)), record)


def _largest_entry(session: Session, values: Reals, survivors: frozenset[str]) -> float:
    """Return the largest |entry| of a mean; warn if a client's value at the end of the range could have made it."""
    largest = float(np.abs(values).max())
    parts = [session.coefficients[client] for client in sorted(survivors)]
    if largest >= 0.99 * session.value_range * min(parts) / sum(parts):
        logger.warning(
            "the largest entry of the mean is %.3g: clients may have cut values to ±%g, which only their own logs say. "
            "Ask them, and lower train.learning_rate in a new run",
            largest,
            session.value_range,
        )
    return largest
