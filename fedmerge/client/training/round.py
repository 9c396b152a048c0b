"""One round of a federation at a client: train from the server's adapter, on what the server freezes."""

from dataclasses import dataclass
from typing import Literal

from fedmerge.adapter import Adapter
from fedmerge.client.auxiliary.prepared import prepare, trained_maps
from fedmerge.client.csft import next_titles
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.batches import training_batches
from fedmerge.client.training.dp_sgd import UserPlan, private_steps
from fedmerge.client.training.expert import check_can_train
from fedmerge.client.training.loop import (
    Attached,
    Budget,
    Progress,
    Recipe,
    Schedule,
    Step,
    budget_of,
    fit,
)
from fedmerge.client.training.plain_sgd import batch_steps, proximal_penalty
from fedmerge.config import Lora, Train
from fedmerge.encoder.lora import applied
from fedmerge.federated.rounds import steps_of_round


@dataclass(frozen=True)
class RoundTask:
    """The server's request for the training of a round.

    Attributes:
        number: number of the round, from 1.
        num_rounds: number of all rounds, which share the budgets of ``train``.
        start: the adapter to train.
        base: adapter that is folded into the backbone and frozen, or None.
        trained: the trained factors; "B" freezes A.
        proximal: μ of FedProx; 0 adds no penalty.
    """

    number: int
    num_rounds: int
    start: Adapter
    base: Adapter | None = None
    trained: Literal["A and B", "B"] = "A and B"
    proximal: float = 0.0


@dataclass(frozen=True)
class RoundReport:
    """Report of a client's round: steps, the limit that ended it, wall clock, mean training loss (None with noise)."""

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
    """Make the steps of a round and return the last adapter; no validation user is read.

    The learning rate falls linearly over all rounds, with a warm-up in each, since every round has a new optimiser.

    Args:
        domain: the client's domain.
        lora: layout of the adapter.
        settings: optimiser and budgets.
        seed: seed of the experiment; sampling depends on it, on the domain's name and on the round.
        task: the round.
        progress: receives one line.
        plan: plan of user-level differential privacy, over all rounds together; None: without noise.

    Returns:
        The adapter in float32 on the CPU, and its report.

    Raises:
        DomainError: fewer than two users to train on.
        ClientError: the loss is not finite.
        LayoutMismatchError: an adapter of another backbone.
    """
    check_can_train(domain)
    name = domain.manifest.name
    share, scope = settings_of_round(settings, task), (name, "round", task.number)
    auxiliary = prepare(domain, settings, seed, *scope, by_user=plan is not None)
    auxiliaries = {} if auxiliary is None else {name: auxiliary}
    titles = next_titles(settings, domain)

    def init(attached: Attached, first: int) -> Step:
        penalty = proximal_penalty(attached, task.proximal)
        if plan is not None:
            return private_steps(domain, attached, settings, plan, seed, *scope, penalty=penalty, auxiliary=auxiliary)
        drawn = training_batches(domain.training_sequences, settings, seed, *scope)
        batches = ((domain, batch, epochs) for batch, epochs in drawn)
        return batch_steps(batches, settings, attached, first, penalty, auxiliaries, titles)

    schedule = Schedule(
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        budget=budget_of(share) if plan is None else Budget(max_steps=share.max_steps),
        round_number=task.number,
        num_rounds=task.num_rounds,
    )
    beside = trained_maps(auxiliaries.values())
    recipe = Recipe(name, init, schedule, start=task.start, only_B=task.trained == "B", beside=beside)
    with applied(domain.backbone, task.base):
        trained = fit(recipe, domain.backbone, lora, seed)
    result = "with noise" if trained.loss is None else f"loss {trained.loss:.3f}"
    progress(f"{name}: round {task.number} of {task.num_rounds}, {trained.steps} steps, {result}")
    return trained.adapter, RoundReport(trained.steps, trained.stopped_by, trained.seconds, trained.loss)


def settings_of_round(settings: Train, task: RoundTask) -> Train:
    """Return the settings with a round's share of the budgets: at least one step, and ``max_steps`` in all rounds
    together, if there are no more rounds than steps.
    """
    shares = {
        "max_steps": settings.max_steps and steps_of_round(settings.max_steps, task.number, task.num_rounds),
        "max_epochs": settings.max_epochs and settings.max_epochs / task.num_rounds,
        "max_minutes": settings.max_minutes and settings.max_minutes / task.num_rounds,
    }
    return settings.model_copy(update=shares)
