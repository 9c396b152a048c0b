"""Recommendations for many users at once: from a table of histories, or from all users of a domain, to a table."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from fedmerge.domain.catalog import Catalog
from fedmerge.domain.importers.reading.formats import open_table
from fedmerge.domain.importers.reading.table import RECOGNISED, check_columns
from fedmerge.domain.importers.reading.values import to_ids
from fedmerge.domain.interactions import Interactions
from fedmerge.errors import DomainError
from fedmerge.evaluation.ranks import FloatArray
from fedmerge.serving.listing import Listing
from fedmerge.serving.recommender import Recommender, read_history, recommend_many

USERS_AT_ONCE = 512
USER, ITEM, HISTORY = "user_id", "item_id", "history"
SCHEMA = pa.schema(
    [
        pa.field(USER, pa.string()),
        pa.field("rank", pa.int32()),
        pa.field(ITEM, pa.string()),
        pa.field("score", pa.float32()),
        pa.field("title", pa.string()),
    ]
)
UserHistory = tuple[str, list[str]]
"""User id, and item ids, oldest first."""


@dataclass(slots=True)
class Tally:
    """Counts of a batch, complete when its rows have been read.

    Attributes:
        users: users with a list.
        without: users without any item of the catalog, who have none.
        unknown: items of histories that the catalog does not have; they are left out.
    """

    users: int = 0
    without: int = 0
    unknown: int = 0


def recommended_rows(
    recommender: Recommender,
    users: Iterable[UserHistory],
    listing: Listing,
    tally: Tally,
    progress: Callable[[int], None] = lambda users: None,
) -> Iterator[dict[str, Any]]:
    """Yield rows of SCHEMA, user after user, each list from rank 1.

    Args:
        recommender: of :func:`fedmerge.serving.recommender.load_recommender`.
        users: read some at a time.
        listing: how the lists are made.
        tally: is counted up.
        progress: called with the number of users so far.
    """
    remaining = iter(users)
    while some := list(itertools.islice(remaining, USERS_AT_ONCE)):
        known = [(user, [item for item in items if item in recommender.item_index]) for user, items in some]
        tally.unknown += sum(len(items) for _, items in some) - sum(len(items) for _, items in known)
        tally.without += sum(not items for _, items in known)
        asked = [(user, read_history(recommender, items)) for user, items in known if items]
        lists = recommend_many(recommender, [history for _, history in asked], [listing] * len(asked))
        tally.users += len(asked)
        for (user, _), found in zip(asked, lists, strict=True):
            for rank, one in enumerate(found, start=1):
                yield {USER: user, "rank": rank, ITEM: one.item_id, "score": one.score, "title": one.title}
        progress(tally.users)


def all_users(interactions: Interactions, catalog: Catalog) -> Iterator[UserHistory]:
    """Yield the users of a domain."""
    for number, user in enumerate(interactions.user_ids):
        yield user, [catalog.item_ids[item] for item in interactions.sequence(number).tolist()]


def history_of(interactions: Interactions, catalog: Catalog, user: str) -> list[str]:
    """Return the item ids of a user of a domain, oldest first.

    Raises:
        DomainError: no such user.
    """
    try:
        number = interactions.user_ids.index(user)
    except ValueError:
        raise DomainError(
            f"recommend: user {user!r} is not among the {interactions.num_users} users of {catalog.name}. Check the "
            "id, or give a history."
        ) from None
    return [catalog.item_ids[item] for item in interactions.sequence(number).tolist()]


def count_items(interactions: Interactions, num_items: int) -> FloatArray:
    """Return how often each item occurs, (N,): the popularity that lists can be blended with."""
    return np.bincount(interactions.items, minlength=num_items).astype(np.float64)


def read_histories(path: Path) -> Iterator[UserHistory]:
    """Yield the users of a table of histories.

    It has a row for each user, ``user_id`` and ``history``, a list of item ids (Parquet); or a row for each item,
    ``user_id`` and ``item_id``, oldest first (any format that imports read).

    Args:
        path: the file.

    Raises:
        DomainError: an unreadable file, no such columns, a row without user, or one user in two rows of histories.
    """
    lists = _list_column(path)
    return _of_items(path) if lists is None else _of_lists(path, lists)


def _list_column(path: Path) -> pq.ParquetFile | None:
    """Open a Parquet file with a column of lists; None for every other file."""
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException):
        return None  # opening it as a table says what is wrong
    names = file.schema_arrow.names
    if HISTORY not in names:
        return None
    kind = file.schema_arrow.field(HISTORY).type
    if USER not in names or not (pt.is_list(kind) or pt.is_large_list(kind)):
        raise DomainError(
            f"{path}: found the columns {', '.join(names)} with {HISTORY!r} of type {kind}, expected {USER!r} and "
            f"lists of item ids. Or write a row for each item: {USER!r} and {ITEM!r}, oldest first."
        )
    return file


def _of_lists(path: Path, file: pq.ParquetFile) -> Iterator[UserHistory]:
    known: set[str] = set()
    for batch in file.iter_batches(batch_size=USERS_AT_ONCE, columns=[USER, HISTORY]):
        users = to_ids(str(path), USER, batch.column(USER)).to_pylist()
        lists = batch.column(HISTORY)
        ids = iter(to_ids(str(path), HISTORY, lists.flatten()).to_pylist())
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_pylist()
        for user, length in zip(users, lengths, strict=True):
            items = [item for item in itertools.islice(ids, length) if item is not None]
            if user is None or user in known:
                found = "without a user" if user is None else "of a user that an earlier row has"
                raise DomainError(f"{path}: found a row {found}, expected one for each user. Correct the file.")
            known.add(user)
            yield user, items


def _of_items(path: Path) -> Iterator[UserHistory]:
    table = open_table(path, [USER, ITEM], 0.0, None, RECOGNISED, "histories")
    check_columns(table, [USER, ITEM])
    histories: dict[str, list[str]] = {}
    for batch in table.batches([USER, ITEM]):
        users, items = (to_ids(table.source, name, batch.column(name)).to_pylist() for name in (USER, ITEM))
        for user, item in zip(users, items, strict=True):
            if user is None or item is None:
                raise DomainError(f"{path}: found a row without {USER} or {ITEM}, expected both. Remove it.")
            histories.setdefault(user, []).append(item)
    table.bad.report(sum(map(len, histories.values())))
    yield from histories.items()
