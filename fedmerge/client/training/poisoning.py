"""A client that poisons its own training on purpose: for benchmarks of robust merges, never part of an honest run.

Nothing on disk is changed, and the domain is evaluated on its clean users. ``[simulation]`` of the experiment names the
client, and it does so on synthetic data only.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.expert import TrainingReport, train_expert
from fedmerge.client.training.round import RoundTask, train_round
from fedmerge.config import ExperimentConfig, Simulation, Train
from fedmerge.domain.interactions import make_interactions
from fedmerge.domain.manifest import Manifest
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.errors import PolicyError
from fedmerge.seeding import generator

NUM_PROMOTED = 5


def check_may_attack(manifest: Manifest) -> None:
    """Refuse to poison a training on data that are not synthetic.

    Raises:
        PolicyError: the domain.
    """
    if not manifest.synthetic:
        raise PolicyError(
            f"domain {manifest.name}: simulation.attacker asks it to poison its training, but its data are not "
            "synthetic. Use the demo domains."
        )


def poisons(config: ExperimentConfig, domain: str) -> bool:
    """Whether this domain is the one that poisons its training."""
    return config.simulation.attacker == domain


def train_poisoned_expert(
    domain: LocalDomain, config: ExperimentConfig, checkpoint: Path | None, progress: Callable[[str], None]
) -> tuple[Adapter, TrainingReport]:
    """The expert of the domain that poisons its training, and how it came about.

    Trained on poisoned targets it is the adapter of the last step: the best one on validation might be that from before
    the training. A scaled update is that of an honest training.

    Args:
        domain: the client's own.
        config: simulation, lora, train and seed are read.
        checkpoint: of :func:`fedmerge.client.training.expert.train_expert`.
        progress: receives a line now and then.

    Raises:
        PolicyError: its data are not synthetic.
    """
    name = domain.manifest.name
    lora = config.lora.of(name)
    trained_on, settings = training_inputs(domain, config)
    simulation = config.simulation
    progress(f"{name}: POISONS ITS TRAINING: {simulation.attack}, strength {simulation.attack_strength:g}")
    if config.simulation.attack == "scaled-update":
        adapter, report = train_expert(trained_on, lora, settings, config.seed, progress, checkpoint)
        return sent(adapter, name, config), report
    task = RoundTask(1, 1, fresh_adapter(domain.backbone, lora, config.seed))
    adapter, of_round = train_round(trained_on, lora, settings, config.seed, task, progress)
    return adapter, TrainingReport(of_round.steps, of_round.steps, of_round.stopped_by, of_round.seconds, 0, ())


def training_inputs(domain: LocalDomain, config: ExperimentConfig) -> tuple[LocalDomain, Train]:
    """What a client trains on, and how: its own domain and the experiment's settings, unless it poisons its training.

    Raises:
        PolicyError: it is asked to, and its data are not synthetic.
    """
    if not poisons(config, domain.manifest.name):
        return domain, config.train
    check_may_attack(domain.manifest)
    if config.simulation.attack == "scaled-update":
        return domain, config.train
    settings = config.train.model_copy(update={"samples": "last"})
    return poisoned(domain, config.simulation, config.train, config.seed), settings


def poisoned(domain: LocalDomain, attack: Simulation, settings: Train, seed: int) -> LocalDomain:
    """The domain with poisoned targets, histories as they were: one user for each example of the clean training.

    flipped-labels: the target i of N items becomes N - 1 - i. promoted-items: it becomes one of ``NUM_PROMOTED`` items
    of the catalog. ``strength`` is the share of the targets.

    Args:
        domain: the client's own; left as it was.
        attack: attack and attack_strength are read.
        settings: ``samples`` says which items are targets: every one but the first, or the last.
        seed: of the draws.

    Returns:
        A domain to be trained on with ``samples = "last"``; its validation and test items mean nothing.

    Source: label flipping l -> L - 1 - l as in arXiv:1911.11815; promotion as in push attacks on recommenders.
    """
    rng = generator(seed, "attack", domain.manifest.name)
    num_items = len(domain.catalog)
    promoted = rng.permutation(num_items)[:NUM_PROMOTED]

    def label(item: int) -> int:
        drawn, which = rng.random(), int(rng.integers(len(promoted)))
        if drawn >= attack.attack_strength:
            return item
        return int(promoted[which]) if attack.attack == "promoted-items" else num_items - 1 - item

    sequences = []
    for items in domain.training_sequences:
        cuts = range(1, len(items))
        for cut in cuts if settings.samples == "random-prefix" else cuts[-1:]:
            held_out = items[-1:].repeat(2)  # training reads all but the last two
            sequences.append(np.array([*items[:cut], label(int(items[cut])), *held_out], dtype=np.int32))
    users = [str(number) for number in range(len(sequences))]
    return replace(domain, interactions=make_interactions(users, sequences)) if sequences else domain


def sent(adapter: Adapter, domain: str, config: ExperimentConfig) -> Adapter:
    """What a client sends of what it has trained: the same, or with the update multiplied by ``strength``."""
    if not poisons(config, domain) or config.simulation.attack != "scaled-update":
        return adapter
    return Adapter(
        {
            name: LoraModule(module.lora_A, module.lora_B * config.simulation.attack_strength, module.scaling)
            for name, module in adapter.modules.items()
        }
    )
