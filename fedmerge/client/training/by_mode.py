"""Training as ``dp.mode`` and the simulation ask: plain, with noise by user or by domain, or poisoned.

Of an expert, or of another domain's adapter that is continued.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedmerge.adapter import Adapter
from fedmerge.client.auxiliary.prepared import prepare
from fedmerge.client.auxiliary.shared_items import Term, similarity_loss, with_term
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.dp_sgd import UserPlan, plan_record, private_steps, user_plan
from fedmerge.client.training.expert import (
    TrainingReport,
    check_can_train,
    continue_adapter,
    train_expert,
    weaving_settings,
)
from fedmerge.client.training.loop import Attached, Budget, Progress, Recipe, Schedule, Step, fit
from fedmerge.client.training.plain_sgd import proximal_penalty
from fedmerge.client.training.poisoning import continue_poisoned, is_attacker, train_poisoned_expert
from fedmerge.client.training.settings import TrainingSettings, WeaveTask
from fedmerge.config import Lora, Train
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.errors import DivergedError
from fedmerge.privacy.dp.accountant import agreed_noise
from fedmerge.privacy.dp.domain_noise import add_noise, domain_record
from fedmerge.privacy.dp.randomness import source
from fedmerge.privacy.dp.releases import domain_releases


def train_adapter(
    domain: LocalDomain,
    settings: TrainingSettings,
    progress: Progress = lambda line: None,
    checkpoint: Path | None = None,
) -> tuple[Adapter, TrainingReport, Mapping[str, Any] | None]:
    """Train the expert as ``dp.mode`` and the simulation ask.

    Returns:
        The adapter, its report, and the record of its privacy loss; None without noise of the client.

    Raises:
        DomainError: the data do not allow the training.
        ClientError: the loss is not finite, or the checkpoint cannot be written.
        ConfigError: no noise is enough, or Opacus is not installed.
    """
    dp, train, name, lora = settings.dp, settings.train, domain.manifest.name, settings.lora.of(domain.manifest.name)
    if dp.mode == "user":
        check_can_train(domain)
        plan = user_plan(domain, train, dp, settings.answers, settings.sums, settings.woven_steps)
        progress(f"{name}: differential privacy by user, noise multiplier {plan.noise_multiplier:.3f}")
        adapter, report = train_private_expert(domain, lora, train, settings.seed, plan, progress, checkpoint)
        return adapter, report, plan_record(plan)
    if is_attacker(settings.simulation, name):
        return *train_poisoned_expert(domain, settings, checkpoint, progress), None
    if dp.mode == "domain-local":
        return _train_noisy_expert(domain, settings, progress, checkpoint)
    return *train_expert(domain, lora, train, settings.seed, progress, checkpoint), None


def continue_as_asked(
    domain: LocalDomain,
    settings: TrainingSettings,
    task: WeaveTask,
    progress: Progress = lambda line: None,
    checkpoint: Path | None = None,
) -> tuple[Adapter, TrainingReport, Mapping[str, Any] | None]:
    """Continue an adapter as ``dp.mode`` and the simulation ask; without steps it stays as it is.

    Args:
        domain, settings, progress, checkpoint: as for :func:`train_adapter`, which states results and errors.
        task: the adapter to continue.

    Raises:
        LayoutMismatchError: an adapter of another backbone.
    """
    name, weave, seed = domain.manifest.name, settings.weave, settings.seed
    lora, train = settings.lora.of(name), weaving_settings(settings.train, weave)
    if weave.steps == 0:
        return task.start, TrainingReport(0, 0, "max_steps", 0.0, 0, ()), None
    term: Term | None = None
    if task.similarity is not None and weave.similarity_weight:
        term = partial(similarity_loss, domain, task.similarity, weave.similarity_weight, seed)
    if settings.dp.mode == "user":
        check_can_train(domain)
        of_expert = user_plan(
            domain, settings.train, settings.dp, settings.answers, settings.sums, settings.woven_steps
        )
        plan = replace(of_expert, steps=weave.steps)
        adapter, report = train_private_expert(
            domain, lora, train, seed, plan, progress, checkpoint, task.start, task.source, weave.proximal, term
        )
        return adapter, report, plan_record(plan)
    if is_attacker(settings.simulation, name):
        return *continue_poisoned(domain, replace(settings, train=train), task, progress), None
    continued = continue_adapter(
        domain, lora, train, seed, task.start, task.source, weave.proximal, progress, checkpoint, term
    )
    return *continued, None


def _train_noisy_expert(
    domain: LocalDomain, settings: TrainingSettings, progress: Progress, checkpoint: Path | None
) -> tuple[Adapter, TrainingReport, Mapping[str, Any]]:
    """Train an expert, clip it and add noise; the report hides the training, except for its duration."""
    dp, name, lora = settings.dp, domain.manifest.name, settings.lora.of(domain.manifest.name)
    started = time.monotonic()
    start = fresh_adapter(domain.backbone, lora, settings.seed)
    try:
        adapter, _ = train_expert(domain, lora, settings.train, settings.seed, progress, checkpoint)
    except DivergedError as error:
        progress(f"{error} Noise alone is sent.")  # a reported divergence would reveal data
        adapter = start
    noise = agreed_noise(dp, domain_releases(settings.answers.number))
    drawn = source(dp.randomness, settings.seed, "client", name, "domain-dp")
    report = TrainingReport(0, 0, "not told", time.monotonic() - started, 0, ())
    return add_noise(adapter, start, dp.clip, noise, drawn), report, domain_record(dp, noise)


def train_private_expert(
    domain: LocalDomain,
    lora: Lora,
    settings: Train,
    seed: int,
    plan: UserPlan,
    progress: Progress = lambda line: None,
    checkpoint: Path | None = None,
    start: Adapter | None = None,
    source: str = "",
    proximal: float = 0.0,
    term: Term | None = None,
) -> tuple[Adapter, TrainingReport]:
    """Fine-tune an adapter with user-level differential privacy, and return the last one.

    No validation user is read, so there is no early stopping and the report has no loss.

    Args:
        domain, lora, settings, seed, progress: see :func:`fedmerge.client.training.expert.train_expert`.
        plan: noise, sampling and steps.
        checkpoint: written where :func:`~fedmerge.client.training.expert.train_expert` would validate. With system
            randomness a resumed training draws other noise than an uninterrupted one.
        start, source, proximal, term: as for :func:`fedmerge.client.training.expert.continue_adapter`; None for a
            fresh adapter.

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
    scope = (name,) if start is None else (name, "weave", source)
    auxiliary = prepare(domain, settings, seed, *scope, by_user=True)

    def init(attached: Attached, first: int) -> Step:
        penalty = with_term(proximal_penalty(attached, proximal), term, first)
        return private_steps(domain, attached, settings, plan, seed, *scope, penalty=penalty, auxiliary=auxiliary)

    recipe = Recipe(name, init, schedule, start=start)
    trained = fit(recipe, domain.backbone, lora, seed, progress, checkpoint)
    return trained.adapter, TrainingReport(plan.steps, plan.steps, "max_steps", trained.seconds, 0, ())
