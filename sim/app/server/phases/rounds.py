"""Training over rounds: clients train, the server aggregates by a rule of :mod:`fedmerge.federated`."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from flwr.app import RecordDict

from fedmerge.adapter import Adapter
from fedmerge.config import LEARNED_METHODS, MIN_SUMMED, ExperimentConfig, Lora
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import applied, fresh_adapter, layout_of
from fedmerge.federated.rounds import GlobalState, aggregate, aggregate_mean, fresh_seed, initial_state
from fedmerge.federated.rules import MergeFunction, rule_named
from fedmerge.federated.summed import num_summed
from fedmerge.merging.candidate import Candidate, Origin
from fedmerge.merging.parameters import parse_parameters
from fedmerge.privacy.dp.agreement import check_spent
from fedmerge.privacy.secagg.session import check_spread
from fedmerge.runs.checkpoints import write_candidate
from fedmerge.runs.round_checkpoints import (
    read_members,
    read_replies,
    read_sample,
    read_state,
    round_records,
    write_members,
    write_reply,
    write_sample,
    write_state,
)
from fedmerge.runs.secure_sums import note_reveal
from fedmerge.seeding import generator
from fedmerge.server.candidates import candidate_of_rounds, learn_from_catalogs, merge_candidates, recipe_of
from fedmerge.server.reply_checks import adapter_bytes, check_adapter
from sim.app.messages import records
from sim.app.server.asking import ask
from sim.app.server.members import join_names
from sim.app.server.phases.joining import greet
from sim.app.server.phases.secure_sum import read_checked_report, secure_mean
from sim.app.server.phases.training import REPORT_BYTES
from sim.app.server.questions import Question, own_noise
from sim.app.server.releases import trainings_released
from sim.app.server.run import Run

logger = logging.getLogger("fedmerge.server")


def run_rounds(run: Run, backbone: Backbone, catalogs: Mapping[str, Catalog]) -> tuple[list[str], Candidate]:
    """Run all rounds, or those that are left.

    Args:
        run: the run.
        backbone: the frozen encoder.
        catalogs: of the training domains, if the rule learns from them.

    Returns:
        The domains that take part, and the global adapter after the last round.

    Raises:
        ClientError: too few clients are left.
        AggregationError: the rule refuses the updates.
    """
    rounds = run.config.rounds
    name = str(rounds.rule)
    with run.phase("train"):
        # 1. Fix the members, and find the state on disk.
        if not (members := read_members(run.folder)):
            members = run.members.in_role("train")
            write_members(run.folder, members)
        state = read_state(run.folder) or initial_state(
            _fresh_adapters(backbone, run.config.lora, run.config.seed, run.config.domains.train)
        )
        if state.num_rounds:
            logger.info("%s: %d of %d rounds are on disk", name, state.num_rounds, rounds.number)
        # 2. One round after another; a round without any reply is repeated with other clients.
        while state.num_rounds < rounds.number:
            number = state.num_rounds + 1
            members = _with_late_clients(run, backbone, members)
            sampled = _sampled_clients(run, members, number)
            after = _round(run, backbone, catalogs, state, sampled)
            if after is None:
                logger.warning("round %d: none of the sampled clients is left; sampling others", number)
                continue
            state = after
            _log_round(name, rounds.number, state)
        # 3. The last state is the merge.
        origin = Origin(dict.fromkeys(members, ""), backbone.record, run.config.privacy.policy)
        aggregations = [record["aggregation"] for record in round_records(run.folder)]
        candidate = candidate_of_rounds(state.adapter, rounds, aggregations, origin)
        write_candidate(run.folder, candidate, backbone.name)
    return members, candidate


def _log_round(name: str, num_rounds: int, state: GlobalState) -> None:
    if (report := state.report) is not None:
        logger.info(
            "%s, round %d of %d: rank %d, error %s, largest residual of a start %.3f%s",
            name,
            state.num_rounds,
            num_rounds,
            report.rank,
            "unknown" if report.error is None else f"{report.error:.3f}",
            max(report.start_residuals.values()),
            f", selected {', '.join(report.selected)}" if report.selected else "",
        )


def _with_late_clients(run: Run, backbone: Backbone, members: list[str]) -> list[str]:
    """Return the members and the clients that joined since.

    A rule that learns from catalogs takes no new members, since the catalogs are already collected.
    """
    joined = greet(run, backbone)
    if run.config.rounds.rule in LEARNED_METHODS:
        if joined:
            logger.info("joined late; evaluated as unseen: %s", join_names(joined))
        return members
    if new := sorted({*run.members.in_role("train")} - {*members}):
        logger.info("joined late; take part from this round on: %s", join_names(new))
        write_members(run.folder, members := sorted([*members, *new]))
        run.members.write()
    return members


def _sampled_clients(run: Run, members: list[str], number: int) -> list[str]:
    """Return the clients of a round: the sample on disk if any of its clients has answered or can, else a new one."""
    connected = [domain for domain in members if domain in run.members.in_role("train")]
    on_disk = read_sample(run.folder, number)
    if {*on_disk} & ({*connected} | {*read_replies(run.folder, number)}):
        return on_disk
    run.require_quorum(connected)
    sampled = _sample(connected, run.config.rounds.fraction, run.config.seed, number)
    write_sample(run.folder, number, sampled)
    return sampled


def _round(
    run: Run, backbone: Backbone, catalogs: Mapping[str, Catalog], state: GlobalState, sampled: list[str]
) -> GlobalState | None:
    """Return the state after a round, or None if none of the sampled clients is left."""
    config, rounds, number = run.config, run.config.rounds, state.num_rounds + 1
    name = str(rounds.rule)
    # 1. The request: where every client starts, and what it trains.
    trained = "A and B" if name in LEARNED_METHODS else rule_named(name).trained
    fresh = state.frozen or not state.num_rounds
    seed = records.NOT_FRESH
    if fresh or trained == "B":  # an untrained lora_A stays that of the first round
        seed = fresh_seed(config.seed, state.num_rounds if fresh else 0)
    task = records.RoundRequest(number, rounds.number, trained, seed)

    def request(domain: str) -> RecordDict:
        return records.round_request_record(task, None if fresh else state.starts[domain], state.base)

    if config.privacy.hides_adapters:
        return _round_of_sums(run, state, sampled, request)
    # 2. Ask for the updates that are not on disk.
    replies = {domain: reply for domain, reply in read_replies(run.folder, number).items() if domain in sampled}

    def limit_bytes(domain: str) -> int:
        return adapter_bytes(layout_of(state.starts[domain])) + REPORT_BYTES

    def admit(domain: str, content: RecordDict) -> None:
        start = state.starts[domain]
        adapter, report = records.read_expert(content, frozen=start if trained == "B" else None)
        check_adapter(domain, adapter, layout_of(start))
        check_spent(domain, config, report.get("privacy"), run.members.descriptions[domain].num_users, number)
        write_reply(run.folder, number, domain, adapter, report, backbone.name)
        replies[domain] = (adapter, report)

    in_training = run.members.in_role("train")
    if missing := [domain for domain in sampled if domain in in_training and domain not in replies]:
        logger.info("round %d of %d: %s", number, rounds.number, join_names(sorted(missing)))
        question = Question(
            records.TRAIN,
            config.server.timeout_seconds,
            request,
            limit_bytes,
            noise=own_noise(config.dp.mode),
            released=trainings_released(run, number),
        )
        ask(run, run.members.nodes_of(missing), question, admit)
    run.require_quorum(list(replies) if rounds.fraction == 1 else run.members.in_role("train"))
    if not replies:
        return None
    # 3. Aggregate.
    adapters = {domain: adapter for domain, (adapter, _) in sorted(replies.items())}
    reports = {domain: report for domain, (_, report) in sorted(replies.items())}
    weights = _weights(run, list(adapters))
    rule = _learned(config, backbone, catalogs, state) if name in LEARNED_METHODS else name
    started = time.monotonic()
    state = aggregate(rule, state, adapters, weights, seed=config.seed, **parse_parameters(rounds.parameters))
    write_state(run.folder, state, reports, time.monotonic() - started)
    return state


def _round_of_sums(
    run: Run, state: GlobalState, sampled: list[str], request: Callable[[str], RecordDict]
) -> GlobalState | None:
    """Return the state after a round of which the server sees only the weighted mean.

    A round that was killed starts over, with fresh keys.
    """
    rounds, number = run.config.rounds, state.num_rounds + 1
    name = str(rounds.rule)
    reports: dict[str, dict[str, Any]] = {}

    def receive(domain: str, content: RecordDict) -> None:
        reports[domain] = read_checked_report(run, domain, content, number)

    in_training = run.members.in_role("train")
    nodes = run.members.nodes_of([domain for domain in sampled if domain in in_training])
    if len(nodes) >= MIN_SUMMED:  # fewer are refused below
        check_spread(_weights(run, list(nodes)), "before training")
    logger.info("round %d of %d: %s", number, rounds.number, join_names(sorted(nodes)))
    timeout_seconds = run.config.server.timeout_seconds
    ask(run, nodes, Question(records.TRAIN, timeout_seconds, request, lambda _: REPORT_BYTES), receive)
    run.require_quorum(list(reports) if rounds.fraction == 1 else run.members.in_role("train"))
    if not reports:
        return None
    started = time.monotonic()
    summed = rule_named(name).summed or "updates"  # the configuration refuses a rule without sums
    weights = _weights(run, list(reports))
    num_values = num_summed(summed, next(iter(state.starts.values())))
    mean = secure_mean(run, weights, num_values, partial(note_reveal, run.folder, number, reports), number)
    weights = {domain: weights[domain] for domain in mean.clients}
    parameters = parse_parameters(rounds.parameters)
    state = aggregate_mean(name, state, mean.values, weights, seed=run.config.seed, **parameters)
    trained = {domain: reports[domain] for domain in mean.clients}
    write_state(run.folder, state, trained, time.monotonic() - started, mean.record)
    return state


def _weights(run: Run, domains: list[str]) -> dict[str, float]:
    """Return the weight of every client in the aggregate."""
    if run.config.rounds.weights == "equal":
        return dict.fromkeys(domains, 1.0)
    return {domain: float(run.members.descriptions[domain].num_users) for domain in domains}


def _fresh_adapters(backbone: Backbone, lora: Lora, seed: int, domains: Sequence[str]) -> dict[str, Adapter]:
    """Return what every domain starts from; domains of equal rank share it."""
    settings = {domain: lora.of(domain) for domain in domains}
    by_rank = {of_domain.rank: of_domain for of_domain in settings.values()}
    adapters = {rank: fresh_adapter(backbone, of_rank, fresh_seed(seed, 0)) for rank, of_rank in by_rank.items()}
    return {domain: adapters[of_domain.rank] for domain, of_domain in settings.items()}


def _sample(domains: list[str], fraction: float, seed: int, number: int) -> list[str]:
    """Sample the clients of a round."""
    count = max(1, math.ceil(fraction * len(domains)))
    chosen = generator(seed, "rounds", "clients", number).permutation(len(domains))[:count]
    return sorted(domains[index] for index in chosen)


def _learned(
    config: ExperimentConfig, backbone: Backbone, catalogs: Mapping[str, Catalog], state: GlobalState
) -> MergeFunction:
    """Return a merge by the last variant of the rule, which learns coefficients of the updates on the global adapter.

    The global adapter is applied to the backbone for the length of the learning.
    """

    method, recipe = str(config.rounds.rule), recipe_of(config)
    last = recipe.variants_of(method)[-1]

    def learned(updates: Mapping[str, Adapter]) -> Adapter:
        wanted = {domain: catalogs[domain] for domain in updates}
        learn = learn_from_catalogs(backbone, updates, wanted, config.text, logger.info)
        origin = Origin(dict.fromkeys(updates, ""), backbone.record, config.privacy.policy)
        with applied(backbone, state.adapter):
            (made,) = merge_candidates(updates, [last], origin, recipe, logger.info, learn=learn)
        return made.adapter

    learned.__name__ = method
    return learned
