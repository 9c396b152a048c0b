"""MergeRec's optimisation: learn merging coefficients from pseudo-users. No interaction is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedmerge import seeding
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import embed_batch, encode
from fedmerge.encoder.lora import applied
from fedmerge.errors import ConfigError, LayoutMismatchError
from fedmerge.mergerec.coefficients import (
    Gradient,
    LearnedCoefficients,
    Progress,
    optimise,
    start_coefficients,
)
from fedmerge.mergerec.objective import PAPER, SIMILARITY, MergeRecSettings, batch_terms, weighted_total
from fedmerge.mergerec.pseudo_users import PseudoDomain
from fedmerge.mergerec.similarity import UnionSimilarity, similarity_term
from fedmerge.mergerec.vectors import (
    TASK_VECTORS,
    RunningMerge,
    SparseRows,
    StreamedVectors,
    Vectors,
    merge_vectors,
    merged_forward,
    on_device,
)
from fedmerge.merging.stack import Stack

HELD_OUT = 64  # pseudo-users per domain for validation, at most a fifth of them


def draw_pseudo_users(sizes: tuple[int, ...], settings: MergeRecSettings) -> tuple[np.ndarray, np.ndarray]:
    """Draw the pseudo-users of each step in epochs: each epoch is a permutation, so all are drawn equally often.

    Args:
        sizes: number of pseudo-users of each domain.
        settings: steps, batch_size, balance_domains and seed.

    Returns:
        Domain and pseudo-user of each draw, two int64 arrays (steps, batch_size). If balanced, domains alternate in a
        random order and each has its own permutations; else one permutation covers all pseudo-users.
    """
    shape = (settings.steps, settings.batch_size)
    count = settings.steps * settings.batch_size
    if not settings.balance_domains:
        pooled = _epochs(sum(sizes), count, seeding.generator(settings.seed, "mergerec"))
        starts = np.cumsum((0, *sizes))
        domains = np.searchsorted(starts, pooled, side="right") - 1
        return domains.reshape(shape), (pooled - starts[domains]).reshape(shape)
    domains = _epochs(len(sizes), count, seeding.generator(settings.seed, "mergerec", "domains"))
    items = np.empty_like(domains)
    for domain, size in enumerate(sizes):
        chosen = domains == domain
        items[chosen] = _epochs(size, int(chosen.sum()), seeding.generator(settings.seed, "mergerec", "items", domain))
    return domains.reshape(shape), items.reshape(shape)


def draw_domains(num_domains: int, settings: MergeRecSettings) -> np.ndarray | None:
    """Draw the domains whose coefficients each step learns, in epochs: each epoch splits a permutation into samples.

    Every sample is uniform over all subsets of its size, and domains are drawn equally often but for the remainder of
    K / m, which an epoch leaves out.

    Args:
        num_domains: K.
        settings: steps, domains_per_step (m) and seed.

    Returns:
        (steps, m) int64, without repetition in a row; None if a step learns the coefficients of all domains.
    """
    size = settings.domains_per_step
    if size is None or not settings.samples(num_domains):
        return None
    rng, whole = seeding.generator(settings.seed, "mergerec", "sampled domains"), num_domains // size
    epochs = [
        rng.permutation(num_domains)[: whole * size].reshape(whole, size) for _ in range(-(-settings.steps // whole))
    ]
    return np.concatenate(epochs)[: settings.steps]


def student_vectors(
    backbone: Backbone, vectors: Vectors, domains: Mapping[str, PseudoDomain], coefficients: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Encode every domain's items under the merge: domain -> Ê_k, (N_k, d) float32 on the CPU.

    Args:
        backbone: the frozen encoder; left as it was.
        vectors: vectors of the K experts.
        domains: domain -> pseudo-users, for exactly the domains of the vectors.
        coefficients: (K,) or (K, G).

    Raises:
        LayoutMismatchError: vectors, pseudo-users and backbone do not belong together.
    """
    _check_domains(vectors, domains)
    with applied(backbone, merge_vectors(vectors, coefficients)):
        return {name: encode(backbone, domains[name].items) for name in vectors.domains}


