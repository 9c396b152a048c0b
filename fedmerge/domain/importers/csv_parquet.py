"""Import a domain from two tables with named columns: interactions and catalog, as CSV or as Parquet."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmerge.config import ATTRIBUTES
from fedmerge.domain.importers.bad_rows import FileReport
from fedmerge.domain.importers.events import (
    DEFAULT_SETTINGS,
    EventLog,
    ImportReport,
    ImportSettings,
    Texts,
    prepare,
    select,
    write_events,
)
from fedmerge.domain.importers.rows import Table, check_columns, csv_table, log_rows, parquet_table
from fedmerge.domain.importers.source_files import SourceFile
from fedmerge.domain.manifest import folder_name
from fedmerge.errors import ConfigError, DomainError

OpenTable = Callable[[Path], Table]


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns.

    Attributes:
        user, item, time: columns of the interactions.
        rating: column of the interactions; None if ratings do not matter.
        catalog_item: item column of the catalog; None means the same name as item.
        title, brand, category: columns of the catalog; None means the column of that name, if present.
    """

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    rating: str | None = None
    catalog_item: str | None = None
    title: str | None = None
    brand: str | None = None
    category: str | None = None


DEFAULT_COLUMNS = Columns()


def import_csv(
    interactions: Path,
    catalog: Path,
    dst: Path,
    columns: Columns = DEFAULT_COLUMNS,
    settings: ImportSettings = DEFAULT_SETTINGS,
    *,
    delimiter: str = ",",
    encoding: str = "utf-8",
) -> ImportReport:
    """Import two CSV files, plain or gzip, each with a header, as the domain folder ``dst/name``.

    Args:
        interactions: one row per interaction, in any order; a user's items are sorted by time, ties by line.
        catalog: one row per item; the item index is the order of the rows.
        dst: folder that holds the domains.
        columns: names of the columns.
        settings: the name defaults to that of the folder that holds interactions.
        delimiter: delimiter of both files.
        encoding: encoding of both files, see csv_table.

    Raises:
        DomainError: an unreadable file, a missing column, too many bad rows, no rows left, or a folder that may not be
            written.
        ConfigError: a minimum rating without a rating column.
    """

    def open_table(path: Path) -> Table:
        return csv_table(SourceFile(path), delimiter, encoding, settings.max_bad_share, settings.progress)

    return _import_tables(interactions, catalog, dst, columns, settings, open_table, "CSV")


def import_parquet(
    interactions: Path,
    catalog: Path,
    dst: Path,
    columns: Columns = DEFAULT_COLUMNS,
    settings: ImportSettings = DEFAULT_SETTINGS,
) -> ImportReport:
    """Import two Parquet files as the domain folder ``dst/name``; arguments and errors as for import_csv."""

    def open_table(path: Path) -> Table:
        return parquet_table(path, settings.max_bad_share, settings.progress)

    return _import_tables(interactions, catalog, dst, columns, settings, open_table, "Parquet")


def _import_tables(
    interactions: Path,
    catalog: Path,
    dst: Path,
    columns: Columns,
    settings: ImportSettings,
    open_table: OpenTable,
    form: str,
) -> ImportReport:
    if settings.min_rating is not None and columns.rating is None:
        raise ConfigError(f"min_rating is {settings.min_rating}, but no rating column is named. Name one.")
    folder = prepare(dst, settings, folder_name(interactions.parent))
    names = [columns.user, columns.item, columns.time]
    if settings.min_rating is not None and columns.rating is not None:
        names.append(columns.rating)
    table = open_table(interactions)
    check_columns(table, names)
    items, texts, catalog_report = _read_catalog(open_table(catalog), columns)
    log = EventLog(items)
    log_rows(((n, _as_ids(values)) for n, values in table.rows(names)), log, table.bad, settings.min_rating)
    report = table.bad.report(log.num_good)
    return write_events(
        folder,
        select(log.take(), settings.k_core, settings.keep_all_items),
        settings,
        user_ids=list(log.users),
        item_ids=list(items),
        texts=texts.__getitem__,
        source=f"{form} tables {interactions.name!r} and {catalog.name!r}",
        files=(report, catalog_report),
    )


def _read_catalog(table: Table, columns: Columns) -> tuple[dict[str, int], list[Texts], FileReport]:
    """Return the code and the attributes of each item, in the order of the rows."""
    item = columns.catalog_item or columns.item
    named = {"title": columns.title, "brand": columns.brand, "category": columns.category}
    check_columns(table, [item, *(name for name in named.values() if name is not None)])
    attributes = {a: named[a] or a for a in ATTRIBUTES if (named[a] or a) in table.columns}
    if not attributes:
        raise DomainError(
            f"{table.source}: found the columns {', '.join(table.columns)}, expected at least one of title, brand and "
            "category for the encoder to read. Name the columns that hold them."
        )
    items: dict[str, int] = {}
    texts: list[Texts] = []
    for number, (value, *found) in table.rows([item, *attributes.values()]):
        item_id = _as_id(value)
        if not item_id:
            table.bad.add(number, "no item")
        elif item_id in items:
            table.bad.add(number, "the item has a row already")
        else:
            items[item_id] = len(items)
            by_name = dict(zip(attributes, found, strict=True))
            title, brand, category = (" ".join(str(by_name.get(a) or "").split()) for a in ATTRIBUTES)
            texts.append((title, brand, category))
    report = table.bad.report(len(items))
    if not items:
        raise DomainError(f"{table.source}: found no items, expected one row per item. Add the items.")
    return items, texts, report


def _as_ids(values: Any) -> Any:
    """Convert user and item in a row of the interactions to ids."""
    user, item, *rest = values
    return _as_id(user), _as_id(item), *rest


def _as_id(value: Any) -> str:
    """Convert text or a whole number to an id, else return ""; a column with gaps may hold whole numbers as floats."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else ""
    return "" if value is None else str(value)
