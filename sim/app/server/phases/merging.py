"""Train and merge, in one of three ways: experts (woven or not), rounds, or secure sums."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.federated.weaving import Weaving, Woven
from fedmerge.merging.candidate import Candidate, Origin
from fedmerge.runs import checkpoints
from fedmerge.server.candidates import learn_from_catalogs, merge_candidates, recipe_of
from fedmerge.server.groups import Grouping, groupings
from fedmerge.server.layer_search import search_on_pseudo_users
from fedmerge.server.refined import refined_candidates
from fedmerge.server.woven import woven_candidates
from sim.app.server.phases.admission import pass_gate
from sim.app.server.phases.coefficients import fit_personal_merges, learn_through_clients, search_through_clients
from sim.app.server.phases.rounds.adapters import run_rounds
from sim.app.server.phases.secure_sum import secure_candidates
from sim.app.server.phases.training import train_experts
from sim.app.server.phases.weaving.passes import weave_experts
from sim.app.server.run import Run

logger = logging.getLogger("fedmerge.server")


@dataclass(frozen=True)
class Merges:
    """The merges that validation selects from.

    Attributes:
        members: the domains in them.
        sources: domain -> hash of its expert; empty after rounds, which leave no experts.
        candidates: the merges.
        failed: domain -> reason why its expert failed at the admission gate.
        woven: what each domain continued of others; empty without ``weave.schedule``.
        groupings: the merges of groups of domains; empty without ``merge.groups``.
    """

    members: list[str]
    sources: Mapping[str, str]
    candidates: list[Candidate]
    failed: Mapping[str, str]
    woven: Woven = field(default_factory=dict)
    groupings: Sequence[Grouping] = ()


def train_and_merge(run: Run, backbone: Backbone, catalogs: Mapping[str, Catalog]) -> Merges:
    """Train and merge: over rounds, in secure sums, or once from the experts.

    Returns:
        The merges; none if the experiment ends after training.
    """
    config = run.config
    if config.rounds.rule is not None:
        members, after_rounds = run_rounds(run, backbone, catalogs)
        return Merges(list(members), {}, with_refined(run, backbone, [after_rounds], catalogs), {})
    if config.privacy.hides_adapters:
        sources, sums = secure_candidates(run, backbone)
        return Merges(list(sources), sources, with_refined(run, backbone, sums, catalogs), {})
    sources = train_experts(run, backbone, catalogs)
    if config.until == "train":
        weave_experts(run, backbone, catalogs, sources)
        return Merges(list(sources), sources, [], {})
    sources, failed = pass_gate(run, backbone, catalogs, sources)
    woven = weave_experts(run, backbone, catalogs, sources)
    candidates = merge_experts(run, backbone, sources, catalogs)
    candidates += merge_woven(run, backbone, sources, woven)
    candidates = with_refined(run, backbone, candidates, catalogs)
    if config.admission.rollback and failed and failed.keys() < sources.keys():
        candidates += merge_experts(run, backbone, sources, catalogs, without=sorted(failed))
    origin = Origin(sources, backbone.record, config.privacy.policy)
    for universal in fit_personal_merges(run, sources, origin):
        checkpoints.write_candidate(run.folder, universal, backbone.name)
        candidates.append(universal)
    in_groups = merge_groups(run, backbone, sources, catalogs)
    return Merges(list(sources), sources, candidates, failed, checkpoints.stored_woven(run.folder, woven), in_groups)


def with_refined(
    run: Run, backbone: Backbone, candidates: list[Candidate], catalogs: Mapping[str, Catalog]
) -> list[Candidate]:
    """Add to merges of all members what ``[mntp]`` and ``[simcse]`` make of each, written as it is made."""
    if not run.config.refines_merges:
        return candidates
    refined = refined_candidates(
        candidates,
        backbone,
        catalogs,
        run.config,
        logger.info,
        run.folder,
        finished=checkpoints.read_candidates(run.folder, candidates[0].provenance.domains),
        keep=lambda made: checkpoints.write_candidate(run.folder, made, backbone.name),
    )
    return [*candidates, *refined]


def merge_groups(
    run: Run, backbone: Backbone, sources: Mapping[str, str], catalogs: Mapping[str, Catalog]
) -> list[Grouping]:
    """Make every merge of the experiment for groups of similar domains, as merges without the others.

    Args:
        run, backbone, sources, catalogs: as for :func:`merge_experts`.
    """
    numbers = run.config.merge.groups
    if not numbers:
        return []

    def merge(group: tuple[str, ...]) -> list[Candidate]:
        without = sorted(sources.keys() - {*group})
        return merge_experts(run, backbone, sources, catalogs, without=without)

    found = groupings(checkpoints.stored_experts(run.folder, sources), numbers, merge)
    for groups in dict.fromkeys(each.groups for each in found):
        logger.info("%d groups: %s", len(groups), "; ".join(", ".join(group) for group in groups))
    return found


def merge_experts(
    run: Run,
    backbone: Backbone,
    sources: Mapping[str, str],
    catalogs: Mapping[str, Catalog],
    without: Sequence[str] = (),
) -> list[Candidate]:
    """Make every merge of the experiment, each written as it is made; merges on disk are not made again.

    Args:
        run: the run.
        backbone: the frozen encoder.
        sources: domain -> hash of its expert.
        catalogs: domain -> catalog, for learned merges.
        without: domains that are left out; they are named in the labels.
    """
    sources = {domain: sha256 for domain, sha256 in sources.items() if domain not in without}
    experts = checkpoints.stored_experts(run.folder, sources)
    recipe = recipe_of(run.config)
    wanted = {domain: catalogs[domain] for domain in sources if domain in catalogs}
    if recipe.at_clients:
        learn = learn_through_clients(run, experts)
    else:
        learn = learn_from_catalogs(backbone, experts, wanted, run.config.text, logger.info)
    if run.config.rmm.reward == "validation":
        search = search_through_clients(run, experts)
    else:
        search = search_on_pseudo_users(backbone, experts, wanted, run.config, logger.info, run.folder)
    return merge_candidates(
        experts,
        recipe.variants(without),
        Origin(sources, backbone.record, run.config.privacy.policy),
        recipe,
        logger.info,
        learn=learn,
        search=search,
        signals=checkpoints.stored_signals(run.folder, experts),
        finished=checkpoints.read_candidates(run.folder, sources),
        keep=lambda made: checkpoints.write_candidate(run.folder, made, backbone.name),
    )


def merge_woven(
    run: Run, backbone: Backbone, sources: Mapping[str, str], woven: Mapping[Weaving, str]
) -> list[Candidate]:
    """Make the universal merges of woven adapters, each written as it is made; none without ``weave.schedule``.

    Args:
        run: the run.
        backbone: the frozen encoder.
        sources: domain -> hash of its expert.
        woven: training -> hash of the adapter that its client continued.
    """
    if run.config.weave.schedule is None:
        return []
    return woven_candidates(
        checkpoints.stored_experts(run.folder, sources),
        checkpoints.stored_woven(run.folder, woven),
        run.config.weave,
        checkpoints.weave_record(woven),
        Origin(sources, backbone.record, run.config.privacy.policy),
        logger.info,
        finished=checkpoints.read_candidates(run.folder, sources),
        keep=lambda made: checkpoints.write_candidate(run.folder, made, backbone.name),
    )
