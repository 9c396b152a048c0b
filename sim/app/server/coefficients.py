"""Learn coefficients through the clients: the server's half (see ``fedmerge.client.coefficients.pseudo_users``).

The cohort's adapters are sent once to each of its clients. Then every message asks the clients for the gradient at
given coefficients (mode ``exact``) or for what a few steps of their own change (``local-steps``); the server averages
and steps. What was averaged is on disk before the next message, so that a run that is resumed replays it.
"""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import RecordDict

from fedmerge.adapter import Adapter
from fedmerge.client.coefficients.pseudo_users import cohort_sha256
from fedmerge.config import ExperimentConfig
from fedmerge.errors import ClientError
from fedmerge.files import append_line, read_json, read_lines, write_json
from fedmerge.mergerec.coefficients import LearnedCoefficients, optimise, start_coefficients
from fedmerge.mergerec.learn import draw_pseudo_users
from fedmerge.mergerec.objective import CollaborativeSettings
from fedmerge.mergerec.vectors import Vectors
from fedmerge.privacy.dp.domain_noise import domain_noise
from fedmerge.privacy.dp.releases import answers_have_noise
from fedmerge.runs.checkpoints import LEARNING
from fedmerge.server.candidates import Learn
from sim.app.messages import records
from sim.app.server.asking import Federation, Question, ask, listed, own_noise, require_quorum
from sim.app.server.releases import answers_released

FARTHEST_NOISE = 20  # standard deviations that nobody ever draws
LARGEST_GRADIENT = 1e6  # of a coefficient, far beyond any loss here, with noise by user too

logger = logging.getLogger("fedmerge.server")


