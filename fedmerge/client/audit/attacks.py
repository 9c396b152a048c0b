"""Attacks that measure what an adapter reveals about its users, docs/reference/privacy/differential-privacy.md."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds

from fedmerge.adapter import Adapter, is_zero
from fedmerge.client.audit.similarity import SentFactors, factor_attacks, recovered_pairs
from fedmerge.client.audit.users import canaries, prepare_for_audit
from fedmerge.client.local_domain import MIN_TRAINING_LENGTH, LocalDomain
from fedmerge.client.training.by_mode import train_adapter
from fedmerge.client.training.losses import TEMPERATURE, catalog_softmax
from fedmerge.client.training.settings import TrainingSettings
from fedmerge.config import Simulation, Train
from fedmerge.domain.splits import train_sequences
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.errors import ClientError
from fedmerge.evaluation.ranks import rank_targets
from fedmerge.merging.stack import linear_merge_of_many, survey_adapters
from fedmerge.privacy.attacks import (
    AGAINST_BACKBONE,
    Floats,
    consecutive_pairs,
    exposures,
    likelihood_ratios,
    membership,
    precision_at,
    top_pairs,
)
from fedmerge.seeding import derive, generator

BACKBONE, EXPERT, MERGED = "backbone", "expert", "merged"
RECORDS_PER_USER = 4  # the longest prefixes with their next items; one if training used the last item alone
PAIR_COUNTS = (50, 100, 500, 1000)
FACTORS = 32  # of the factorisation whose item similarities are compared
BLOCK = 1024

Sequence_ = npt.NDArray[np.int32]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Audited:
    """The target of an audit: a domain and the adapters that reveal something about it.

    Attributes:
        domain: the opened domain with all its users.
        settings: settings of the training.
        expert: the domain's adapter, as it left the client; None after rounds.
        merged: the served merge.
        experts: domain -> expert, of all domains in the merge.
        coefficients: coefficients of the merge by domain (a number, or one per group of modules) if it is a plain sum.
        woven: source -> adapter that the domain continued and sent.
        factors: label -> similarity factors, its own and those of others, of :func:`factors_for`.
    """

    domain: LocalDomain
    settings: TrainingSettings
    expert: Adapter | None
    merged: Adapter | None
    experts: Mapping[str, Adapter]
    coefficients: Mapping[str, Any] | None
    woven: Mapping[str, Adapter] = field(default_factory=dict)
    factors: Mapping[str, SentFactors] = field(default_factory=dict)


@dataclass(frozen=True)
class UserScores:
    """Mean loss and mean log-odds of the target, (U,) each, of U users under one model."""

    losses: Floats
    log_odds: Floats


def audit_domain(audited: Audited, num_shadows: int, progress: Progress = lambda line: None) -> dict[str, Any]:
    """Run all attacks on one domain.

    Args:
        audited: domain and adapters.
        num_shadows: trainings on random halves of the users for LiRA; 0 runs the loss attacks alone.
        progress: receives a line now and then.

    Returns:
        The measurements, as JSON types.

    Raises:
        ClientError: the run left no user out, so there are no non-members.
    """
    domain, settings = audited.domain, audited.settings
    trained = prepare_for_audit(domain, settings.simulation, settings.seed)
    sequences = train_sequences(domain.interactions)
    eligible = np.array([len(sequence) >= MIN_TRAINING_LENGTH for sequence in sequences])
    out = np.zeros(len(sequences), dtype=np.bool_) if trained.left_out is None else trained.left_out
    users = np.flatnonzero(eligible)
    members = ~out[users]
    if members.all() or not members.any():
        raise ClientError(
            f"domain {domain.manifest.name}: the run trained on {int(members.sum())} users and left out "
            f"{int((~members).sum())}, but an audit compares both kinds of users. Start a run with "
            "simulation.held_out_users = 0.5."
        )
    pool = [sequences[user] for user in users]
    models = {BACKBONE: None, EXPERT: audited.expert, MERGED: audited.merged}
    models |= {f"continued {source}": adapter for source, adapter in audited.woven.items()}
    models = {label: adapter for label, adapter in models.items() if adapter is not None or label == BACKBONE}
    nothing_learned = [label for label, adapter in models.items() if adapter is not None and is_zero(adapter)]
    for label in nothing_learned:
        progress(f"{domain.manifest.name}: nothing was learned: the {label} is zero, so its attacks find nothing")
    scores = {}
    for label, adapter in models.items():
        scores[label] = score_users(domain, adapter, pool, settings.train)
        progress(f"{domain.manifest.name}: {len(pool)} users scored under {label}")
    rows = _loss_attacks(scores, members)
    backbone = _encoded(domain, None, [])[0] if audited.factors else torch.empty(0)
    of_factors, similarities = factor_attacks(audited.factors, backbone, pool, members)
    rows += of_factors
    why_none = ""
    if num_shadows and EXPERT not in scores and not _is_in_a_sum(audited):
        why_none = "without an expert, and without a merge that is a plain sum, shadows cannot be compared"
        progress(f"{domain.manifest.name}: no shadow is trained: {why_none}")
        num_shadows = 0
    if num_shadows:
        rows += _shadow_attacks(audited, scores, users, members, num_shadows, progress)
    of_members = [sequence for sequence, member in zip(pool, members, strict=True) if member]
    recovery = _recovery(domain, models, of_members, settings.seed)
    recovery["rows"] += [
        {"from": label, "precision_at": recovered_pairs(items, of, of_members, PAIR_COUNTS)}
        for label, items, of in similarities
    ]
    return {
        "members": int(members.sum()),
        "non_members": int((~members).sum()),
        "items": len(domain.table),
        "shadows": num_shadows,
        "why_no_shadows": why_none,
        "nothing_learned": nothing_learned,
        "membership": rows,
        "recovery": recovery,
        "canaries": _canaries(domain, models, settings.simulation, settings.seed),
    }


def score_users(
    domain: LocalDomain, adapter: Adapter | None, sequences: list[Sequence_], settings: Train
) -> UserScores:
    """Compute each user's loss over the whole catalog on the last records, whichever loss was trained."""
    most = 1 if settings.samples == "last" else RECORDS_PER_USER
    cuts = [range(max(1, len(sequence) - most), len(sequence)) for sequence in sequences]
    owners = np.concatenate([np.full(len(cut), user) for user, cut in enumerate(cuts)])
    records = [(sequence[:at], sequence[at]) for sequence, cut in zip(sequences, cuts, strict=True) for at in cut]
    targets = np.array([target for _, target in records], dtype=np.int64)
    losses = _losses(domain, adapter, [history for history, _ in records], targets)
    likely = np.exp(-losses)
    log_odds = -losses - np.log(np.maximum(1 - likely, 1e-12))
    counts = np.bincount(owners)
    return UserScores(np.bincount(owners, losses) / counts, np.bincount(owners, log_odds) / counts)


