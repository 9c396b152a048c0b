"""What is served at one moment. A change makes another shelf, so requests in progress keep theirs."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.text import Tokens, TokenTable
from fedmerge.errors import DomainError
from fedmerge.evaluation.ranks import FloatArray, IntArray
from fedmerge.seeding import generator
from fedmerge.serving.filters import passing
from fedmerge.serving.index import is_exact, load_or_build_index
from fedmerge.serving.listing import BoolArray, popularity_source
from fedmerge.serving.model import Opened, with_head
from fedmerge.serving.recommender import Recommender, encode_histories, tokens_of

MADE_UP_USERS, ITEMS_EACH = 100, 3  # on whom the recall of an index is measured
KEPT_FILTERS = 64
ROOM = 1024  # items that can be added before the vectors are copied


class ItemChange(NamedTuple):
    """An item to add or change; None leaves its text or availability as it is."""

    item_id: str
    attributes: Mapping[str, str] | None
    available: bool | None


@dataclass(frozen=True, eq=False)
class Shelf:
    """A recommender and what may be recommended.

    Attributes:
        opened: the recommender, the run it is of, and its head.
        label: the model's name, for answers.
        available: (N,) False for items that are not recommended.
        counts: (N,) how often each item was had; None if nobody counted.
        changed: ids of items that were added or changed since the catalog was read.
        room: (N or more, d), of which the vectors are the first rows; only the newest shelf may write behind them.
        filtered: filter on attributes -> items that pass, of the latest filters.
        beside: shelves of other models over the same items, for the page.
        absent: a model that the page would show -> why it is not beside.
    """

    opened: Opened
    label: str
    available: BoolArray
    counts: FloatArray | None
    changed: frozenset[str]
    room: torch.Tensor
    filtered: dict[str, BoolArray] = field(default_factory=dict)
    beside: tuple["Shelf", ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def recommender(self) -> Recommender:
        """The recommender."""
        return self.opened.recommender

    @property
    def catalog(self) -> Catalog:
        """The items, those that were added included."""
        return self.opened.recommender.catalog

    @cached_property
    def folded_titles(self) -> list[str]:
        """(N,) :func:`fold` of the titles, for searches."""
        return [fold(title) for title in self.catalog.titles]


def fold(text: str) -> str:
    """Return a text without its case and its compatible forms, so that what looks alike is equal."""
    return unicodedata.normalize("NFKC", text).casefold()


def make_shelf(opened: Opened, label: str, counts: FloatArray | None, available: BoolArray, cache_dir: str) -> Shelf:
    """Return a shelf of a catalog as it was read.

    Args:
        opened: of :func:`fedmerge.serving.model.open_recommender`.
        label: the model's name.
        counts: (N,) of :func:`fedmerge.serving.batch.count_items`, or None.
        available: (N,).
        cache_dir: folder with the index, if the catalog is so large that it needs one.
    """
    recommender = opened.recommender
    vectors = recommender.item_vectors
    if counts is not None:
        recommender = replace(recommender, popularity=popularity_source(counts))
    if recommender.head is None and not is_exact(*vectors.shape):
        index = load_or_build_index(recommender.catalog.name, vectors, lambda: _made_up(recommender), cache_dir)
        recommender = replace(recommender, index=index)
    return Shelf(replace(opened, recommender=recommender), label, available, counts, frozenset(), vectors)


def _made_up(recommender: Recommender) -> torch.Tensor:
    """Return the vectors of users with random histories."""
    table = recommender.table
    drawn = generator(0, "index-recall").integers(len(table), size=(MADE_UP_USERS, ITEMS_EACH))
    return encode_histories(recommender, [[table.item(item) for item in history] for history in drawn.tolist()])


def change_items(shelf: Shelf, changes: Sequence[ItemChange]) -> Shelf:
    """Return the shelf after items were added or changed; their vectors are computed at once.

    Args:
        shelf: the newest one.
        changes: applied in their order.

    Raises:
        DomainError: a new item without text, or attributes that the catalog does not have.
    """
    catalog, recommender = shelf.catalog, shelf.recommender
    texts: dict[str, Mapping[str, str]] = {}
    availability: dict[str, bool] = {}
    for change in changes:
        if change.attributes is not None:
            texts[change.item_id] = change.attributes
        elif change.item_id not in recommender.item_index and change.item_id not in texts:
            raise DomainError(
                f"items: {change.item_id!r} is not in the catalog of {catalog.name} and comes without attributes, "
                f"expected some of {list(catalog.attributes)}. Describe it."
            )
        if change.available is not None:
            availability[change.item_id] = change.available
    if texts:
        tokens = dict(zip(texts, tokens_of(recommender, list(texts.values())), strict=True))
        shelf = _with_texts(shelf, texts, tokens)
    available = shelf.available.copy()
    for item_id, value in availability.items():
        available[shelf.recommender.item_index[item_id]] = value
    changed = shelf.changed | texts.keys() | availability.keys()
    beside = tuple(change_items(each, changes) for each in shelf.beside)
    return replace(shelf, available=available, changed=changed, beside=beside)


def _with_texts(shelf: Shelf, texts: Mapping[str, Mapping[str, str]], tokens: Mapping[str, Tokens]) -> Shelf:
    recommender, catalog = shelf.recommender, shelf.catalog
    old = len(catalog)
    item_index = dict(recommender.item_index)
    for item_id in texts:
        item_index.setdefault(item_id, len(item_index))
    positions = np.array([item_index[item_id] for item_id in texts], dtype=np.int64)
    new = len(item_index) - old
    vectors = encode_histories(recommender, [[each] for each in tokens.values()])  # an item is a history of one
    if not vectors.isfinite().all():
        raise DomainError("items: a vector is NaN or infinite, expected finite ones. Serve another merge.")
    room = _room(shelf, old + new, changed=bool((positions < old).any()))
    room[torch.from_numpy(positions)] = vectors
    changed = replace(
        recommender,
        catalog=_with_rows(catalog, item_index, texts),
        table=_with_tokens(recommender.table, {item_index[item_id]: each for item_id, each in tokens.items()}, new),
        item_vectors=room[: old + new],
        item_index=item_index,
    )
    counts = None
    if shelf.counts is not None:
        counts = np.concatenate([shelf.counts, np.zeros(new)])
        changed = replace(changed, popularity=popularity_source(counts))
    if changed.index is not None:
        changed = replace(changed, index=changed.index.changed(positions))
    opened = replace(shelf.opened, recommender=changed)
    if opened.head is not None:
        head = opened.head.extended(changed.item_vectors)
        opened = replace(opened, recommender=with_head(changed, head), head=head)
    available = np.concatenate([shelf.available, np.ones(new, dtype=np.bool_)])
    return replace(shelf, opened=opened, available=available, counts=counts, room=room, filtered={})


def _room(shelf: Shelf, size: int, changed: bool) -> torch.Tensor:
    """Return vectors to write to: those behind the old ones can be written in place, which older shelves do not see."""
    if not changed and size <= len(shelf.room):
        return shelf.room
    vectors = shelf.recommender.item_vectors
    room = vectors.new_empty(size + ROOM, vectors.shape[1])
    room[: len(vectors)] = vectors
    return room


def _with_rows(catalog: Catalog, item_index: Mapping[str, int], texts: Mapping[str, Mapping[str, str]]) -> Catalog:
    attributes = {}
    for name, values in catalog.attributes.items():
        column = [*values, *[""] * (len(item_index) - len(catalog))]
        for item_id, item in texts.items():
            column[item_index[item_id]] = item.get(name, "")
        attributes[name] = tuple(column)
    return Catalog(catalog.name, tuple(item_index), attributes, "changed while it was served", catalog.limits)


def _with_tokens(table: TokenTable, tokens: Mapping[int, Tokens], new: int) -> TokenTable:
    lengths = np.concatenate([np.diff(table.offsets), np.zeros(new, dtype=np.int64)])
    lengths[list(tokens)] = [len(each) for each in tokens.values()]
    parts, start = [], 0
    for position in sorted(tokens):
        if position < len(table):
            parts.append(table.ids[table.offsets[start] : table.offsets[position]])
            start = position + 1
        elif start < len(table):
            parts.append(table.ids[table.offsets[start] :])
            start = len(table)
        parts.append(tokens[position])
    if start < len(table):
        parts.append(table.ids[table.offsets[start] :])
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    return TokenTable(np.concatenate(parts), offsets, table.separator)


def passing_items(shelf: Shelf, only: Mapping[str, Sequence[str]]) -> BoolArray:
    """Return :func:`fedmerge.serving.filters.passing`, which shops ask for again and again; it must not be changed."""
    key = json.dumps(only)
    if (found := shelf.filtered.get(key)) is None:
        if len(shelf.filtered) >= KEPT_FILTERS:
            shelf.filtered.clear()
        found = shelf.filtered[key] = passing(shelf.catalog, only)
    return found


def positions_of(shelf: Shelf, item_ids: Sequence[str]) -> IntArray:
    """Return the positions of the ids that the catalog has."""
    index = shelf.recommender.item_index
    return np.array([index[item_id] for item_id in item_ids if item_id in index], dtype=np.int64)
