"""The admission gate of a run: the checks of ``fedmerge.server.gate``, once; what it decided is final."""

import logging
from collections.abc import Mapping
from pathlib import Path

from fedmerge.config import ExperimentConfig
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.files import read_json, write_json
from fedmerge.runs import checkpoints
from fedmerge.server.gate import Vote, check_experts, leave_one_out_merges, votes_of
from sim.app.server.asking import Federation, require_quorum
from sim.app.server.evaluating import evaluate_models

logger = logging.getLogger("fedmerge.server")


def pass_gate(
    federation: Federation,
    config: ExperimentConfig,
    backbone: Backbone,
    catalogs: Mapping[str, Catalog],
    sources: Mapping[str, str],
    run_dir: Path,
) -> tuple[dict[str, str], dict[str, str]]:
    """Check every expert, write ``admission.json``, and exclude by name who fails, if the experiment says so.

    Args:
        federation: the clients.
        config: admission, evaluation, text and seed count.
        backbone: the frozen encoder.
        catalogs: of the probe.
        sources: domain -> hash of its expert.
        run_dir: of the run.

    Returns:
        The experts that are merged, domain -> hash; and why each that fails does, domain -> reason.

    Raises:
        ClientError: too few experts are left.
    """
    if config.admission.action is None:
        return dict(sources), {}
    federation.phase = "admission"
    record = read_json(run_dir / checkpoints.ADMISSION)
    if record is None:
        experts = checkpoints.KeptExperts(run_dir, sources)
        votes = _votes(federation, config, experts, run_dir) if config.admission.leave_one_out else {}
        record = check_experts(experts, config, backbone, catalogs, votes)
        write_json(run_dir / checkpoints.ADMISSION, record)
    failed: dict[str, str] = record["failed"]
    for domain, reason in failed.items():
        if config.admission.action == "flag":
            logger.warning("flagged, and merged all the same: %s: %s", domain, reason)
        elif domain not in federation.excluded:
            federation.exclude(domain, f"admission: {reason}")
    if not failed:
        logger.info("admission: all %d experts pass", len(sources))
    away = checkpoints.turned_away(run_dir)
    merged = {domain: sha256 for domain, sha256 in sources.items() if domain not in away}
    if away:
        require_quorum(federation, config, list(merged))
    return merged, failed


def _votes(
    federation: Federation, config: ExperimentConfig, experts: checkpoints.KeptExperts, run_dir: Path
) -> dict[str, dict[str, Vote]]:
    merges = leave_one_out_merges(experts)
    if not merges:
        return {}
    voters = [domain for domain in federation.of("train") if domain in experts]
    said = evaluate_models(federation, config, "admission", voters, merges, {}, run_dir)
    metric = config.evaluation.selection_metric
    return {
        domain: votes_of(sums["unmasked"], [other for other in experts if other != domain], metric)
        for domain, sums in said.items()
    }
