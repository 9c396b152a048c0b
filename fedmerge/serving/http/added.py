"""Items that were added or changed while serving, on disk: they are there again after a restart."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedmerge.domain.catalog import Catalog
from fedmerge.files import append_line, make_folder, read_lines
from fedmerge.serving.http.shelf import ItemChange


def changes_file(cache_dir: str, domain: str) -> Path:
    """Return the file of a domain's changes."""
    return Path(cache_dir).expanduser() / "serving" / f"{domain}-items.jsonl"


def keep_changes(path: Path, catalog_sha256: str, changes: Iterable[ItemChange]) -> None:
    """Append changes to a file; they are on disk when this returns.

    Args:
        path: of :func:`changes_file`.
        catalog_sha256: hash of the catalog that was read when the server started, or was swapped.
        changes: at least one.

    Raises:
        RunDirError: the file cannot be written.
    """
    make_folder(path.parent)
    items = [change._asdict() for change in changes]
    append_line(path, {"time": time.time(), "catalog": catalog_sha256, "items": items})


def kept_changes(path: Path, catalog: Catalog, since: float = 0.0) -> list[ItemChange]:
    """Return what still holds of the changes in a file: one for each item, the last text and the last availability.

    A text from before the catalog was written anew is older than the catalog's own, so it counts only for items that
    the catalog lacks. So does a text with attributes that the catalog does not have.

    Args:
        path: of :func:`changes_file`.
        catalog: as it was read now.
        since: seconds since 1970 when it was last said what is in stock; an earlier availability does not count.

    Raises:
        RunDirError: the file is damaged, or cannot be read.
    """
    in_catalog, attributes = set(catalog.item_ids), set(catalog.attributes)
    texts: dict[str, Mapping[str, str]] = {}
    availability: dict[str, bool] = {}
    for line in read_lines(path):
        for change in (ItemChange(**item) for item in line["items"]):
            outdated = line["catalog"] != catalog.sha256 and change.item_id in in_catalog
            if change.attributes is not None and not outdated and change.attributes.keys() <= attributes:
                texts[change.item_id] = change.attributes
            if change.available is not None and line["time"] >= since:
                availability[change.item_id] = change.available
    known = [*texts, *(item_id for item_id in availability if item_id in in_catalog and item_id not in texts)]
    return [ItemChange(item_id, texts.get(item_id), availability.get(item_id)) for item_id in known]
