"""Evaluate models on the clients' own users; each client's sums are checked and written as they arrive."""

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from flwr.app import RecordDict

from fedmerge.adapter import Adapter
from fedmerge.config import Split
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import BACKBONE, EXPERT, FEDERATED_HEAD, LAST_ITEM, PERSONAL
from fedmerge.mergerec.cohort import cohort_of
from fedmerge.runs import checkpoints
from fedmerge.server.reply_checks import check_sums, sums_bytes
from sim.app.messages import records
from sim.app.server.asking import ask
from sim.app.server.members import join_names
from sim.app.server.phases.heads.local import NO_HEADS, Heads
from sim.app.server.questions import Question
from sim.app.server.run import Run

NO_OWN: Mapping[str, Mapping[str, Adapter]] = MappingProxyType({})

logger = logging.getLogger("fedmerge.server")


def evaluate_models(
    run: Run,
    stage: checkpoints.Stage,
    domains: Sequence[str],
    adapters: Mapping[str, Adapter],
    sources: Mapping[str, str],
    heads: Heads = NO_HEADS,
    own: Mapping[str, Mapping[str, Adapter]] = NO_OWN,
) -> dict[str, checkpoints.Sums]:
    """Evaluate models on the users of some domains, on test with the reference rows.

    Sums that are on disk are not asked for again.

    Args:
        run: the run.
        stage: decides the split and the folder of the sums.
        domains: that are asked, as far as they still take part.
        adapters: label -> merge.
        sources: domain -> hash of its expert, which is evaluated there as well.
        heads: the clients' own and the federated head, which are evaluated there as well.
        own: domain -> label -> merge of this domain alone.

    Returns:
        Domain -> sums, sorted.
    """
    test = stage == "test"
    split: Split = "test" if test else "valid"
    labels = list(adapters)

    cohort = cohort_of(sources) if sources and run.config.personal.directions is not None else ""

    def personal_of(domain: str) -> list[str]:
        return [PERSONAL] if cohort and domain in sources else []

    def asked_models(domain: str) -> list[str]:
        reference = [*([BACKBONE] if test else []), *([EXPERT] if domain in sources else [])]
        to_beat = [] if heads.federated is None else [LAST_ITEM]  # by that head, to be served
        return [*reference, *personal_of(domain), *own.get(domain, ()), *labels, *heads.rows(domain), *to_beat]

    on_disk = checkpoints.read_sums(run.folder, stage)
    results = {
        domain: sums for domain, sums in on_disk.items() if set(asked_models(domain)) <= set(sums["unmasked"].methods)
    }
    if results:
        logger.info("already evaluated on %s: %s", split, join_names(list(results)))
    nodes = run.members.nodes_of([domain for domain in domains if domain not in results])
    if nodes:
        of_heads = dict.fromkeys(row for domain in nodes for row in heads.rows(domain))
        logger.info("evaluating on %s: %s", split, ", ".join([*labels, *of_heads]))
    shared = {} if heads.federated is None else {FEDERATED_HEAD: heads.federated}
    models = records.model_records({**adapters, **shared})
    min_users = run.config.privacy.min_users

    def request(domain: str) -> RecordDict:
        personal = cohort if personal_of(domain) else ""
        asked = records.EvaluationRequest(
            split, test, sources.get(domain, ""), test, *heads.request(domain), personal=personal
        )
        sent = records.model_records({**adapters, **shared, **own[domain]}) if domain in own else models
        return records.evaluation_request_record(asked, sent)

    def receive(domain: str, content: RecordDict) -> None:
        sums = records.read_metric_sums(content)
        num_users = (min_users, run.members.descriptions[domain].num_users)
        check_sums(domain, sums, asked_models(domain), test, num_users, run.config.privacy)
        checkpoints.write_sums(run.folder, stage, domain, sums)
        results[domain] = sums

    def limit_bytes(domain: str) -> int:
        return sums_bytes(len(labels) + 3 + len(own.get(domain, ())) + len(heads.rows(domain)), len(METRICS))

    timeout_seconds = run.config.server.timeout_seconds
    with run.phase(checkpoints.SUMS[stage]):
        ask(run, nodes, Question(records.EVALUATE, timeout_seconds, request, limit_bytes, split), receive)
    return dict(sorted(results.items()))
