"""Local fine-tuning of a LoRA adapter on a client's own users: an expert, or another domain's adapter continued."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge.adapter import Adapter
from fedmerge.client.auxiliary.prepared import prepare, trained_maps
from fedmerge.client.auxiliary.shared_items import Term, with_term
from fedmerge.client.csft import next_titles
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.batches import Batch, training_batches
from fedmerge.client.training.checkpoint import Validation
from fedmerge.client.training.loop import Attached, Progress, Recipe, Schedule, Step, budget_of, fit
from fedmerge.client.training.losses import TEMPERATURE
from fedmerge.client.training.plain_sgd import batch_steps, proximal_penalty
from fedmerge.config import Lora, Train, Weave
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.encode import encode
from fedmerge.errors import DomainError
from fedmerge.evaluation.ranks import rank_targets, selection_score

PATIENCE = 5  # validations without a better NDCG@10 that end a training
WOVEN_POINTS = 5  # of a training that continues an adapter, the start among them; so patience never ends it


@dataclass(frozen=True)
class TrainingReport:
    """Report of a training.

    Attributes:
        steps: optimiser steps made.
        best_step: the step whose adapter was selected; 0 is the start: the untouched backbone, or what was received.
        stopped_by: the budget that ended it, or ``patience``.
        seconds: wall clock.
        validation_users: number of users in each validation.
        validations: in order.
        signals: module -> its training signals (I_A, I_B), see :class:`fedmerge.client.training_signals.SignalSums`;
            None where noise hides the training, or if they are not known.
    """

    steps: int
    best_step: int
    stopped_by: str
    seconds: float
    validation_users: int
    validations: tuple[Validation, ...]
    signals: Mapping[str, tuple[float, float]] | None = None


def train_expert(
    domain: LocalDomain,
    lora: Lora,
    settings: Train,
    seed: int,
    progress: Progress = lambda line: None,
    checkpoint: Path | None = None,
) -> tuple[Adapter, TrainingReport]:
    """Fine-tune a fresh adapter and select the one that ranks the validation users best (NDCG@10, unmasked).

    Args:
        domain: the client's domain.
        lora: layout of the adapter.
        settings: optimiser and budgets; training ends at the first one reached.
        seed: seed of the experiment; sampling depends on it and on the domain's name only.
        progress: receives one line after every validation.
        checkpoint: see :func:`fedmerge.client.training.loop.fit`.

    Returns:
        The adapter in float32 on the CPU, and its report.

    Raises:
        DomainError: fewer than two users to train on.
        ClientError: the loss is not finite.
    """
    check_can_train(domain)
    name = domain.manifest.name
    drawn = training_batches(domain.training_sequences, settings, seed, name)
    batches = ((domain, batch, epochs) for batch, epochs in drawn)
    return fine_tune(name, [domain], batches, lora, settings, seed, progress, checkpoint)


def continue_adapter(
    domain: LocalDomain,
    lora: Lora,
    settings: Train,
    seed: int,
    start: Adapter,
    source: str,
    proximal: float = 0.0,
    progress: Progress = lambda line: None,
    checkpoint: Path | None = None,
    term: Term | None = None,
) -> tuple[Adapter, TrainingReport]:
    """Continue another domain's adapter on a client's own users, with a new optimiser; the best on validation is kept.

    Args:
        domain: the client's domain.
        lora: layout of the adapter, except for its rank and scaling.
        settings: optimiser and steps, of :func:`weaving_settings`.
        seed: seed of the experiment.
        start: the adapter, which has its own rank and scaling.
        source: whose it is; sampling depends on it, on the seed and on the domain's name only.
        proximal: μ of FedProx, the pull towards ``start``.
        progress, checkpoint: as for :func:`train_expert`, which states results and errors.
        term: a term of the loss, by step; it reads no user.

    Raises:
        LayoutMismatchError: ``start`` is an adapter of another backbone.
    """
    check_can_train(domain)
    name = domain.manifest.name
    scope = ("weave", source)
    drawn = training_batches(domain.training_sequences, settings, seed, name, *scope)
    batches = ((domain, batch, epochs) for batch, epochs in drawn)
    progress(f"{name}: continuing the adapter of {source}")
    return fine_tune(name, [domain], batches, lora, settings, seed, progress, checkpoint, start, proximal, term, scope)


def weaving_settings(train: Train, weave: Weave) -> Train:
    """Return the settings of the training that continues an adapter: five points are validated, and none ends it."""
    changes = {
        "learning_rate": train.learning_rate * weave.rate,
        "max_steps": weave.steps,
        "max_epochs": None,
        "max_minutes": None,
        "validate_every_steps": max(1, math.ceil(weave.steps / (WOVEN_POINTS - 1))),
    }
    return train.model_copy(update=changes)


def fine_tune(
    name: str,
    domains: Sequence[LocalDomain],
    batches: Iterator[tuple[LocalDomain, Batch, float]],
    lora: Lora,
    settings: Train,
    seed: int,
    progress: Progress = lambda line: None,
    checkpoint: Path | None = None,
    start: Adapter | None = None,
    proximal: float = 0.0,
    term: Term | None = None,
    scope: tuple[str, ...] = (),
) -> tuple[Adapter, TrainingReport]:
    """Train an adapter on batches; select the best by mean NDCG@10 over the domains' validation users.

    Args:
        name: subject of progress lines.
        domains: one, or several that share a backbone.
        batches: endless: the domain, its users, and the epochs done after them.
        lora, settings, seed, progress, checkpoint: as for :func:`train_expert`, which states results and errors.
        start: the adapter to train; None for a fresh one.
        proximal: μ of FedProx, the pull towards it.
        term: as for :func:`continue_adapter`.
        scope: names of the randomness of augmentations and auxiliary losses, after the seed and the domain's name.
    """
    titles = next_titles(settings, *domains)
    examples = [
        evaluation_examples(domain.interactions, "valid", settings.validation_users, seed) for domain in domains
    ]

    def validate() -> float:
        scores = [_validation_ndcg(domain, of_domain) for domain, of_domain in zip(domains, examples, strict=True)]
        return float(np.mean(scores))

    names = {domain.manifest.name: domain for domain in domains}
    prepared = {of: prepare(domain, settings, seed, of, *scope) for of, domain in names.items()}
    auxiliaries = {domain: auxiliary for domain, auxiliary in prepared.items() if auxiliary is not None}
    schedule = Schedule(
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        budget=budget_of(settings),
        check_every=settings.validate_every_steps,
        patience=PATIENCE,
    )

    def init(attached: Attached, first: int) -> Step:
        penalty = with_term(proximal_penalty(attached, proximal), term, first)
        return batch_steps(batches, settings, attached, first, penalty, auxiliaries, titles)

    recipe = Recipe(name, init, schedule, validate, start, beside=trained_maps(auxiliaries.values()))
    trained = fit(recipe, domains[0].backbone, lora, seed, progress, checkpoint)
    num_users = sum(len(of_domain) for of_domain in examples)
    return trained.adapter, TrainingReport(
        trained.steps,
        trained.best_step,
        trained.stopped_by,
        trained.seconds,
        num_users,
        trained.validations,
        trained.signals,
    )


def training_record(settings: Train) -> dict[str, Any]:
    """Return all that training depends on besides data and seed, as the keys of caches have it."""
    return {**settings.cache_inputs(), "temperature": TEMPERATURE, "patience": PATIENCE}


def check_can_train(domain: LocalDomain) -> None:
    """Refuse a domain with fewer than two users to train on.

    Raises:
        DomainError: names the number of users.
    """
    if not domain.can_train:
        raise DomainError(
            f"domain {domain.manifest.name}: {len(domain.training_sequences)} users have at least two items outside "
            "validation and test, but training needs two such users. List the domain under domains.unseen, or give it "
            "more data."
        )


def _validation_ndcg(domain: LocalDomain, examples: Examples) -> float:
    users = domain.packed(examples.histories)
    ranks = rank_targets(
        encode(domain.backbone, users), encode(domain.backbone, domain.item_sequences), examples.targets
    )
    return selection_score(ranks)
