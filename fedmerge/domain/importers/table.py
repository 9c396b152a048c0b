"""Import a domain from tables with named columns: interactions, and a catalog of items or none.

A table is a CSV or TSV file, JSON lines, Parquet (a file or a folder of parts), an Excel sheet, RecBole's atomic files,
or a data frame; the format is recognised.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedmerge.config import ATTRIBUTES
from fedmerge.domain.importers.bad_rows import BadRows, FileReport
from fedmerge.domain.importers.events import (
    DEFAULT_SETTINGS,
    LOW_RATING,
    ImportReport,
    ImportSettings,
    prepare,
    write_rows,
)
from fedmerge.domain.importers.reading.events import LOST_DIGITS, TOO_LONG, EventColumns, read_events
from fedmerge.domain.importers.reading.formats import open_table
from fedmerge.domain.importers.reading.frames import is_frame
from fedmerge.domain.importers.reading.table import NUMBER, RECOGNISED, FileOptions, Table, check_columns
from fedmerge.domain.importers.reading.values import has_lost_digits, is_too_long, to_ids, to_keys, to_texts
from fedmerge.domain.importers.store import EventStore
from fedmerge.domain.manifest import folder_name, read_template
from fedmerge.errors import ConfigError, DomainError


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns.

    Attributes:
        user, item, time: columns of the interactions.
        rating: column of the interactions; None if ratings do not matter.
        catalog_item: item column of the catalog; None means the same name as item.
        texts: columns of the catalog that are the items' attributes, in the order of an item's text; an entry
            ``name=N`` reads at most N tokens of it. None means title, brand and category.
        title, brand, category: columns of the catalog, unless texts are named; None means the column of that name, if
            present.
    """

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    rating: str | None = None
    catalog_item: str | None = None
    texts: tuple[str, ...] | None = None
    title: str | None = None
    brand: str | None = None
    category: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read; what is not given is recognised.

    Attributes:
        interactions, catalog: options of either file.
        time_formats: see Times.
    """

    interactions: FileOptions = RECOGNISED
    catalog: FileOptions = RECOGNISED
    time_formats: tuple[str, ...] = ()


DEFAULT_COLUMNS = Columns()
DEFAULT_READING = Reading()


def import_table(
    interactions: Path | Any,
    catalog: Path | Any | None,
    dst: Path,
    columns: Columns = DEFAULT_COLUMNS,
    settings: ImportSettings = DEFAULT_SETTINGS,
    reading: Reading = DEFAULT_READING,
) -> ImportReport:
    """Import interactions and a catalog as the domain folder ``dst/name``.

    Args:
        interactions: a file, a folder of Parquet parts, or a data frame (any object with ``__arrow_c_stream__``); one
            row per interaction, in any order; a user's items are sorted by time, ties by row.
        catalog: the same with one row per item; the item index is the order of the rows. None takes the items and their
            texts from the interactions: of an item, the first text of each column that is not empty.
        dst: folder that holds the domains.
        columns: names of the columns.
        settings: the name defaults to that of the folder that holds interactions; a data frame needs one.
        reading: how the files are read.

    Raises:
        DomainError: an unreadable file, a missing column, too many bad rows, no rows left, or a folder that may not be
            written.
        ConfigError: a minimum rating without a rating column, no name, or an unknown time format.
    """
    if settings.min_rating is not None and columns.rating is None:
        raise ConfigError(f"min_rating is {settings.min_rating}, but no rating column is named. Name one.")
    if is_frame(interactions) and settings.name is None:
        raise ConfigError("The domain of a data frame has no name. Give settings.name.")
    folder = prepare(dst, settings, "" if is_frame(interactions) else folder_name(Path(interactions).parent))
    rating = columns.rating if settings.min_rating is not None else None
    events = EventColumns(columns.user, columns.item, columns.time, rating)
    item = columns.catalog_item or columns.item
    table = open_table(
        interactions,
        events.names([] if catalog is not None else _text_columns(columns)),
        settings.max_bad_share,
        settings.progress,
        reading.interactions,
        "interactions",
    )
    check_columns(table, events.names())
    limits = read_template(columns.texts or ATTRIBUTES, "The columns of texts")
    items = _Items(tuple(limits))
    reports: list[FileReport] = []
    source = f"{table.form} table {_name(interactions)}"
    if catalog is None:
        attributes = _attributes(table, columns)
    else:
        listing = open_table(
            catalog,
            [item, *_text_columns(columns)],
            settings.max_bad_share,
            settings.progress,
            reading.catalog,
            "catalog",
        )
        reports.append(_read_catalog(listing, item, columns, items))
        forms = " and ".join(dict.fromkeys((table.form, listing.form)))
        source, attributes = f"{forms} tables {_name(interactions)} and {_name(catalog)}", {}
    known = None if catalog is None else {item_id: code for code, item_id in enumerate(items.texts)}
    with EventStore(folder, known) as store:
        for batch in read_events(table, events, reading.time_formats, settings.min_rating, list(attributes.values())):
            if catalog is None:
                items.merge(batch.rows.column("item"), batch.others, attributes, table.bad)
            store.drop(LOW_RATING, batch.num_low)
            store.add(batch.rows, table.bad)
        store.flush(table.bad)
        if items.conflicts:
            table.bad.notes.append(
                f"{len(items.conflicts)} items have different texts in different rows; the first text of each counts"
            )
        report = table.bad.report(store.num_good)
        store.select(settings.k_core, settings.keep_all_items)
        texts = [items.texts[item_id] for item_id in store.items]
        return write_rows(
            folder,
            store,
            settings,
            attributes={name: [values[at] for values in texts] for at, name in enumerate(limits)},
            limits={name: limit for name, limit in limits.items() if limit is not None},
            source=source,
            files=(report, *reports),
            lists_all_items=catalog is not None,
        )


@dataclass(slots=True)
class _Items:
    """Items in the order in which they were met, with their texts.

    Attributes:
        names: the attributes.
        texts: their values by item.
        conflicts: items with different texts.
    """

    names: tuple[str, ...]
    texts: dict[str, list[str]] = field(default_factory=dict)
    conflicts: set[str] = field(default_factory=set)

    def merge(self, item_ids: pa.Array, others: pa.RecordBatch, attributes: Mapping[str, str], bad: BadRows) -> None:
        """Add the items of rows of interactions; of each text the first that is not empty counts."""
        names = list(dict.fromkeys(attributes.values()))
        columns = [to_keys(others.column(name), bad) for name in names]
        rows = pa.table([item_ids, *columns], ["item", *map(str, range(len(names)))])
        distinct = rows.append_column("row", pa.array(range(len(rows)))).group_by(rows.column_names)
        first = distinct.aggregate([("row", "min")]).sort_by("row_min")
        values = {name: to_texts(first.column(str(at)).combine_chunks(), bad) for at, name in enumerate(names)}
        for row, item_id in enumerate(first.column("item").to_pylist()):
            texts = self.texts.setdefault(item_id, [""] * len(self.names))
            for at, attribute in enumerate(self.names):
                text = values[attributes[attribute]][row] if attribute in attributes else ""
                if text and texts[at] and text != texts[at]:
                    self.conflicts.add(item_id)
                texts[at] = texts[at] or text


def _name(source: Path | Any) -> str:
    return repr(Path(source).name) if not is_frame(source) else f"of {type(source).__module__.split('.')[0]}"


def _text_columns(columns: Columns) -> list[str]:
    """Return the names of the columns of texts that are looked for."""
    if columns.texts:
        return list(read_template(columns.texts, "The columns of texts"))
    return [columns.title or "title", columns.brand or "brand", columns.category or "category"]


def _attributes(table: Table, columns: Columns) -> dict[str, str]:
    """Return the column of each attribute that the table has; at least one is needed."""
    if columns.texts:
        names = _text_columns(columns)
        check_columns(table, names)
        return dict(zip(names, names, strict=True))
    named = {"title": columns.title, "brand": columns.brand, "category": columns.category}
    check_columns(table, [name for name in named.values() if name is not None])
    attributes = {a: named[a] or a for a in ATTRIBUTES if (named[a] or a) in table.columns}
    if not attributes:
        raise DomainError(
            f"{table.source}: found the columns {', '.join(table.columns)}, expected at least one of title, brand and "
            "category for the encoder to read. Name the columns that hold them, or others with --text-columns."
        )
    check_columns(table, list(attributes.values()))
    return attributes


def _read_catalog(table: Table, item: str, columns: Columns, items: _Items) -> FileReport:
    """Read the items and their texts, in the order of the rows; the first row of an item counts."""
    attributes = _attributes(table, columns)
    check_columns(table, [item])
    for batch in table.batches(list(dict.fromkeys([item, *attributes.values()]))):
        item_ids = to_ids(table.source, item, batch.column(item))
        lost = has_lost_digits(item_ids).to_pylist()
        long = is_too_long(item_ids).to_pylist()
        found = [
            to_texts(batch.column(attributes[a]), table.bad) if a in attributes else [""] * len(batch)
            for a in items.names
        ]
        rows = zip(batch.column(NUMBER).to_pylist(), item_ids.to_pylist(), lost, long, *found, strict=True)
        for number, item_id, is_lost, is_long, *texts in rows:
            if item_id is None:
                table.bad.add(number, "no item")
            elif is_lost:
                table.bad.add(number, LOST_DIGITS.format("item"))
            elif is_long:
                table.bad.add(number, TOO_LONG.format("item"))
            elif item_id in items.texts:
                table.bad.add(number, "the item has a row already")
            else:
                items.texts[item_id] = texts
    report = table.bad.report(len(items.texts))
    if not items.texts:
        raise DomainError(f"{table.source}: found no items, expected one row per item. Add the items.")
    return report
