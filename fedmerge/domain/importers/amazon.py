"""Import a domain from raw Amazon reviews and metadata (UCSD, McAuley Lab): the releases of 2014, 2018 and 2023."""

import ast
import html
import io
import itertools
import json
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedmerge.config import ATTRIBUTES
from fedmerge.domain.importers.bad_rows import BadRows, FileReport
from fedmerge.domain.importers.events import (
    LOW_RATING,
    ImportReport,
    ImportSettings,
    check_rows_left,
    prepare,
    write_rows,
)
from fedmerge.domain.importers.reading.events import refuse
from fedmerge.domain.importers.reading.json_fields import LINE, BadLine, read_fields, strings
from fedmerge.domain.importers.reading.table import NUMBER
from fedmerge.domain.importers.reading.values import INT64_DIGITS, is_too_long, map_distinct, matching, to_numbers
from fedmerge.domain.importers.source_files import Progress, SourceFile, read_blocks
from fedmerge.domain.importers.store import ROWS, EventStore
from fedmerge.errors import ConfigError, DomainError

WITHOUT_TEXT = "of an item without metadata or text"
NO_TEXTS = ("", "", "")
LEADING_ASIN = re.compile(rb"\{'asin': '([^'\\]*)'")  # how a line of 2014 begins: spares parsing

# A tag has the name of an element of HTML and attributes with values: "<Large>" and "<b or c>" are texts.
HTML_TAG = re.compile(
    r"</?(?:a|abbr|b|big|body|br|center|code|dd|div|dl|dt|em|font|h[1-6]|head|hr|html|i|img|li|link|meta|ol|p|pre|s|"
    r"script|small|span|strike|strong|style|sub|sup|table|tbody|td|th|thead|tr|tt|u|ul)"
    r"(?:\s+[\w:-]+\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"'>]+))*\s*/?>",
    re.IGNORECASE,
)

Texts = tuple[str, str, str]  # the values of ATTRIBUTES


@dataclass(frozen=True, slots=True)
class ReviewFields:
    """The field names of a review."""

    user: str
    item: str
    time: str
    rating: str


FIVE_CORE = ImportSettings(k_core=5)
FIELDS_2014_2018 = ReviewFields("reviewerID", "asin", "unixReviewTime", "overall")
FIELDS_2023 = ReviewFields("user_id", "parent_asin", "timestamp", "rating")


