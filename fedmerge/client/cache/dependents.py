"""What a client's cache holds of a domain: after its data changed, this is out of date or has learned from the old."""

import re
from pathlib import Path

LEARNED = ("experts", "heads", "personal", "woven", "sasrec")  # from interactions
RECORDS = ("released", "sums", "disclosed")  # of what has left
REMADE = ("tokens", "item-vectors", "indexes", "cohorts", "domains", "adapters")  # of catalogs, received and fetched


def cached_of(domain: str, cache_dir: Path) -> dict[str, list[Path]]:
    """Return the entries of a domain in each folder of the cache; folders without any are left out.

    Args:
        domain: name of the domain.
        cache_dir: folder on the client's own disk.
    """
    named = re.compile(rf"{re.escape(domain)}(?:-(?:[a-z]+-)?[0-9a-f]{{16}}.*)?")
    found = {
        kind: sorted(path for path in (cache_dir.expanduser() / kind).glob("*") if named.fullmatch(path.name))
        for kind in (*LEARNED, *RECORDS, *REMADE)
    }
    return {kind: paths for kind, paths in found.items() if paths}
