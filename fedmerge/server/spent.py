"""What the mechanisms of a run say that they released, read from its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmerge.run_dir import read_json
from fedmerge.server.checkpoints import ADAPTERS, MERGED
from fedmerge.server.round_checkpoints import round_records

EVERY_DOMAIN = "every domain"


def spent_by_domain(run_dir: Path, mode: str) -> dict[str, list[Mapping[str, Any]]]:
    """Domain -> one record for each release: of its expert or of each round, or of a noised sum of all.

    Args:
        run_dir: the run.
        mode: ``dp.mode``. With ``domain-central`` the server alone adds noise; clients' accounts are nothing.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}

    def add(domain: str, told: Mapping[str, Any] | None) -> None:
        if told and told.get("privacy"):
            found.setdefault(domain, []).append(told["privacy"])

    if mode == "domain-central":
        for path in sorted((run_dir / MERGED).glob("[!.]*/provenance.json")):
            add(EVERY_DOMAIN, read_json(path))
        return found
    for path in sorted((run_dir / ADAPTERS).glob("[!.]*/training.json")):
        add(path.parent.name, read_json(path))
    for record in round_records(run_dir):
        for domain, told in sorted(record["clients"].items()):
            add(domain, told)
    return dict(sorted(found.items()))
