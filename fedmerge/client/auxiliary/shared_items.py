"""The pull of a continued expert towards the mean similarity of shared items, as a term of its loss."""

import itertools
from collections.abc import Callable

import torch

from fedmerge.client.local_domain import LocalDomain
from fedmerge.encoder.encode import embed_in_groups
from fedmerge.federated.shared_items import MeanSimilarity
from fedmerge.seeding import generator

BLOCK = 256  # rows and columns of a block

Term = Callable[[int], torch.Tensor]
"""Number of a step -> a term of its loss."""


def similarity_loss(
    domain: LocalDomain, similarity: MeanSimilarity, weight: float, seed: int, step: int
) -> torch.Tensor:
    """Return γ · mean of (e_i·e_j − S̄_ij)² over a random block of shared items, differentiable; it reads no user.

    Args:
        domain: the client's domain, under the adapter that is trained.
        similarity: S̄ over its shared items.
        weight: γ.
        seed: seed of the experiment; the block depends on it, on the domain's name and on the step.
        step: number of the step.
    """
    drawn = generator(seed, "weave", "similarity", domain.manifest.name, step)
    number = len(similarity.items)
    rows, columns = (drawn.permutation(number)[:BLOCK] for _ in range(2))
    vectors = [
        embed_in_groups(domain.backbone, [domain.item_sequences[item] for item in similarity.items[places]])
        for places in (rows, columns)
    ]
    found = vectors[0] @ vectors[1].T
    return weight * (found - similarity.block(rows, columns).to(found)).square().mean()


def with_term(
    penalty: Callable[[], torch.Tensor] | None, term: Term | None, first: int
) -> Callable[[], torch.Tensor] | None:
    """Return a penalty that adds the term of the next step at each call, from step ``first`` on."""
    if term is None:
        return penalty
    numbers = itertools.count(first)

    def both() -> torch.Tensor:
        of_step = term(next(numbers))
        return of_step if penalty is None else penalty() + of_step

    return both
