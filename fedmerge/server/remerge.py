"""Merge adapters that exist already: the experts of a run, or any LoRA adapters of one backbone."""

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmerge.adapter import Adapter
from fedmerge.config import ExperimentConfig, to_toml
from fedmerge.domain.catalog import Catalog, load_catalog
from fedmerge.domain.manifest import check_catalog_is_public, check_name, read_manifest
from fedmerge.encoder.adapted import check_backbone
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import ConfigError, DomainError, RunDirError
from fedmerge.files import new_folder, read_record, write_json, write_text
from fedmerge.mergerec.pictures import draw_learned
from fedmerge.merging.candidate import Candidate, Origin
from fedmerge.merging.folders.reading import AdapterFolders, read_folders
from fedmerge.merging.folders.writing import write_as_sources
from fedmerge.merging.methods import method_named
from fedmerge.runs.checkpoints import HEADS, read_excluded_experts
from fedmerge.runs.reading import REMERGED
from fedmerge.server.candidates import learn_from_catalogs, merge_candidates, recipe_of
from fedmerge.server.layer_search import search_on_pseudo_users
from fedmerge.server.refined import refined_candidates

WITHDRAWN = "left out with --exclude"
TURNED_AWAY = "not admitted"


@dataclass(frozen=True)
class Experts:
    """Verified adapters that are to be merged, and their origin.

    Attributes:
        sources: the adapters by domain, and the settings that their folders share.
        excluded: domain -> reason why it is left out.
        run: id of the run that trained them, or None.
        catalog_sha256: domain -> hash of its catalog, where known.
    """

    sources: AdapterFolders
    excluded: Mapping[str, str]
    run: str | None
    catalog_sha256: Mapping[str, str]

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters: domain -> adapter."""
        return self.sources.adapters


def experts_of_run(run: Path, exclude: Sequence[str] = ()) -> Experts:
    """Read the experts that a run received, finished or not, except those that its gate excluded.

    Args:
        run: folder of the run.
        exclude: domains to leave out; their folders are not opened.

    Raises:
        RunDirError: the run has no expert, or a damaged record.
        ConfigError: ``exclude`` names a domain without an expert, or every domain.
        LayoutMismatchError: an expert is damaged or not finite.
    """
    folders = {folder.name: folder for folder in (run / "adapters").glob("[!.]*") if folder.is_dir()}
    if not folders:
        raise RunDirError(
            f"{run}: no adapter in {run / 'adapters'}; the run ended before it received an expert. Run it again."
        )
    away = {domain: f"{TURNED_AWAY}: {why}" for domain, why in read_excluded_experts(run).items() if domain in folders}
    folders = {name: folder for name, folder in folders.items() if name not in away}
    participants = read_record(run / "clients.json").get("participants")
    catalogs = {}
    for domain, client in participants.items() if isinstance(participants, dict) else ():
        if isinstance(client, dict) and isinstance(client.get("catalog_sha256"), str):
            catalogs[domain] = client["catalog_sha256"]
    kept = _kept(folders, exclude)
    experts = Experts(read_folders(kept, union=False), dict.fromkeys(exclude, WITHDRAWN), run.name, catalogs)
    return replace(experts, excluded={**away, **experts.excluded})


def experts_in(
    folders: Mapping[str, Path], exclude: Sequence[str] = (), backbone_name: str | None = None, **parts: Any
) -> Experts:
    """Read any LoRA adapters of one backbone, each as the expert of a domain; errors as :func:`experts_of_run`.

    Args:
        folders: domain -> PEFT folder.
        exclude: as for :func:`experts_of_run`.
        backbone_name: see :func:`fedmerge.merging.folders.reading.read_folders`.
        parts: ``whole``, ``leave_out`` and ``base`` of the same function.

    Raises:
        DomainError: a name is not valid for a domain.
    """
    for name in folders:
        check_name(name)
    kept = _kept(folders, exclude)
    return Experts(read_folders(kept, backbone_name, **parts), dict.fromkeys(exclude, WITHDRAWN), None, {})


def needs_backbone(config: ExperimentConfig) -> bool:
    """Return True if a merge of the configuration is learned or trained, so that it runs the backbone on catalogs."""
    return config.refines_merges or any(method_named(method).learned for method in config.merge.methods)


def catalogs_of(experts: Experts, root: Path) -> dict[str, Catalog]:
    """Read the catalog of every expert's domain.

    Args:
        experts: the experts.
        root: folder with a folder of each domain.

    Raises:
        DomainError: a catalog is missing, damaged, or not the one that the expert was trained with.
        PolicyError: the manifest of a catalog says private.
    """
    missing = [domain for domain in experts.adapters if not (root / domain).is_dir()]
    if missing:
        raise DomainError(
            f"{root}: no catalog of {', '.join(missing)}, which learned merges need. Give --catalogs a folder with a "
            f"folder for each of {', '.join(experts.adapters)}, or merge with --set merge.methods=average."
        )
    catalogs = {}
    for domain in experts.adapters:
        check_catalog_is_public(domain, read_manifest(root / domain).public_catalog)
        catalog = load_catalog(root / domain)
        expected = experts.catalog_sha256.get(domain, catalog.sha256)
        if catalog.sha256 != expected:
            raise DomainError(
                f"{root / domain}: the catalog has hash {catalog.sha256[:12]}, expected {expected[:12]} as in the run. "
                "Give --catalogs the folder with the catalogs of the run."
            )
        catalogs[domain] = catalog
    return catalogs


def merge_again(
    experts: Experts,
    config: ExperimentConfig,
    backbone: Backbone | None,
    catalogs: Mapping[str, Catalog],
    progress: Callable[[str], None] = lambda line: None,
) -> list[Candidate]:
    """Make every merge of the configuration, as a run makes them.

    Args:
        experts: from :func:`experts_of_run` or :func:`experts_in`.
        config: methods and their variants.
        backbone: the backbone of the experts; may be None unless :func:`needs_backbone`.
        catalogs: domain -> catalog; may be empty unless :func:`needs_backbone`.
        progress: receives lines about the progress.

    Raises:
        LayoutMismatchError: the experts do not belong together, or the backbone is not theirs.
        MergeError: a merge cannot be computed.
    """
    if backbone is not None:
        check_backbone("the experts", backbone, experts.sources.backbone_sha256)
    recipe, learn = recipe_of(config), None
    search = search_on_pseudo_users(backbone, experts.adapters, catalogs, config, progress)
    if not recipe.at_clients:
        learn = learn_from_catalogs(backbone, experts.adapters, catalogs, config.text, progress)
    origin = Origin(
        experts.sources.hashes(),
        backbone.record if backbone else experts.sources.backbone,
        config.privacy.policy,
        experts.excluded,
        is_remerge=True,
        run=experts.run,
    )
    candidates = merge_candidates(
        experts.adapters,
        recipe.variants(),
        origin,
        recipe,
        progress,
        learn=learn,
        search=search,
        signals=experts.sources.signals,
    )
    return [*candidates, *refined_candidates(candidates, backbone, catalogs, config, progress)]


def heads_note(run: Path | None) -> str:
    """Return a sentence about a run whose clients hold heads, which no merge made later has; else empty."""
    if run is None or not (run / HEADS).is_dir():
        return ""
    return (
        "The clients of this run hold heads over the merge that it serves. A merge made here has no clients: no head "
        "is trained over it, and what the run serves does not change."
    )


def new_merge_folder(run: Path) -> Path:
    """Return a new path ``<run>/remerged/<UTC time>-<four random hex digits>``."""
    return run / REMERGED / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def write_merges(
    candidates: Sequence[Candidate], experts: Experts, config: ExperimentConfig, folder: Path
) -> dict[str, Path]:
    """Write merges and their settings, all of them or none.

    Args:
        candidates: from :func:`merge_again`.
        experts: the merged experts.
        config: settings for ``config.toml``, which gets the domains that took part.
        folder: absent or empty.

    Returns:
        Label -> PEFT folder.

    Raises:
        RunDirError: the folder is not empty, or cannot be written; then nothing is left behind.
    """
    names = {candidate.label: candidate.label.replace(" ", "-") for candidate in candidates}
    with new_folder(folder) as partial:
        for candidate in candidates:
            made = partial / names[candidate.label]
            write_as_sources(candidate.adapter, experts.sources, made)
            write_json(made / "provenance.json", {**candidate.provenance.to_dict(), **experts.sources.facts()})
            draw_learned(made, candidate.provenance)
        write_text(partial / "config.toml", to_toml(settings_of(experts, config)))
    folder = Path(os.path.abspath(folder))
    return {label: folder / name for label, name in names.items()}


def settings_of(experts: Experts, config: ExperimentConfig) -> ExperimentConfig:
    """Return the settings of a run with the domains that took part in a merge."""
    domains = tuple(experts.adapters)
    unseen = tuple(domain for domain in config.domains.unseen if domain not in domains)
    enough = min(config.server.min_train_clients, len(domains))
    return config.model_copy(
        update={
            "domains": config.domains.model_copy(update={"train": domains, "unseen": unseen}),
            "server": config.server.model_copy(update={"min_train_clients": enough}),
        }
    )


def _kept(folders: Mapping[str, Path], exclude: Sequence[str]) -> dict[str, Path]:
    """Return the folders that are not excluded, sorted."""
    unknown = [domain for domain in exclude if domain not in folders]
    if unknown:
        raise ConfigError(
            f"--exclude {' '.join(unknown)}: found no such adapter, expected some of {', '.join(sorted(folders))}."
        )
    kept = {domain: folders[domain] for domain in sorted(folders) if domain not in exclude}
    if not kept:
        raise ConfigError(f"--exclude names all of {', '.join(sorted(folders))}. Take at least one name off the list.")
    return kept
