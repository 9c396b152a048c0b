"""Lists of several models for one history: what moved between them, and which items of the history are near."""

from collections.abc import Sequence

import torch

from fedmerge.encoder.text import Tokens, num_packed
from fedmerge.serving.http.page.bodies import Gone, OfModel, Reason, Shown
from fedmerge.serving.http.page.models import Column
from fedmerge.serving.recommender import (
    History,
    Item,
    Recommendation,
    Recommender,
    encode_histories,
    read_history,
)

DEPTH = 100  # of the first list, in which places are looked up
MOST_REASONS = 2
NO_TEXTS = "A head reads items of the catalog alone, and this history describes another one."


def num_read(recommender: Recommender, history: History) -> int:
    """Return how many of a history's latest items its text has."""
    text = recommender.text
    tokens = history.tokens[-text.max_items :]
    return num_packed(tokens, recommender.table.separator, recommender.encoder.special, text.max_tokens)


def can_read(column: Column, items: Sequence[Item]) -> bool:
    """Return whether a model reads such a history: a head has no place for texts."""
    return column.shelf.recommender.head is None or all(isinstance(item, str) for item in items)


def explain(
    column: Column,
    items: Sequence[Item],
    places: Sequence[int],
    found: Sequence[Recommendation],
    first: Sequence[Recommendation],
    k: int,
) -> OfModel:
    """Return the list of a model, with places in the first list and the nearest items of the history.

    Args:
        column: the model.
        items: H items that it can read, oldest first.
        places: (H,) of the items in the history that was sent.
        found: what it recommends; the best k are taken.
        first: what the first model recommends, DEPTH or more.
        k: length of a list.
    """
    before = {item.item_id: place for place, item in enumerate(first, 1)}
    listed = found[:k]
    near = _near(column.shelf.recommender, items, places, listed)
    shown = [
        Shown(item_id=item.item_id, title=item.title, score=item.score, before=before.get(item.item_id), near=reasons)
        for item, reasons in zip(listed, near, strict=True)
    ]
    ids = {item.item_id for item in listed}
    gone = [
        Gone(item_id=item.item_id, title=item.title, before=place)
        for place, item in enumerate(first[:k], 1)
        if item.item_id not in ids
    ]
    kind = column.shelf.recommender.score_kind
    return OfModel(title=column.title, score_kind=kind, recommendations=shown, gone=gone, refused=None)


def _near(
    recommender: Recommender, items: Sequence[Item], places: Sequence[int], listed: Sequence[Recommendation]
) -> list[list[Reason]]:
    """Return for each listed item the nearest of the history that the model reads, by the cosine of their vectors."""
    history = read_history(recommender, items)
    start = 0 if recommender.head is not None else len(items) - num_read(recommender, history)
    last_of = {item if isinstance(item, str) else number: number for number, item in enumerate(items)}
    read = [number for number in sorted(last_of.values()) if number >= start]  # an id that comes twice: its latest
    theirs = _vectors(recommender, [items[number] for number in read], [history.tokens[number] for number in read])
    ours = recommender.item_vectors[[recommender.item_index[item.item_id] for item in listed]]
    best = (ours @ theirs.T).topk(min(MOST_REASONS, len(read)), dim=1)
    return [
        [Reason(place=places[read[row]], cosine=cosine) for row, cosine in zip(rows, cosines, strict=True)]
        for rows, cosines in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _vectors(recommender: Recommender, items: Sequence[Item], tokens: Sequence[Tokens]) -> torch.Tensor:
    """Return the vectors (H, d) of items: those of the catalog, others encoded from their tokens."""
    texts = [number for number, item in enumerate(items) if not isinstance(item, str)]
    rows = [recommender.item_index[item] if isinstance(item, str) else 0 for item in items]
    vectors = recommender.item_vectors[rows]  # a copy
    if texts:
        vectors[texts] = encode_histories(recommender, [[tokens[number]] for number in texts])
    return vectors
