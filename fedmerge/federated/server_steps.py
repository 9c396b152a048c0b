"""Server optimisers: the aggregated update in product space is the pseudo-gradient of one step.

The state is a value that a step takes and returns. First moments are adapters, of low rank as long as that is smaller
than dense. Second moments are dense, since the square of a low-rank matrix has no low rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from fedmerge.adapter import Adapter
from fedmerge.errors import AggregationError
from fedmerge.federated.product_space import weighted_sum
from fedmerge.merging.stack import dense_module


@dataclass(frozen=True)
class Moments:
    """State of a server optimiser between rounds.

    Attributes:
        optimiser: name in RULES.
        num_steps: number of steps so far.
        first: first moment (momentum).
        second: module -> (out, in) float32, running mean of squares; empty for FedAvgM.
    """

    optimiser: str
    num_steps: int
    first: Adapter
    second: Mapping[str, torch.Tensor] = field(default_factory=dict)


def fedavgm(update: Adapter, moments: Moments | None, learning_rate: float, momentum: float) -> tuple[Adapter, Moments]:
    """FedAvgM: m ← momentum · m + u; the step is learning_rate · m.

    Args:
        update: u, the average of the clients' updates.
        moments: moments after the previous step; None at the first step.
        learning_rate: factor on the momentum.
        momentum: decay of the momentum.

    Returns:
        The step, to be added to the global adapter, and the moments for the next step.

    Raises:
        AggregationError: the moments are another optimiser's.

    Source: arXiv:1909.06335, as in Flower's FedAvgM.
    """
    _check("fedavgm", moments)
    first = update if moments is None else _mixed(moments.first, momentum, update, 1.0)
    steps = 1 if moments is None else moments.num_steps + 1
    return weighted_sum({"step": first}, {"step": learning_rate}), Moments("fedavgm", steps, first)


def fedadam(
    update: Adapter, moments: Moments | None, learning_rate: float, beta_1: float, beta_2: float, tau: float
) -> tuple[Adapter, Moments]:
    """FedAdam: m ← β₁ m + (1 − β₁) u, v ← β₂ v + (1 − β₂) u²; the step is η_t m / (√v + τ), entry by entry.

    η_t = learning_rate · √(1 − β₂^(t+1)) / (1 − β₁^(t+1)) at step t = 1, 2, …; the step has no low rank.

    Args, returns, raises: as :func:`fedavgm`.

    Source: Adaptive Federated Optimization, ICLR 2021, arXiv:2003.00295, algorithm 2.
    Differs: as in Flower's FedAdam, v starts at 0, not at τ², and η_t corrects the bias (the paper does not; Adam uses
        t instead of t + 1).
    """

    def second(before: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return beta_2 * before + (1 - beta_2) * square

    exponent = 2 if moments is None else moments.num_steps + 2
    rate = learning_rate * (1 - beta_2**exponent) ** 0.5 / (1 - beta_1**exponent)
    return _adaptive("fedadam", update, moments, rate, beta_1, tau, second)


def fedyogi(
    update: Adapter, moments: Moments | None, learning_rate: float, beta_1: float, beta_2: float, tau: float
) -> tuple[Adapter, Moments]:
    """FedYogi: as FedAdam with v ← v − (1 − β₂) u² sign(v − u²), and η_t = learning_rate.

    Args, returns, raises: as :func:`fedavgm`.

    Source: Adaptive Federated Optimization, ICLR 2021, arXiv:2003.00295, algorithm 2.
    Differs: as in Flower's FedYogi, v starts at 0, not at τ².
    """

    def second(before: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return before - (1 - beta_2) * square * torch.sign(before - square)

    return _adaptive("fedyogi", update, moments, learning_rate, beta_1, tau, second)


def _adaptive(
    name: str,
    update: Adapter,
    moments: Moments | None,
    rate: float,
    beta_1: float,
    tau: float,
    second_moment: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[Adapter, Moments]:
    _check(name, moments)
    before = update if moments is None else moments.first
    first = _mixed(before, 0.0 if moments is None else beta_1, update, 1 - beta_1)
    second, step = {}, {}
    for module, factors in update.modules.items():
        square = factors.delta_weight().square()
        second[module] = second_moment(torch.zeros_like(square) if moments is None else moments.second[module], square)
        step[module] = dense_module(rate * first.modules[module].delta_weight() / (second[module].sqrt() + tau))
    steps = 1 if moments is None else moments.num_steps + 1
    return Adapter(step), Moments(name, steps, first, second)


def _mixed(left: Adapter, left_weight: float, right: Adapter, right_weight: float) -> Adapter:
    return weighted_sum({"left": left, "right": right}, {"left": left_weight, "right": right_weight})


def _check(name: str, moments: Moments | None) -> None:
    if moments is not None and moments.optimiser != name:
        raise AggregationError(
            f"{name}: found the moments of {moments.optimiser} from the previous round, expected its own; "
            "use one rule for all rounds, or restart without moments"
        )
