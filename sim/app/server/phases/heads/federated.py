"""The federated head: trained over rounds by the training clients, on the item vectors of the served merge."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import RunDirError
from fedmerge.evaluation.sums import FEDERATED_HEAD
from fedmerge.federated.head import fresh_head
from fedmerge.federated.rounds import GlobalState, fresh_seed, initial_state
from fedmerge.federated.rules import rule_named
from fedmerge.merging.candidate import Candidate, MergeVariant, Origin, provenance_of_merge
from fedmerge.runs.federated_head import HEAD_FOLDER, read_federated_head, write_federated_head
from fedmerge.runs.round_checkpoints import HEAD_ROUNDS, round_records
from fedmerge.seeding import derive
from fedmerge.server.choice import CHOICE_FILE
from sim.app.messages import records
from sim.app.server.phases.rounds.one_by_one import Training, train_over_rounds
from sim.app.server.run import Run

logger = logging.getLogger("fedmerge.server")


def train_federated_head(
    run: Run, backbone: Backbone, domains: Sequence[str], served: Candidate, *, ask_clients: bool
) -> Adapter | None:
    """Return the federated head after all rounds; None if the experiment has none. It is written with its provenance.

    Args:
        run: the run.
        backbone: the frozen encoder.
        domains: training domains; those that still take part are asked.
        served: the merge that encodes the items.
        ask_clients: False for the head on disk alone, which is final once the choice is made.

    Raises:
        RunDirError: clients may not be asked, and the head on disk is missing or damaged.
        ClientError: too few clients are left.
        AggregationError: the rule refuses the updates, or a secure sum has too few clients.
    """
    config, head = run.config, run.config.head
    if head.kind != "federated":
        return None
    if (found := read_federated_head(run.folder)) is not None:
        logger.info("the federated head is on disk")
        return found
    if not ask_clients:
        folder = run.folder / HEAD_FOLDER
        raise RunDirError(
            f"{folder}: the federated head is missing or damaged, but {CHOICE_FILE}, which was made with it, is final. "
            f"Restore {folder} from an undamaged copy, or start a new run."
        )
    seed = derive(config.seed, "federated head")
    # Where the rule can, the head is cut to the rank that the clients start the next round with.
    parameters = {"output_rank": head.rank} if "output_rank" in rule_named(head.rule).parameters else {}
    training = Training(
        title=FEDERATED_HEAD,
        what="head",
        message_type=records.ROUND_HEAD,
        rule=head.rule,
        parameters=parameters,
        num_rounds=head.rounds,
        seed=seed,
        backbone_name=backbone.name,
        base=served.adapter,
        folder=HEAD_ROUNDS,
    )
    members = [domain for domain in run.members.in_role("train") if domain in domains]

    def initial() -> GlobalState:
        # Replies on disk may be of clients that are away now, so every domain has a start.
        return initial_state(dict.fromkeys(domains, fresh_head(backbone.width, head, fresh_seed(seed, 0))))

    with run.phase(HEAD_ROUNDS):
        members, state = train_over_rounds(run, training, members, initial)
        origin = Origin(dict.fromkeys(members, ""), backbone.record, config.privacy.policy)
        provenance = replace(
            provenance_of_merge(MergeVariant(head.rule, num_rounds=head.rounds), state.adapter, origin),
            label=FEDERATED_HEAD,
            parameters=head.model_dump(mode="json"),
            rounds=[record["aggregation"] for record in round_records(run.folder, HEAD_ROUNDS)],
            more={"item_vectors": {"label": served.label, "sha256": adapter_sha256(served.adapter)}},
        )
        write_federated_head(run.folder, Candidate(state.adapter, provenance), backbone.name)
    return state.adapter
