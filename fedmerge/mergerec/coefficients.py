"""Start merging coefficients and optimise them with Adam; the gradient comes from pseudo-users or from clients."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.errors import LayoutMismatchError, MergeError
from fedmerge.merging.stack import StackLayout

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, Mapping[str, float]], None]
"""(steps done, steps, losses of the step)."""
Gradient = Callable[[int, torch.Tensor], tuple[torch.Tensor, dict[str, float]]]
"""(step, coefficients) -> gradient, and the loss as "total" with its terms; no losses if they stay at the clients."""


@dataclass(frozen=True, slots=True)
class LearnedCoefficients:
    """Learned coefficients and their history.

    Attributes:
        coefficients: (K,) or (K, G) float32 on the CPU, domains in the order of the stack, after ``chosen_step``.
        history: for every step the losses before its update: "total", and the terms of which it is the weighted sum;
            empty if the losses stay at the clients.
        initial_coefficients: coefficients before the first step, of the same shape.
        trajectory: (steps + 1, …) the coefficients after 0, 1, … steps.
        chosen_step: the last step, or the best one of ``validation``.
        validation: (step, score) in order, lower is better; empty if no pseudo-users were held out.
    """

    coefficients: torch.Tensor
    history: tuple[Mapping[str, float], ...]
    initial_coefficients: torch.Tensor
    trajectory: torch.Tensor
    chosen_step: int
    validation: tuple[tuple[int, float], ...] = ()


def start_coefficients(layout: StackLayout, granularity: str, start: float | torch.Tensor | None) -> torch.Tensor:
    """Return the coefficients before the first step.

    Args:
        layout: K domains, G groups.
        granularity: "domain" for (K,), "layer" for (K, G).
        start: one number for all; or coefficients (K,) or (K, G), such as those of another merge; or None for 1/√K.

    Returns:
        (K,) or (K, G) float32 on the CPU, a copy.

    Raises:
        LayoutMismatchError: the coefficients do not fit the granularity, such as (K, G) for "domain".
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
            f"initial coefficients: found shape {tuple(values.shape)}, expected one number or {shape} for granularity "
            f"{granularity!r}; give one for each of {', '.join(layout.domains)}"
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
    sampled: npt.NDArray[np.int64] | None = None,
) -> LearnedCoefficients:
    """Minimise a loss over the coefficients with Adam.

    With sampled domains, a step changes their coefficients and Adam's moments of them alone; the moments of a domain
    are corrected by the number of its own steps. With all domains in every step this is Adam.

    Args:
        name: name of the method, for messages.
        start: (K,) or (K, G) float32 on the device of the model; not changed.
        gradient: gradient and losses of a step.
        steps: number of updates.
        learning_rate: constant learning rate.
        clamp: clamp the coefficients to [0, 1] after every update.
        prior_weight: adds prior_weight · mean (w - w_start)² to the loss, as the term "prior".
        validate: score of coefficients, lower is better; the step with the lowest score is chosen.
        validate_every: steps between two validations; step 0 and the last step are always validated.
        progress: called after every step.
        sampled: (steps, m) the domains of each step, as indices without repetition; ``gradient`` must return an
            unbiased estimate that is 0 elsewhere. None: all domains in every step.

    Raises:
        MergeError: a loss or a coefficient is not finite; names the step.

    Source: sampled domains: "lazy" Adam, as ``torch.optim.SparseAdam``.
    Differs: SparseAdam corrects all moments by the number of steps so far, however often a coefficient had one.
    """
    coefficients = start.detach().clone().requires_grad_()
    initial = start.detach().clone()
    update = _updates(coefficients, learning_rate, sampled)
    history: list[Mapping[str, float]] = []
    trajectory = [initial.cpu()]
    validation: list[tuple[int, float]] = []

    def validate_at(step: int) -> None:
        if validate is not None and (step == steps or step % (validate_every or steps) == 0):
            validation.append((step, validate(coefficients.detach())))

    validate_at(0)
    for step in range(1, steps + 1):
        coefficients.grad, losses = gradient(step - 1, coefficients)
        if prior_weight:
            moved = coefficients.detach() - initial
            losses["prior"] = float(moved.square().mean())
            if "total" in losses:
                losses["total"] += prior_weight * losses["prior"]
            share = 1.0 if sampled is None else sampled.shape[1] / len(initial)
            coefficients.grad = coefficients.grad + 2 * prior_weight * moved / moved.numel() / share
        update(step - 1)
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
        validate_at(step)
        if progress is not None:
            progress(step, steps, losses)
    chosen = min(validation, key=lambda found: found[1])[0] if validation else steps
    if "total" in history[0]:
        logger.info("%s: %d steps, loss %s", name, steps, _smoothed([losses["total"] for losses in history]))
    return LearnedCoefficients(
        trajectory[chosen], tuple(history), initial.cpu(), torch.stack(trajectory), chosen, tuple(validation)
    )


def _updates(
    coefficients: torch.Tensor, learning_rate: float, sampled: npt.NDArray[np.int64] | None
) -> Callable[[int], None]:
    """Return a function that takes a step of Adam, in the coefficients of all domains or of those that it samples."""
    if sampled is None:
        optimizer = torch.optim.Adam([coefficients], lr=learning_rate)

        def update_all(_step: int) -> None:
            optimizer.step()

        return update_all
    (beta_1, beta_2), epsilon = (0.9, 0.999), 1e-8  # those of torch.optim.Adam
    first, second = torch.zeros_like(coefficients), torch.zeros_like(coefficients)
    counts = torch.zeros([len(coefficients)] + [1] * (coefficients.ndim - 1), dtype=torch.float64)

    @torch.no_grad()
    def update(step: int) -> None:
        rows = torch.from_numpy(sampled[step])
        counts[rows] += 1
        here = rows.to(coefficients.device)
        gradient = torch.zeros_like(coefficients[here]) if coefficients.grad is None else coefficients.grad[here]
        first[here] = first[here].lerp(gradient, 1 - beta_1)
        second[here] = second[here] * beta_2 + (1 - beta_2) * gradient.square()
        size = (learning_rate / (1 - beta_1 ** counts[rows])).to(first)
        root = (1 - beta_2 ** counts[rows]).sqrt().to(first)
        coefficients[here] -= size * first[here] / (second[here].sqrt() / root + epsilon)

    return update


def _smoothed(losses: Sequence[float]) -> str:
    """Return the means of the first and the last tenth: single batches differ by more than learning changes."""
    count = max(1, len(losses) // 10)
    first, last = fmean(losses[:count]), fmean(losses[-count:])
    return f"{first:.4f} -> {last:.4f}" + (f" (means of {count} steps)" if count > 1 else "")
