"""One round of a federation at a client: from the adapter that the server says, on what it says is frozen."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch

from fedmerge.adapter import Adapter
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.dp_sgd import UserPlan, items_are_due, private_steps
from fedmerge.client.training.expert import (
    Progress,
    check_can_train,
    check_loss,
    spent_budget,
    training_batches,
    training_step,
)
from fedmerge.client.training.losses import proximal_term
from fedmerge.config import Lora, Train
from fedmerge.encoder.encode import encode
from fedmerge.encoder.frozen import frozen_products, using
from fedmerge.encoder.lora import adapter_of, applied, attach, load_into
from fedmerge.privacy.dp.agreement import steps_of_round


@dataclass(frozen=True)
class RoundTask:
    """What a client is to do in a round.

    Attributes:
        number: of the round, from 1.
        num_rounds: in all; the budgets of ``train`` are those of all rounds together.
        start: the adapter that is trained.
        base: folded into the backbone, frozen; None: nothing.
        trained: "B": A is frozen, too.
        proximal: μ of FedProx; 0: none.
    """

    number: int
    num_rounds: int
    start: Adapter
    base: Adapter | None = None
    trained: Literal["A and B", "B"] = "A and B"
    proximal: float = 0.0


@dataclass(frozen=True)
class RoundReport:
    """How a client's round went: steps, the limit that ended it, wall clock, mean training loss, if looked at."""

    steps: int
    stopped_by: str
    seconds: float
    loss: float | None


def train_round(
    domain: LocalDomain,
    lora: Lora,
    settings: Train,
    seed: int,
    task: RoundTask,
    progress: Progress = lambda line: None,
    plan: UserPlan | None = None,
) -> tuple[Adapter, RoundReport]:
    """A round's steps; what they end with is sent, so no validation user is looked at.

    The learning rate falls linearly over all rounds, with a warm-up in each, since every round has a new optimiser.

    Args:
        domain: the client's own.
        lora: layout of the adapter.
        settings: optimiser and budgets.
        seed: of the experiment; sampling depends on it, on the domain's name and on the round.
        task: see there.
        progress: receives a line.
        plan: of a training with differential privacy by user, over all rounds together; None: without.

    Returns:
        The adapter in float32 on the CPU, and how it came about.

    Raises:
        DomainError: nobody to train on.
        ClientError: the loss is no longer finite.
        LayoutMismatchError: an adapter for another backbone.
    """
    name = domain.manifest.name
    check_can_train(domain)
    started = time.monotonic()
    with applied(domain.backbone, task.base):
        like = next(iter(task.start.modules.values()))
        model = attach(domain.backbone, lora.target_modules, like.rank, like.rank * like.scaling, seed)
        try:
            load_into(model, task.start)
            if task.trained == "B":
                for parameter_name, parameter in model.named_parameters():
                    parameter.requires_grad_("lora_B" in parameter_name)
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            before = [parameter.detach().clone() for parameter in parameters]
            optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
            penalty = partial(proximal_term, parameters, before, task.proximal) if task.proximal else None
            share = settings_of_round(settings, task)

            def rate(step: int, spent: float) -> float:
                warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
                return settings.learning_rate * warm * (1.0 - (task.number - 1 + spent) / task.num_rounds)

            scope = (name, "round", task.number)
            losses: list[float] = []
            if plan is not None:
                steps, stopped_by = int(share.max_steps or 0), "max_steps"
                make = private_steps(domain, model, optimizer, settings, plan, seed, *scope)
                for step in range(steps):
                    make(step, rate(step, step / steps), penalty)
            else:
                stopped_by, spent, items, products = "", 0.0, None, frozen_products(domain.backbone)
                drawn = training_batches(domain.training_sequences, settings, seed, *scope)
                while not stopped_by:
                    batch, epochs = next(drawn)
                    if settings.negatives == "catalog" and items_are_due(settings, len(losses)):
                        items = encode(domain.backbone, domain.item_sequences).to(domain.backbone.device)
                    current = rate(len(losses), spent)
                    with using(products):
                        loss = training_step(domain, batch, settings, optimizer, current, items, penalty)
                    check_loss(name, loss, len(losses) + 1, settings)
                    losses.append(loss)
                    spent, stopped_by = spent_budget(share, len(losses), epochs, time.monotonic() - started)
                steps = len(losses)
            mean = float(np.mean(losses)) if losses else None
            told = "with noise" if mean is None else f"loss {mean:.3f}"
            progress(f"{name}: round {task.number} of {task.num_rounds}, {steps} steps, {told}")
            trained = adapter_of(model)
        finally:
            model.unload()
    seconds = time.monotonic() - started
    return trained, RoundReport(steps, stopped_by, seconds, mean)


def settings_of_round(settings: Train, task: RoundTask) -> Train:
    """The part of the budgets that a round has: a step or more; ``max_steps`` in all, where rounds are not more."""
    shares = {
        "max_steps": settings.max_steps and steps_of_round(settings.max_steps, task.number, task.num_rounds),
        "max_epochs": settings.max_epochs and settings.max_epochs / task.num_rounds,
        "max_minutes": settings.max_minutes and settings.max_minutes / task.num_rounds,
    }
    return settings.model_copy(update=shares)
