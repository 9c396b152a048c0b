"""Coefficients learned on all clients' own users in one process, for study_mergerec.py; no part of a federation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from fedmerge.client.coefficients.own_users import ClientMergeSettings, coefficient_gradient
from fedmerge.client.local_domain import LocalDomain
from fedmerge.errors import ConfigError, DomainError
from fedmerge.mergerec.coefficients import LearnedCoefficients, Progress, optimise, start_coefficients
from fedmerge.mergerec.vectors import Vectors, on_device


@dataclass(frozen=True)
class StudySchedule:
    """Steps of Adam on the mean of the clients' gradients.

    Attributes:
        granularity: "domain": one coefficient per domain; "layer": one per domain and group of the stack.
        initial_coefficient: start of every coefficient.
        learning_rate: constant learning rate of Adam.
        steps: optimisation steps; every client computes one gradient in each.
        prior_weight: weight of the mean squared distance from the start.

    Raises:
        ConfigError: a value out of bounds.
    """

    granularity: Literal["domain", "layer"] = "layer"
    initial_coefficient: float = 0.5
    learning_rate: float = 1e-2
    steps: int = 150
    prior_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.granularity not in ("domain", "layer"):
            raise ConfigError(f"granularity: found {self.granularity!r}, expected 'domain' or 'layer'")
        if self.steps < 1 or self.prior_weight < 0 or not self.learning_rate > 0:
            raise ConfigError(f"{self}: expected steps >= 1, prior_weight >= 0 and learning_rate > 0")


def study_settings(keys: Mapping[str, Any]) -> tuple[ClientMergeSettings, StudySchedule]:
    """Split the keys of a point of a grid.

    Raises:
        ConfigError, TypeError: a value out of bounds, or an unknown key.
    """
    of_schedule = {field.name for field in fields(StudySchedule)}
    own = {key: value for key, value in keys.items() if key not in of_schedule}
    return ClientMergeSettings(**own), StudySchedule(**{key: keys[key] for key in keys.keys() - own.keys()})


def learn_on_clients(
    domains: Sequence[LocalDomain],
    vectors: Vectors,
    settings: ClientMergeSettings,
    schedule: StudySchedule,
    progress: Progress | None = None,
    start: torch.Tensor | None = None,
) -> LearnedCoefficients:
    """Run the whole optimisation in one process: average the clients' gradients, then one step of Adam.

    Args:
        domains: the clients, opened on one backbone; all count equally, whatever their size.
        vectors: vectors of the K experts, see :func:`fedmerge.mergerec.vectors.initial_vectors`.
        settings: draws of users and items.
        schedule: steps of Adam.
        progress: called after every step.
        start: coefficients to start from, (K,) or (K, G), in place of the initial coefficient.

    Returns:
        The coefficients; the history has "total" and each client's loss by name.

    Raises:
        DomainError: no client, or a client without users to learn from.
        MergeError: a loss or a coefficient is not finite.
    """
    clients = sorted(domains, key=lambda domain: domain.manifest.name)
    if not clients:
        raise DomainError("learn_on_clients: found no domain, expected at least one. Open the training domains.")
    device = clients[0].backbone.device
    placed = on_device(vectors, device)
    initial = start_coefficients(
        placed, schedule.granularity, schedule.initial_coefficient if start is None else start
    ).to(device)

    def gradient(step: int, coefficients: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        answers = {
            client.manifest.name: coefficient_gradient(client, placed, coefficients, step, settings)
            for client in clients
        }
        mean = torch.stack([found for found, _ in answers.values()]).mean(dim=0)
        losses = {name: loss for name, (_, loss) in answers.items()}
        return mean, {"total": sum(losses.values()) / len(losses), **losses}

    return optimise(
        "learning on clients",
        initial,
        gradient,
        steps=schedule.steps,
        learning_rate=schedule.learning_rate,
        prior_weight=schedule.prior_weight,
        progress=progress,
    )
