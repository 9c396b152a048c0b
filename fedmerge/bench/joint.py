"""Joint training: one adapter on the pooled interactions of several domains, as a reference row.

It breaks isolation, since it reads the users of all domains. So neither client nor server has this code; benchmarks on
one's own data use it to measure the cost of isolation.
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
        settings: settings of one expert.
        seed: seed of the experiment.
        drawing: see :func:`joint_batches`.
        progress: receives one line after every validation.
        checkpoint: as for :func:`fedmerge.client.training.expert.train_expert`.

    Returns:
        The adapter with the best mean NDCG@10 over the domains' validation users, and the report of its training.

    Raises:
        DomainError: a domain has fewer than two users to train on.
        ClientError: the loss is not finite.
    """
    for domain in domains.values():
        check_can_train(domain)
    pooled = pooled_settings(settings, len(domains))
    batches = joint_batches(domains, settings, seed, drawing)
    name = f"joint training, {drawing}"
    return fine_tune(name, list(domains.values()), batches, lora, pooled, seed, progress, checkpoint)


def pooled_settings(settings: Train, num_domains: int) -> Train:
    """Return the budgets of all experts together: steps and minutes add up, epochs and validations stay the same."""
    changes = {
        "max_steps": settings.max_steps and num_domains * settings.max_steps,
        "max_minutes": settings.max_minutes and num_domains * settings.max_minutes,
        "validate_every_steps": num_domains * settings.validate_every_steps,
    }
    return settings.model_copy(update=changes)


def joint_batches(
    domains: Mapping[str, LocalDomain], settings: Train, seed: int, drawing: Drawing
) -> Iterator[tuple[LocalDomain, Batch, float]]:
    """Mix the experts' batches; each batch has users of one domain, whose negatives are items of that domain.

    Args:
        domains: domains by name.
        settings: batch size and samples are read.
        seed: seed of the experiment; a domain's batches are those of its expert, in the same order.
        drawing: "shuffled": a pooled epoch has every domain's batches, in random order, so that users count equally;
            "balanced": in each round every domain has one batch, in random order, so that domains count equally.

    Yields:
        Endlessly: the domain, its users, and the pooled epochs done after them.
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