def learn_through_clients(
    federation: Federation, config: ExperimentConfig, experts: Mapping[str, Adapter], run_dir: Path
) -> Learn:
    """What learns the coefficients of a merge by asking the clients.

    Args:
        federation: the clients.
        config: of the experiment.
        experts: domain -> expert, of everybody who is merged.
        run_dir: where the cohort and every step are kept.

    Returns:
        A function as ``fedmerge.server.candidates.merge_candidates`` takes it. It raises ClientError when too few
        clients are left.
    """

    @cache
    def cohort() -> tuple[str, dict[str, int]]:
        return _send_cohort(federation, config, experts, run_dir)

    def learn(label: str, settings: CollaborativeSettings, vectors: Vectors) -> LearnedCoefficients:
        sha256, sizes = cohort()
        log = run_dir / LEARNING / f"{label.replace(' ', '-')}-{sha256[:8]}.jsonl"
        kept = [line["found"] for line in read_lines(log)]
        if kept:
            logger.info("%s: %d messages to each client are on disk", label, len(kept))
        initial = start_coefficients(vectors, settings.granularity, settings.start)
        local = config.through_clients.mode == "local-steps"
        steps_a_message = config.through_clients.local_steps if local else 1
        num_messages = -(-settings.steps // steps_a_message)
        drawn = None if local or not any(sizes.values()) else draw_pseudo_users(tuple(sizes.values()), settings)
        students = start_coefficients(vectors, "domain", settings.start)

        def averaged(number: int, coefficients: torch.Tensor) -> torch.Tensor:
            """The mean of the clients' answers to one message, from disk or asked for."""
            nonlocal students
            step = number * steps_a_message
            every = settings.refresh_every
            if every and number and step // every > (step - steps_a_message) // every:
                students = coefficients.detach().clone()
            if number < len(kept):
                return torch.tensor(kept[number], dtype=torch.float32)
            users = {domain: _drawn(drawn, step, index) for index, domain in enumerate(sizes)}
            weights = {domain: float(len(mine)) for domain, mine in users.items()}
            if drawn is None:
                weights = {
                    domain: 1.0 if settings.balance_domains else float(size or 1) for domain, size in sizes.items()
                }
            num_steps = min(steps_a_message, settings.steps - step) if local else 0
            task = records.GradientRequest(label, sha256, step, num_steps)
            bound = 10 * num_steps * settings.learning_rate if local else LARGEST_GRADIENT
            if config.dp.mode == "domain-local":
                bound = config.dp.coefficient_clip * (1 + 2 * FARTHEST_NOISE * domain_noise(config))
            answers = _answers(federation, config, task, coefficients, students, users, weights, bound)
            mean = torch.zeros_like(coefficients.detach())  # where all whose turn it was have failed, others are left
            for domain in sorted(answers):
                mean += weights[domain] / sum(weights[answered] for answered in answers) * answers[domain]
            append_line(log, {"step": step, "found": mean.tolist(), "answered": sorted(answers)})
            if number % max(1, num_messages // 5) == 0:
                logger.info("%s: message %d of %d to each client", label, number + 1, num_messages)
            return mean

        if local:
            return _sum_of_changes(initial, averaged, num_messages, settings)
        return optimise(
            f"{label} through the clients",
            initial,
            lambda step, coefficients: (averaged(step, coefficients), {}),
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            clamp=settings.clamp,
            prior_weight=settings.prior_weight,
        )

    return learn


def _send_cohort(
    federation: Federation, config: ExperimentConfig, experts: Mapping[str, Adapter], run_dir: Path
) -> tuple[str, dict[str, int]]:
    """Send every participant all adapters: the cohort's hash, and domain -> number of pseudo-users.

    A run that is resumed sends them again, since a client may have lost them; who was in it is on disk.
    """
    federation.phase = "merge"
    adapters = dict(experts)
    sha256, content = cohort_sha256(adapters), records.cohort_record(adapters)
    path = run_dir / LEARNING / f"cohort-{sha256[:8]}.json"  # with a rollback there are two: all, and without some
    before: dict[str, int] | None = read_json(path)
    nodes = {domain: federation.nodes[domain] for domain in federation.of("train") if domain in (before or adapters)}
    sizes: dict[str, int] = {}

    def receive(domain: str, reply: RecordDict) -> None:
        size = records.read_pseudo_users(reply)
        if before is not None and size != before[domain]:
            raise ClientError(
                f"domain {domain}: it makes {size} pseudo-users, before the run was resumed it made "
                f"{before[domain]}. A run has one state of the data and settings: put them back, or start a new run."
            )
        if (size == 0) != (config.through_clients.users == "own-users"):
            raise ClientError(f"domain {domain}: it makes {size} pseudo-users. Use the same settings everywhere.")
        sizes[domain] = size

    logger.info("the cohort's %d adapters go to every participant: %s", len(adapters), listed(sorted(nodes)))
    ask(federation, nodes, Question(records.COHORT, config.server.timeout_seconds, lambda _: content), receive)
    require_quorum(federation, config, list(sizes))
    if before is None:
        path.parent.mkdir(exist_ok=True)
        before = dict(sorted(sizes.items()))
        write_json(path, before)
    return sha256, before


def _answers(
    federation: Federation,
    config: ExperimentConfig,
    task: records.GradientRequest,
    coefficients: torch.Tensor,
    students: torch.Tensor,
    users: Mapping[str, list[int]],
    weights: Mapping[str, float],
    bound: float,
) -> dict[str, torch.Tensor]:
    """Domain -> answer to one message, of everybody who has a part in it and is still in."""
    answers: dict[str, torch.Tensor] = {}
    shape = (len(coefficients), coefficients.numel() // len(coefficients))

    def request(domain: str) -> RecordDict:
        return records.gradient_request_record(task, coefficients, students, users[domain])

    def receive(domain: str, reply: RecordDict) -> None:
        found = records.read_gradient(reply)
        if tuple(found.shape) != shape:
            raise ClientError(f"domain {domain}: its gradient has shape {tuple(found.shape)}, expected {shape}")
        if not bool(found.isfinite().all()) or float(found.abs().max()) > bound:
            raise ClientError(
                f"domain {domain}: its gradient is not finite or exceeds {bound:g}. Leave it out, or look into its "
                "client."
            )
        answers[domain] = found.reshape(coefficients.shape)

    taking_part = [domain for domain in federation.of("train") if weights.get(domain)]
    nodes = {domain: federation.nodes[domain] for domain in taking_part}
    noised = answers_have_noise(config)
    question = Question(
        records.GRADIENT,
        config.server.timeout_seconds,
        request,
        lambda _: 4 * coefficients.numel() + 2**12,
        noise=own_noise(config) if noised else "none",
        quiet=True,
        released=answers_released(federation) if noised else None,
    )
    ask(federation, nodes, question, receive)
    require_quorum(federation, config, [domain for domain in federation.of("train") if domain in weights])
    return answers


def _sum_of_changes(
    start: torch.Tensor,
    averaged: Callable[[int, torch.Tensor], torch.Tensor],
    num_messages: int,
    settings: CollaborativeSettings,
) -> LearnedCoefficients:
    """Mode local-steps: the mean of the clients' changes is added after each message."""
    trajectory = [start]
    for number in range(num_messages):
        moved = trajectory[-1] + averaged(number, trajectory[-1])
        trajectory.append(moved.clamp(0.0, 1.0) if settings.clamp else moved)
    return LearnedCoefficients(trajectory[-1], (), start, torch.stack(trajectory), num_messages)


def _drawn(drawn: tuple[np.ndarray, np.ndarray] | None, step: int, domain: int) -> list[int]:
    if drawn is None:
        return []
    domains, users = drawn[0][step], drawn[1][step]
    return [int(user) for user in users[domains == domain]]
