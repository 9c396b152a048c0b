"""Models on the clients' own users: asked for, checked, kept as they come."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr.app import RecordDict

from fedmerge.adapter import Adapter
from fedmerge.config import ExperimentConfig, Split
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import BACKBONE, EXPERT
from fedmerge.runs import checkpoints
from fedmerge.server.admission import check_sums, sums_bytes
from sim.app.messages import records
from sim.app.server.asking import Federation, Question, ask, listed

logger = logging.getLogger("fedmerge.server")


def evaluate_models(
    federation: Federation,
    config: ExperimentConfig,
    stage: checkpoints.Stage,
    domains: Sequence[str],
    adapters: Mapping[str, Adapter],
    sources: Mapping[str, str],
    run_dir: Path,
) -> dict[str, checkpoints.Sums]:
    """All models on the users of some domains, on test with the reference rows; what is on disk is not asked again.

    Args:
        federation: the clients.
        config: evaluation and privacy count.
        stage: says the split, and where the sums are kept.
        domains: who is asked, of those that are in.
        adapters: label -> what is evaluated.
        sources: domain -> hash of its expert, which is evaluated there, too.
        run_dir: of the run.

    Returns:
        Domain -> sums, sorted.
    """
    test = stage == "test"
    split: Split = "test" if test else "valid"
    federation.phase = checkpoints.SUMS[stage]
    labels = list(adapters)
    models = records.model_records(adapters)

    def asked_models(domain: str) -> list[str]:
        return [*([BACKBONE] if test else []), *([EXPERT] if domain in sources else []), *labels]

    kept = checkpoints.kept_sums(run_dir, stage)
    results = {
        domain: sums for domain, sums in kept.items() if set(asked_models(domain)) <= set(sums["unmasked"].methods)
    }

    def request(domain: str) -> RecordDict:
        return records.evaluation_request_record(
            records.EvaluationRequest(split, test, sources.get(domain, ""), test), models
        )

    def receive(domain: str, content: RecordDict) -> None:
        sums = records.read_metric_sums(content)
        num_users = (config.privacy.min_users, federation.descriptions[domain].num_users)
        check_sums(domain, sums, asked_models(domain), test, num_users)
        checkpoints.keep_sums(run_dir, stage, domain, sums)
        results[domain] = sums

    nodes = {
        domain: federation.nodes[domain] for domain in domains if domain in federation.nodes.keys() - results.keys()
    }
    if results:
        logger.info("evaluated on %s already: %s", split, listed(list(results)))
    if nodes:
        logger.info("evaluating on %s: %s", split, ", ".join(labels))
    most = sums_bytes(len(labels) + 2, len(METRICS))
    timeout_seconds = config.server.timeout_seconds
    ask(federation, nodes, Question(records.EVALUATE, timeout_seconds, request, lambda _: most, split), receive)
    return dict(sorted(results.items()))
