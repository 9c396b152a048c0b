"""Training over rounds: clients train adapters, the server aggregates by a rule of :mod:`fedmerge.federated`."""

import logging
from collections.abc import Callable, Mapping, Sequence

from fedmerge.adapter import Adapter
from fedmerge.config import LEARNED_METHODS, ExperimentConfig, Lora
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import applied, fresh_adapter
from fedmerge.federated.rounds import GlobalState, fresh_seed, initial_state
from fedmerge.federated.rules import MergeFunction
from fedmerge.merging.candidate import Candidate, Origin
from fedmerge.merging.parameters import parse_parameters
from fedmerge.runs.checkpoints import write_candidate
from fedmerge.runs.round_checkpoints import round_records, write_members
from fedmerge.server.candidates import candidate_of_rounds, learn_from_catalogs, merge_candidates, recipe_of
from sim.app.messages import records
from sim.app.server.members import join_names
from sim.app.server.phases.joining import greet, greet_late
from sim.app.server.phases.rounds.one_by_one import Training, train_over_rounds
from sim.app.server.run import Run

logger = logging.getLogger("fedmerge.server")


def run_rounds(run: Run, backbone: Backbone, catalogs: Mapping[str, Catalog]) -> tuple[list[str], Candidate]:
    """Run all rounds, or those that are left.

    Args:
        run: the run.
        backbone: the frozen encoder.
        catalogs: of the training domains, if the rule learns from them.

    Returns:
        The domains that take part, and the global adapter after the last round.

    Raises:
        ClientError: too few clients are left.
        AggregationError: the rule refuses the updates.
    """
    config, rounds = run.config, run.config.rounds
    name = str(rounds.rule)
    training = Training(
        title=name,
        what="adapter",
        message_type=records.TRAIN,
        rule=name,
        parameters=parse_parameters(rounds.parameters),
        num_rounds=rounds.number,
        seed=config.seed,
        backbone_name=backbone.name,
        learned=_learned(config, backbone, catalogs) if name in LEARNED_METHODS else None,
    )

    def initial() -> GlobalState:
        return initial_state(_fresh_adapters(backbone, config.lora, config.seed, config.domains.train))

    def with_late_clients(members: list[str]) -> list[str]:
        return _with_late_clients(run, backbone, members)

    with run.phase("train"):
        in_training = run.members.in_role("train")
        members, state = train_over_rounds(run, training, in_training, initial, with_late_clients)
        origin = Origin(dict.fromkeys(members, ""), backbone.record, config.privacy.policy)
        aggregations = [record["aggregation"] for record in round_records(run.folder)]
        candidate = candidate_of_rounds(state.adapter, rounds, aggregations, origin)
        write_candidate(run.folder, candidate, backbone.name)
    return members, candidate


def _with_late_clients(run: Run, backbone: Backbone, members: list[str]) -> list[str]:
    """Return the members and the clients that joined since.

    A rule that learns from catalogs takes no new members, since the catalogs are already collected.
    """
    if run.config.rounds.rule in LEARNED_METHODS:
        greet_late(run, backbone, members)
        return members
    greet(run, backbone)
    if new := sorted({*run.members.in_role("train")} - {*members}):
        logger.info("joined late; take part from this round on: %s", join_names(new))
        write_members(run.folder, members := sorted([*members, *new]))
        run.members.write()
    return members


def _fresh_adapters(backbone: Backbone, lora: Lora, seed: int, domains: Sequence[str]) -> dict[str, Adapter]:
    """Return what every domain starts from; domains of equal rank share it."""
    settings = {domain: lora.of(domain) for domain in domains}
    by_rank = {of_domain.rank: of_domain for of_domain in settings.values()}
    adapters = {rank: fresh_adapter(backbone, of_rank, fresh_seed(seed, 0)) for rank, of_rank in by_rank.items()}
    return {domain: adapters[of_domain.rank] for domain, of_domain in settings.items()}


def _learned(
    config: ExperimentConfig, backbone: Backbone, catalogs: Mapping[str, Catalog]
) -> Callable[[GlobalState], MergeFunction]:
    """Return the merges by the last variant of the rule, which learns coefficients of the updates on a global adapter.

    The global adapter is applied to the backbone for the length of the learning.
    """
    method, recipe = str(config.rounds.rule), recipe_of(config)
    last = recipe.variants_of(method)[-1]

    def on_adapter(state: GlobalState) -> MergeFunction:
        def learned(updates: Mapping[str, Adapter]) -> Adapter:
            wanted = {domain: catalogs[domain] for domain in updates}
            learn = learn_from_catalogs(backbone, updates, wanted, config.text, logger.info)
            origin = Origin(dict.fromkeys(updates, ""), backbone.record, config.privacy.policy)
            with applied(backbone, state.adapter):
                (made,) = merge_candidates(updates, [last], origin, recipe, logger.info, learn=learn)
            return made.adapter

        learned.__name__ = method
        return learned

    return on_adapter