def learn_coefficients(
    backbone: Backbone,
    vectors: Vectors,
    domains: Mapping[str, PseudoDomain],
    settings: MergeRecSettings = PAPER,
    progress: Progress | None = None,
    students: Mapping[str, torch.Tensor] | None = None,
    start: torch.Tensor | None = None,
    union: UnionSimilarity | None = None,
) -> LearnedCoefficients:
    """Learn merging coefficients from pseudo-users, in a process that has the catalogs.

    Adam minimises the loss of θ(w) = θ₀ + Σ_k w_k v_k over w alone. The item vectors Ê are constant between two
    refreshes; no gradient flows through them. Published: L = L_rec + 1000 · L_kd, w neither clamped nor normalised,
    Ê never refreshed. For a one-item pseudo-user the teacher's first choice is the item itself. The loss is
    :func:`fedmerge.mergerec.objective.weighted_total`.

    Args:
        backbone: the frozen encoder; left as it was.
        vectors: vectors of the K experts, :func:`fedmerge.mergerec.vectors.initial_vectors` for
            ``settings.initialisation``; streamed if and only if ``settings.samples(K)``.
        domains: domain -> pseudo-users, for exactly the domains of the vectors; the order does not matter.
        settings: loss, steps and all other settings.
        progress: called after every step.
        students: :func:`student_vectors` at the start, which variants can share; None to encode them here.
        start: initial coefficients (K,) or (K, G), in place of ``settings.start``.
        union: :func:`fedmerge.mergerec.similarity.union_similarity` of the settings, for a loss with "similarity".

    Raises:
        ConfigError: the vectors have another initialisation than the settings, there are too few pseudo-users to hold
            some out, or what the loss or its teacher needs is missing.
        LayoutMismatchError: vectors, pseudo-users and backbone do not belong together.
        MergeError: a loss or a coefficient is not finite; names the step.

    Source: arXiv:2601.01753 (MergeRec); AdaMerging (arXiv:2310.02575) with the settings ADAMERGING.
    Differs: the student is low-rank or sparse and teacher logits exist per batch, instead of K + 1 dense models and an
        N × N matrix per domain; the result is the same. refresh_every, balance_domains, select_every, prior_weight,
        kd_top_k, rec_temperature, domains_per_step, the contrastive teacher and the term "similarity" are not in the
        paper. With sampled domains, a step's gradient is K/m times that of the m sampled coefficients and 0 elsewhere,
        an unbiased estimate of the gradient.
    """
    # 1. Check the inputs and move them to the device.
    _check_domains(vectors, domains)
    _check_needs(domains, settings, union)
    num_domains = len(vectors.domains)
    expected = StreamedVectors if settings.samples(num_domains) else Stack
    if not isinstance(vectors, expected if settings.initialisation == TASK_VECTORS else SparseRows):
        raise ConfigError(
            f"learn_coefficients: found {type(vectors).__name__} of {num_domains} domains, but settings.initialisation "
            f"is {settings.initialisation!r} and domains_per_step {settings.domains_per_step}; make the vectors with "
            "initial_vectors(stack, settings.initialisation), or as StreamedVectors to sample domains"
        )
    device = backbone.compute.device
    vectors = on_device(vectors, device)
    sampled = draw_domains(num_domains, settings)
    at = _vectors_of_steps(vectors, sampled, device)
    # 2. The coefficients at the start.
    initial = start_coefficients(vectors, settings.granularity, settings.start if start is None else start).to(device)
    # 3. The parts of the loss.
    objectives = []
    if settings.terms_of_users:
        objectives.append(_objective_of_users(backbone, vectors, at, domains, settings, initial, students))
    if union is not None:
        objectives.append(_objective_of_items(backbone, at, settings, union))
    objective = _sum_of(objectives)
    if sampled is not None:
        objective = _scaled(objective, num_domains / sampled.shape[1])
    return optimise(
        "adamerging" if settings.clamp else "mergerec",
        initial,
        objective.gradient,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        clamp=settings.clamp,
        prior_weight=settings.prior_weight,
        validate=objective.validate if settings.select_every else None,
        validate_every=settings.select_every,
        progress=progress,
        sampled=sampled,
    )


