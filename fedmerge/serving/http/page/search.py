"""Find items of a catalog for a history, and make example histories; interactions are not read."""

import itertools

import torch

from fedmerge.errors import DomainError
from fedmerge.seeding import generator
from fedmerge.serving.http.shelf import Shelf, fold

EXAMPLE_SIZE, EXAMPLE_POOL = 4, 30  # items of an example, and nearest items that they are drawn from


def find_items(shelf: Shelf, query: str, k: int) -> tuple[list[int], int]:
    """Find the items whose titles have all words of a query, and the item with this id.

    First the item with the id, then titles that begin with the query, then those with a word that begins with the
    query's first one, then the others; of equal ones the item that comes first in the catalog.

    Args:
        shelf: N items.
        query: words, or an id.
        k: how many.

    Returns:
        At most k positions, and the number of items that match.

    Raises:
        DomainError: a query without words.
    """
    words = fold(query).split()
    if not words:
        raise DomainError("q: found no word, expected an item's id, or words of its title.")
    beginning, first = " ".join(words), words[0]
    titles, same_id = shelf.folded_titles, shelf.recommender.item_index.get(query.strip())
    found = [place for place, title in enumerate(titles) if first in title]
    for word in words[1:]:
        found = [place for place in found if word in titles[place]]
    if same_id is not None and same_id not in found:
        found.append(same_id)

    ranked = itertools.chain(
        (place for place in found if place == same_id),
        (place for place in found if titles[place].startswith(beginning)),
        (place for place in found if f" {first}" in titles[place]),
        found,
    )
    best = dict[int, None]()
    for place in ranked:
        best[place] = None
        if len(best) == k:
            break
    return list(best), len(found)


def example_history(shelf: Shelf, number: int) -> list[int]:
    """Make a history of similar items: one that is drawn, after some that are drawn from those nearest to it.

    Args:
        shelf: N items; their vectors say what is near.
        number: the same number gives the same history.

    Returns:
        At most EXAMPLE_SIZE different positions.
    """
    vectors = shelf.recommender.item_vectors
    rng = generator(0, "example-history", number)
    last = int(rng.integers(len(vectors)))
    cosines = vectors @ vectors[last]
    cosines[last] = -torch.inf
    near = cosines.topk(min(EXAMPLE_POOL, len(vectors) - 1)).indices.tolist()
    return [*rng.permutation(near)[: EXAMPLE_SIZE - 1].tolist(), last]
