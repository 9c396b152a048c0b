"""Similarity averaging over shared items, FedCIA-style: factors of each client, and their mean for one target.

A similarity e_i·e_j does not change if all vectors are rotated, so experts that share no space can be averaged by it:

    find_shared_items    items whose id at least two catalogs have
    similarity_factors   F_k (n, q) with F_k F_kᵀ the best rank-q approximation of E_k E_kᵀ; one client sends it
    mean_similarity      S̄ = the mean of F_k F_kᵀ over the clients that have both items, as factors again

Source: FedCIA, arXiv:2504.14208, and its released code.
Differs: there all clients have one item set and send N × N similarities with Laplace noise, which is no guarantee; here
the factors have rank q, no noise is added, and items are matched by id. Clients receive the factors of S̄, which tell
nothing of single clients that S̄ does not; of two clients each learns the other's similarities by subtraction.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.errors import DomainError

Numbers = npt.NDArray[np.int64]
FEWEST = 2  # shared items of a domain, for one pair


@dataclass(frozen=True, eq=False)
class SharedItems:
    """The shared items of one domain.

    Attributes:
        items: (n,) their positions in the domain's catalog, increasing.
        shared: (n,) their numbers among the shared items of all domains.
    """

    items: Numbers
    shared: Numbers


@dataclass(frozen=True, eq=False)
class MeanSimilarity:
    """S̄ over the shared items of one domain.

    Attributes:
        items: (n,) positions in its catalog.
        factors: (n, p) float16; factors · factorsᵀ is the sum of all clients' similarities.
        present: (n, K) uint8, 1 where a client has the item.
    """

    items: Numbers
    factors: torch.Tensor
    present: torch.Tensor

    def block(self, rows: Numbers, columns: Numbers) -> torch.Tensor:
        """Return the (b, c) block of S̄ at these places of ``items``, float32."""
        left, right = torch.from_numpy(rows), torch.from_numpy(columns)
        total = self.factors[left].float() @ self.factors[right].float().T
        return total / (self.present[left].float() @ self.present[right].float().T)


def find_shared_items(catalogs: Mapping[str, Sequence[str]]) -> dict[str, SharedItems]:
    """Return domain -> its items whose id at least two catalogs have.

    Args:
        catalogs: domain -> item ids, in the order of the catalog.

    Raises:
        DomainError: a domain has fewer than two such items.
    """
    counts = Counter(item for ids in catalogs.values() for item in ids)
    numbers = {item: number for number, item in enumerate(sorted(item for item, count in counts.items() if count > 1))}
    places = {name: [place for place, item in enumerate(ids) if item in numbers] for name, ids in catalogs.items()}
    if few := sorted(name for name, of_domain in places.items() if len(of_domain) < FEWEST):
        raise DomainError(
            f"no shared items: found fewer than {FEWEST} item ids of {', '.join(few)} in the other catalogs, but "
            "weave.schedule = 'similarity' averages the similarities of items that two catalogs have. Leave these "
            "domains out, or set weave.schedule = 'none'; mergerec.loss = 'similarity' needs no shared items."
        )
    return {
        name: SharedItems(
            np.array(places[name], dtype=np.int64),
            np.array([numbers[catalogs[name][place]] for place in places[name]], dtype=np.int64),
        )
        for name in sorted(catalogs)
    }


def factor_width(num_items: int, width: int, rank: int) -> int:
    """Return q, the number of columns of a client's factors."""
    return min(rank, width, num_items)


def similarity_factors(vectors: torch.Tensor, rank: int) -> torch.Tensor:
    """Return F = E V_q (n, q) float16, V_q the first q right singular vectors of E, so that F Fᵀ is E Eᵀ cut to rank q.

    Args:
        vectors: E (n, d), of length 1.
        rank: largest q.
    """
    exact = vectors.double()
    directions: torch.Tensor = torch.linalg.eigh(exact.T @ exact).eigenvectors  # ascending
    kept = factor_width(len(vectors), vectors.shape[1], rank)
    return (exact @ directions.flip(1)[:, :kept]).half()


def mean_similarity(
    target: str, shared: Mapping[str, SharedItems], factors: Mapping[str, torch.Tensor]
) -> MeanSimilarity:
    """Return S̄ over the shared items of one domain, as its client receives it.

    Args:
        target: the domain.
        shared: domain -> its shared items.
        factors: domain -> its factors, of the clients that are averaged.
    """
    names, wanted = sorted(factors), shared[target]
    present = torch.zeros(len(wanted.items), len(names), dtype=torch.uint8)
    blocks = []
    for column, name in enumerate(names):
        place_of = {int(number): place for place, number in enumerate(shared[name].shared)}
        rows = [row for row, number in enumerate(wanted.shared) if int(number) in place_of]
        places = [place_of[int(wanted.shared[row])] for row in rows]
        block = torch.zeros(len(wanted.items), factors[name].shape[1], dtype=torch.float64)
        block[rows] = factors[name][places].double()
        present[rows, column] = 1
        blocks.append(block)
    stacked = torch.cat(blocks, dim=1)
    _, directions = torch.linalg.eigh(stacked.T @ stacked)  # rotates the columns, so that no block is one client's
    kept = min(stacked.shape)
    return MeanSimilarity(wanted.items, (stacked @ directions.flip(1)[:, :kept]).half(), present)


def of_others(target: str, shared: Mapping[str, SharedItems], other: str) -> tuple[Numbers, Numbers]:
    """Return the places of the items that two domains share: positions in the target's catalog, rows of the other's."""
    _, own, theirs = np.intersect1d(shared[target].shared, shared[other].shared, return_indices=True)
    return shared[target].items[own], theirs.astype(np.int64)
