"""The cells of federated heads: rounds of training as clients and server make them, and ranks alone and fused."""

from collections.abc import Sequence
from pathlib import Path

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.bench.ranking import domain_of, num_users, questions, text_vectors, write_ranks
from fedmerge.client.heads.federated import federated_ranks, federated_weights
from fedmerge.client.heads.vectors import item_vectors
from fedmerge.config import ExperimentConfig, Split
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.evaluation.sums import FEDERATED_HEAD
from fedmerge.federated.head import fresh_head, mean_weights
from fedmerge.federated.rounds import aggregate, fresh_seed, initial_state
from fedmerge.federated.rules import rule_named
from fedmerge.files import read_json, whole_folder, write_json
from fedmerge.seeding import derive
from fedmerge.sequence.anchored import train_anchored


def train_federated_head(result: Path, config: ExperimentConfig, merge: Path, domains: Sequence[str]) -> None:
    """Train a head over rounds on the item vectors of a merge, and let every domain choose the weights of its fusion.

    Args:
        result: receives hash, bytes, seconds of the clients, and weights by domain; the head is beside it.
        config: head, rounds.weights, seed, evaluation and what opens a domain.
        merge: PEFT folder that encodes the items.
        domains: domains that take part.

    Raises:
        FedMergeError: a domain without training users, or a training that diverges.
    """
    head, seed, encoder = config.head, derive(config.seed, "federated head"), read_adapter(merge)
    opened = {name: domain_of(config, name) for name in sorted(domains)}
    vectors = {name: item_vectors(domain, encoder, config.cache_dir) for name, domain in opened.items()}
    parameters = {"output_rank": head.rank} if "output_rank" in rule_named(head.rule).parameters else {}
    width = next(iter(opened.values())).backbone.width
    state = initial_state(dict.fromkeys(opened, fresh_head(width, head, fresh_seed(seed, 0))))
    weights = {
        name: 1.0 if config.rounds.weights == "equal" else float(domain.manifest.num_users)
        for name, domain in opened.items()
    }
    seconds = 0.0
    for number in range(1, head.rounds + 1):
        trained: dict[str, Adapter] = {}
        for name, domain in opened.items():
            trained[name], report = train_anchored(
                domain.training_sequences,
                vectors[name],
                state.starts[name],
                steps=head.steps,
                proximal=head.proximal,
                seed=config.seed,
                scope=(name, "head round", number),
            )
            seconds += report.seconds
        state = aggregate(head.rule, state, trained, weights, seed=seed, **parameters)
    validation_users = num_users(config.evaluation, "valid")
    fusions = {
        name: federated_weights(domain, state.adapter, encoder, validation_users, config.seed, config.cache_dir)
        for name, domain in opened.items()
    }
    with whole_folder(head_folder(result)) as folder:
        write_adapter(state.adapter, folder, config.backbone.source)
    record = {"sha256": adapter_sha256(state.adapter), "bytes": state.adapter.size_bytes, "seconds": seconds}
    write_json(result, {**record, "fusions": {name: dict(fusion) for name, fusion in fusions.items()}})


def head_folder(result: Path) -> Path:
    """Return the folder of a federated head, beside its record."""
    return result.with_name(FEDERATED_HEAD.replace(" ", "-"))


def rank_federated_head(
    result: Path, config: ExperimentConfig, domain: str, split: Split, test_root: str | None, merge: Path, head: Path
) -> None:
    """Write every user's rank under a federated head, alone and fused.

    A domain that chose no weights, since it was left out or is unseen, gets the mean of the others'.

    Args:
        result, config, domain, split, test_root: as for :func:`fedmerge.bench.ranking.rank_model`.
        merge: PEFT folder that encodes items and histories.
        head: record of :func:`train_federated_head`.
    """
    examples, fusions = questions(config, domain, split, test_root), read_json(head)["fusions"]
    _, text = text_vectors(config, domain, split, test_root, merge)
    weights = fusions.get(domain) or mean_weights([*fusions.values()])
    found = federated_ranks(read_adapter(head_folder(head)), text, weights, examples)
    write_ranks(result, {label.removeprefix(FEDERATED_HEAD): ranks for label, ranks in found.items()})
