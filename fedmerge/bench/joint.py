"""Joint training: one adapter on the pooled interactions of several domains, as a row for reference (METHODS 7).

It breaks isolation: whoever trains it reads every domain's users. No federation can have it, and no client or server
has this code; a benchmark on one's own data has it, to show what isolation costs.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedmerge.adapter import Adapter
from fedmerge.bench.config import Drawing
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.batches import Batch, num_batches, training_batches
from fedmerge.client.training.expert import TrainingReport, check_can_train, fine_tune
from fedmerge.client.training.loop import Progress
from fedmerge.config import Lora, Train
from fedmerge.seeding import generator


def train_jointly(
    domains: Mapping[str, LocalDomain],
    lora: Lora,
    settings: Train,
    seed: int,
    drawing: Drawing,
    progress: Progress = lambda line: None,
    checkpoint: Path | None = None,
) -> tuple[Adapter, TrainingReport]:
    """Fine-tune one adapter on the users of all domains together, with the budgets of all their experts.

    Args:
        domains: at least one; they share a backbone.
        lora: layout of the adapter.
        settings: of one expert.
        seed: of the experiment.
        drawing: see :func:`joint_batches`.
        progress: receives one line after every validation.
        checkpoint: as for :func:`fedmerge.client.training.expert.train_expert`.

    Returns:
        The adapter with the best mean NDCG@10 over the domains' validation users, and how it came about.

    Raises:
        DomainError: a domain with nobody to train on.
        ClientError: the loss is no longer finite.
    """
    for domain in domains.values():
        check_can_train(domain)
    pooled = pooled_settings(settings, len(domains))
    batches = joint_batches(domains, settings, seed, drawing)
    name = f"joint training, {drawing}"
    return fine_tune(name, list(domains.values()), batches, lora, pooled, seed, progress, checkpoint)


def pooled_settings(settings: Train, num_domains: int) -> Train:
    """The budgets of all experts together: steps and minutes add up, epochs do not; there are as many validations."""
    changes = {
        "max_steps": settings.max_steps and num_domains * settings.max_steps,
        "max_minutes": settings.max_minutes and num_domains * settings.max_minutes,
        "validate_every_steps": num_domains * settings.validate_every_steps,
    }
    return settings.model_copy(update=changes)


def joint_batches(
    domains: Mapping[str, LocalDomain], settings: Train, seed: int, drawing: Drawing
) -> Iterator[tuple[LocalDomain, Batch, float]]:
    """The experts' batches, mixed: each batch is of one domain, so that a user's negatives are items of that domain.

    Args:
        domains: by name.
        settings: batch size and samples are read.
        seed: of the experiment; a domain's own batches are those of its expert, in the same order.
        drawing: "shuffled": a pooled epoch has every domain's batches, in random order, so that users count alike;
            "balanced": in each round every domain has one batch, in random order, so that domains count alike.

    Returns:
        Without end: the domain, its users, and how many batches there were, in pooled epochs.
    """
    own = {name: training_batches(domains[name].training_sequences, settings, seed, name) for name in sorted(domains)}
    counts = {name: num_batches(len(domains[name].training_sequences), settings.batch_size) for name in own}
    turns = list(own) if drawing == "balanced" else [name for name in own for _ in range(counts[name])]
    per_epoch = sum(counts.values())
    done = itertools.count(1)
    for number in itertools.count():
        for turn in generator(seed, "joint", drawing, number).permutation(len(turns)):
            name = turns[turn]
            batch, _ = next(own[name])
            yield domains[name], batch, next(done) / per_epoch