def import_amazon(
    reviews: Path,
    metadata: Path,
    dst: Path,
    settings: ImportSettings = FIVE_CORE,
    *,
    keep_items_without_text: bool = False,
) -> ImportReport:
    """Import one category's reviews and metadata, JSON lines, plain or gzip, as the domain folder ``dst/name``.

    The release is recognised by the field names. Reviews are read once and their text is discarded; metadata is read
    once and stored only for the items of the k-core. Reviews of items without metadata, or with title, brand and
    category all empty, are left out, and the k-core is computed again. The k-core of a subset lies within the k-core of
    the whole, so the result is the k-core of the reviews of items with text.

    With ``settings.keep_all_items`` the catalog is the metadata in their order, and only users with fewer than k_core
    reviews are left out.

    Texts: title; brand (2023: ``details.Brand``, else ``store``); category, the words of the path (2014: of the first
    path; 2018 and 2023: else of ``main_cat`` or ``main_category``). HTML entities are resolved, white space is
    collapsed; a 2018 title that is a script (``getTime``) counts as empty.

    Args:
        reviews: reviews of one category.
        metadata: metadata of the same category and release.
        dst: folder that holds the domains.
        settings: k_core is required; the name defaults to default_name(reviews).
        keep_items_without_text: keep items without text and, unless all items are kept, items without metadata.

    Returns:
        The report. Users are in the order of their first review, and so are items unless all are kept.

    Raises:
        DomainError: an unreadable file, unknown fields, files of different releases, too many bad rows, no metadata
            for any item, no rows left, or a folder that may not be written.
        ConfigError: k_core is None.
    """
    if settings.k_core is None:
        raise ConfigError("k_core is none, expected a number: 1 keeps every review of an item with text.")
    folder = prepare(dst, settings, default_name(reviews))
    with EventStore(folder) as store:
        report, releases = _read_reviews(SourceFile(reviews), store, settings)
        store.select(settings.k_core, settings.keep_all_items)
        check_rows_left(store, (report,))
        item_ids = list(store.items)
        reviewed = {item_ids[code] for code in store.item_codes().tolist()}
        wanted = None if settings.keep_all_items else reviewed
        texts, metadata_report = _read_metadata(SourceFile(metadata), wanted, releases, settings)
        if reviewed.isdisjoint(texts):
            raise DomainError(
                f"{metadata}: found none of the {len(reviewed)} reviewed items. "
                "Use the metadata of the reviews' category and release."
            )
        if not keep_items_without_text:
            texts = {item_id: found for item_id, found in texts.items() if any(found)}
        if settings.keep_all_items or not keep_items_without_text:
            store.keep_items(np.array([item_id in texts for item_id in item_ids]), WITHOUT_TEXT)
            store.core(settings.k_core, settings.keep_all_items)
        if settings.keep_all_items:
            item_ids = list(texts)
        columns = zip(*(texts.get(item_id, NO_TEXTS) for item_id in item_ids), strict=True)
        rows = f"users with {settings.k_core} rows" if settings.keep_all_items else f"{settings.k_core}-core"
        return write_rows(
            folder,
            store,
            settings,
            item_ids=item_ids,
            attributes=dict(zip(ATTRIBUTES, columns, strict=True)),
            source=f"Amazon {' or '.join(releases)}, {rows} of {reviews.name!r} with {metadata.name!r}",
            files=(report, metadata_report),
        )


def default_name(reviews: Path) -> str:
    """Return the domain's name for a file of reviews: ``Beauty`` for ``reviews_Beauty_5.json.gz``."""
    return reviews.name.split(".")[0].removeprefix("reviews_").removesuffix("_5")


def _read_reviews(
    source: SourceFile, store: EventStore, settings: ImportSettings
) -> tuple[FileReport, tuple[str, ...]]:
    """Store the reviews; return the file's report and the possible releases."""
    bad = BadRows(str(source), "line", settings.max_bad_share)
    blocks, number, record = _first_record(source, settings.progress)
    fields, releases = (FIELDS_2014_2018, ()) if record is None else _review_release(source, number, record)
    names = [fields.user, fields.item, fields.time, *([] if settings.min_rating is None else [fields.rating])]
    for batch in read_fields(blocks, names, bad, _parse):
        rows, num_low = _good_reviews(batch, fields, settings.min_rating, bad)
        store.drop(LOW_RATING, num_low)
        store.add(rows, bad)
    store.flush(bad)
    return bad.report(store.num_good), releases


def _good_reviews(
    batch: pa.RecordBatch, fields: ReviewFields, min_rating: float | None, bad: BadRows
) -> tuple[pa.RecordBatch, int]:
    """Return rows of the schema ROWS, and the number of reviews that are rated too low; record the unusable ones."""
    numbers, time = batch.column(NUMBER), batch.column(fields.time)
    good = pa.repeat(pa.scalar(True), len(batch))
    ids = {name: _ids(batch.column(name)) for name in (fields.user, fields.item)}
    for name, column in ids.items():
        good = refuse(bad, numbers, good, pc.is_null(column), f"no {name}")
    whole = matching(time, r"^-?\d+$")
    good = refuse(bad, numbers, good, pc.is_null(whole), f"{fields.time} is not a whole number")
    num_low = 0
    if min_rating is not None:
        ratings = to_numbers(batch.column(fields.rating))
        good = refuse(bad, numbers, good, pc.is_null(ratings), f"{fields.rating} is not a number")
        low = pc.and_(good, pc.fill_null(pc.less(ratings, min_rating), False))
        num_low = pc.sum(low).as_py() or 0
        good = pc.and_not(good, low)
    short = matching(whole, INT64_DIGITS)
    long = pc.if_else(pc.is_null(short), whole, pa.scalar(None, pa.string()))
    times = pc.coalesce(short.cast(pa.int64()), map_distinct(long, _int64))
    good = refuse(bad, numbers, good, pc.is_null(times), f"{fields.time} is out of range")
    return pa.record_batch([numbers, *ids.values(), times], ROWS.names).filter(good), num_low


