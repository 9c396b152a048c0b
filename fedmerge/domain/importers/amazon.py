"""Import a domain from raw Amazon reviews and metadata (UCSD, McAuley Lab): the releases of 2014, 2018 and 2023."""

import ast
import html
import json
import math
import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from fedmerge.domain.importers.bad_rows import BadRows, FileReport
from fedmerge.domain.importers.events import (
    EventLog,
    ImportReport,
    ImportSettings,
    Texts,
    check_rows_left,
    k_core,
    prepare,
    select,
    write_events,
)
from fedmerge.domain.importers.source_files import Progress, SourceFile, read_lines
from fedmerge.errors import ConfigError, DomainError

WITHOUT_TEXT = "of an item without metadata or text"
NO_TEXTS: Texts = ("", "", "")
LEADING_ASIN = re.compile(rb"\{'asin': '([^'\\]*)'")  # how a line of 2014 begins: spares parsing
HTML_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


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
    log = EventLog()
    report, releases = _read_reviews(SourceFile(reviews), log, settings)
    events = select(log.take(), settings.k_core, settings.keep_all_items)
    check_rows_left(events, (report,))
    user_ids, item_ids = list(log.users), list(log.items)
    del log
    reviewed = {item_ids[code] for code in np.unique(events.items).tolist()}
    wanted = None if settings.keep_all_items else reviewed
    texts, metadata_report = _read_metadata(SourceFile(metadata), wanted, releases, settings)
    if reviewed.isdisjoint(texts):
        raise DomainError(
            f"{metadata}: found none of the {len(reviewed)} reviewed items. "
            "Use the metadata of the reviews' category and release."
        )
    if settings.keep_all_items:  # the codes of items are renumbered in the order of the metadata
        item_index = np.full(len(item_ids), -1, np.int32)
        codes = {item_id: code for code, item_id in enumerate(item_ids)}
        item_ids = [item_id for item_id, found in texts.items() if keep_items_without_text or any(found)]
        for index, item_id in enumerate(item_ids):
            if item_id in codes:
                item_index[codes[item_id]] = index
        events = events.keep(item_index[events.items] >= 0, WITHOUT_TEXT)
        events = k_core(replace(events, items=item_index[events.items]), settings.k_core, users_only=True)
    elif not keep_items_without_text:
        has_text = np.array([any(texts.get(item_id, NO_TEXTS)) for item_id in item_ids])
        events = k_core(events.keep(has_text[events.items], WITHOUT_TEXT), settings.k_core)
    rows = f"users with {settings.k_core} rows" if settings.keep_all_items else f"{settings.k_core}-core"
    return write_events(
        folder,
        events,
        settings,
        user_ids=user_ids,
        item_ids=item_ids,
        texts=lambda code: texts.get(item_ids[code], NO_TEXTS),
        source=f"Amazon {' or '.join(releases)}, {rows} of {reviews.name!r} with {metadata.name!r}",
        files=(report, metadata_report),
    )


def default_name(reviews: Path) -> str:
    """Return the domain's name for a file of reviews: ``Beauty`` for ``reviews_Beauty_5.json.gz``."""
    return reviews.name.split(".")[0].removeprefix("reviews_").removesuffix("_5")


def _read_reviews(source: SourceFile, log: EventLog, settings: ImportSettings) -> tuple[FileReport, tuple[str, ...]]:
    """Log the reviews; return the file's report and the possible releases."""
    bad = BadRows(str(source), "line", settings.max_bad_share)
    fields: ReviewFields | None = None
    releases: tuple[str, ...] = ()
    for number, line in _lines(source, settings.progress):
        try:
            record = _parse(line)
            if fields is None:  # the first record decides
                fields, releases = _review_release(source, number, record)
            _log_review(record, fields, log, settings.min_rating)
        except _BadRow as error:
            bad.add(number, str(error))
    return bad.report(log.num_good), releases


