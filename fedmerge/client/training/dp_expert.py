"""Training of an expert with user-level differential privacy, from a fresh adapter to the last step."""

from pathlib import Path

from fedmerge.adapter import Adapter
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.dp_sgd import UserPlan, private_steps
from fedmerge.client.training.expert import TrainingReport, check_can_train
from fedmerge.client.training.loop import Budget, Progress, Recipe, Schedule, fit
from fedmerge.config import Lora, Train


def train_private_expert(
    domain: LocalDomain,
    lora: Lora,
    settings: Train,
    seed: int,
    plan: UserPlan,
    progress: Progress = lambda line: None,
    checkpoint: Path | None = None,
) -> tuple[Adapter, TrainingReport]:
    """Fine-tune a fresh adapter with user-level differential privacy, and return the last one.

    No validation user is read, so there is no early stopping and the report has no loss.

    Args:
        domain, lora, settings, seed, progress: see :func:`fedmerge.client.training.expert.train_expert`.
        plan: noise, sampling and steps.
        checkpoint: written where :func:`~fedmerge.client.training.expert.train_expert` would validate. With system
            randomness a resumed training draws other noise than an uninterrupted one.

    Raises:
        DomainError: fewer than two users to train on.
    """
    check_can_train(domain)
    name = domain.manifest.name
    schedule = Schedule(
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        budget=Budget(max_steps=plan.steps),
        check_every=settings.validate_every_steps,
    )
    recipe = Recipe(name, lambda attached, first: private_steps(domain, attached, settings, plan, seed, name), schedule)
    trained = fit(recipe, domain.backbone, lora, seed, progress, checkpoint)
    return trained.adapter, TrainingReport(plan.steps, plan.steps, "max_steps", trained.seconds, 0, ())
