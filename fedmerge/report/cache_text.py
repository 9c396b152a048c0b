"""The cache of a client as text: its sizes by kind, and what is deleted from it."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fedmerge.client.cache.contents import KINDS, CacheEntry
from fedmerge.report.html.page import size
from fedmerge.report.tables import aligned

_OTHER = "not of fedmerge's making, or of another version; never deleted"


def cache_table(folder: Path, entries: Sequence[CacheEntry]) -> str:
    """Return a line for each kind, largest first, with the sum below."""
    if not entries:
        return f"{folder}: holds nothing\n"
    by_kind: dict[str, list[CacheEntry]] = {}
    for entry in entries:
        by_kind.setdefault(entry.kind, []).append(entry)
    rows = [("kind", "entries", "size", "last used", "what it is")]
    for kind, of_kind in sorted(by_kind.items(), key=lambda item: -_total(item[1])):
        used = max(entry.used for entry in of_kind)
        rows.append((kind, str(len(of_kind)), size(_total(of_kind)), _date(used), KINDS.get(kind, _OTHER)))
    lines = aligned(rows)
    return (
        "\n".join([*lines, "", f"{folder}: {size(_total(entries))} in {len(entries)} entries"])
        + "\nDelete what can be made again and is not in use: fedmerge cache clean (lists it; --yes deletes).\n"
    )


def deletion_text(folder: Path, entries: Sequence[CacheEntry], *, is_deleted: bool) -> str:
    """Return a line for each entry with the reason, and what was or would be freed."""
    if not entries:
        return f"{folder}: nothing to delete\n"
    names = [str(entry.path.relative_to(folder)) for entry in entries]
    lines = aligned([(name, size(entry.size_bytes), entry.why) for name, entry in zip(names, entries, strict=True)])
    total = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}, {size(_total(entries))}"
    end = f"deleted: {total}" if is_deleted else f"{total}. Nothing was deleted; add --yes to delete them."
    return "\n".join([*lines, end]) + "\n"


def _total(entries: Sequence[CacheEntry]) -> int:
    return sum(entry.size_bytes for entry in entries)


def _date(used: float) -> str:
    return f"{datetime.fromtimestamp(used, UTC):%Y-%m-%d}"
