"""Merge through the clients: the server's half (see ``fedmerge.client.coefficients``).

The cohort's adapters are sent once to each of its clients. Then every message asks the clients for the gradient at
given coefficients (mode ``exact``) or for the change by a few steps of their own (``local-steps``); the server averages
and steps. Every average is on disk before the next message, so that a resumed run replays it. A search over layer maps
sends one map in every message instead, which the clients' users read, and keeps every reading in the same way.
"""

import logging
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from flwr.app import RecordDict

from fedmerge.adapter import Adapter
from fedmerge.errors import ClientError
from fedmerge.files import append_line, read_lines, read_sealed, seal, write_json
from fedmerge.mergerec.coefficients import LearnedCoefficients, optimise, start_coefficients
from fedmerge.mergerec.cohort import cohort_sha256
from fedmerge.mergerec.layer_maps.candidates import LayerCandidates, LayerMap
from fedmerge.mergerec.layer_maps.episodes import FoundMap, Sums
from fedmerge.mergerec.learn import draw_pseudo_users
from fedmerge.mergerec.objective import MergeRecSettings
from fedmerge.mergerec.vectors import Vectors
from fedmerge.merging.candidate import Candidate, MergeVariant, Origin
from fedmerge.merging.stack import survey_adapters
from fedmerge.privacy.dp.domain_noise import domain_noise
from fedmerge.privacy.dp.releases import answers_have_noise
from fedmerge.runs import checkpoints
from fedmerge.runs.checkpoints import LEARNING
from fedmerge.server.candidates import UNIVERSAL, Learn, universal_candidate
from fedmerge.server.layer_search import NDCG_SCALE, Search, search_with
from sim.app.messages import records
from sim.app.server.asking import ask
from sim.app.server.members import join_names
from sim.app.server.questions import Question, own_noise
from sim.app.server.releases import answers_released
from sim.app.server.run import Run

FARTHEST_NOISE = 20  # standard deviations; larger noise is never drawn
LARGEST_GRADIENT = 1e6  # of a coefficient, far beyond any loss here, with noise by user too

logger = logging.getLogger("fedmerge.server")


def learn_through_clients(run: Run, experts: Mapping[str, Adapter]) -> Learn:
    """Return a function that learns the coefficients of a merge by asking the clients.

    Args:
        run: the run; the cohort and every step are written to its folder.
        experts: domain -> expert, of all domains that are merged.

    Returns:
        A function for :func:`fedmerge.server.candidates.merge_candidates`. It raises ClientError if too few clients are
        left.
    """
    config = run.config

    def learn(variant: MergeVariant, settings: MergeRecSettings, vectors: Vectors) -> LearnedCoefficients:
        sha256, sizes = _send_cohort(run, experts)
        label = variant.name  # whichever domains are merged; the hash of the cohort says which
        log = run.folder / LEARNING / f"{label.replace(' ', '-')}-{sha256[:8]}.jsonl"
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
            with run.phase("merge"):
                answers = _answers(run, task, coefficients, students, users, weights, bound)
            mean = torch.zeros_like(coefficients.detach())  # stays zero if every client of this step has failed
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


def search_through_clients(run: Run, experts: Mapping[str, Adapter]) -> Search:
    """Return a function that searches by the NDCG@10 of the clients' validation users.

    Args:
        run: the run; the cohort and every reading are written to its folder.
        experts: domain -> expert, of all domains that are merged.

    Returns:
        A function for :func:`fedmerge.server.candidates.merge_candidates`. It raises ClientError if too few clients are
        left.
    """
    min_users = run.config.privacy.min_users

    @cache
    def cohort() -> tuple[str, Mapping[str, int]]:
        return _send_cohort(run, experts)

    def search(candidates: LayerCandidates) -> FoundMap:
        def read(layer_map: LayerMap, shard: int) -> Sums:
            sha256, members = cohort()  # nothing is sent if all readings are on disk
            content = records.layer_map_request_record(records.LayerMapRequest(sha256, shard), layer_map)
            sums: dict[str, tuple[int, float]] = {}

            def receive(domain: str, reply: RecordDict) -> None:
                num_users, ndcg = records.read_layer_map(reply)
                if num_users < min_users:
                    raise ClientError(
                        f"domain {domain}: its sum is over {num_users} users, expected at least privacy.min_users = "
                        f"{min_users}; use the same settings everywhere"
                    )
                sums[domain] = num_users, NDCG_SCALE * ndcg

            asked = [domain for domain in run.members.in_role("train") if domain in members]
            timeout_seconds = run.config.server.timeout_seconds
            question = Question(
                records.LAYER_MAP, timeout_seconds, lambda _: content, lambda _: 2**12, split="valid", quiet=True
            )
            with run.phase("merge"):
                ask(run, run.members.nodes_of(asked), question, receive)
            run.require_quorum([domain for domain in run.members.in_role("train") if domain in members])
            return sums

        return search_with(candidates, read, run.config, experts, logger.info, run.folder)

    return search


