"""The admission gate of a run: the checks of ``fedmerge.server.gate``, made once; their outcome is final."""

import logging
from collections.abc import Mapping

from fedmerge.adapter import Adapter
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.evaluation.ranks import SELECTION_METRIC
from fedmerge.files import read_sealed, seal, write_json
from fedmerge.runs import checkpoints
from fedmerge.runs.folder import ADMISSION
from fedmerge.server.gate import Vote, check_experts, leave_one_out_merges, votes_of
from sim.app.server.phases.evaluating import evaluate_models
from sim.app.server.run import Run

logger = logging.getLogger("fedmerge.server")


def pass_gate(
    run: Run, backbone: Backbone, catalogs: Mapping[str, Catalog], sources: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Check every expert, write ``admission.json``, and exclude the domains that fail if the experiment says so.

    Args:
        run: the run.
        backbone: the frozen encoder.
        catalogs: for the probe.
        sources: domain -> hash of its expert.

    Returns:
        The experts that are merged, domain -> hash; and the experts that fail, domain -> reason.

    Raises:
        ClientError: too few experts are left.
    """
    admission = run.config.admission
    if admission.action is None:
        return dict(sources), {}
    with run.phase("admission"):
        record = read_sealed(run.folder / ADMISSION)
        if record is None:
            experts = checkpoints.stored_experts(run.folder, sources)
            votes = _votes(run, experts) if admission.leave_one_out else {}
            record = check_experts(experts, admission, run.config.text, run.config.seed, backbone, catalogs, votes)
            write_json(run.folder / ADMISSION, seal(record))
        failed: dict[str, str] = record["failed"]
        for domain, reason in failed.items():
            if admission.action == "flag":
                logger.warning("flagged, but still merged: %s: %s", domain, reason)
            elif domain not in run.members.excluded:
                run.exclude(domain, f"admission: {reason}")
        nothing_learned: dict[str, str] = record.get("nothing_learned", {})
        for domain, reason in nothing_learned.items():
            logger.warning("flagged, but still merged: %s: %s", domain, reason)
        if not failed:
            zero = f", {len(nothing_learned)} of them without having learned anything" if nothing_learned else ""
            logger.info("admission: all %d experts pass%s", len(sources), zero)
        away = checkpoints.read_excluded_experts(run.folder)
        merged = {domain: sha256 for domain, sha256 in sources.items() if domain not in away}
        if away:
            run.require_quorum(list(merged))
    return merged, failed


def _votes(run: Run, experts: Mapping[str, Adapter]) -> dict[str, dict[str, Vote]]:
    """Return voter -> domain -> its vote, from evaluations of the merges without each domain."""
    merges = leave_one_out_merges(experts)
    if not merges:
        return {}
    voters = [domain for domain in run.members.in_role("train") if domain in experts]
    sums = evaluate_models(run, "admission", voters, merges, {})
    return {
        voter: votes_of(of_voter["unmasked"], [domain for domain in experts if domain != voter], SELECTION_METRIC)
        for voter, of_voter in sums.items()
    }
