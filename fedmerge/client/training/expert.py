"""Local fine-tuning of a LoRA adapter on a client's own users (METHODS 3)."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.adapter import Adapter
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.checkpoint import (
    BegunTraining,
    Validation,
    begun_training,
    keep_begun,
    restore,
    state_tensors,
)
from fedmerge.client.training.dp_sgd import items_are_due
from fedmerge.client.training.losses import catalog_softmax, in_batch_softmax
from fedmerge.config import Lora, Train
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.encode import embed_in_groups, encode
from fedmerge.encoder.frozen import frozen_products, using
from fedmerge.encoder.lora import adapter_of, attach
from fedmerge.encoder.text import pack_sequences
from fedmerge.errors import DivergedError, DomainError
from fedmerge.evaluation.ranks import METRICS, per_user_metrics, rank_targets
from fedmerge.seeding import generator

BATCHES_PER_BUCKET = 16  # batches are formed by length among this many batches of users drawn at random

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TrainingReport:
    """How a training went.

    Attributes:
        steps: optimiser steps made.
        best_step: the step whose adapter was kept; 0 is the untouched backbone.
        stopped_by: the budget that ended it, or ``patience``.
        seconds: wall clock.
        validation_users: how many users the validations look at.
        validations: in order.
    """

    steps: int
    best_step: int
    stopped_by: str
    seconds: float
    validation_users: int
    validations: tuple[Validation, ...]


@dataclass(frozen=True)
class Batch:
    """One training batch: b histories (oldest first) and their targets."""

    histories: list[npt.NDArray[np.int32]]
    targets: npt.NDArray[np.int64]


def train_expert(
    domain: LocalDomain,
    lora: Lora,
    settings: Train,
    seed: int,
    progress: Progress = lambda line: None,
    begun: Path | None = None,
) -> tuple[Adapter, TrainingReport]:
    """Fine-tune a fresh adapter and keep the one that ranks the validation users best (NDCG@10, unmasked).

    Args:
        domain: the client's own.
        lora: layout of the adapter.
        settings: optimiser and budgets; training ends at the first one reached.
        seed: of the experiment; sampling depends on it and on the domain's name only.
        progress: receives one line after every validation.
        begun: file that holds the state after every validation, so that a training that is ended goes on from there, to
            the same result; None: it would start again. Whoever has kept the expert removes it.

    Returns:
        The adapter in float32 on the CPU, and how it came about.

    Raises:
        DomainError: nobody to train on.
        ClientError: the loss is no longer finite.
    """
    check_can_train(domain)
    name = domain.manifest.name
    drawn = training_batches(domain.training_sequences, settings, seed, name)
    batches = ((domain, batch, epochs) for batch, epochs in drawn)
    return fine_tune(name, [domain], batches, lora, settings, seed, progress, begun)


def fine_tune(
    name: str,
    domains: Sequence[LocalDomain],
    batches: Iterator[tuple[LocalDomain, Batch, float]],
    lora: Lora,
    settings: Train,
    seed: int,
    progress: Progress = lambda line: None,
    begun: Path | None = None,
) -> tuple[Adapter, TrainingReport]:
    """Train a fresh adapter on batches; keep the one with the best mean NDCG@10 over the domains' validation users.

    Args:
        name: of what is trained, for the lines.
        domains: one, or several that share a backbone.
        batches: without end: of which domain, users, and the epochs done after them.
        lora, settings, seed, progress, begun: as for :func:`train_expert`, which says what is returned and raised.
    """
    backbone = domains[0].backbone
    examples = [
        evaluation_examples(domain.interactions, "valid", settings.validation_users, seed) for domain in domains
    ]

    def validated() -> float:
        scores = [_validation_ndcg(domain, of_domain) for domain, of_domain in zip(domains, examples, strict=True)]
        return float(np.mean(scores))

    started = time.monotonic()
    model = attach(backbone, lora.target_modules, lora.rank, lora.alpha, seed)
    try:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
        losses: list[float] = []
        stopped_by = ""
        if before := begun and begun_training(begun):
            restore(before.tensors, parameters, optimizer)
            best, validations, best_step = before.best, list(before.validations), before.best_step
            step, spent = before.step, before.spent
            started -= before.seconds
            progress(f"{name}: goes on after step {step}, where an earlier training was ended")
        else:
            best, validations = adapter_of(model), [Validation(0, math.nan, validated())]
            best_step, step, spent = 0, 0, 0.0
            progress(f"{name}: start, validation ndcg@10 {validations[0].ndcg:.4f}")
        products, encoded = frozen_products(backbone), dict[str, torch.Tensor]()
        left = itertools.islice(batches, step, None)
        while not stopped_by:
            domain, batch, epochs = next(left)
            rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps)) * (1.0 - spent)
            items = _catalog_negatives(domain, settings, step, encoded)
            with using(products):
                loss = training_step(domain, batch, settings, optimizer, rate, items)
            check_loss(domain.manifest.name, loss, step + 1, settings)
            step += 1
            losses.append(loss)
            spent, stopped_by = spent_budget(settings, step, epochs, time.monotonic() - started)
            if step % settings.validate_every_steps == 0 or stopped_by:
                validations.append(Validation(step, float(np.mean(losses)), validated()))
                losses.clear()
                if validations[-1].ndcg > max(earlier.ndcg for earlier in validations[:-1]):
                    best, best_step = adapter_of(model), step
                elif sum(validation.step > best_step for validation in validations) >= settings.patience:
                    stopped_by = stopped_by or "patience"
                progress(
                    f"{name}: step {step}, {100 * spent:.0f} % of the budget, loss {validations[-1].loss:.3f}, "
                    f"validation ndcg@10 {validations[-1].ndcg:.4f} (best {max(v.ndcg for v in validations):.4f})"
                )
                if begun and not stopped_by:
                    tensors = state_tensors(parameters, optimizer)
                    seconds = time.monotonic() - started
                    keep_begun(begun, BegunTraining(step, spent, seconds, best_step, best, tuple(validations), tensors))
    finally:
        model.unload()
    num_users = sum(len(of_domain) for of_domain in examples)
    return best, TrainingReport(step, best_step, stopped_by, time.monotonic() - started, num_users, tuple(validations))


def _catalog_negatives(
    domain: LocalDomain, settings: Train, step: int, encoded: dict[str, torch.Tensor]
) -> torch.Tensor | None:
    """The domain's item vectors, (N, d), encoded anew when it is time; None where the negatives are in the batch."""
    if settings.negatives == "in-batch":
        return None
    if items_are_due(settings, step):
        encoded.clear()
    name = domain.manifest.name
    if name not in encoded:
        encoded[name] = encode(domain.backbone, domain.item_sequences).to(domain.backbone.device)
    return encoded[name]


