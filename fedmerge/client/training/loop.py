"""The training loop of every kind of local training: expert, private expert, round, joint training.

A :class:`Recipe` holds what differs between them; :func:`fit` is the loop: attach, restore, step, validate,
checkpoint, unload.
"""

import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from fedmerge.adapter import Adapter
from fedmerge.client.training.checkpoint import (
    TrainingState,
    Validation,
    read_checkpoint,
    write_checkpoint,
)
from fedmerge.client.training_signals import SignalSums
from fedmerge.config import Lora, Train
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import adapter_of, attach, factors_of, load_into
from fedmerge.tensor_files import restore, state_tensors

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Attached:
    """A trainable LoRA on the backbone, with its optimiser.

    Attributes:
        model: the backbone with the LoRA attached.
        parameters: the trainable ones.
        optimizer: AdamW over them and what is trained beside them, without weight decay.
        start: copies of their values before the first step, also in a training that resumes.
    """

    model: PeftModel
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    start: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step: the training loss, None where noise hides it, and the epochs done after it."""

    loss: float | None
    epochs: float = 0.0


Step = Callable[[int], StepResult]
"""Makes the optimiser step of this number, from 0; the learning rate is set before."""


@dataclass(frozen=True)
class Budget:
    """Limits of a training; it ends at the first one reached. None: no such limit."""

    max_steps: int | None = None
    max_epochs: float | None = None
    max_minutes: float | None = None

    def spent(self, steps: int, epochs: float, seconds: float) -> tuple[float, str]:
        """Return the share of the budget spent, in [0, 1], and the limit reached, if any."""
        shares = {
            "max_steps": steps / self.max_steps if self.max_steps else 0.0,
            "max_epochs": epochs / self.max_epochs if self.max_epochs else 0.0,
            "max_minutes": seconds / 60 / self.max_minutes if self.max_minutes else 0.0,
        }
        limit = max(shares, key=lambda name: shares[name])
        return min(1.0, shares[limit]), limit if shares[limit] >= 1.0 else ""


def budget_of(settings: Train) -> Budget:
    """The limits of ``[train]``."""
    return Budget(settings.max_steps, settings.max_epochs, settings.max_minutes)


@dataclass(frozen=True)
class Schedule:
    """The learning rate and the end of a training, and the steps after which it is validated.

    rate = learning_rate · min(1, (step + 1) / warmup_steps) · (1 − (round_number − 1 + spent) / num_rounds)

    Attributes:
        learning_rate: of AdamW after warm-up.
        warmup_steps: in every round, since every round has a new optimiser.
        budget: limits of this training.
        check_every: steps between validations and checkpoints; None: neither.
        patience: number of validations without improvement that ends the training.
        round_number: from 1.
        num_rounds: over which the learning rate falls to zero.
    """

    learning_rate: float
    warmup_steps: int
    budget: Budget
    check_every: int | None = None
    patience: int = 1
    round_number: int = 1
    num_rounds: int = 1

    def rate(self, step: int, spent: float) -> float:
        """Return the learning rate of a step.

        Args:
            step: its number, from 0.
            spent: share of the budget spent before it, in [0, 1].
        """
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.learning_rate * warm * (1.0 - (self.round_number - 1 + spent) / self.num_rounds)


@dataclass(frozen=True)
class Recipe:
    """The differences between kinds of training.

    Attributes:
        name: subject of progress lines.
        init: makes the step function: (the attached LoRA, steps already made) -> step.
        schedule: learning rate, budget, validations.
        validate: returns NDCG@10 of the validation users; the best adapter is returned. None: the last one is, and
            nothing is validated.
        start: the adapter to start from; None: a fresh one.
        only_B: A is frozen.
        beside: parameters that are trained beside the adapter, checkpointed with it, and dropped at the end.
    """

    name: str
    init: Callable[[Attached, int], Step]
    schedule: Schedule
    validate: Callable[[], float] | None = None
    start: Adapter | None = None
    only_B: bool = False
    beside: tuple[torch.nn.Parameter, ...] = ()


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        adapter: the best one on validation, or the last one; float32 on the CPU.
        steps: optimiser steps made.
        best_step: the step of that adapter; 0 is the start.
        stopped_by: the limit that ended the training, or ``patience``.
        seconds: wall clock, over all attempts.
        validations: in order.
        loss: mean training loss since the last validation, None where noise hides it.
        signals: module -> its training signals (I_A, I_B) over all steps; None if they are not finite, or if an earlier
            version, which did not measure them, made some of the steps.
    """

    adapter: Adapter
    steps: int
    best_step: int
    stopped_by: str
    seconds: float
    validations: tuple[Validation, ...]
    loss: float | None
    signals: Mapping[str, tuple[float, float]] | None


