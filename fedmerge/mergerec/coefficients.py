"""Adam over merging coefficients, wherever their gradient comes from: pseudo-users on a server, or clients."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fedmerge.errors import LayoutMismatchError, MergeError
from fedmerge.merging.stack import StackLayout

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, Mapping[str, float]], None]
Gradient = Callable[[int, torch.Tensor], tuple[torch.Tensor, dict[str, float]]]


@dataclass(frozen=True, slots=True)
class LearnedCoefficients:
    """What was learned.

    Attributes:
        coefficients: (K,) or (K, G) float32, on the CPU, domains in the order of the stack: those of ``chosen_step``.
        history: for every step, before its update, "total" and the terms that it is the weighted sum of; empty where
            the losses stay at the clients.
        initial_coefficients: the same shape, where the optimisation started.
        trajectory: (steps + 1, …) the coefficients after 0, 1, … steps.
        chosen_step: the last one, or the best of ``validation``.
        validation: (step, score) in order, lower is better; empty where nothing was held out.
    """

    coefficients: torch.Tensor
    history: tuple[Mapping[str, float], ...]
    initial_coefficients: torch.Tensor
    trajectory: torch.Tensor
    chosen_step: int
    validation: tuple[tuple[int, float], ...] = ()


def start_coefficients(layout: StackLayout, granularity: str, start: float | torch.Tensor | None) -> torch.Tensor:
    """Coefficients to start from.

    Args:
        layout: K domains, G groups.
        granularity: "domain": (K,); "layer": (K, G).
        start: one number for all, or coefficients, (K,) or (K, G): those of another merge; None: 1/√K for all.

    Returns:
        float32 on the CPU, a copy.

    Raises:
        LayoutMismatchError: coefficients that do not fit, such as (K, G) where one number a domain is learned.
    """
    shape = (len(layout.domains),) if granularity == "domain" else (len(layout.domains), len(layout.groups))
    number = 1 / math.sqrt(len(layout.domains)) if start is None else start
    values = torch.as_tensor(number, dtype=torch.float32).detach().cpu()
    if values.ndim == 1 and len(values) == shape[0] and len(shape) == 2:
        values = values[:, None]
    try:
        return values.expand(shape).clone()
    except RuntimeError as error:
        raise LayoutMismatchError(
            f"coefficients to start from: found shape {tuple(values.shape)}, expected one number or {shape} for "
            f"granularity {granularity!r}; give one for each of {', '.join(layout.domains)}"
        ) from error


def optimise(
    name: str,
    start: torch.Tensor,
    gradient: Gradient,
    *,
    steps: int,
    learning_rate: float,
    clamp: bool = False,
    prior_weight: float = 0.0,
    validate: Callable[[torch.Tensor], float] | None = None,
    validate_every: int | None = None,
    progress: Progress | None = None,
) -> LearnedCoefficients:
    """Minimise a loss over the coefficients with Adam.

    Args:
        name: of the method, for messages.
        start: (K,) or (K, G) float32 on the device of the model; not changed.
        gradient: (step, coefficients) -> gradient, and the loss as "total" with its terms, or nothing where nobody
            here knows it.
        steps: updates.
        learning_rate: constant.
        clamp: bring the coefficients back into [0, 1] after every update.
        prior_weight: adds prior_weight · mean (w - w_start)² to the loss, as the term "prior".
        validate: a score of coefficients, lower is better; the step that has the lowest is chosen.
        validate_every: at step 0, every so many steps, and at the end.
        progress: called after every step with (steps done, steps, the step's losses).

    Raises:
        MergeError: a loss or a coefficient that is not finite, with its step.
    """
    coefficients = start.detach().clone().requires_grad_()
    initial = start.detach().clone()
    optimizer = torch.optim.Adam([coefficients], lr=learning_rate)
    history: list[Mapping[str, float]] = []
    trajectory = [initial.cpu()]
    validation: list[tuple[int, float]] = []

    def look(step: int) -> None:
        if validate is not None and (step == steps or step % (validate_every or steps) == 0):
            validation.append((step, validate(coefficients.detach())))

    look(0)
    for step in range(1, steps + 1):
        coefficients.grad, losses = gradient(step - 1, coefficients)
        if prior_weight:
            moved = coefficients.detach() - initial
            losses["prior"] = float(moved.square().mean())
            if "total" in losses:
                losses["total"] += prior_weight * losses["prior"]
            coefficients.grad = coefficients.grad + 2 * prior_weight * moved / moved.numel()
        optimizer.step()
        if clamp:
            with torch.no_grad():
                coefficients.clamp_(0.0, 1.0)
        history.append(losses)
        if not all(map(math.isfinite, losses.values())) or not bool(coefficients.detach().isfinite().all()):
            terms = ", ".join(f"{term} {value:g}" for term, value in losses.items() if term != "total")
            raise MergeError(
                f"{name}, step {step} of {steps}: found loss {losses.get('total', 0):g} ({terms}) and coefficients "
                f"{coefficients.tolist()}, expected finite values; lower the learning rate or check the experts' norms"
            )
        trajectory.append(coefficients.detach().cpu().clone())
        look(step)
        if progress is not None:
            progress(step, steps, losses)
    chosen = min(validation, key=lambda found: found[1])[0] if validation else steps
    if "total" in history[0]:
        logger.info("%s: %d steps, loss %.4f -> %.4f", name, steps, history[0]["total"], history[-1]["total"])
    return LearnedCoefficients(
        trajectory[chosen], tuple(history), initial.cpu(), torch.stack(trajectory), chosen, tuple(validation)
    )
