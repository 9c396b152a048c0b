"""Weave: clients continue each other's adapters, pass after pass (see ``fedmerge.federated.weaving``); their merges.

Each continued adapter is on disk as it arrives, and a resumed run asks for those that are missing.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

from flwr.app import RecordDict

from fedmerge.adapter import Adapter, OnDemand, adapter_sha256
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import fresh_adapter, layout_of
from fedmerge.errors import ClientError
from fedmerge.evaluation.ranks import SELECTION_METRIC
from fedmerge.evaluation.sums import WOVEN, MetricSums, copy_row, woven_label
from fedmerge.federated.shared_items import MeanSimilarity
from fedmerge.federated.weaving import Weaving, Woven, schedule_passes, start_of, target_merge
from fedmerge.merging.candidate import Origin
from fedmerge.privacy.dp.agreement import check_spent
from fedmerge.runs import checkpoints
from fedmerge.server.choice import best_row
from fedmerge.server.reply_checks import adapter_bytes, check_adapter
from fedmerge.server.woven import woven_candidate_of
from sim.app.messages import records
from sim.app.server.asking import ask
from sim.app.server.members import join_names
from sim.app.server.phases.training import REPORT_BYTES
from sim.app.server.phases.weaving.similarity import mean_similarities
from sim.app.server.questions import Question, own_noise
from sim.app.server.releases import trainings_released
from sim.app.server.run import Run

WEAVE = "weave"  # the phase

logger = logging.getLogger("fedmerge.server")


Rows = Mapping[str, Mapping[str, Adapter]]
"""Domain -> row -> the adapter that is sent to this domain alone."""


@dataclass(frozen=True)
class Pass:
    """A pass of a schedule.

    Attributes:
        number: from 1.
        of: number of passes.
        trainings: one for each domain. What is on disk of any of them may be the start of a later one.
        wanted: those that clients are asked for.
        means: under schedule ``similarity``, domain -> the mean that its expert is pulled to.
    """

    number: int
    of: int
    trainings: Sequence[Weaving]
    wanted: Sequence[Weaving]
    means: Mapping[str, MeanSimilarity]


def weave_experts(
    run: Run, backbone: Backbone, catalogs: Mapping[str, Catalog], sources: Mapping[str, str]
) -> dict[Weaving, str]:
    """Let the clients continue each other's adapters as ``[weave]`` says; the adapters are on disk.

    A domain whose client does not finish its trainings is no target: what it continued is not merged. Its expert is,
    and others continue it. Once the weaving has ended, the set of adapters is final.

    Args:
        run: the run.
        backbone: the frozen encoder.
        catalogs: of the training domains, for schedule ``similarity``.
        sources: domain -> hash of its expert, of all domains that are merged.

    Returns:
        Training -> hash of the continued adapter; empty without ``weave.schedule``.

    Raises:
        ClientError: too few targets, or an adapter that was merged is missing and its client does not send it again.
    """
    config = run.config
    if config.weave.schedule is None:
        return {}
    with run.phase(WEAVE):
        # 1. One pass after another, without what is on disk.
        ended = checkpoints.read_weave(run.folder)
        means = mean_similarities(run, backbone, catalogs, sources) if config.shares_similarity else {}
        passes = schedule_passes(config.weave, list(sources), config.seed)
        found: dict[Weaving, str] = {}
        for number, trainings in enumerate(passes, start=1):
            wanted = [each for each in trainings if ended is None or each in ended]
            if config.shares_similarity:
                wanted = [each for each in wanted if each.target in means]
            one = Pass(number, len(passes), trainings, wanted, means)
            found |= _one_pass(run, backbone, sources, found, one)
        # 2. Fix the adapters that are merged: those of the domains that finished.
        if ended is None:
            targets = [name for name in sources if all(Weaving(name, each) in found for each in _of(name, passes))]
            run.require_quorum(targets)
            ended = {each: sha256 for each, sha256 in found.items() if each.target in targets}
            checkpoints.write_weave(run.folder, ended)
        elif missing := sorted({each.target for each in ended if found.get(each) != ended[each]}):
            raise ClientError(
                f"{run.folder}: adapters that {join_names(missing)} continued were merged, but are missing or damaged "
                "on disk, and their clients did not send the same again. Restore them, or start a new run."
            )
        for name in run.members.in_role("train"):
            if name in sources and passes and not any(each.target == name for each in ended):
                run.exclude(name, "it had not continued all adapters when weaving ended")
    return ended


def _of(target: str, passes: Sequence[Sequence[Weaving]]) -> list[str]:
    return [each.source for trainings in passes for each in trainings if each.target == target]


def _one_pass(
    run: Run, backbone: Backbone, sources: Mapping[str, str], before: Mapping[Weaving, str], one: Pass
) -> dict[Weaving, str]:
    """Return the hashes of the adapters of a pass: those on disk, and those that the clients send."""
    config = run.config
    experts = checkpoints.stored_experts(run.folder, sources)
    woven = checkpoints.stored_woven(run.folder, before)
    of_target = {each.target: each for each in one.trainings}

    @cache
    def start(target: str) -> Adapter:
        fresh = partial(fresh_adapter, backbone, config.lora.of(target), config.seed)
        return start_of(of_target[target], config.weave, experts, woven, fresh)

    # 1. Find the adapters on disk.
    found: dict[Weaving, str] = {}
    for target, each in of_target.items():
        if sha256 := checkpoints.read_woven_hash(run.folder, each, adapter_sha256(start(target))):
            found[each] = sha256
    # 2. Ask for the others.
    in_training = run.members.in_role("train")
    missing = [each.target for each in one.wanted if each not in found and each.target in in_training]
    if not missing:
        return found

    def request(target: str) -> RecordDict:
        asked = records.WeaveRequest(one.number, of_target[target].source)
        return records.weave_request_record(asked, start(target), one.means.get(target))

    def limit_bytes(target: str) -> int:
        return adapter_bytes(layout_of(start(target))) + REPORT_BYTES

    def admit(target: str, content: RecordDict) -> None:
        each, num_users = of_target[target], run.members.descriptions[target].num_users
        adapter, report = records.read_woven(content, each.source)
        check_adapter(target, adapter, layout_of(start(target)))
        check_spent(target, config, report.get("privacy"), num_users, woven=True)
        start_sha256 = adapter_sha256(start(target))
        # This must be last: nothing after it may raise.
        found[each] = checkpoints.write_woven(run.folder, each, adapter, report, start_sha256, backbone.name)

    logger.info("weaving, pass %d of %d: %s", one.number, one.of, join_names(missing))
    question = Question(
        records.WEAVE,
        config.server.timeout_seconds,
        request,
        limit_bytes,
        noise=own_noise(config.dp.mode),
        released=trainings_released(run, one.number, woven=True),
    )
    ask(run, run.members.nodes_of(missing), question, admit)
    return found


def target_rows(run: Run, sources: Mapping[str, str], woven: Woven) -> Rows:
    """Return the merges of what each domain trained, with every factor; each is made when it is read.

    Args:
        run: the run.
        sources: domain -> hash of its expert.
        woven: the adapters that clients continued.
    """
    experts, factors = checkpoints.stored_experts(run.folder, sources), run.config.weave.factors
    labels = {woven_label(factor): factor for factor in factors}

    def rows_of(target: str) -> Mapping[str, Adapter]:
        return OnDemand(labels, lambda label: target_merge(target, experts[target], woven, labels[label]))

    return {target: rows_of(target) for target in sorted({each.target for each in woven})}


def choose_factors(
    run: Run, backbone: Backbone, sources: Mapping[str, str], woven: Woven, validation: Mapping[str, MetricSums]
) -> tuple[Rows, dict[str, MetricSums]]:
    """Choose the factor of each domain's woven merge on its own validation users, and write the merge.

    Args:
        run: the run.
        backbone: its name is written.
        sources: domain -> hash of its expert.
        woven: the adapters that clients continued.
        validation: domain -> unmasked sums, with a row for each factor.

    Returns:
        Domain -> its merge in the row WOVEN; and ``validation`` with that row.
    """
    config = run.config
    labels = {woven_label(factor): factor for factor in config.weave.factors}
    experts = checkpoints.stored_experts(run.folder, sources)
    origin = Origin(sources, backbone.record, config.privacy.policy)
    hashes = checkpoints.read_weave(run.folder) or {}
    rows, sums = {}, dict(validation)
    for target in sorted({each.target for each in woven} & {*validation}):
        best = best_row(validation[target], list(labels), SELECTION_METRIC)
        sums[target] = copy_row(validation[target], best, WOVEN)
        kept = checkpoints.read_target_merge(run.folder, target)
        if kept is None or kept.provenance.parameters != {"factor": labels[best]}:
            record = checkpoints.weave_record({each: sha for each, sha in hashes.items() if each.target == target})
            kept = woven_candidate_of(target, experts[target], woven, labels[best], config.weave, record, origin)
            checkpoints.write_target_merge(run.folder, target, kept, backbone.name)
        rows[target] = {WOVEN: kept.adapter}
    return rows, sums