VectorsAt = Callable[[int | None, torch.Tensor], Vectors]
"""(step, coefficients) -> vectors of a forward pass; without a step, coefficients need no gradient."""


def _vectors_of_steps(vectors: Vectors, sampled: np.ndarray | None, device: torch.device) -> VectorsAt:
    if sampled is None or not isinstance(vectors, StreamedVectors):
        return lambda step, coefficients: vectors
    running = RunningMerge(vectors, device)
    return lambda step, coefficients: running.at(coefficients, () if step is None else sampled[step].tolist())


@dataclass(frozen=True, slots=True)
class _Objective:
    """A part of the loss.

    Attributes:
        gradient: its gradient and its terms at a step; "total" is their weighted sum.
        validate: its value on what is held out.
    """

    gradient: Gradient
    validate: Callable[[torch.Tensor], float]


def _objective_of_users(
    backbone: Backbone,
    vectors: Vectors,
    at: VectorsAt,
    domains: Mapping[str, PseudoDomain],
    settings: MergeRecSettings,
    initial: torch.Tensor,
    students: Mapping[str, torch.Tensor] | None,
) -> _Objective:
    """Return the terms that are means over pseudo-users."""
    device = backbone.compute.device
    pseudo = [domains[name] for name in vectors.domains]
    teachers = [domain.teacher_items.to(device, torch.float32) for domain in pseudo]
    amateurs, amateurs_of_users = _amateurs(pseudo, settings, device)
    orders, held_out = _hold_out(pseudo, settings)
    drawn_domains, drawn_users = draw_pseudo_users(
        tuple(len(order) - held for order, held in zip(orders, held_out, strict=True)), settings
    )
    if students is None:
        students = student_vectors(backbone, vectors, domains, initial)
    student_items = [students[name].to(device) for name in vectors.domains]

    def terms_of(
        pairs: list[tuple[int, int]], coefficients: torch.Tensor, step: int | None = None
    ) -> dict[str, torch.Tensor]:
        with merged_forward(backbone, at(step, coefficients), coefficients):
            users = embed_batch(backbone, [pseudo[domain].users[user] for domain, user in pairs])  # (n, d)
        teacher_users = torch.stack([pseudo[domain].teacher_users[user] for domain, user in pairs]).to(users)  # (n, d)
        amateur_users = None
        if amateurs:
            amateur_users = torch.stack([amateurs_of_users[domain][user] for domain, user in pairs]).to(users)  # (n, d)
        drawn = np.array([domain for domain, _ in pairs])
        return batch_terms(users, teacher_users, drawn, teachers, student_items, settings, amateur_users, amateurs)

    def gradient(step: int, coefficients: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        nonlocal student_items
        if step and settings.refresh_every and step % settings.refresh_every == 0:
            fresh = student_vectors(backbone, vectors, domains, coefficients)
            student_items = [fresh[name].to(device) for name in vectors.domains]
        pairs = [
            (int(domain), int(orders[domain][user + held_out[domain]]))
            for domain, user in zip(drawn_domains[step], drawn_users[step], strict=True)
        ]
        terms = terms_of(pairs, coefficients, step)
        loss = weighted_total(terms, settings)
        (found,) = torch.autograd.grad(loss, [coefficients])
        return found, {"total": float(loss.detach()), **{name: float(term.detach()) for name, term in terms.items()}}

    @torch.no_grad()
    def validate(coefficients: torch.Tensor) -> float:
        """Return the mean over domains of the loss on held-out pseudo-users."""
        losses = []
        for domain, (order, held) in enumerate(zip(orders, held_out, strict=True)):
            if held:
                pairs = [(domain, int(user)) for user in order[:held]]
                losses.append(float(weighted_total(terms_of(pairs, coefficients), settings)))
        return float(np.mean(losses))

    return _Objective(gradient, validate)


def _objective_of_items(
    backbone: Backbone, at: VectorsAt, settings: MergeRecSettings, union: UnionSimilarity
) -> _Objective:
    """Return the term "similarity": a block a step, and the last one for validation."""

    def gradient(step: int, coefficients: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        term, found = similarity_term(backbone, at(step, coefficients), coefficients, union, step)
        return settings.similarity_weight * found, {"total": settings.similarity_weight * term, SIMILARITY: term}

    @torch.no_grad()
    def validate(coefficients: torch.Tensor) -> float:
        term, _ = similarity_term(backbone, at(None, coefficients), coefficients, union, settings.steps)
        return settings.similarity_weight * term

    return _Objective(gradient, validate)


def _sum_of(objectives: Sequence[_Objective]) -> _Objective:
    if len(objectives) == 1:
        return objectives[0]

    def gradient(step: int, coefficients: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        parts = [objective.gradient(step, coefficients) for objective in objectives]
        losses = {name: value for _, of_part in parts for name, value in of_part.items()}
        losses["total"] = sum(of_part["total"] for _, of_part in parts)
        return torch.stack([found for found, _ in parts]).sum(dim=0), losses

    return _Objective(gradient, lambda coefficients: sum(each.validate(coefficients) for each in objectives))


def _scaled(objective: _Objective, factor: float) -> _Objective:
    """Return an objective whose gradient is multiplied by a factor; its losses are not."""

    def gradient(step: int, coefficients: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        found, losses = objective.gradient(step, coefficients)
        return factor * found, losses

    return _Objective(gradient, objective.validate)


def _hold_out(pseudo: Sequence[PseudoDomain], settings: MergeRecSettings) -> tuple[list[np.ndarray], list[int]]:
    """Return the order of every domain's pseudo-users, and how many of the first are held out for validation.

    Raises:
        ConfigError: no domain has enough of them.
    """
    orders = [
        seeding.generator(settings.seed, "mergerec", "held out", domain.name).permutation(len(domain.users))
        if settings.select_every
        else np.arange(len(domain.users))
        for domain in pseudo
    ]
    held_out = [min(HELD_OUT, len(order) // 5) if settings.select_every else 0 for order in orders]
    if settings.select_every and not any(held_out):
        raise ConfigError(
            f"mergerec: select_every holds out a fifth of a domain's pseudo-users, but no domain has more than "
            f"{max(map(len, orders))}, expected 5 or more; set it to None, or make more pseudo-users"
        )
    return orders, held_out


def _amateurs(
    pseudo: Sequence[PseudoDomain], settings: MergeRecSettings, device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return each domain's vectors of items and pseudo-users under the other experts; empty if they teach nothing."""
    if settings.teacher == "expert":
        return [], []
    items = [domain.amateur_items for domain in pseudo if domain.amateur_items is not None]
    users = [domain.amateur_users for domain in pseudo if domain.amateur_users is not None]
    return [vectors.to(device, torch.float32) for vectors in items], users


def _check_domains(vectors: Vectors, domains: Mapping[str, PseudoDomain]) -> None:
    if set(domains) != set(vectors.domains):
        raise LayoutMismatchError(
            f"learn_coefficients: found pseudo-users of {', '.join(sorted(domains)) or 'no domain'}, "
            f"expected those of {', '.join(vectors.domains)}; make them for exactly the domains that are merged"
        )


def _check_needs(
    domains: Mapping[str, PseudoDomain], settings: MergeRecSettings, union: UnionSimilarity | None
) -> None:
    plain = [name for name in sorted(domains) if domains[name].amateur_items is None]
    if settings.teacher == "contrastive" and plain:
        raise ConfigError(
            f"learn_coefficients: teacher = 'contrastive', but the pseudo-users of {', '.join(plain)} have no vectors "
            "under the other experts; make them with teacher='contrastive'"
        )
    if settings.compares_items != (union is not None):
        found, expected = ("no union", "that of") if union is None else ("a union", "none for")
        raise ConfigError(
            f"learn_coefficients: found {found} of the catalogs, expected {expected} loss {settings.loss!r}; pass "
            "union = union_similarity(…) if and only if the loss has the term similarity"
        )


def _epochs(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the first ``count`` entries of concatenated random permutations of range(size)."""
    return np.concatenate([rng.permutation(size) for _ in range(-(-count // size))] or [np.empty(0, np.int64)])[:count]
