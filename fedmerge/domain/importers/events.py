"""Settings and reports of imports, and the domain that is written from the rows of a store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmerge.domain.catalog import make_catalog
from fedmerge.domain.folder import check_target, write_domain
from fedmerge.domain.importers.bad_rows import FileReport
from fedmerge.domain.importers.source_files import Progress
from fedmerge.domain.importers.store import OF_SHORT_USERS, OUTSIDE_CORE, REPEATED, EventStore
from fedmerge.domain.manifest import CatalogSource, Manifest, check_name
from fedmerge.errors import ConfigError, DomainError

LOW_RATING = "rated below the minimum"
ASKED_FOR = frozenset({LOW_RATING, OUTSIDE_CORE, OF_SHORT_USERS})  # reasons that name what a setting says
MAX_LOSS = 0.1  # of the rows, without consent


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """Settings of every import of rows.

    Attributes:
        name: the domain's name; None derives it from the source.
        overwrite: replace an existing domain of that name.
        public_catalog: True if the owner lets the catalog leave the client.
        k_core: keep the largest set of rows in which every user and every item has at least k rows, and only those
            items in the catalog; None keeps all rows and the whole catalog.
        keep_all_items: keep the whole catalog and all rows of its items; k_core then drops only users with fewer than
            k rows. So neither the catalog nor a user's rows depend on other users.
        catalog_source: the owner's word on where the catalog comes from; None: "given" if all items are kept and the
            source lists them whatever users did, else "interactions".
        min_rating: leave out rows with a lower rating; None keeps all.
        max_bad_share: largest share of bad rows in a file, in [0, 1]. More than 0.1 is also the consent to lose that
            share of all rows for any reason but a minimum rating, a k-core and repeats.
        progress: called with the progress of reading each file.

    Raises:
        ConfigError: a number out of range.
    """

    name: str | None = None
    overwrite: bool = False
    public_catalog: bool = False
    k_core: int | None = None
    keep_all_items: bool = False
    catalog_source: CatalogSource | None = None
    min_rating: float | None = None
    max_bad_share: float = 0.01
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.k_core is not None and self.k_core < 1:
            raise ConfigError(f"k_core is {self.k_core}, expected at least 1 (or none, to keep all rows).")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"max_bad_share is {self.max_bad_share}, expected a share from 0 to 1, such as 0.01.")

    @property
    def whole_catalog(self) -> bool:
        """True if the catalog keeps items that no row is left of."""
        return self.k_core is None or self.keep_all_items


DEFAULT_SETTINGS = ImportSettings()


@dataclass(frozen=True, slots=True)
class ImportReport:
    """The result of an import; every row of the interactions is bad, dropped, or in the domain.

    Attributes:
        manifest: the domain's manifest.
        files: reports on the files, interactions first.
        dropped: number of good rows that are not in the domain, by reason.
    """

    manifest: Manifest
    files: tuple[FileReport, ...]
    dropped: Mapping[str, int]

    @property
    def lost(self) -> Mapping[str, int]:
        """Return the rows that are lost though no setting says so, by reason; a repeat loses nothing."""
        return lost_rows(self.files, self.dropped)


def lost_rows(files: tuple[FileReport, ...], dropped: Mapping[str, int]) -> dict[str, int]:
    """Return the number of rows of interactions that are lost though no setting says so, by reason.

    Args:
        files: reports on the files, interactions first.
        dropped: number of good rows that were left out, by reason.
    """
    counts = {reason.text: reason.count for reason in files[0].bad}
    return counts | {text: count for text, count in dropped.items() if text not in {*ASKED_FOR, REPEATED}}


def check_loss(files: tuple[FileReport, ...], dropped: Mapping[str, int], settings: ImportSettings) -> None:
    """Raise DomainError if more rows are lost than the settings allow; arguments as for lost_rows."""
    lost, most = lost_rows(files, dropped), max(MAX_LOSS, settings.max_bad_share)
    if sum(lost.values()) > most * files[0].num_rows:
        found = "; ".join(f"{text} ({count})" for text, count in lost.items())
        raise DomainError(
            f"{files[0].source}: {sum(lost.values())} of the {files[0].num_rows} rows are lost, expected at most "
            f"{100 * most:g} %: {found}. Correct the files, or allow a larger max_bad_share."
        )


def prepare(dst: Path, settings: ImportSettings, default_name: str) -> Path:
    """Return the folder of the new domain; raise DomainError, before anything is read, if it may not be written."""
    name = default_name if settings.name is None else settings.name
    check_name(name)
    check_target(dst / name, settings.overwrite)
    return dst / name


def write_rows(
    folder: Path,
    store: EventStore,
    settings: ImportSettings,
    *,
    attributes: Mapping[str, Sequence[str]],
    source: str,
    files: tuple[FileReport, ...],
    item_ids: Sequence[str] | None = None,
    limits: Mapping[str, int] | None = None,
    lists_all_items: bool = True,
) -> ImportReport:
    """Write selected rows as a domain folder, whole or not at all.

    Args:
        folder: as returned by prepare.
        store: after ``select``.
        settings: the catalog holds all items if ``whole_catalog``, else only those that have rows.
        attributes: (number of items,) values of each attribute.
        source: origin of the data, in words.
        files: reports on the files, interactions first.
        item_ids: the items in the order of the catalog, with all that have rows; None: the store's, by code.
        limits: see make_catalog.
        lists_all_items: False if the items are only those that somebody interacted with.

    Raises:
        DomainError: no rows are left, too many are lost, or write_domain fails.
    """
    check_rows_left(store, files)
    check_loss(files, store.dropped, settings)
    codes = list(range(len(store.items))) if item_ids is None else [store.items.get(id_, -1) for id_ in item_ids]
    ids = list(store.items) if item_ids is None else item_ids
    has_rows = np.zeros(len(store.items) + 1, bool)  # the last: of items that are not in the store
    has_rows[store.item_codes()] = True
    chosen = [row for row, code in enumerate(codes) if settings.whole_catalog or has_rows[code]]
    item_index = np.full(len(store.items) + 1, -1, np.int32)
    item_index[[codes[row] for row in chosen]] = np.arange(len(chosen))
    catalog = make_catalog(
        folder.name,
        [ids[row] for row in chosen],
        {name: [values[row] for row in chosen] for name, values in attributes.items()},
        limits,
    )
    manifest = write_domain(
        folder,
        catalog,
        store.parts(item_index),
        public_catalog=settings.public_catalog,
        synthetic=False,
        source=source,
        catalog_source=settings.catalog_source
        or ("given" if settings.whole_catalog and lists_all_items else "interactions"),
        overwrite=settings.overwrite,
    )
    return ImportReport(manifest, files, store.dropped)


def check_rows_left(store: EventStore, files: tuple[FileReport, ...]) -> None:
    """Raise DomainError if no rows are left; the message counts the reasons.

    Args:
        store: the remaining rows.
        files: reports on the files, interactions first.
    """
    if not store.num_rows:
        counts = {"bad": files[0].num_bad, **store.dropped}
        found = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise DomainError(
            f"{files[0].source}: none of the {files[0].num_rows} rows is left: {found}. "
            "Use more data, or a smaller k_core or min_rating."
        )
