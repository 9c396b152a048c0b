"""Collect the catalogs of the training domains, which learned merges and the probe of the admission gate read."""

import logging
from pathlib import Path

from flwr.app import RecordDict

from fedmerge.domain.catalog import Catalog, catalog_from_bytes, catalog_limits, load_catalog
from fedmerge.domain.manifest import check_catalog_is_public, read_manifest
from fedmerge.federated.shared_items import find_shared_items
from fedmerge.files import read_json
from fedmerge.runs import checkpoints
from fedmerge.runs.folder import ADMISSION
from fedmerge.server.candidates import recipe_of
from fedmerge.server.choice import CHOICE_FILE, SELECTION_FILE
from fedmerge.server.gate import probes
from fedmerge.server.refined import refined_label
from sim.app.messages import records
from sim.app.server.asking import DESCRIBE_SECONDS, ask
from sim.app.server.questions import Question
from sim.app.server.run import Run

logger = logging.getLogger("fedmerge.server")


def collect_catalogs(run: Run) -> dict[str, Catalog]:
    """Return the catalogs of the training domains, from the server's folder or from the clients, checked by hash.

    Empty if nothing reads them: no learned merge and no probe, or all that needs them is on disk.

    Raises:
        ClientError: too few training clients are left.
        DomainError: schedule ``similarity`` of weaving finds too few shared items.
    """
    if not _are_needed(run):
        return {}
    with run.phase("catalogs"):
        sources = checkpoints.read_sources(run.folder)
        domains = [domain for domain in run.members.in_role("train") if sources is None or domain in sources]
        folder = run.config.server.catalogs
        catalogs = _from_clients(run, domains) if folder is None else _from_folder(Path(folder), domains)
        for domain, catalog in list(catalogs.items()):
            announced = run.members.descriptions[domain].catalog_sha256
            if catalog.sha256 != announced:
                del catalogs[domain]
                run.exclude(
                    domain, f"the catalog has hash {catalog.sha256[:12]}, its client announced {announced[:12]}"
                )
        run.require_quorum(run.members.in_role("train"))
        if run.config.shares_similarity:  # before any training
            find_shared_items({domain: catalog.item_ids for domain, catalog in catalogs.items()})
    return catalogs


def _are_needed(run: Run) -> bool:
    config, folder = run.config, run.folder
    methods = config.methods_from_catalogs
    if config.shares_similarity and checkpoints.read_factor_hashes(folder) is None:
        return True
    if config.refines_merges and not _are_refined(run):
        return True
    if not methods and not probes(config):
        return False
    sources = checkpoints.read_sources(folder)
    if sources is None or (probes(config) and read_json(folder / ADMISSION) is None):
        return True
    away = checkpoints.read_excluded_experts(folder)
    merged = {domain: sha256 for domain, sha256 in sources.items() if domain not in away}
    if config.admission.rollback and not read_json(folder / "choice.json"):
        return True  # the second merge, without the flagged experts, may be missing
    labels = {variant.label for method in methods for variant in recipe_of(config).variants_of(method)}
    return not labels <= checkpoints.read_candidates(folder, merged).keys()


def _are_refined(run: Run) -> bool:
    """Return True if validation selected, so that no merge is missing, and each has what the stages make of it."""
    final = (run.folder / SELECTION_FILE).is_file() or (run.folder / CHOICE_FILE).is_file()
    sources = checkpoints.read_sources(run.folder)
    if not final or sources is None:
        return False
    away = checkpoints.read_excluded_experts(run.folder)
    merged = {domain: "" if sha256 == records.OWN_EXPERT else sha256 for domain, sha256 in sources.items()}
    labels = checkpoints.read_candidates(
        run.folder, {domain: sha256 for domain, sha256 in merged.items() if domain not in away}
    ).keys()
    refined = {label for label in labels if label.startswith(refined_label(""))}
    return bool(refined) and {refined_label(label) for label in labels - refined} <= refined


def _from_folder(folder: Path, domains: list[str]) -> dict[str, Catalog]:
    catalogs = {}
    for domain in domains:
        check_catalog_is_public(domain, read_manifest(folder / domain).public_catalog)
        catalogs[domain] = load_catalog(folder / domain)
    return catalogs


def _from_clients(run: Run, domains: list[str]) -> dict[str, Catalog]:
    catalogs: dict[str, Catalog] = {}

    def receive(domain: str, content: RecordDict) -> None:
        announced = run.members.descriptions[domain]
        template = announced.attributes.split(",")
        catalogs[domain] = catalog_from_bytes(records.read_catalog(content), domain, announced.num_items, template)

    def limit_bytes(domain: str) -> int:
        return catalog_limits(run.members.descriptions[domain].num_items).decoded_bytes

    timeout_seconds = DESCRIBE_SECONDS
    question = Question(records.CATALOG, timeout_seconds, limit_bytes=limit_bytes)
    ask(run, run.members.nodes_of(domains), question, receive)
    return catalogs
