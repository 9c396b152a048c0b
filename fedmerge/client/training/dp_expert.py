"""A training with differential privacy by user, from a fresh adapter to the last step."""

import time
from pathlib import Path

import torch

from fedmerge.adapter import Adapter
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.checkpoint import BegunTraining, begun_training, keep_begun, restore, state_tensors
from fedmerge.client.training.dp_sgd import UserPlan, private_steps
from fedmerge.client.training.expert import Progress, TrainingReport, check_can_train
from fedmerge.config import Lora, Train
from fedmerge.encoder.lora import adapter_of, attach


def train_private_expert(
    domain: LocalDomain,
    lora: Lora,
    settings: Train,
    seed: int,
    plan: UserPlan,
    progress: Progress = lambda line: None,
    begun: Path | None = None,
) -> tuple[Adapter, TrainingReport]:
    """Fine-tune a fresh adapter with differential privacy by user, and keep the last one: no validation user is
    looked at, so there is no early stopping and the report tells no loss.

    Args:
        domain, lora, settings, seed, progress, begun: see :func:`fedmerge.client.training.expert.train_expert`.
            The state is kept where that one would validate. With system randomness, a resumed training has
            other noise than an uninterrupted one.
        plan: what is spent.

    Raises:
        DomainError: nobody to train on.
    """
    name = domain.manifest.name
    check_can_train(domain)
    started = time.monotonic()
    model = attach(domain.backbone, lora.target_modules, lora.rank, lora.alpha, seed)
    try:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
        first = 0
        if before := begun and begun_training(begun):
            restore(before.tensors, parameters, optimizer)
            first, started = before.step, started - before.seconds
            progress(f"{name}: goes on after step {first}, where an earlier training was ended")
        make = private_steps(domain, model, optimizer, settings, plan, seed, name)
        for step in range(first, plan.steps):
            rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
            make(step, rate * (1.0 - step / plan.steps))
            done = step + 1
            if done % settings.validate_every_steps == 0 and done < plan.steps:
                progress(f"{name}: step {done} of {plan.steps}, with noise")
                if begun:
                    tensors, seconds = state_tensors(parameters, optimizer), time.monotonic() - started
                    spent = done / plan.steps
                    keep_begun(begun, BegunTraining(done, spent, seconds, done, adapter_of(model), (), tensors))
        trained = adapter_of(model)
    finally:
        model.unload()
    return trained, TrainingReport(plan.steps, plan.steps, "max_steps", time.monotonic() - started, 0, ())
