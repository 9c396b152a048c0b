"""A federation of rounds: clients train on, the server aggregates, by a rule of ``fedmerge.federated``."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import LEARNED_METHODS, ExperimentConfig
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import applied, fresh_adapter
from fedmerge.errors import ConfigError
from fedmerge.federated.rounds import GlobalState, aggregate, aggregate_mean, fresh_seed, initial_state
from fedmerge.federated.rules import MergeFunction, rule_named, rule_of, rule_parameters
from fedmerge.federated.summed import num_summed
from fedmerge.merging.candidate import Candidate
from fedmerge.merging.parameters import Value, parse_parameters
from fedmerge.privacy.dp.agreement import check_spent
from fedmerge.runs.checkpoints import keep_merge
from fedmerge.runs.round_checkpoints import (
    keep_draw,
    keep_members,
    keep_reply,
    keep_state,
    kept_draw,
    kept_replies,
    kept_state,
    members_of,
    round_records,
)
from fedmerge.runs.secure_sums import note_reveal
from fedmerge.seeding import generator
from fedmerge.server.admission import adapter_bytes, check_adapter, layout_of
from fedmerge.server.candidates import merge_candidates
from sim.app.messages import records
from sim.app.server.asking import Federation, Question, ask, listed, own_noise, require_quorum
from sim.app.server.joining import greet
from sim.app.server.releases import trainings_released
from sim.app.server.secure_sum import REPORT_BYTES, read_checked_report, secure_mean

logger = logging.getLogger("fedmerge.server")


def run_rounds(
    federation: Federation,
    config: ExperimentConfig,
    backbone: Backbone,
    catalogs: Mapping[str, Catalog],
    run_dir: Path,
) -> tuple[list[str], Candidate]:
    """All rounds, or those that are left of them.

    Args:
        federation: the clients.
        config: rounds, lora and train count.
        backbone: the frozen encoder.
        catalogs: of the training domains, where the rule of a round is learned.
        run_dir: where every reply and every state is kept.

    Returns:
        Who takes part, and the global adapter after the last round.

    Raises:
        ClientError: too few clients are left.
        AggregationError: what the rule refuses.
    """
    rounds = config.rounds
    name = str(rounds.rule)
    parameters = parse_parameters(rounds.parameters)
    federation.phase = "train"
    if not (members := members_of(run_dir)):
        members = federation.of("train")
        keep_members(run_dir, members)
    state = kept_state(run_dir) or initial_state(_fresh_adapters(backbone, config, config.domains.train))
    if state.num_rounds:
        logger.info("%s: %d of %d rounds are on disk", name, state.num_rounds, rounds.number)
    while state.num_rounds < rounds.number:
        members = _joined(federation, config, backbone, run_dir, members)
        drawn = _drawn_now(federation, config, run_dir, members, state.num_rounds + 1)
        made = _round(federation, config, backbone, catalogs, run_dir, state, drawn, parameters)
        if made is None:
            logger.warning("round %d: of all who were drawn nobody is left; others are drawn", state.num_rounds + 1)
            continue
        state, report = made, made.report
        if report is not None:
            logger.info(
                "%s, round %d of %d: rank %d, error %s, largest residual of a start %.3f%s",
                name,
                state.num_rounds,
                rounds.number,
                report.rank,
                "unknown" if report.error is None else f"{report.error:.3f}",
                max(report.start_residuals.values()),
                f", took {', '.join(report.selected)}" if report.selected else "",
            )
    candidate = _candidate(config, backbone, state, members, run_dir)
    keep_merge(run_dir, candidate, backbone.name)
    return members, candidate


def check_rounds(config: ExperimentConfig) -> None:
    """Refuse parameters that the rule does not have, and a trimmed mean of too few, before anything starts.

    Raises:
        ConfigError: which.
    """
    rule = config.rounds.rule
    if rule is not None:
        row = rule_of(lambda updates: next(iter(updates.values()))) if rule in LEARNED_METHODS else rule_named(rule)
        parameters = rule_parameters(rule, row, parse_parameters(config.rounds.parameters))
        clients = max(1, math.ceil(config.rounds.fraction * len(config.domains.train)))
        if rule == "trimmed-mean" and math.floor(Fraction(str(parameters["trim"])) * clients) < 1:
            raise ConfigError(
                f"rounds.rule = 'trimmed-mean' with trim = {parameters['trim']} and {clients} clients in a round cuts "
                "off nobody; raise trim in rounds.parameters to one over the clients, or name more domains"
            )


def _joined(
    federation: Federation,
    config: ExperimentConfig,
    backbone: Backbone,
    run_dir: Path,
    members: list[str],
) -> list[str]:
    """The members and who has come since, who is no member where the rule learns from catalogs: they were asked for."""
    came = greet(federation, config, backbone)
    federation.phase = "train"
    if config.rounds.rule in LEARNED_METHODS:
        if came:
            logger.info("came late and are tested as unseen: %s", listed(came))
        return members
    if new := sorted({*federation.of("train")} - {*members}):
        logger.info("came late and take part from now on: %s", listed(new))
        keep_members(run_dir, members := sorted([*members, *new]))
        federation.write_clients()
    return members


def _drawn_now(
    federation: Federation, config: ExperimentConfig, run_dir: Path, members: list[str], number: int
) -> list[str]:
    """Who takes part in a round: as was drawn when it began, while one of them can still answer or has answered."""
    there = [domain for domain in members if domain in federation.of("train")]
    begun = kept_draw(run_dir, number)
    if {*begun} & ({*there} | {*kept_replies(run_dir, number)}):
        return begun
    require_quorum(federation, config, there)
    drawn = _drawn(there, config.rounds.fraction, config.seed, number)
    keep_draw(run_dir, number, drawn)
    return drawn


def _round(
    federation: Federation,
    config: ExperimentConfig,
    backbone: Backbone,
    catalogs: Mapping[str, Catalog],
    run_dir: Path,
    state: GlobalState,
    drawn: list[str],
    parameters: Mapping[str, Value],
) -> GlobalState | None:
    """The state after a round; None where nobody is left of those who were drawn."""
    rounds, number = config.rounds, state.num_rounds + 1
    name = str(rounds.rule)
    trained = "A and B" if name in LEARNED_METHODS else rule_named(name).trained
    fresh = state.frozen or not state.num_rounds
    seed = records.NOT_FRESH
    if fresh or trained == "B":  # an A that nobody trains stays the one of the first round
        seed = fresh_seed(config.seed, state.num_rounds if fresh else 0)
    task = records.RoundRequest(number, rounds.number, trained, seed)

    def request(domain: str) -> RecordDict:
        return records.round_request_record(task, None if fresh else state.starts[domain], state.base)

    if config.privacy.policy == "aggregate-only":
        return _round_of_sums(federation, config, run_dir, state, parameters, drawn, request)
    replies = {domain: kept for domain, kept in kept_replies(run_dir, number).items() if domain in drawn}

    def limit_bytes(domain: str) -> int:
        return adapter_bytes(layout_of(state.starts[domain])) + REPORT_BYTES

    def admit(domain: str, content: RecordDict) -> None:
        start = state.starts[domain]
        adapter, report = records.read_expert(content, frozen=start if trained == "B" else None)
        check_adapter(domain, adapter, layout_of(start))
        check_spent(domain, config, report.get("privacy"), federation.descriptions[domain].num_users, number)
        keep_reply(run_dir, number, domain, adapter, report, backbone.name)
        replies[domain] = (adapter, report)

    nodes = {domain: federation.nodes[domain] for domain in drawn if domain in federation.of("train")}
    nodes = {domain: node for domain, node in nodes.items() if domain not in replies}
    if nodes:
        logger.info("round %d of %d: %s", number, rounds.number, listed(sorted(nodes)))
        timeout_seconds, noise = config.server.timeout_seconds, own_noise(config)
        released = trainings_released(federation, config, number)
        question = Question(records.TRAIN, timeout_seconds, request, limit_bytes, noise=noise, released=released)
        ask(federation, nodes, question, admit)
    require_quorum(federation, config, list(replies) if rounds.fraction == 1 else federation.of("train"))
    if not replies:
        return None
    adapters = {domain: adapter for domain, (adapter, _) in sorted(replies.items())}
    reports = {domain: report for domain, (_, report) in sorted(replies.items())}
    weights = _weights(federation, config, list(adapters))
    rule = _learned(config, backbone, catalogs, state) if name in LEARNED_METHODS else name
    started = time.monotonic()
    state = aggregate(rule, state, adapters, weights, seed=config.seed, **parameters)
    keep_state(run_dir, state, reports, time.monotonic() - started)
    return state


def _round_of_sums(
    federation: Federation,
    config: ExperimentConfig,
    run_dir: Path,
    state: GlobalState,
    parameters: Mapping[str, Value],
    drawn: list[str],
    request: Callable[[str], RecordDict],
) -> GlobalState | None:
    """A round of which the server sees the weighted mean alone; one that was killed begins again, with fresh keys."""
    rounds, number = config.rounds, state.num_rounds + 1
    name = str(rounds.rule)
    reports: dict[str, dict[str, Any]] = {}

    def receive(domain: str, content: RecordDict) -> None:
        reports[domain] = read_checked_report(federation, config, domain, content, number)

    nodes = {domain: federation.nodes[domain] for domain in drawn if domain in federation.of("train")}
    logger.info("round %d of %d: %s", number, rounds.number, listed(sorted(nodes)))
    limit = config.server.timeout_seconds
    ask(federation, nodes, Question(records.TRAIN, limit, request, lambda _: REPORT_BYTES), receive)
    require_quorum(federation, config, list(reports) if rounds.fraction == 1 else federation.of("train"))
    if not reports:
        return None
    started = time.monotonic()
    summed = rule_named(name).summed or "updates"  # of a rule without, the configuration is refused
    weights = _weights(federation, config, list(reports))
    num_values = num_summed(summed, next(iter(state.starts.values())))
    note = partial(note_reveal, run_dir, number, reports)
    mean = secure_mean(federation, config, weights, num_values, note)
    weights = {domain: weights[domain] for domain in mean.clients}
    state = aggregate_mean(name, state, mean.values, weights, seed=config.seed, **parameters)
    trained = {domain: reports[domain] for domain in mean.clients}
    keep_state(run_dir, state, trained, time.monotonic() - started, mean.record)
    return state


def _weights(federation: Federation, config: ExperimentConfig, domains: list[str]) -> dict[str, float]:
    """How much every client counts."""
    if config.rounds.weights == "equal":
        return dict.fromkeys(domains, 1.0)
    return {domain: float(federation.descriptions[domain].num_users) for domain in domains}


def _fresh_adapters(backbone: Backbone, config: ExperimentConfig, domains: Sequence[str]) -> dict[str, Adapter]:
    """What every domain starts from; domains of one rank share it."""
    seed = fresh_seed(config.seed, 0)
    layouts = {domain: config.lora.of(domain) for domain in domains}
    by_rank = {lora.rank: lora for lora in layouts.values()}
    made = {rank: fresh_adapter(backbone, lora, seed) for rank, lora in by_rank.items()}
    return {domain: made[lora.rank] for domain, lora in layouts.items()}


def _drawn(domains: list[str], fraction: float, seed: int, number: int) -> list[str]:
    """Who takes part in a round."""
    count = max(1, math.ceil(fraction * len(domains)))
    chosen = generator(seed, "rounds", "clients", number).permutation(len(domains))[:count]
    return sorted(domains[index] for index in chosen)


def _learned(
    config: ExperimentConfig, backbone: Backbone, catalogs: Mapping[str, Catalog], state: GlobalState
) -> MergeFunction:
    """Coefficients of the updates, learned on top of the global adapter: it is folded into the backbone meanwhile."""

    def learned(updates: Mapping[str, Adapter]) -> Adapter:
        methods = config.merge.model_copy(update={"methods": (config.rounds.rule,)})
        wanted = {domain: catalogs[domain] for domain in updates}
        with applied(backbone, state.adapter):
            made = merge_candidates(
                backbone, updates, wanted, config.model_copy(update={"merge": methods}), logger.info
            )
        return made[-1].adapter

    learned.__name__ = str(config.rounds.rule)
    return learned


def _candidate(
    config: ExperimentConfig, backbone: Backbone, state: GlobalState, members: list[str], run_dir: Path
) -> Candidate:
    """The global adapter as a merge among merges."""
    rule = str(config.rounds.rule)
    label = f"{rule} {config.rounds.number} round{'s' * (config.rounds.number > 1)}"
    provenance: dict[str, Any] = {
        "label": label,
        "method": rule,
        "domains": dict.fromkeys(members, ""),
        "rank": max(module.rank for module in state.adapter.modules.values()),
        "excluded": {},
        "policy": config.privacy.policy,
        "backbone": {"name": backbone.name, "sha256": backbone.sha256},
        "sha256": adapter_sha256(state.adapter),
        "parameters": config.rounds.model_dump(mode="json"),
        "rounds": [record["aggregation"] for record in round_records(run_dir)],
    }
    return Candidate(label, rule, state.adapter, provenance)
