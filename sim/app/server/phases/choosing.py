"""Validate the merges, then choose what is served; a choice on disk is final."""

import logging
from collections.abc import Mapping

from fedmerge.evaluation.ranks import SELECTION_METRIC
from fedmerge.evaluation.sums import EXPERT
from fedmerge.files import read_sealed, seal, write_json
from fedmerge.runs import checkpoints
from fedmerge.server.choice import (
    CHOICE_FILE,
    FALLBACK,
    Choice,
    choose,
    choose_per_domain,
    dropped_domains,
    roll_back,
)
from sim.app.server.phases.evaluating import evaluate_models
from sim.app.server.phases.merging import Merges
from sim.app.server.run import Run

logger = logging.getLogger("fedmerge.server")


def validate_and_choose(run: Run, merges: Merges) -> tuple[dict[str, checkpoints.Sums], Choice]:
    """Evaluate on validation, then choose, once. Unseen domains have no say.

    Returns:
        Domain -> validation sums, of the domains that decided; and the choice.

    Raises:
        ClientError: too few domains are left to decide.
    """
    found = read_sealed(run.folder / CHOICE_FILE)
    deciding = found["domains"] if found else [name for name in run.members.in_role("train") if name in merges.members]
    adapters = {candidate.label: candidate.adapter for candidate in merges.candidates}
    validation = evaluate_models(run, "valid", deciding, adapters, merges.sources)
    if found:
        logger.info("already selected on validation: serving %s", found["served"])
        return {domain: sums for domain, sums in validation.items() if domain in deciding}, Choice.from_dict(found)
    run.require_quorum(list(validation))
    choice = _choose(run, merges, validation)
    write_json(run.folder / CHOICE_FILE, seal(choice.to_dict()))
    selected = ", ".join(choice.labels)
    logger.info("selected on validation: %s; serving %s. Test is read next, once.", selected, choice.served)
    return validation, choice


def _choose(run: Run, merges: Merges, validation: Mapping[str, checkpoints.Sums]) -> Choice:
    config, metric = run.config, SELECTION_METRIC
    sums = {domain: of_domain["unmasked"] for domain, of_domain in validation.items()}
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
    # 3. For each domain the merge or its own expert.
    per_domain = choose_per_domain(sums, served, metric, config.evaluation.fallback)
    if rollback is not None and rollback["to"] == FALLBACK:
        for domain in rollback["dropped"]:
            per_domain[domain]["serve"] = EXPERT
    return Choice(metric, scores, best, served, list(validation), per_domain, dropped, rollback)