def _ids(column: pa.Array) -> pa.Array:
    """Return the texts of a column of JSON that can be ids; null elsewhere."""
    found = matching(strings(column), r"\S")
    return pc.if_else(is_too_long(found), pa.scalar(None, pa.string()), found)


def _int64(digits: str) -> int:
    """Return a whole number; raise OverflowError beyond 64 bits."""
    return int.from_bytes(int(digits).to_bytes(8, "big", signed=True), "big", signed=True)


def _read_metadata(
    source: SourceFile, wanted: Collection[str] | None, releases: tuple[str, ...], settings: ImportSettings
) -> tuple[dict[str, Texts], FileReport]:
    """Return the texts of the wanted items, or of all, by id (the first entry counts), and the file's report."""
    bad = BadRows(str(source), "line", settings.max_bad_share)
    blocks, first, record = _first_record(source, settings.progress)
    release = "" if record is None else _metadata_release(source, first, record, releases)
    field = "parent_asin" if release == "2023" else "asin"
    num_good = 0
    texts: dict[str, Texts] = {}
    for number, item, line in _entries_of_2014(blocks, bad) if release == "2014" else _entries(blocks, field, bad):
        try:
            if not _is_id(item):
                raise BadLine(f"no {field}")
            if (wanted is None or item in wanted) and item not in texts:
                title, brand, category = map(bad.cut, _texts(_parse(line), release))
                texts[item] = title, brand, category
            num_good += 1
        except BadLine as error:
            bad.add(number, str(error))
    return texts, bad.report(num_good)


def _entries(blocks: Iterator[bytes], field: str, bad: BadRows) -> Iterator[tuple[int, str | None, bytes]]:
    """Yield number, id and line of each item."""
    for batch in read_fields(blocks, [field], bad, _parse):
        columns = (batch.column(NUMBER), strings(batch.column(field)), batch.column(LINE))
        yield from zip(*(column.to_pylist() for column in columns), strict=True)


def _entries_of_2014(blocks: Iterator[bytes], bad: BadRows) -> Iterator[tuple[int, str | None, bytes]]:
    """Yield the same from literals, which are parsed only if they do not begin with the id."""
    for number, line in enumerate(itertools.chain.from_iterable(map(io.BytesIO, blocks)), 1):
        if leading := LEADING_ASIN.match(line):
            yield number, leading[1].decode(errors="replace"), line
        elif not line.isspace():
            try:
                yield number, _parse(line).get("asin"), line
            except BadLine as error:
                bad.add(number, str(error))


def _review_release(source: SourceFile, number: int, record: dict[str, Any]) -> tuple[ReviewFields, tuple[str, ...]]:
    """Return the fields and the releases that have them; ``helpful`` and ``verified`` distinguish 2014 from 2018."""
    if record.keys() >= {FIELDS_2023.user, FIELDS_2023.item, FIELDS_2023.time}:
        return FIELDS_2023, ("2023",)
    if record.keys() >= {FIELDS_2014_2018.user, FIELDS_2014_2018.item, FIELDS_2014_2018.time}:
        if "verified" in record:
            return FIELDS_2014_2018, ("2018",)
        return FIELDS_2014_2018, ("2014",) if "helpful" in record else ("2014", "2018")
    raise DomainError(
        f"{source}: line {number} has the fields {_names(record)}, expected those of a review: reviewerID, asin, "
        "unixReviewTime (2014, 2018) or user_id, parent_asin, timestamp (2023). Use the raw reviews."
    )


