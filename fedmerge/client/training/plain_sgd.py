"""Optimiser steps without differential privacy: the loss of a batch, and the check that it is finite."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fedmerge.client.auxiliary.objectives import auxiliary_losses
from fedmerge.client.auxiliary.prepared import NO_AUXILIARIES, Auxiliary, augmented_histories
from fedmerge.client.csft import NO_TITLES, NextTitles, csft_loss
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.batches import Batch
from fedmerge.client.training.loop import Attached, Step, StepResult
from fedmerge.client.training.losses import TEMPERATURE, catalog_softmax, in_batch_softmax, proximal_term
from fedmerge.config import Train
from fedmerge.encoder.encode import embed_in_groups, encode, tokens_at_once
from fedmerge.encoder.fast.frozen import frozen_products, using
from fedmerge.errors import DivergedError


def batch_steps(
    batches: Iterator[tuple[LocalDomain, Batch, float]],
    settings: Train,
    attached: Attached,
    first: int,
    penalty: Callable[[], torch.Tensor] | None = None,
    auxiliaries: Mapping[str, Auxiliary] = NO_AUXILIARIES,
    titles: Mapping[str, NextTitles] = NO_TITLES,
) -> Step:
    """Return the step function that trains on one batch after the other.

    Args:
        batches: endless, from step 0: the domain, its users, and the epochs done after them.
        settings: negatives and their refresh, learning rate for the message.
        attached: the LoRA on the backbone that the domains share.
        first: number of the first step; earlier batches are skipped.
        penalty: a term added to the loss.
        auxiliaries: domain -> auxiliary losses and augmentations; none for those that are missing.
        titles: of :func:`fedmerge.client.csft.next_titles`.

    Returns:
        A step function that raises DivergedError when the loss is not finite.
    """
    left, encoded = itertools.islice(batches, first, None), dict[str, torch.Tensor]()
    products = None

    def step(number: int) -> StepResult:
        nonlocal products
        domain, batch, epochs = next(left)
        if products is None:
            products = frozen_products(domain.backbone)
        items, added = _catalog_negatives(domain, settings, number, encoded), penalty
        if (auxiliary := auxiliaries.get(domain.manifest.name)) is not None:
            added = partial(_added_losses, auxiliary, domain, batch, number, penalty)
            histories = augmented_histories(auxiliary, domain, batch.histories, batch.users, number)
            batch = replace(batch, histories=histories)
        with using(products), tokens_at_once(settings.tokens_at_once):
            loss = training_step(domain, batch, attached.optimizer, items, added, titles.get(domain.manifest.name))
        check_loss(domain.manifest.name, loss, number + 1, settings)
        return StepResult(loss, epochs)

    return step


def training_step(
    domain: LocalDomain,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    items: torch.Tensor | None = None,
    penalty: Callable[[], torch.Tensor] | None = None,
    titles: NextTitles | None = None,
) -> float:
    """Make one optimiser step and return the loss before it; a loss that is not finite changes nothing.

    Args:
        domain: the client's domain.
        batch: users of the step.
        optimizer: optimiser of the adapter's parameters, with the learning rate set.
        items: (N, d) vectors of the whole catalog as negatives; None: the targets of the batch are.
        penalty: a term added to the loss.
        titles: what CSFT needs; None: the loss is InfoNCE.
    """
    optimizer.zero_grad()
    loss = batch_loss(domain, batch, items) if titles is None else csft_loss(domain, titles, batch)
    if penalty is not None:
        loss = loss + penalty()
    if math.isfinite(loss.item()):
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        optimizer.step()
    return loss.item()


def _added_losses(
    auxiliary: Auxiliary, domain: LocalDomain, batch: Batch, step: int, penalty: Callable[[], torch.Tensor] | None
) -> torch.Tensor:
    """Return the auxiliary losses of a batch together with the penalty, if there is one."""
    terms = [] if penalty is None else [penalty()]
    terms += auxiliary_losses(auxiliary, domain, batch.histories, batch.users, step)
    return torch.stack(terms).sum() if terms else torch.zeros((), device=domain.backbone.device)


def proximal_penalty(attached: Attached, strength: float) -> Callable[[], torch.Tensor] | None:
    """Return the penalty μ/2 ‖θ − θ_start‖² as a term of the loss; None for μ = 0."""
    return partial(proximal_term, attached.parameters, attached.start, strength) if strength else None


def item_refresh_is_due(settings: Train, step: int) -> bool:
    """Return True if the item vectors are encoded again before this step, as before every step that can resume."""
    return (step % settings.validate_every_steps) % settings.item_refresh_steps == 0


def check_loss(name: str, loss: float, step: int, settings: Train) -> None:
    """Refuse a training that has diverged.

    Raises:
        DivergedError: the loss is not finite; names the step.
    """
    if not math.isfinite(loss):
        raise DivergedError(
            f"domain {name}: the training loss is {loss} at step {step}. Lower train.learning_rate "
            f"({settings.learning_rate}) or set runtime.precision = 'float32'."
        )


def _catalog_negatives(
    domain: LocalDomain, settings: Train, step: int, encoded: dict[str, torch.Tensor]
) -> torch.Tensor | None:
    """Return the domain's item vectors, (N, d), encoded again when due; None where the negatives are in the batch."""
    if settings.negatives == "in-batch":
        return None
    if item_refresh_is_due(settings, step):
        encoded.clear()
    name = domain.manifest.name
    if name not in encoded:
        encoded[name] = encode(domain.backbone, domain.item_sequences).to(domain.backbone.device)
    return encoded[name]


def batch_loss(domain: LocalDomain, batch: Batch, items: torch.Tensor | None) -> torch.Tensor:
    """Return the mean loss of a batch under the backbone as it is, differentiable; ``items`` as in a training step."""
    backbone = domain.backbone
    user_vectors = embed_in_groups(backbone, domain.packed(batch.histories))  # (b, d)
    if items is not None:
        targets = torch.from_numpy(batch.targets).to(backbone.device)
        return catalog_softmax(user_vectors, items, targets, TEMPERATURE).mean()
    numbers, rows = np.unique(batch.targets, return_inverse=True)
    item_vectors = embed_in_groups(backbone, [domain.item_sequences[number] for number in numbers])  # (m, d)
    return in_batch_softmax(user_vectors, item_vectors, torch.from_numpy(rows).to(backbone.device), TEMPERATURE)
