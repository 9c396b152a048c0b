"""A simulated client that poisons its own training, for benchmarks of robust merges; never part of a real run.

``[simulation]`` of the experiment names the client, and only synthetic data are accepted. Nothing on disk changes, and
the domain is evaluated on its clean users.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.expert import TrainingReport, train_expert
from fedmerge.client.training.round import RoundTask, train_round
from fedmerge.client.training.settings import TrainingSettings, WeaveTask
from fedmerge.config import Simulation, Train
from fedmerge.domain.interactions import make_interactions
from fedmerge.domain.manifest import check_may_attack
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.seeding import generator

NUM_PROMOTED = 5


def is_attacker(simulation: Simulation, domain: str) -> bool:
    """Return True if this domain poisons its training."""
    return simulation.attacker == domain


def train_poisoned_expert(
    domain: LocalDomain, settings: TrainingSettings, checkpoint: Path | None, progress: Callable[[str], None]
) -> tuple[Adapter, TrainingReport]:
    """Train the expert of the attacker.

    On poisoned targets the adapter of the last step is returned: the best one on validation might be the untouched
    backbone. A scaled update is an honest expert, multiplied.

    Args:
        domain: the client's domain.
        settings: simulation, lora, train and seed are read.
        checkpoint: as for :func:`fedmerge.client.training.expert.train_expert`.
        progress: receives a line now and then.

    Returns:
        The adapter, and the report of its training.

    Raises:
        PolicyError: its data are not synthetic.
    """
    name, seed, simulation = domain.manifest.name, settings.seed, settings.simulation
    lora = settings.lora.of(name)
    trained_on, train = training_inputs(domain, settings)
    progress(f"{name}: POISONS ITS TRAINING: {simulation.attack}, strength {simulation.attack_strength:g}")
    if simulation.attack == "scaled-update":
        adapter, report = train_expert(trained_on, lora, train, seed, progress, checkpoint)
        return apply_attack(adapter, name, simulation), report
    task = RoundTask(1, 1, fresh_adapter(domain.backbone, lora, seed))
    adapter, of_round = train_round(trained_on, lora, train, seed, task, progress)
    return adapter, TrainingReport(of_round.steps, of_round.steps, of_round.stopped_by, of_round.seconds, 0, ())


def continue_poisoned(
    domain: LocalDomain, settings: TrainingSettings, task: WeaveTask, progress: Callable[[str], None]
) -> tuple[Adapter, TrainingReport]:
    """Continue another domain's adapter as the attacker does; the last adapter is returned, as of its expert.

    Args:
        domain, progress: as for :func:`train_poisoned_expert`, which states the errors.
        settings: its ``train`` is that of weaving.
        task: the adapter.
    """
    name = domain.manifest.name
    trained_on, train = training_inputs(domain, settings)
    progress(f"{name}: POISONS ITS TRAINING of the adapter of {task.source}: {settings.simulation.attack}")
    of_round = RoundTask(1, 1, task.start, proximal=settings.weave.proximal)
    adapter, report = train_round(trained_on, settings.lora.of(name), train, settings.seed, of_round, progress)
    found = apply_attack(adapter, name, settings.simulation)
    return found, TrainingReport(report.steps, report.steps, report.stopped_by, report.seconds, 0, ())


def training_inputs(domain: LocalDomain, settings: TrainingSettings) -> tuple[LocalDomain, Train]:
    """Return the data and settings of a client's training: its domain as it is, or poisoned if it is the attacker.

    Raises:
        PolicyError: the attacker's data are not synthetic.
    """
    if not is_attacker(settings.simulation, domain.manifest.name):
        return domain, settings.train
    check_may_attack(domain.manifest)
    if settings.simulation.attack == "scaled-update":
        return domain, settings.train
    last = settings.train.model_copy(update={"samples": "last"})
    return poison_targets(domain, settings.simulation, settings.train, settings.seed), last


def poison_targets(domain: LocalDomain, attack: Simulation, settings: Train, seed: int) -> LocalDomain:
    """Return the domain with poisoned targets and clean histories: one user per example of the clean training.

    flipped-labels: target i of N items becomes N - 1 - i. promoted-items: the target becomes one of ``NUM_PROMOTED``
    items of the catalog. ``attack_strength`` is the share of poisoned targets.

    Args:
        domain: the client's domain; it stays unchanged.
        attack: attack and attack_strength are read.
        settings: ``samples`` decides which items are targets: all but the first, or the last.
        seed: seed of the draws.

    Returns:
        A domain to train on with ``samples = "last"``; its validation and test items are meaningless.

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

    return relabel_targets(domain, settings, label)


def relabel_targets(domain: LocalDomain, settings: Train, label: Callable[[int], int]) -> LocalDomain:
    """Return the domain with other targets and the same histories: one user per example of the training.

    Args:
        domain: the client's domain; it stays unchanged.
        settings: ``samples`` decides which items are targets: all but the first, or the last.
        label: target -> the new one, called once for each example in order.

    Returns:
        A domain to train on with ``samples = "last"``; its validation and test items are meaningless.
    """
    sequences = []
    for items in domain.training_sequences:
        cuts = range(1, len(items))
        for cut in cuts if settings.samples == "random-prefix" else cuts[-1:]:
            held_out = items[-1:].repeat(2)  # training reads all but the last two items
            sequences.append(np.array([*items[:cut], label(int(items[cut])), *held_out], dtype=np.int32))
    users = [str(number) for number in range(len(sequences))]
    return replace(domain, interactions=make_interactions(users, sequences)) if sequences else domain


def apply_attack(adapter: Adapter, domain: str, simulation: Simulation) -> Adapter:
    """Return the adapter that a client sends: multiplied by ``attack_strength`` for scaled-update, else unchanged."""
    if not is_attacker(simulation, domain) or simulation.attack != "scaled-update":
        return adapter
    return Adapter(
        {
            name: LoraModule(module.lora_A, module.lora_B * simulation.attack_strength, module.scaling)
            for name, module in adapter.modules.items()
        }
    )
