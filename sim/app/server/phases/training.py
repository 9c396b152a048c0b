"""Train the experts: each is admitted and written to disk as it arrives."""

import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import RecordDict

from fedmerge.adapter import is_zero
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import fresh_adapter, layout_of
from fedmerge.errors import ClientError
from fedmerge.escaping import one_line
from fedmerge.privacy.dp.agreement import check_spent
from fedmerge.privacy.transport import coding_of
from fedmerge.runs import checkpoints
from fedmerge.server.gate import probes
from fedmerge.server.reply_checks import adapter_bytes, check_adapter
from sim.app.messages import records
from sim.app.server.asking import ask
from sim.app.server.members import FEW_CLIENTS, LONGEST_NAME, join_names
from sim.app.server.questions import Question, own_noise
from sim.app.server.releases import trainings_released
from sim.app.server.run import Run

REPORT_BYTES = 2**20  # largest report of a training

logger = logging.getLogger("fedmerge.server")


def train_experts(run: Run, backbone: Backbone, catalogs: Mapping[str, Catalog]) -> dict[str, str]:
    """Return every training client's expert by hash, domain -> hash; the experts are on disk.

    An expert that is on disk is not asked for again, whether its client is connected or not. Once training has ended,
    the set of experts that are merged is final.

    Args:
        run: the run.
        backbone: the frozen encoder.
        catalogs: of the training domains; a domain without one cannot be merged if catalogs are needed.

    Raises:
        ClientError: too few experts, or an expert that was merged is missing and its client does not send it again.
    """
    with run.phase("train"):
        # 1. Find the experts on disk.
        ended = checkpoints.read_sources(run.folder)
        wanted = sorted(ended if ended is not None else _may_train(run, catalogs))
        sources = {domain: sha256 for domain in wanted if (sha256 := checkpoints.read_expert_hash(run.folder, domain))}
        if sources:
            logger.info("training: already on disk: %s", join_names(sorted(sources)))
        # 2. Ask for the others.
        in_training = run.members.in_role("train")
        missing = [domain for domain in wanted if domain in in_training and domain not in sources]
        if missing:
            logger.info("training: %s", join_names(missing))
            sources |= _ask_for_experts(run, backbone, missing)
        sources = dict(sorted(sources.items()))
        # 3. Fix the experts that are merged.
        if ended is None:
            run.require_quorum(list(sources))
            checkpoints.write_sources(run.folder, sources)
        elif sources != ended:
            damaged = [domain for domain in ended if sources.get(domain) != ended[domain]]
            raise ClientError(
                f"{run.folder}: the experts of {join_names(damaged)} were merged, but are missing or damaged on disk, "
                "and their clients did not send the same again. Restore them, or start a new run."
            )
        for domain in run.members.in_role("train"):
            if domain not in sources:
                run.exclude(domain, "no expert arrived before training ended")
    return sources


def _may_train(run: Run, catalogs: Mapping[str, Catalog]) -> set[str]:
    domains = {*run.config.domains.train} - {*run.members.excluded}
    if run.config.methods_from_catalogs or run.config.shares_similarity or probes(run.config):
        domains &= {*catalogs}
    return domains


def _ask_for_experts(run: Run, backbone: Backbone, domains: list[str]) -> dict[str, str]:
    config = run.config
    of_rank = {lora.rank: lora for lora in map(config.lora.of, domains)}
    fresh = {rank: fresh_adapter(backbone, lora, seed=0) for rank, lora in of_rank.items()}
    likes = {domain: fresh[config.lora.of(domain).rank] for domain in domains}
    layouts = {domain: layout_of(like) for domain, like in likes.items()}
    transport = config.privacy.transport
    limits = {domain: adapter_bytes(layout, transport) + REPORT_BYTES for domain, layout in layouts.items()}
    sources: dict[str, str] = {}

    def admit(domain: str, content: RecordDict) -> None:
        coding = coding_of(config.privacy, config.lora.of(domain), config.seed, backbone)
        adapter, report = records.read_expert(content, coding, likes[domain])
        check_adapter(domain, adapter, layouts[domain])
        report = {key: value for key, value in report.items() if key not in ("signals", "spread")}  # arrays, checked
        if config.sends_signals:
            report |= records.read_signals(content, layouts[domain], config.livar.spread)
        check_spent(domain, config, report.get("privacy"), run.members.descriptions[domain].num_users)
        log_expert(domain, report, few=len(domains) <= FEW_CLIENTS)
        if is_zero(adapter):
            logger.warning("%s: nothing was learned: its expert is zero, that is the untouched backbone", domain)
        # This must be last: nothing after it may raise.
        sources[domain] = checkpoints.write_expert(run.folder, domain, adapter, report, backbone.name)

    question = Question(
        records.TRAIN,
        config.server.timeout_seconds,
        limit_bytes=limits.__getitem__,
        noise=own_noise(config.dp.mode),
        released=trainings_released(run),
    )
    ask(run, run.members.nodes_of(domains), question, admit)
    return sources


def log_expert(domain: str, report: Mapping[str, Any], few: bool) -> None:
    """Log a client's report of its training; its texts are the client's own."""

    def shown(value: Any) -> str:
        return one_line(str(value), LONGEST_NAME)

    if sent := report.get("transport"):
        kind, residual = shown(sent.get("kind")), shown(sent.get("residual"))
        logger.info("%s: expert sent as %s, relative residual %s", domain, kind, residual)
    (logger.info if few else logger.debug)(
        "%s: expert received (%s steps, best at %s, stopped by %s, %.0f s%s)",
        domain,
        shown(report.get("steps")),
        shown(report.get("best_step", "(not reported)")),
        shown(report.get("stopped_by", "(not reported)")),
        float(report.get("seconds", 0)),
        ", from the client's cache" if report.get("cached") else "",
    )
