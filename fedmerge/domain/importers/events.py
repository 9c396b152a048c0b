"""A stream of (user, item, time) rows becomes a domain: the k-core, repeats, the order in time, the folder.

Memory: 16 bytes a row (user and item int32, time int64), each distinct id once (about 200 bytes), and while rows are
counted and sorted some 30 bytes more for each that is still there.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedmerge.domain.catalog import ATTRIBUTES, make_catalog
from fedmerge.domain.folder import check_target, write_domain
from fedmerge.domain.importers.bad_rows import FileReport
from fedmerge.domain.importers.source_files import Progress
from fedmerge.domain.interactions import Interactions
from fedmerge.domain.manifest import Manifest, check_name
from fedmerge.errors import ConfigError, DomainError

OUTSIDE_CORE = "outside the k-core"
REPEATED = "the same user, item and time as an earlier row"
LOW_RATING = "rated below the minimum"

Texts = tuple[str, str, str]  # the values of ATTRIBUTES


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """What all imports of rows have in common.

    Attributes:
        name: the domain's name; None takes it from the source.
        overwrite: replace an existing domain of that name.
        public_catalog: whether the owner lets the catalog leave the client.
        k_core: keep the largest set of rows in which every user and every item has at least so many, and only their
            items in the catalog; None keeps all rows and the whole catalog.
        min_rating: rows rated below are left out; None keeps all.
        max_bad_share: share of a file's rows that may be bad, in [0, 1].
        progress: told how far each file is read.

    Raises:
        ConfigError: a number out of range.
    """

    name: str | None = None
    overwrite: bool = False
    public_catalog: bool = True
    k_core: int | None = None
    min_rating: float | None = None
    max_bad_share: float = 0.01
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.k_core is not None and self.k_core < 1:
            raise ConfigError(f"k_core is {self.k_core}, expected at least 1, or none to keep all rows.")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"max_bad_share is {self.max_bad_share}, expected a share from 0 to 1, such as 0.01.")


DEFAULT_SETTINGS = ImportSettings()


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did; every row of the interactions is bad, dropped, or in the domain.

    Attributes:
        manifest: of the domain.
        files: the files read, interactions first.
        dropped: good rows that are not in the domain, by reason.
    """

    manifest: Manifest
    files: tuple[FileReport, ...]
    dropped: Mapping[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """Rows in the order of the file, with codes for ids.

    Attributes:
        users, items: (T,) int32 codes.
        times: (T,) int64, whatever the unit.
        dropped: rows that are gone, by reason.
    """

    users: npt.NDArray[np.int32]
    items: npt.NDArray[np.int32]
    times: npt.NDArray[np.int64]
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of rows T."""
        return len(self.users)

    def only(self, kept: npt.NDArray[np.bool_], reason: str) -> "Events":
        """The rows where kept (T,) is true; the others are counted under the reason."""
        if kept.all():
            return self
        num_dropped = len(kept) - int(kept.sum())
        dropped = {**self.dropped, reason: self.dropped.get(reason, 0) + num_dropped}
        return Events(self.users[kept], self.items[kept], self.times[kept], dropped)


class EventLog:
    """Rows as they are read, in compact arrays; ids are numbered in the order of their first row.

    Args:
        items: code of each item, if the items are known before the rows.

    Attributes:
        users, items: code of each id.
    """

    def __init__(self, items: Mapping[str, int] | None = None) -> None:
        self.users: dict[str, int] = {}
        self.items: dict[str, int] = dict(items or {})
        self._users, self._items, self._times = array("i"), array("i"), array("q")
        self._low_rating = 0

    def add(self, user: str, item: str, time: int) -> None:
        """Append a row; OverflowError, and no row, if the time does not fit 64 bits."""
        self._times.append(time)
        self._users.append(self.users.setdefault(user, len(self.users)))
        self._items.append(self.items.setdefault(item, len(self.items)))

    def drop_low_rating(self) -> None:
        """Count a row that is left out for its rating."""
        self._low_rating += 1

    @property
    def num_good(self) -> int:
        """Rows added or left out for their rating."""
        return len(self._times) + self._low_rating

    def take(self) -> Events:
        """The rows; the log holds none of them any more."""
        arrays = self._users, self._items, self._times
        self._users, self._items, self._times = array("i"), array("i"), array("q")
        users, items, times = (np.frombuffer(column, np.dtype(column.typecode)) for column in arrays)
        return Events(users, items, times, {LOW_RATING: self._low_rating} if self._low_rating else {})


def k_core(events: Events, k: int | None) -> Events:
    """The largest set of rows in which each user and each item has at least k rows; all rows if k is None.

    Rows of users and items below k are dropped until none is left: each round may push others below.
    """
    while k is not None and len(events):
        enough = (np.bincount(events.users) >= k)[events.users] & (np.bincount(events.items) >= k)[events.items]
        if enough.all():
            break
        events = events.only(enough, OUTSIDE_CORE)
    return events


def without_repeats(events: Events) -> Events:
    """The first of the rows that agree in user, item and time; the same item at another time stays."""
    order = np.lexsort((events.items, events.times, events.users))  # stable: the first in the file comes first
    users, items, times = events.users[order], events.items[order], events.times[order]
    kept = np.ones(len(events), bool)
    kept[order[1:]] = (users[1:] != users[:-1]) | (items[1:] != items[:-1]) | (times[1:] != times[:-1])
    return events.only(kept, REPEATED)


def select(events: Events, k: int | None) -> Events:
    """The k-core of the rows without repeats.

    The core of a part lies in the core of the whole, so it is taken first, which leaves less to sort.
    """
    return k_core(without_repeats(k_core(events, k)), k)


def to_interactions(events: Events, user_ids: Sequence[str], item_index: npt.NDArray[np.int32]) -> Interactions:
    """Each user's items by time, ties in the order of the file; users in the order of their codes.

    Args:
        events: at least one row.
        user_ids: id of each user code.
        item_index: (number of item codes,) index in the catalog of each item code that occurs.
    """
    order = np.lexsort((events.times, events.users))
    lengths = np.bincount(events.users)
    present = np.flatnonzero(lengths)
    offsets = np.zeros(len(present) + 1, np.int64)
    np.cumsum(lengths[present], out=offsets[1:])
    return Interactions(tuple(user_ids[code] for code in present.tolist()), item_index[events.items[order]], offsets)


def prepare(dst: Path, settings: ImportSettings, default_name: str) -> Path:
    """The folder of the domain to be; DomainError, before anything is read, if it may not be written."""
    name = default_name if settings.name is None else settings.name
    check_name(name)
    check_target(dst / name, settings.overwrite)
    return dst / name


def write_events(
    folder: Path,
    events: Events,
    settings: ImportSettings,
    *,
    user_ids: Sequence[str],
    item_ids: Sequence[str],
    texts: Callable[[int], Texts],
    source: str,
    files: tuple[FileReport, ...],
) -> ImportReport:
    """Write selected rows as a domain folder, whole or not at all.

    Args:
        folder: from prepare.
        events: from select.
        settings: with a k_core, the catalog holds the items of the rows; without, all of item_ids.
        user_ids, item_ids: id of each code.
        texts: attributes of an item code.
        source: where the data comes from, in words.
        files: the files that were read, interactions first.

    Raises:
        DomainError: no row is left, or anything that write_domain refuses.
    """
    refuse_nothing(events, files)
    codes = np.arange(len(item_ids)) if settings.k_core is None else np.unique(events.items)
    item_index = np.full(len(item_ids), -1, np.int32)
    item_index[codes] = np.arange(len(codes), dtype=np.int32)
    columns = zip(*(texts(code) for code in codes.tolist()), strict=True)
    catalog = make_catalog(
        folder.name, [item_ids[code] for code in codes.tolist()], dict(zip(ATTRIBUTES, map(list, columns), strict=True))
    )
    manifest = write_domain(
        folder,
        catalog,
        to_interactions(events, user_ids, item_index),
        public_catalog=settings.public_catalog,
        synthetic=False,
        source=source,
        overwrite=settings.overwrite,
    )
    return ImportReport(manifest, files, events.dropped)


def refuse_nothing(events: Events, files: tuple[FileReport, ...]) -> None:
    """DomainError if no row is left.

    Args:
        events: what is left.
        files: the files that were read, interactions first.
    """
    if not len(events):
        counts = {"bad": files[0].num_bad, **events.dropped}
        found = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise DomainError(
            f"{files[0].source}: none of the {files[0].num_rows} rows is left: {found}. "
            "Take more data, or a smaller k_core or min_rating."
        )