def fit_personal_merges(run: Run, sources: Mapping[str, str], origin: Origin) -> list[Candidate]:
    """Let every training client fit its personal merge at home, if the experiment has them; the cohort is sent first.

    A resumed run asks again, and the clients find their merges in their caches.

    Args:
        run: the run.
        sources: domain -> hash of its expert, of all domains that are merged.
        origin: the same, and what else is known of the experts.

    Returns:
        The universal merge, if the experiment has one; else nothing, since personal merges stay with the clients.

    Raises:
        ClientError: too few clients are left.
    """
    personal = run.config.personal
    if personal.directions is None:
        return []
    experts = checkpoints.stored_experts(run.folder, sources)
    sha256, _ = _send_cohort(run, experts)
    layout, fits = survey_adapters(experts, values=False), dict[str, torch.Tensor]()
    shape, bound = (len(layout.domains), len(layout.groups)), 10 * personal.steps * personal.learning_rate
    domains = [domain for domain in run.members.in_role("train") if domain in sources]
    fitted: list[str] = []

    def request(domain: str) -> RecordDict:
        return records.personal_request_record(records.PersonalRequest(sha256, sources[domain]))

    def receive(domain: str, reply: RecordDict) -> None:
        seconds = records.read_fitted(reply)
        if personal.universal:
            own = layout.domains.index(domain)
            values = records.read_fitted_coefficients(reply, shape, own, bound)
            fits.update({} if values is None else {domain: values})
        logger.info("%s: personal merge fitted (%.0f s)", domain, seconds)
        fitted.append(domain)

    with run.phase("merge"):
        ask(
            run,
            run.members.nodes_of(domains),
            Question(records.FIT_PERSONAL, run.config.server.timeout_seconds, request),
            receive,
        )
    run.require_quorum(fitted)
    if not personal.universal:
        return []
    if before := checkpoints.read_candidates(run.folder, sources).get(UNIVERSAL):
        return [before]
    return [universal_candidate(experts, fits, personal, origin)]


def _send_cohort(run: Run, experts: Mapping[str, Adapter]) -> tuple[str, dict[str, int]]:
    """Send all adapters to every participant, once an attempt; return the cohort's hash, and domain -> pseudo-users.

    A resumed run sends them again, since a client may have lost them; the members of the cohort are on disk.
    """
    adapters = dict(experts)
    sha256 = cohort_sha256(adapters)
    if sha256 in run.cohorts:
        return sha256, run.cohorts[sha256]
    content = records.cohort_record(adapters)
    path = run.folder / LEARNING / f"cohort-{sha256[:8]}.json"  # with a rollback there are two: all, and without some
    before: dict[str, int] | None = read_sealed(path)
    domains = [domain for domain in run.members.in_role("train") if domain in (before or adapters)]
    sizes: dict[str, int] = {}

    def receive(domain: str, reply: RecordDict) -> None:
        size = records.read_pseudo_users(reply)
        if before is not None and size != before[domain]:
            raise ClientError(
                f"domain {domain}: it makes {size} pseudo-users, before the run was resumed it made {before[domain]}. "
                "Its data or settings changed since the run started; restore them, or start a new run."
            )
        if (size == 0) != (run.config.cohort_learns_on == "own-users"):
            raise ClientError(f"domain {domain}: it makes {size} pseudo-users. Use the same settings everywhere.")
        sizes[domain] = size

    logger.info("sending the cohort's %d adapters to every participant: %s", len(adapters), join_names(domains))
    question = Question(records.COHORT, run.config.server.timeout_seconds, lambda _: content)
    with run.phase("merge"):
        ask(run, run.members.nodes_of(domains), question, receive)
    run.require_quorum(list(sizes))
    if before is None:
        path.parent.mkdir(exist_ok=True)
        before = dict(sorted(sizes.items()))
        write_json(path, seal(before))
    run.cohorts[sha256] = before
    return sha256, before


def _answers(
    run: Run,
    task: records.GradientRequest,
    coefficients: torch.Tensor,
    students: torch.Tensor,
    users: Mapping[str, list[int]],
    weights: Mapping[str, float],
    bound: float,
) -> dict[str, torch.Tensor]:
    """Ask for one message's answers; return domain -> answer, of the domains with a weight that still take part."""
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
                f"domain {domain}: its gradient is not finite or exceeds {bound:g}. Leave the domain out, or check its "
                "client."
            )
        answers[domain] = found.reshape(coefficients.shape)

    noised = answers_have_noise(run.config.dp, run.config.through_clients)
    question = Question(
        records.GRADIENT,
        run.config.server.timeout_seconds,
        request,
        lambda _: 4 * coefficients.numel() + 2**12,
        noise=own_noise(run.config.dp.mode) if noised else "none",
        quiet=True,
        released=answers_released(run) if noised else None,
    )
    asked = [domain for domain in run.members.in_role("train") if weights.get(domain)]
    ask(run, run.members.nodes_of(asked), question, receive)
    run.require_quorum([domain for domain in run.members.in_role("train") if domain in weights])
    return answers


def _sum_of_changes(
    start: torch.Tensor,
    averaged: Callable[[int, torch.Tensor], torch.Tensor],
    num_messages: int,
    settings: MergeRecSettings,
) -> LearnedCoefficients:
    """Add the mean of the clients' changes after each message (mode ``local-steps``)."""
    trajectory = [start]
    for number in range(num_messages):
        moved = trajectory[-1] + averaged(number, trajectory[-1])
        trajectory.append(moved.clamp(0.0, 1.0) if settings.clamp else moved)
    return LearnedCoefficients(trajectory[-1], (), start, torch.stack(trajectory), num_messages)


def _drawn(drawn: tuple[np.ndarray, np.ndarray] | None, step: int, domain: int) -> list[int]:
    """Return the pseudo-users of a domain in a step; none if the clients draw themselves."""
    if drawn is None:
        return []
    domains, users = drawn[0][step], drawn[1][step]
    return [int(user) for user in users[domains == domain]]