def check_can_train(domain: LocalDomain) -> None:
    """Refuse a domain with nobody to train on.

    Raises:
        DomainError: how many users there are.
    """
    if not domain.can_train:
        raise DomainError(
            f"domain {domain.manifest.name}: {len(domain.training_sequences)} users have two items or more outside "
            "validation and test, training needs two users. List it under domains.unseen, or give it more data."
        )


def check_loss(name: str, loss: float, step: int, settings: Train) -> None:
    """Refuse a training that has diverged.

    Raises:
        DivergedError: at which step.
    """
    if not math.isfinite(loss):
        raise DivergedError(
            f"domain {name}: the training loss is {loss} at step {step}. Lower train.learning_rate "
            f"({settings.learning_rate}) or set runtime.precision = 'float32'."
        )


def training_step(
    domain: LocalDomain,
    batch: Batch,
    settings: Train,
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    items: torch.Tensor | None = None,
    penalty: Callable[[], torch.Tensor] | None = None,
) -> float:
    """One optimiser step; the loss before it, after which nothing is changed if it is not finite.

    Args:
        domain: the client's own.
        batch: users.
        settings: the temperature is read.
        optimizer: of the adapter's parameters.
        learning_rate: of this step.
        items: (N, d) vectors of the whole catalog to be the negatives; None: the targets of the batch are.
        penalty: is added to the loss.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss = _loss(domain, batch, settings.temperature, items)
    if penalty is not None:
        loss = loss + penalty()
    if math.isfinite(loss.item()):
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        optimizer.step()
    return loss.item()


def _loss(domain: LocalDomain, batch: Batch, temperature: float, items: torch.Tensor | None) -> torch.Tensor:
    text, backbone = domain.text, domain.backbone
    users = pack_sequences(domain.table, batch.histories, backbone.special, text.max_items, text.max_tokens)
    user_vectors = embed_in_groups(backbone, users)
    if items is not None:
        targets = torch.from_numpy(batch.targets).to(backbone.device)
        return catalog_softmax(user_vectors, items, targets, temperature).mean()
    numbers, rows = np.unique(batch.targets, return_inverse=True)
    item_vectors = embed_in_groups(backbone, [domain.item_sequences[number] for number in numbers])
    return in_batch_softmax(user_vectors, item_vectors, torch.from_numpy(rows).to(backbone.device), temperature)


def _validation_ndcg(domain: LocalDomain, examples: Examples) -> float:
    users = pack_sequences(
        domain.table, examples.histories, domain.backbone.special, domain.text.max_items, domain.text.max_tokens
    )
    ranks = rank_targets(
        encode(domain.backbone, users), encode(domain.backbone, domain.item_sequences), examples.targets
    )
    return float(per_user_metrics(ranks)[:, METRICS.index("ndcg@10")].mean())


def training_batches(
    sequences: list[npt.NDArray[np.int32]], settings: Train, seed: int, *scope: str | int
) -> Iterator[tuple[Batch, float]]:
    """Endless epochs over the users, drawn from seed and scope; with each batch, the epochs done after it."""
    size = settings.batch_size
    per_epoch = max(1, len(sequences) // size)  # a last, smaller batch would have too few negatives: its users wait
    for epoch in itertools.count():
        rng = generator(seed, "client", *scope, "epoch", epoch)
        cuts = [len(sequence) - 1 for sequence in sequences]
        if settings.samples == "random-prefix":
            cuts = rng.integers(1, np.asarray(cuts) + 1).tolist()
        users = rng.permutation(len(sequences))[: per_epoch * size]
        done = 0
        for bucket in np.array_split(users, math.ceil(per_epoch / BATCHES_PER_BUCKET)) if per_epoch > 1 else [users]:
            by_length = bucket[np.argsort([cuts[user] for user in bucket], kind="stable")]
            batches = np.array_split(by_length, max(1, round(len(by_length) / size)))
            for index in rng.permutation(len(batches)):
                done += 1
                chosen = batches[index]
                histories = [sequences[user][: cuts[user]] for user in chosen]
                targets = np.array([sequences[user][cuts[user]] for user in chosen], dtype=np.int64)
                yield Batch(histories, targets), epoch + min(1.0, done / per_epoch)


def spent_budget(settings: Train, step: int, epochs: float, seconds: float) -> tuple[float, str]:
    """The share of the budget that is spent, in [0, 1], and which limit is reached, if any."""
    shares = {
        "max_steps": step / settings.max_steps if settings.max_steps else 0.0,
        "max_epochs": epochs / settings.max_epochs if settings.max_epochs else 0.0,
        "max_minutes": seconds / 60 / settings.max_minutes if settings.max_minutes else 0.0,
    }
    limit = max(shares, key=lambda name: shares[name])
    return min(1.0, shares[limit]), limit if shares[limit] >= 1.0 else ""