def _log_review(record: dict[str, Any], fields: ReviewFields, log: EventLog, min_rating: float | None) -> None:
    """Log one review; raise _BadRow if it cannot be used."""
    user, item, time = record.get(fields.user), record.get(fields.item), record.get(fields.time)
    if not _is_id(user):
        raise _BadRow(f"no {fields.user}")
    if not _is_id(item):
        raise _BadRow(f"no {fields.item}")
    if type(time) is not int:
        raise _BadRow(f"{fields.time} is not a whole number")
    if min_rating is not None:
        rating = record.get(fields.rating)
        if not isinstance(rating, int | float) or math.isnan(rating):
            raise _BadRow(f"{fields.rating} is not a number")
        if rating < min_rating:
            log.drop_low_rating()
            return
    try:
        log.add(user, item, time)
    except OverflowError:
        raise _BadRow(f"{fields.time} is out of range") from None


def _read_metadata(
    source: SourceFile, wanted: Collection[str] | None, releases: tuple[str, ...], settings: ImportSettings
) -> tuple[dict[str, Texts], FileReport]:
    """Return the texts of the wanted items, or of all, by id (the first entry counts), and the file's report."""
    bad = BadRows(str(source), "line", settings.max_bad_share)
    wanted_bytes = {item_id.encode() for item_id in wanted or ()}
    release, num_good = "", 0
    texts: dict[str, Texts] = {}
    for number, line in _lines(source, settings.progress):
        leading = LEADING_ASIN.match(line)
        if wanted is not None and release == "2014" and leading and leading[1] not in wanted_bytes:
            num_good += 1
            continue
        try:
            record = _parse(line)
            release = release or _metadata_release(source, number, record, releases)
            field = "parent_asin" if release == "2023" else "asin"
            item = record.get(field)
            if not _is_id(item):
                raise _BadRow(f"no {field}")
        except _BadRow as error:
            bad.add(number, str(error))
            continue
        num_good += 1
        if (wanted is None or item in wanted) and item not in texts:
            texts[item] = _texts(record, release)
    return texts, bad.report(num_good)


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
    title, brand = _clean(record.get("title")), _clean(record.get("brand"))
    if release == "2014":
        paths = record.get("categories")
        return title, brand, _join_path(paths[0] if isinstance(paths, list) and paths else None)
    if release == "2018":
        return (
            "" if "getTime" in title else title,
            brand,
            _join_path(record.get("category")) or _clean(record.get("main_cat")),
        )
    details = record.get("details")
    brand = _clean(details.get("Brand")) if isinstance(details, dict) else ""
    category = _join_path(record.get("categories")) or _clean(record.get("main_category"))
    return title, brand or _clean(record.get("store")), category


def _join_path(path: Any) -> str:
    """Join the names of a category path with spaces, as MergeRec does."""
    return " ".join(filter(None, map(_clean, path))) if isinstance(path, list) else ""


def _clean(value: Any) -> str:
    """Remove tags, entities and superfluous white space from a text; "" for anything else."""
    if not isinstance(value, str):
        return ""
    text = html.unescape(HTML_TAG.sub(" ", value)) if "<" in value or "&" in value else value
    return " ".join(text.encode("utf-8", "replace").decode().split())


class _BadRow(Exception):
    """The reason why a line is left out."""


def _lines(source: SourceFile, progress: Progress | None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers."""
    for number, line in enumerate(read_lines(source, progress), 1):
        if not line.isspace():
            yield number, line


def _parse(line: bytes) -> dict[str, Any]:
    """Parse the object on a line: JSON, or a Python literal as in the metadata of 2014."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise _BadRow("not UTF-8 text") from None
    is_literal = text.startswith("{'")
    try:
        record = _literal(text) if is_literal else json.loads(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise _BadRow("not a Python literal" if is_literal else "not JSON") from None
    if not isinstance(record, dict):
        raise _BadRow("not an object")
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