def _losses(
    domain: LocalDomain,
    adapter: Adapter | None,
    histories: list[Sequence_],
    targets: npt.NDArray[np.int64],
) -> Floats:
    items, vectors = _encoded(domain, adapter, histories)
    wanted = torch.from_numpy(targets)
    parts = [slice(start, start + BLOCK) for start in range(0, len(targets), BLOCK)]
    found = [catalog_softmax(vectors[part], items, wanted[part], TEMPERATURE) for part in parts]
    return torch.cat(found).double().numpy()


def _encoded(
    domain: LocalDomain, adapter: Adapter | None, histories: list[Sequence_]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode the items (N, d) and the histories (b, d)."""
    packed = domain.packed(histories)
    with applied(domain.backbone, adapter):
        return encode(domain.backbone, domain.item_sequences), encode(domain.backbone, packed)


def _loss_attacks(scores: Mapping[str, UserScores], members: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    rows = []
    for label, found in scores.items():
        attacks = {"loss": -found.losses}
        if label != BACKBONE:
            attacks[AGAINST_BACKBONE] = scores[BACKBONE].losses - found.losses
        for attack, values in attacks.items():
            rows.append({"model": label, "attack": attack, **membership(values[members], values[~members])})
    return rows


def _shadow_attacks(
    audited: Audited,
    scores: Mapping[str, UserScores],
    users: npt.NDArray[np.int64],
    members: npt.NDArray[np.bool_],
    num_shadows: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Run LiRA, online: shadows are trained like the expert, each on a random half of members and non-members."""
    domain, settings = audited.domain, audited.settings
    name, sequences = domain.manifest.name, train_sequences(domain.interactions)
    pool = [sequences[user] for user in users]
    inside = np.zeros((num_shadows, len(users)), dtype=np.bool_)
    found: dict[str, list[Floats]] = {EXPERT: [], MERGED: []}
    for shadow in range(num_shadows):
        drawn = generator(settings.seed, "audit", "shadow", name, shadow).permutation(len(users))
        inside[shadow, drawn[: len(users) // 2]] = True
        left_out = np.ones(domain.interactions.num_users, dtype=np.bool_)
        left_out[users[inside[shadow]]] = False
        seeded = replace(settings, seed=derive(settings.seed, "audit", "shadow", shadow) % 2**31)
        adapter, _, _ = train_adapter(replace(domain, left_out=left_out), seeded)
        merged = _merged_with(audited, adapter)
        for label, of_shadow in ((EXPERT, adapter), (MERGED, merged)):
            if label in scores and of_shadow is not None:
                found[label].append(score_users(domain, of_shadow, pool, settings.train).log_odds)
        progress(f"{name}: shadow {shadow + 1} of {num_shadows}")
    rows = []
    for label, of_shadows in found.items():
        if of_shadows:
            ratios = likelihood_ratios(scores[label].log_odds, np.stack(of_shadows), inside)
            rows.append({"model": label, "attack": "LiRA", **membership(ratios[members], ratios[~members])})
    return rows


def _merged_with(audited: Audited, adapter: Adapter) -> Adapter | None:
    """Merge with this adapter in place of the domain's expert; None if the merge is not a plain sum."""
    if audited.coefficients is None or not _is_in_a_sum(audited):
        return None
    adapters = {**audited.experts, audited.domain.manifest.name: adapter}
    coefficients = np.array([audited.coefficients[domain] for domain in sorted(adapters)], dtype=np.float64)
    return linear_merge_of_many(adapters, survey_adapters(adapters), coefficients)


def _is_in_a_sum(audited: Audited) -> bool:
    """Return True if a shadow can replace the domain's expert in the merge."""
    return audited.merged is not None and audited.domain.manifest.name in (audited.coefficients or ())


def _recovery(
    domain: LocalDomain, models: Mapping[str, Adapter | None], members: list[Sequence_], seed: int
) -> dict[str, Any]:
    """Guess consecutive items of members from similarities of the public items, and return the precision."""
    num_items, true = len(domain.table), consecutive_pairs(members)
    vectors = {label: _encoded(domain, adapter, [])[0] for label, adapter in models.items()}
    factors = torch.from_numpy(item_factors(members, num_items, seed))
    similarities: dict[str, Callable[[int], torch.Tensor]] = {
        label: _similarities(found, found) for label, found in vectors.items()
    }
    for label in set(models) - {BACKBONE}:
        similarities[f"{label} minus backbone"] = _difference(vectors[label], vectors[BACKBONE])
    similarities["similarity sharing (item factors)"] = _similarities(factors, factors)
    scale = float((factors[:BLOCK] @ factors.T).std())
    drawn = generator(seed, "audit", "similarity-noise", domain.manifest.name)
    similarities["similarity sharing, Laplace noise as large as they spread"] = _with_laplace(
        _similarities(factors, factors), scale / np.sqrt(2), drawn
    )
    rows = [
        {
            "from": label,
            "precision_at": precision_at(top_pairs(_blocks(of, num_items), max(PAIR_COUNTS)), true, PAIR_COUNTS),
        }
        for label, of in sorted(similarities.items())
    ]
    return {"pairs": len(true), "share_of_all_pairs": 2 * len(true) / (num_items * (num_items - 1)), "rows": rows}


def item_factors(sequences: list[Sequence_], num_items: int, seed: int) -> npt.NDArray[np.float32]:
    """Factorise the users' interactions: item vectors V √Σ, (N, f), of the truncated SVD.

    Methods that share item similarities start from such vectors.
    """
    users = np.concatenate([np.full(len(sequence), user) for user, sequence in enumerate(sequences)])
    items = np.concatenate(sequences)
    matrix = csr_array((np.ones(len(items)), (users, items)), shape=(len(sequences), num_items))
    matrix.data[:] = 1.0
    start = generator(seed, "audit", "factors").standard_normal(min(matrix.shape))
    _, values, right = svds(matrix, k=min(FACTORS, min(matrix.shape) - 1), v0=start)
    return np.asarray(right.T * np.sqrt(values), dtype=np.float32)


def _similarities(left: torch.Tensor, right: torch.Tensor) -> Callable[[int], torch.Tensor]:
    return lambda start: left[start : start + BLOCK] @ right.T


def _difference(vectors: torch.Tensor, before: torch.Tensor) -> Callable[[int], torch.Tensor]:
    return lambda start: vectors[start : start + BLOCK] @ vectors.T - before[start : start + BLOCK] @ before.T


def _with_laplace(
    similarities: Callable[[int], torch.Tensor], scale: float, drawn: np.random.Generator
) -> Callable[[int], torch.Tensor]:
    def noised(start: int) -> torch.Tensor:
        block = similarities(start)
        return block + torch.from_numpy(drawn.laplace(0, scale, tuple(block.shape))).to(block)

    return noised


def _blocks(of: Callable[[int], torch.Tensor], num_items: int) -> Iterator[tuple[int, Floats]]:
    return ((start, of(start).double().numpy()) for start in range(0, num_items, BLOCK))


def _canaries(
    domain: LocalDomain, models: Mapping[str, Adapter | None], simulation: Simulation, seed: int
) -> list[dict[str, Any]]:
    """Measure the exposure of the planted users' last items against users drawn in the same way but not planted."""
    drawn = canaries(domain, simulation.canaries, seed)
    if not drawn.planted:
        return []
    rows = []
    both = [*drawn.planted, *drawn.compared]
    histories, targets = [s[:-1] for s in both], np.array([s[-1] for s in both], dtype=np.int64)
    planted = np.arange(len(both)) < len(drawn.planted)
    for label, adapter in models.items():
        items, vectors = _encoded(domain, adapter, histories)
        ranks = rank_targets(vectors, items, targets)
        found = exposures(ranks, len(domain.table))
        rows.append(
            {
                "model": label,
                "planted": len(drawn.planted),
                "median_rank": float(np.median(ranks[planted])),
                "mean_exposure": float(found[planted].mean()),
                "max_exposure": float(found[planted].max()),
                "mean_exposure_not_planted": float(found[~planted].mean()),
                **membership(found[planted], found[~planted]),
            }
        )
    return rows