def fit(
    recipe: Recipe,
    backbone: Backbone,
    lora: Lora,
    seed: int,
    progress: Progress = lambda line: None,
    checkpoint: Path | None = None,
) -> Trained:
    """Train an adapter on a backbone, which stays unchanged.

    Args:
        recipe: the kind of training.
        backbone: the frozen encoder of all domains of the training.
        lora: layout of the adapter; ``recipe.start`` has its own rank and scaling.
        seed: seed of a fresh adapter.
        progress: receives a line when training resumes, and after every validation or checkpoint.
        checkpoint: file that holds the state after every ``check_every`` steps; an interrupted training resumes from it
            with an identical result. None: it would start again. The caller removes it once the result is stored.

    Raises:
        ClientError: the loss is not finite, or the checkpoint cannot be written.
        LayoutMismatchError: ``recipe.start`` is an adapter of another backbone.
    """
    started = time.monotonic()
    schedule, validate, name = recipe.schedule, recipe.validate, recipe.name
    with _attached(backbone, lora, seed, schedule.learning_rate, recipe) as attached:
        trained = [*attached.parameters, *recipe.beside]
        step, spent, best_step, stopped_by = 0, 0.0, 0, ""
        losses: list[float] = []
        validations: list[Validation] = []
        signals = SignalSums(factors_of(attached.model))

        # Resume from the checkpoint, or validate the untouched backbone.
        if before := checkpoint and read_checkpoint(checkpoint):
            restore(before.tensors, trained, attached.optimizer)
            best, best_step, validations = before.best, before.best_step, list(before.validations)
            step, spent = before.step, before.spent
            signals = SignalSums(factors_of(attached.model), before.signals or (math.nan,) * len(signals.values))
            started -= before.seconds
            progress(f"{name}: resuming at step {step}")
        else:
            best = adapter_of(attached.model)
            if validate:
                validations = [Validation(0, math.nan, validate())]
                progress(f"{name}: start, validation ndcg@10 {validations[0].ndcg:.4f}")

        make_step = recipe.init(attached, step)
        while not stopped_by:
            for group in attached.optimizer.param_groups:
                group["lr"] = schedule.rate(step, spent)
            with signals.measured():
                result = make_step(step)
            step += 1
            if result.loss is not None:
                losses.append(result.loss)
            spent, stopped_by = schedule.budget.spent(step, result.epochs, time.monotonic() - started)
            due = schedule.check_every is not None and step % schedule.check_every == 0

            # Validate, and keep the best adapter.
            if validate and (due or stopped_by):
                validations.append(Validation(step, float(np.mean(losses)), validate()))
                losses.clear()
                if validations[-1].ndcg > max(earlier.ndcg for earlier in validations[:-1]):
                    best, best_step = adapter_of(attached.model), step
                elif sum(validation.step > best_step for validation in validations) >= schedule.patience:
                    stopped_by = stopped_by or "patience"
                learned = not stopped_by or best_step
                progress(_validation_line(recipe, spent, validations, nothing_learned=not learned))
            elif due and not stopped_by:
                best, best_step = adapter_of(attached.model), step
                progress(f"{name}: step {step}, {100 * spent:.0f} % of the budget")

            if checkpoint and due and not stopped_by:
                tensors, seconds = state_tensors(trained, attached.optimizer), time.monotonic() - started
                write_checkpoint(
                    checkpoint,
                    TrainingState(step, spent, seconds, best_step, best, tuple(validations), tensors, signals.values),
                )
        if not validate:
            best, best_step = adapter_of(attached.model), step
    seconds = time.monotonic() - started
    loss = float(np.mean(losses)) if losses else None
    return Trained(best, step, best_step, stopped_by, seconds, tuple(validations), loss, signals.of_modules())


@contextmanager
def _attached(backbone: Backbone, lora: Lora, seed: int, learning_rate: float, recipe: Recipe) -> Iterator[Attached]:
    """Attach the LoRA of a recipe with a new optimiser; unload it and give memory back afterwards."""
    rank, alpha = lora.rank, float(lora.scaled_alpha)
    if recipe.start is not None:
        like = next(iter(recipe.start.modules.values()))
        rank, alpha = like.rank, like.rank * like.scaling
    model = attach(backbone, lora.target_modules, rank, alpha, seed)
    try:
        if recipe.start is not None:
            load_into(model, recipe.start)
        if recipe.only_B:
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_B" in parameter_name)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW([*parameters, *recipe.beside], lr=learning_rate, weight_decay=0.0)
        yield Attached(model, parameters, optimizer, [parameter.detach().clone() for parameter in parameters])
    finally:
        model.unload()
        give_back_memory()


def _validation_line(recipe: Recipe, spent: float, validations: list[Validation], nothing_learned: bool) -> str:
    last = validations[-1]
    start = "untouched backbone" if recipe.start is None else "adapter that was received"
    line = (
        f"{recipe.name}: step {last.step}, {100 * spent:.0f} % of the budget, loss {last.loss:.3f}, "
        f"validation ndcg@10 {last.ndcg:.4f} (best {max(validation.ndcg for validation in validations):.4f})"
    )
    return f"{line}; nothing was learned: no validation beats the {start}" if nothing_learned else line


def give_back_memory() -> None:
    """Return memory that was freed to the system, and that of a GPU to other processes.

    glibc keeps what is freed for later. Lengths differ from batch to batch, so little of it is used again, and a client
    that has trained holds several times what it needs.
    """
    torch.cuda.empty_cache()  # nothing where there is no GPU
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