def _metadata_release(source: SourceFile, number: int, record: dict[str, Any], releases: tuple[str, ...]) -> str:
    """Return the release of the metadata, which must be one of the reviews' releases."""
    is_review = not record.keys().isdisjoint({"reviewerID", "user_id"})
    if is_review or record.keys().isdisjoint({"asin", "parent_asin"}):
        raise DomainError(
            f"{source}: line {number} has the fields {_names(record)}, expected those of an item: asin (2014, 2018) or "
            f"parent_asin (2023) with a title{'; these are reviews' if is_review else ''}. Use the raw metadata."
        )
    if "parent_asin" in record:
        release = "2023"
    else:
        release = "2014" if record.keys().isdisjoint({"category", "main_cat"}) else "2018"
    if releases and release not in releases:
        raise DomainError(
            f"{source}: found metadata of the {release} release, expected {' or '.join(releases)} like the reviews. "
            "Use files of one release: item ids differ between releases."
        )
    return release


def _texts(record: dict[str, Any], release: str) -> Texts:
    """Return title, brand and category; raise BadLine for a value that is none."""
    title, brand = _text(record, "title"), _text(record, "brand")
    if release == "2014":
        paths = record.get("categories")
        return title, brand, _clean("categories", paths[0] if isinstance(paths, list) and paths else paths)
    if release == "2018":
        return "" if "getTime" in title else title, brand, _text(record, "category") or _text(record, "main_cat")
    brand = _clean("details", _details(record.get("details")).get("Brand"))
    category = _text(record, "categories") or _text(record, "main_category")
    return title, brand or _text(record, "store"), category


def _details(value: Any) -> dict[str, Any]:
    """Return the details of an item of 2023; some copies of the files hold them as the text of an object."""
    if isinstance(value, str):
        return _parse_text(value.strip(), "details: ") if value.strip() else {}
    if value is None or isinstance(value, dict):
        return value or {}
    raise BadLine("details is not an object")


def _text(record: dict[str, Any], field: str) -> str:
    return _clean(field, record.get(field))


def _clean(field: str, value: Any) -> str:
    """Return a text without tags, entities and superfluous space; lists are joined with spaces, as MergeRec does.

    Numbers count as texts; null and NaN as "". Entities are resolved until none is left: some are escaped twice.
    """
    if isinstance(value, list):
        return " ".join(filter(None, (_clean(field, part) for part in value)))
    if value is None or value != value:  # noqa: PLR0124  # NaN
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadLine(f"{field} is not a text or a list of texts")
    text = str(value)
    if "&" in text:
        while (resolved := html.unescape(text)) != text:
            text = resolved
    if "<" in text:
        text = HTML_TAG.sub(" ", text)
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _first_record(source: SourceFile, progress: Progress | None) -> tuple[Iterator[bytes], int, dict[str, Any] | None]:
    """Return the blocks of a file, and number and content of the first line with an object, None if there is none."""
    blocks = read_blocks(source, progress=progress)
    start = next(blocks)
    whole = itertools.chain([start], blocks)
    for number, line in enumerate(io.BytesIO(start), 1):
        with suppress(BadLine):
            return whole, number, _parse(line)
    return whole, 0, None


def _parse(line: bytes) -> dict[str, Any]:
    """Parse the object on a line."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise BadLine("not UTF-8 text") from None
    return _parse_text(text)


def _parse_text(text: str, where: str = "") -> dict[str, Any]:
    """Parse an object: JSON, or a Python literal as in the metadata of 2014."""
    is_literal = text.startswith("{'")
    try:
        record = _literal(text) if is_literal else json.loads(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise BadLine(f"{where}not a Python literal" if is_literal else f"{where}not JSON") from None
    if not isinstance(record, dict):
        raise BadLine(f"{where}not an object")
    return record


def _literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # texts contain invalid escapes
        return ast.literal_eval(text)


def _is_id(value: Any) -> TypeGuard[str]:
    """Return True for valid UTF-8 text that is not blank."""
    return isinstance(value, str) and (value.isascii() or _is_utf8(value)) and not value.isspace() and value != ""


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _names(record: dict[str, Any]) -> str:
    names = [str(name)[:30] for name in record]
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
