"""One round after another, of adapters or of the federated head: sample clients, ask them, aggregate, write the state.

A round that is on disk is not repeated, and no client whose reply is on disk is asked again.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from typing import Any

from flwr.app import RecordDict

from fedmerge.adapter import Adapter
from fedmerge.config import MIN_SUMMED
from fedmerge.encoder.lora import layout_of
from fedmerge.federated.rounds import GlobalState, aggregate, aggregate_mean, fresh_seed
from fedmerge.federated.rules import MergeFunction, rule_named
from fedmerge.federated.summed import num_summed
from fedmerge.merging.parameters import Value
from fedmerge.privacy.dp.agreement import check_spent
from fedmerge.privacy.secagg.agreement import Summand
from fedmerge.privacy.secagg.session import check_spread
from fedmerge.runs.round_checkpoints import (
    ROUNDS,
    read_members,
    read_replies,
    read_sample,
    read_state,
    write_members,
    write_reply,
    write_sample,
    write_state,
)
from fedmerge.runs.secure_sums import note_reveal
from fedmerge.seeding import generator
from fedmerge.server.reply_checks import adapter_bytes, check_adapter
from sim.app.messages import records
from sim.app.server.asking import ask
from sim.app.server.members import join_names
from sim.app.server.phases.secure_sum import read_checked_report, secure_mean
from sim.app.server.phases.training import REPORT_BYTES
from sim.app.server.questions import Question, own_noise
from sim.app.server.releases import trainings_released
from sim.app.server.run import Run

logger = logging.getLogger("fedmerge.server")
Members = list[str]


@dataclass(frozen=True)
class Training:
    """What is trained over rounds, and how its rounds differ from others.

    Attributes:
        title: for the log.
        what: kind of the adapters; secure sums of two kinds are never confused.
        message_type: of the question that a round asks.
        rule: name of the aggregation rule, or of the method that ``learned`` applies.
        parameters: of the rule.
        num_rounds: in all.
        seed: of fresh adapters, of samples and of random rules.
        backbone_name: written beside replies.
        base: adapter that clients apply to the backbone meanwhile, in all rounds; None for that of the state.
        learned: state -> a merge of the updates that learns from catalogs; None for a rule of the table.
        folder: of the checkpoints, in the run folder.
    """

    title: str
    what: Summand
    message_type: str
    rule: str
    parameters: Mapping[str, Value]
    num_rounds: int
    seed: int
    backbone_name: str
    base: Adapter | None = None
    learned: Callable[[GlobalState], MergeFunction] | None = field(default=None, repr=False)
    folder: str = ROUNDS


def train_over_rounds(
    run: Run,
    training: Training,
    members: Members,
    initial: Callable[[], GlobalState],
    with_late_clients: Callable[[Members], Members] = lambda members: members,
) -> tuple[Members, GlobalState]:
    """Run all rounds, or those that are left.

    Args:
        run: the run.
        training: what is trained.
        members: domains that take part, if none are on disk.
        initial: returns the state before the first round.
        with_late_clients: members -> members with clients that joined since; called before every round.

    Returns:
        The domains that take part, and the state after the last round.

    Raises:
        ClientError: too few clients are left.
        AggregationError: the rule refuses the updates, or a secure sum has too few clients.
    """
    # 1. Fix the members, and find the state on disk.
    if found := read_members(run.folder, training.folder):
        members = found
    else:
        write_members(run.folder, members, training.folder)
    state = read_state(run.folder, training.folder) or initial()
    if state.num_rounds:
        logger.info("%s: %d of %d rounds are on disk", training.title, state.num_rounds, training.num_rounds)
    # 2. One round after another; a round without any reply is repeated with other clients.
    while state.num_rounds < training.num_rounds:
        number = state.num_rounds + 1
        members = with_late_clients(members)
        sampled = _sampled_clients(run, training, members, number)
        after = _round(run, training, state, sampled)
        if after is None:
            logger.warning("round %d: none of the sampled clients is left; sampling others", number)
            continue
        state = after
        _log_round(training, state)
    return members, state


def _log_round(training: Training, state: GlobalState) -> None:
    if (report := state.report) is not None:
        logger.info(
            "%s, round %d of %d: rank %d, error %s, largest residual of a start %.3f%s",
            training.title,
            state.num_rounds,
            training.num_rounds,
            report.rank,
            "unknown" if report.error is None else f"{report.error:.3f}",
            max(report.start_residuals.values()),
            f", selected {', '.join(report.selected)}" if report.selected else "",
        )


def _sampled_clients(run: Run, training: Training, members: Members, number: int) -> list[str]:
    """Return the clients of a round: the sample on disk if any of its clients has answered or can, else a new one."""
    connected = [domain for domain in members if domain in run.members.in_role("train")]
    on_disk = read_sample(run.folder, number, training.folder)
    if {*on_disk} & ({*connected} | {*read_replies(run.folder, number, training.folder)}):
        return on_disk
    run.require_quorum(connected)
    sampled = _sample(connected, run.config.rounds.fraction, training.seed, number)
    write_sample(run.folder, number, sampled, training.folder)
    return sampled


def _round(run: Run, training: Training, state: GlobalState, sampled: list[str]) -> GlobalState | None:
    """Return the state after a round, or None if none of the sampled clients is left."""
    config, number = run.config, state.num_rounds + 1
    # 1. The request: where every client starts, and what it trains.
    trained = "A and B" if training.learned is not None else rule_named(training.rule).trained
    fresh = state.frozen or not state.num_rounds
    seed = records.NOT_FRESH
    if fresh or trained == "B":  # an untrained lora_A stays that of the first round
        seed = fresh_seed(training.seed, state.num_rounds if fresh else 0)
    task = records.RoundRequest(number, training.num_rounds, trained, seed)
    base = state.base if training.base is None else training.base

    def request(domain: str) -> RecordDict:
        return records.round_request_record(task, None if fresh else state.starts[domain], base)

    if config.privacy.hides_adapters:
        return _round_of_sums(run, training, state, sampled, request)
    # 2. Ask for the updates that are not on disk.
    on_disk = read_replies(run.folder, number, training.folder)
    replies = {domain: reply for domain, reply in on_disk.items() if domain in sampled}

    def limit_bytes(domain: str) -> int:
        return adapter_bytes(layout_of(state.starts[domain])) + REPORT_BYTES

    def admit(domain: str, content: RecordDict) -> None:
        start = state.starts[domain]
        adapter, report = records.read_expert(content, frozen=start if trained == "B" else None)
        check_adapter(domain, adapter, layout_of(start))
        check_spent(domain, config, report.get("privacy"), run.members.descriptions[domain].num_users, number)
        write_reply(run.folder, number, domain, adapter, report, training.backbone_name, training.folder)
        replies[domain] = (adapter, report)

    in_training = run.members.in_role("train")
    if missing := [domain for domain in sampled if domain in in_training and domain not in replies]:
        logger.info("round %d of %d: %s", number, training.num_rounds, join_names(sorted(missing)))
        question = Question(
            training.message_type,
            config.server.timeout_seconds,
            request,
            limit_bytes,
            noise=own_noise(config.dp.mode),
            released=trainings_released(run, number),
        )
        ask(run, run.members.nodes_of(missing), question, admit)
    run.require_quorum(list(replies) if config.rounds.fraction == 1 else run.members.in_role("train"))
    if not replies:
        return None
    # 3. Aggregate.
    adapters = {domain: adapter for domain, (adapter, _) in sorted(replies.items())}
    reports = {domain: report for domain, (_, report) in sorted(replies.items())}
    weights = _weights(run, list(adapters))
    rule = training.rule if training.learned is None else training.learned(state)
    started = time.monotonic()
    state = aggregate(rule, state, adapters, weights, seed=training.seed, **training.parameters)
    state = _with_base_bytes(state, training.base)
    write_state(run.folder, state, reports, time.monotonic() - started, None, training.folder)
    return state


def _round_of_sums(
    run: Run, training: Training, state: GlobalState, sampled: list[str], request: Callable[[str], RecordDict]
) -> GlobalState | None:
    """Return the state after a round of which the server sees only the weighted mean.

    A round that was killed starts over, with fresh keys.
    """
    number = state.num_rounds + 1
    reports: dict[str, dict[str, Any]] = {}

    def receive(domain: str, content: RecordDict) -> None:
        reports[domain] = read_checked_report(run, domain, content, number)

    in_training = run.members.in_role("train")
    nodes = run.members.nodes_of([domain for domain in sampled if domain in in_training])
    if len(nodes) >= MIN_SUMMED:  # fewer are refused below
        check_spread(_weights(run, list(nodes)), "before training")
    logger.info("round %d of %d: %s", number, training.num_rounds, join_names(sorted(nodes)))
    timeout_seconds = run.config.server.timeout_seconds
    ask(run, nodes, Question(training.message_type, timeout_seconds, request, lambda _: REPORT_BYTES), receive)
    run.require_quorum(list(reports) if run.config.rounds.fraction == 1 else run.members.in_role("train"))
    if not reports:
        return None
    started = time.monotonic()
    summed = rule_named(training.rule).summed or "updates"  # the configuration refuses a rule without sums
    weights = _weights(run, list(reports))
    num_values = num_summed(summed, next(iter(state.starts.values())))
    reveal = partial(note_reveal, run.folder, number, reports, what=training.what)
    mean = secure_mean(run, weights, num_values, reveal, number, training.what)
    weights = {domain: weights[domain] for domain in mean.clients}
    state = aggregate_mean(training.rule, state, mean.values, weights, seed=training.seed, **training.parameters)
    state = _with_base_bytes(state, training.base)
    trained = {domain: reports[domain] for domain in mean.clients}
    write_state(run.folder, state, trained, time.monotonic() - started, mean.record, training.folder)
    return state


def _with_base_bytes(state: GlobalState, base: Adapter | None) -> GlobalState:
    """Count the base that every request carries in the bytes that clients receive."""
    if base is None or state.report is None:
        return state
    bytes_down = {domain: count + base.size_bytes for domain, count in state.report.bytes_down.items()}
    return replace(state, report=replace(state.report, bytes_down=bytes_down))


def _weights(run: Run, domains: list[str]) -> dict[str, float]:
    """Return the weight of every client in the aggregate."""
    if run.config.rounds.weights == "equal":
        return dict.fromkeys(domains, 1.0)
    return {domain: float(run.members.descriptions[domain].num_users) for domain in domains}


def _sample(domains: list[str], fraction: float, seed: int, number: int) -> list[str]:
    """Sample the clients of a round."""
    count = max(1, ceil(fraction * len(domains)))
    chosen = generator(seed, "rounds", "clients", number).permutation(len(domains))[:count]
    return sorted(domains[index] for index in chosen)
