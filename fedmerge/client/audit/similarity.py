"""Attacks on the similarity factors that a client sends: bought in succession, and membership; with controls.

The factors are a function of the expert and of public texts, so a server that has both learns nothing from them that
it could not compute; the other clients, who have no expert, do. The control reads the factors of another domain, whose
users are others: what it finds is what the items' texts tell.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.federated.shared_items import SharedItems, of_others
from fedmerge.privacy.attacks import Floats, consecutive_pairs, membership, precision_at, top_pairs

OWN = "similarity factors"
CONTROL = "similarity factors of {} (control)"
LESS = " minus backbone"
PAIRS_ATTACK = "similarity of the user's successive items"
BLOCK = 1024

Numbers = npt.NDArray[np.int64]
Sequences = Sequence[npt.NDArray[np.int32]]


@dataclass(frozen=True, eq=False)
class SentFactors:
    """Similarity factors over some items of the audited domain.

    Attributes:
        items: (n,) positions in its catalog.
        factors: (n, q), of this domain or of another one.
    """

    items: Numbers
    factors: torch.Tensor


def factors_for(
    target: str, sent: Mapping[str, tuple[SharedItems, torch.Tensor]], least: int = 2
) -> dict[str, SentFactors]:
    """Return label -> the factors of a domain itself, and of each other one over the items that both have.

    Args:
        target: the audited domain.
        sent: domain -> its shared items and factors; without the target, nothing is audited.
        least: fewest items of a control.
    """
    if target not in sent:
        return {}
    shared = {name: items for name, (items, _) in sent.items()}
    found = {OWN: SentFactors(shared[target].items, sent[target][1].float())}
    for name in sorted(sent):
        items, rows = of_others(target, shared, name)
        if name != target and len(items) >= least:
            found[CONTROL.format(name)] = SentFactors(items, sent[name][1][torch.from_numpy(rows)].float())
    return found


def factor_attacks(
    sent: Mapping[str, SentFactors], backbone: torch.Tensor, pool: Sequences, members: npt.NDArray[np.bool_]
) -> tuple[list[dict[str, Any]], list[tuple[str, Numbers, Callable[[int], torch.Tensor]]]]:
    """Attack factors alone, and factors against the similarity under the backbone.

    Args:
        sent: of :func:`factors_for`.
        backbone: (N, d) item vectors of the untouched backbone, which everybody has.
        pool: training sequences of the users, of members and of others.
        members: (U,) True for those that were trained on.

    Returns:
        Rows of the membership attack, whose score of a user is the mean similarity of items bought in succession; and
        label, items and similarity of these items by blocks of rows, for the attack on pairs.
    """
    rows, similarities = [], []
    for label, of_label in sent.items():
        before = backbone[torch.from_numpy(of_label.items)].to(of_label.factors)
        for name, less in ((label, None), (label + LESS, before)):
            users, scores = _user_scores(of_label, less, pool)
            is_member = members[users]
            if is_member.any() and not is_member.all():
                rows.append(
                    {"model": name, "attack": PAIRS_ATTACK, **membership(scores[is_member], scores[~is_member])}
                )
            similarities.append((name, of_label.items, _similarity(of_label.factors, less)))
    return rows, similarities


def recovered_pairs(
    items: Numbers, similarity: Callable[[int], torch.Tensor], sequences: Sequences, counts: Sequence[int]
) -> Mapping[str, float]:
    """Return precision@k of the most similar pairs of these items, against those that somebody bought in succession."""
    blocks: Iterator[tuple[int, Floats]] = (
        (start, similarity(start).double().numpy()) for start in range(0, len(items), BLOCK)
    )
    return precision_at(items[top_pairs(blocks, max(counts))], consecutive_pairs(sequences), counts)


def _similarity(factors: torch.Tensor, before: torch.Tensor | None) -> Callable[[int], torch.Tensor]:
    def block(start: int) -> torch.Tensor:
        rows = slice(start, start + BLOCK)
        found = factors[rows] @ factors.T
        return found if before is None else found - before[rows] @ before.T

    return block


def _user_scores(sent: SentFactors, before: torch.Tensor | None, pool: Sequences) -> tuple[Numbers, Floats]:
    """Return the users who bought two of the items in succession, and the mean similarity of these pairs."""
    place_of = {int(item): place for place, item in enumerate(sent.items)}
    found = []
    for user, sequence in enumerate(pool):
        steps = [(place_of.get(int(a)), place_of.get(int(b))) for a, b in pairwise(sequence)]
        pairs = [(a, b) for a, b in steps if a is not None and b is not None and a != b]
        if pairs:
            left, right = (torch.tensor(places) for places in zip(*pairs, strict=True))
            values = (sent.factors[left] * sent.factors[right]).sum(dim=1)
            if before is not None:
                values = values - (before[left] * before[right]).sum(dim=1)
            found.append((user, float(values.mean())))
    users = np.array([user for user, _ in found], dtype=np.int64)
    return users, np.array([score for _, score in found], dtype=np.float64)
