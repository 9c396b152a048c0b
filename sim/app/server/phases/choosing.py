"""Validate the merges, train heads over the best, then choose what is served; a choice on disk is final."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import RunDirError
from fedmerge.evaluation.ranks import SELECTION_METRIC
from fedmerge.evaluation.sums import EXPERT, GROUP, PERSONAL, WOVEN, MetricSums
from fedmerge.files import read_sealed, seal, write_json
from fedmerge.runs import checkpoints
from fedmerge.runs.federated_head import write_fusion
from fedmerge.server.choice import (
    CHOICE_FILE,
    FALLBACK,
    MERGED,
    SELECTION_FILE,
    Choice,
    choose,
    choose_for_unseen,
    choose_per_domain,
    dropped_domains,
    roll_back,
)
from fedmerge.server.groups import choose_grouping, row_of_choice, rows_of, with_group_row
from sim.app.server.phases.evaluating import evaluate_models
from sim.app.server.phases.heads.federated import train_federated_head
from sim.app.server.phases.heads.local import Heads, train_heads
from sim.app.server.phases.merging import Merges
from sim.app.server.phases.weaving.passes import Rows, choose_factors, target_rows
from sim.app.server.run import Run

logger = logging.getLogger("fedmerge.server")


def validate_and_choose(
    run: Run, backbone: Backbone, merges: Merges
) -> tuple[dict[str, checkpoints.Sums], Choice, Heads, Rows]:
    """Evaluate on validation, then choose, once. Unseen domains only choose whether a federated head serves them.

    Returns:
        Domain -> validation sums of the merges, of the domains that decided; the choice; the heads of the clients; and
        the woven merges of single domains.

    Raises:
        ClientError: too few domains are left to decide.
        RunDirError: the choice on disk is final, but the federated head or the report of a head is missing or damaged.
    """
    final = read_sealed(run.folder / CHOICE_FILE)
    found = final or read_sealed(run.folder / SELECTION_FILE)
    # 1. Evaluate the merges.
    deciding = found["domains"] if found else [name for name in run.members.in_role("train") if name in merges.members]
    adapters = {candidate.label: candidate.adapter for candidate in merges.candidates}
    rows = _joined(target_rows(run, merges.sources, merges.woven), rows_of(merges.groupings))
    evaluated = evaluate_models(run, "valid", deciding, adapters, merges.sources, own=rows)
    validation = {domain: sums for domain, sums in evaluated.items() if domain in deciding}
    own, unmasked = choose_factors(run, backbone, merges.sources, merges.woven, _unmasked(validation))
    # 2. Select the merge that is served.
    if found:
        choice = Choice.from_dict(found)
        logger.info("already selected on validation: serving %s", choice.served)
    else:
        run.require_quorum(list(validation))
        choice = _select(run, merges, validation)
        if run.config.head.kind is not None:
            write_json(run.folder / SELECTION_FILE, seal(choice.to_dict()))
            logger.info("selected on validation: serving %s; heads are trained over it", choice.served)
    unmasked = with_group_row(choice.groups, unmasked)
    own = _joined(own, row_of_choice(choice.groups, merges.groupings))
    # 3. Train heads over it, and evaluate them.
    served = next(candidate for candidate in merges.candidates if candidate.label == choice.served)
    federated = train_federated_head(run, backbone, deciding, served, ask_clients=not final)
    heads = train_heads(run, deciding, served, merges.sources, federated, ask_clients=not final)
    if final:
        _check_reports(run, choice, heads)
    if federated is not None:
        write_fusion(run.folder, heads.mean_fusion)
    if final:
        return validation, choice, heads, own
    of_heads: Mapping[str, checkpoints.Sums] = {}
    choosing = [] if federated is None else _unseen_with_validation(run)
    if owners := [*(domain for domain in deciding if heads.rows(domain)), *choosing]:
        of_heads = evaluate_models(run, "heads", owners, {served.label: served.adapter}, merges.sources, heads, own)
    if run.config.head.kind is not None:
        run.require_quorum([domain for domain in deciding if domain in run.members.nodes])
    # 4. Choose for each domain.
    choice = _serve(run, choice, unmasked, {name: sums for name, sums in of_heads.items() if name in owners}, heads)
    write_json(run.folder / CHOICE_FILE, seal(choice.to_dict()))
    selected = ", ".join(choice.labels)
    logger.info("selected on validation: %s; serving %s. Test is read next, once.", selected, choice.served)
    return validation, choice, heads, own


def _select(run: Run, merges: Merges, validation: Mapping[str, checkpoints.Sums]) -> Choice:
    """Select the merge that is served by default; the choice for each domain is still empty."""
    config, metric = run.config, SELECTION_METRIC
    sums = _unmasked(validation)
    # 1. The best merge of all members.
    without = [candidate for candidate in merges.candidates if {*merges.sources} - {*candidate.provenance.domains}]
    of_all = [candidate for candidate in merges.candidates if candidate not in without]
    best, served, scores = choose(of_all, sums, list(validation), metric)
    # 2. Roll back if it harms domains, to the best merge without the flagged experts, or to the fallback.
    dropped = {} if config.admission.action is None else dropped_domains(sums, served, metric)
    rollback = None
    if config.admission.rollback:
        rollback = roll_back(sums, served, [candidate.label for candidate in without], list(merges.failed), metric)
    if rollback is not None and rollback["to"] != FALLBACK:
        served = rollback["to"]
    # 3. Or a merge for each group of domains.
    groups = choose_grouping(merges.groupings, sums, served, metric)
    if groups is not None:
        logger.info("selected on validation: %s", groups.get("label", "one merge for all domains, no groups"))
    return Choice(metric, scores, best, served, list(validation), {}, dropped, rollback, groups)


def _serve(
    run: Run,
    choice: Choice,
    validation: Mapping[str, MetricSums],
    of_heads: Mapping[str, checkpoints.Sums],
    heads: Heads,
) -> Choice:
    """Choose what each domain is served: a merge, its own expert, or one of its heads; ``validation`` is unmasked."""
    fallback = run.config.evaluation.fallback
    members = {domain: sums for domain, sums in of_heads.items() if domain in validation}
    unseen = {domain: sums for domain, sums in of_heads.items() if domain not in validation}
    per_domain = choose_per_domain(
        {**validation, **_unmasked(members)},  # those of the heads hold the served merge and the expert, too
        choice.served,
        choice.metric,
        fallback,
        {domain: heads.rows(domain) for domain in members},
        choice.rollback["dropped"] if choice.rollback is not None and choice.fell_back else (),
    )
    per_domain |= choose_for_unseen(_unmasked(unseen), choice.served, choice.metric, fallback)
    return replace(choice, per_domain=per_domain)


def _check_reports(run: Run, choice: Choice, heads: Heads) -> None:
    """Raise RunDirError if a training domain chose among its heads, but their report is missing or damaged."""
    for domain in choice.domains:
        own = {*choice.per_domain.get(domain, ())} - {"serve", MERGED, EXPERT, PERSONAL, WOVEN, GROUP}
        if own and domain not in heads.vectors:
            file = run.folder / checkpoints.HEADS / f"{domain}.json"
            raise RunDirError(
                f"{file}: the report of the domain's heads is missing or damaged, but {CHOICE_FILE}, which was made "
                f"with it, is final. Restore {file} from an undamaged copy, or start a new run."
            )


def _unseen_with_validation(run: Run) -> list[str]:
    """Return the unseen domains that may have enough validation users to choose between merge and federated head."""
    most, needed = run.config.evaluation.validation_users, run.config.privacy.min_users
    if most is not None and most < needed:
        return []
    return [name for name in run.members.in_role("unseen") if run.members.descriptions[name].num_users >= needed]


def _joined(rows: Rows, more: Rows) -> Rows:
    """Return domain -> the rows of both."""
    return {domain: {**rows.get(domain, {}), **more.get(domain, {})} for domain in sorted({*rows, *more})}


def _unmasked(sums: Mapping[str, checkpoints.Sums]) -> dict[str, MetricSums]:
    return {domain: of_domain["unmasked"] for domain, of_domain in sums.items()}
