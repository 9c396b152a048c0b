"""The state of a server: its shelf, changes to it, and swaps to another model. No HTTP here."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fedmerge.errors import ConfigError, DomainError, FedMergeError
from fedmerge.serving.http.added import keep_changes, kept_changes
from fedmerge.serving.http.batching import Batcher
from fedmerge.serving.http.bodies import Filters
from fedmerge.serving.http.metrics import Metrics
from fedmerge.serving.http.shelf import ItemChange, Shelf, change_items, passing_items, positions_of
from fedmerge.serving.listing import BoolArray, Listing
from fedmerge.serving.recommender import Item

Load = Callable[[str | None, str | None], Shelf]
"""(MODEL or None for the same, model of the run or None for its choice) -> shelf of the catalog as it is on disk."""


class SwapInProgressError(FedMergeError):
    """Another swap has not ended yet."""


class Service:
    """What a server serves.

    Args:
        load: loads the first model, and those of swaps.
        changes: file of the changes of items, see :mod:`fedmerge.serving.http.added`.
        threads: threads that answer requests.
        stock: the file of what is in stock, if ``load`` reads one: earlier changes of it do not count.
    """

    def __init__(self, load: Load, changes: Path, threads: int, stock: Path | None = None) -> None:
        self._load, self._changes, self._stock, self._started = load, changes, stock, time.monotonic()
        self._changing, self._swapping = threading.Lock(), threading.Lock()
        self.shelf, self._catalog_sha256 = self._with_changes(load(None, None))
        self.metrics = Metrics()
        self.batcher = Batcher(threads, self.metrics)

    @property
    def uptime_seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._started

    def change(self, changes: Sequence[ItemChange]) -> tuple[int, int, int]:
        """Add or change items, on disk before anybody sees them.

        Returns:
            Numbers of added and of changed items, and of all items now.

        Raises:
            DomainError: as :func:`fedmerge.serving.http.shelf.change_items`; nothing was changed.
            RunDirError: the disk is full; nothing was changed.
        """
        with self._changing:
            before = self.shelf
            after = change_items(before, changes)
            keep_changes(self._changes, self._catalog_sha256, changes)
            self.shelf = after
        added = len(after.catalog) - len(before.catalog)
        return added, len({change.item_id for change in changes}) - added, len(after.catalog)

    def swap(self, model: str | None, served: str | None) -> Shelf:
        """Load another model, or the same with the catalog of today, and serve it; requests go on meanwhile.

        Args:
            model: a run or an adapter, as on the command line; None is the one that is served.
            served: a model of the run in place of its choice.

        Raises:
            SwapInProgressError: another swap has not ended.
            FedMergeError: the model cannot be loaded; the old one is still served.
        """
        if not self._swapping.acquire(blocking=False):
            raise SwapInProgressError("another swap has not ended yet, expected one at a time. Try again later.")
        try:
            with ThreadPoolExecutor(1, initializer=_yield_to_others) as loader:
                shelf = loader.submit(self._load, model, served).result()
            with self._changing:  # no change falls between the two shelves
                self.shelf, self._catalog_sha256 = self._with_changes(shelf)
            return self.shelf
        finally:
            self._swapping.release()

    def _with_changes(self, shelf: Shelf) -> tuple[Shelf, str]:
        """Return a shelf with the kept changes of its items, and the hash of its catalog as it was read."""
        since = 0.0 if self._stock is None else self._stock.stat().st_mtime
        changes = kept_changes(self._changes, shelf.catalog, since)
        return change_items(shelf, changes) if changes else shelf, shelf.catalog.sha256


def _yield_to_others() -> None:
    """Give this thread the lowest priority, on Linux, where each thread has its own: requests come first."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def run_name(shelf: Shelf) -> str | None:
    """Return the name of the run that a shelf is of; None for an adapter."""
    decision = shelf.opened.decision
    return None if decision is None else decision.run.name


def known_items(shelf: Shelf, history: Sequence[Item]) -> tuple[list[int], list[str]]:
    """Return the places in a history of what is in the catalog or given by text, and the ids that are not.

    Raises:
        DomainError: nothing of it is known.
    """
    item_index = shelf.recommender.item_index
    ignored = [item for item in history if isinstance(item, str) and item not in item_index]
    if len(ignored) == len(history):
        raise DomainError(
            f"history: found none of its {len(ignored)} ids in the catalog of {shelf.catalog.name}, expected at least "
            "one. Give ids of the catalog, or attributes."
        )
    return [place for place, item in enumerate(history) if not isinstance(item, str) or item in item_index], ignored


def listing_of(
    shelf: Shelf, filters: Filters, keep_seen: bool = False, diversity: float = 0.0, popularity: float = 0.0
) -> Listing:
    """Return the listing of a request.

    Raises:
        DomainError: a filter on an attribute that the catalog does not have.
        ConfigError: popularity that nobody counted.
    """
    if popularity and shelf.counts is None:
        raise ConfigError("popularity: nobody counted here, expected 0. Start the server with --count-popularity.")
    return Listing(filters.k, keep_seen, _allowed(shelf, filters), diversity, popularity)


def _allowed(shelf: Shelf, filters: Filters) -> BoolArray | None:
    if not filters.only and filters.among is None and not filters.exclude and shelf.available.all():
        return None
    allowed = shelf.available & passing_items(shelf, filters.only) if filters.only else shelf.available.copy()
    if filters.among is not None:
        among = np.zeros(len(allowed), dtype=np.bool_)
        among[positions_of(shelf, filters.among)] = True
        allowed &= among
    allowed[positions_of(shelf, filters.exclude)] = False
    return allowed
