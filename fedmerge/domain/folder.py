"""Write domain folders atomically, list them, and describe them to their owner."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmerge.domain.catalog import (
    CATALOG_FILE,
    Catalog,
    catalog_fingerprint,
    catalog_to_bytes,
    load_catalog,
)
from fedmerge.domain.interactions import (
    INTERACTIONS_FILE,
    Interactions,
    SequencePart,
    load_interactions,
    write_interactions,
)
from fedmerge.domain.manifest import (
    MANIFEST_FILE,
    CatalogSource,
    Manifest,
    default_catalog_source,
    folder_name,
    manifest_to_bytes,
    read_manifest,
)
from fedmerge.domain.splits import MIN_EVALUATED_LENGTH
from fedmerge.domain.tables import RESTORE
from fedmerge.errors import DomainError

__all__ = ["DomainInfo", "Manifest", "check_target", "domain_info", "list_domains", "read_manifest", "write_domain"]


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """Facts about a domain, for its owner only: they derive from private interactions.

    Attributes:
        manifest: counts, hashes and origin.
        min_length, median_length, max_length: interactions per user.
        density: share of the (user, item) pairs that occur, in (0, 1].
        attribute_shares: share of items that have it, in [0, 1], for each attribute.
        num_short_users: users with fewer than 3 interactions, who train but are not evaluated.
        num_unused_items: items without interactions.
        num_repeats: interactions with an item the user had before.
        problems: sentences on possible causes of weak results; empty if none was found.
    """

    manifest: Manifest
    min_length: int
    median_length: float
    max_length: int
    density: float
    attribute_shares: Mapping[str, float]
    num_short_users: int
    num_unused_items: int
    num_repeats: int
    problems: tuple[str, ...]


def write_domain(
    folder: Path,
    catalog: Catalog,
    interactions: Interactions | Iterable[SequencePart],
    *,
    public_catalog: bool,
    synthetic: bool,
    source: str,
    catalog_source: CatalogSource | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a domain folder atomically.

    The files are written and synced in a hidden folder beside the target (``.<name>.partial-…``), which is then
    renamed; a killed process may leave it behind, and it may be deleted. An overwrite first renames the existing domain
    to ``.<name>.previous-…``; a process killed between the two renames leaves that folder intact, and ``read_manifest``
    names it.

    Args:
        folder: the domain folder, named like the catalog. Missing parents are created.
        catalog: the items.
        interactions: the sequences, over the catalog's item indices; parts are read once.
        public_catalog: True if the owner lets the catalog leave the client.
        synthetic: True if the data is generated.
        source: origin of the data, in words.
        catalog_source: see :class:`~fedmerge.domain.manifest.Manifest`; None: "given" for synthetic data, else
            "interactions".
        overwrite: replace an existing domain; a folder that is not a domain is never replaced.

    Raises:
        DomainError: different names, an item index outside the catalog, a target that may not be replaced, or a failed
            write (a full disk, for example), which leaves nothing behind.
    """
    if folder_name(folder) != catalog.name:
        raise DomainError(f"{folder}: expected the name of the catalog, {catalog.name!r}. Rename one of them.")
    check_target(folder, overwrite)
    token = secrets.token_hex(4)
    partial = folder.parent / f".{catalog.name}.partial-{token}"
    previous = folder.parent / f".{catalog.name}.previous-{token}"
    new_parents = [parent for parent in partial.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        parts = interactions.parts() if isinstance(interactions, Interactions) else interactions
        written = write_interactions(parts, partial / INTERACTIONS_FILE, len(catalog))
        manifest = Manifest(
            name=catalog.name,
            public_catalog=public_catalog,
            catalog_source=catalog_source or default_catalog_source(synthetic),
            synthetic=synthetic,
            source=source,
            num_items=len(catalog),
            num_users=written.num_users,
            num_interactions=written.num_interactions,
            catalog_sha256=catalog_fingerprint(catalog.item_ids, catalog.attributes, catalog.limits),
            interactions_sha256=written.sha256,
            attributes=catalog.template,
        )
        _write_synced(partial / CATALOG_FILE, catalog_to_bytes(catalog))
        _write_synced(partial / MANIFEST_FILE, manifest_to_bytes(manifest))
        if replaced := overwrite and (folder / MANIFEST_FILE).exists():
            _exchange(partial, folder, previous)
        else:
            partial.rename(folder)  # fails if another process has created the domain meanwhile
    except OSError as error:
        raise DomainError(
            f"{folder}: the domain could not be written ({error}); nothing was changed. "
            f"Check the space and the permissions of {folder.parent} and try again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()  # if it is still empty
    if replaced:
        _remove(previous)
    return manifest


def list_domains(root: Path) -> tuple[str, ...]:
    """List the names of the domain folders directly under root, sorted; hidden and other folders are ignored.

    Raises:
        DomainError: root is not a folder, or a folder holds a domain's tables without a manifest.
    """
    if not root.is_dir():
        raise DomainError(f"{root}: not found, expected a folder with one folder per domain. Check the path.")
    names = []
    for folder in sorted(root.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        if (folder / MANIFEST_FILE).exists():
            names.append(folder.name)
        elif (folder / CATALOG_FILE).exists() or (folder / INTERACTIONS_FILE).exists():
            raise DomainError(f"{folder / MANIFEST_FILE}: missing beside the domain's tables. {RESTORE}")
    return tuple(names)


def domain_info(folder: Path) -> DomainInfo:
    """Load, verify and describe a domain.

    Raises:
        DomainError: as load_catalog and load_interactions.
    """
    manifest, catalog, interactions = read_manifest(folder), load_catalog(folder), load_interactions(folder)
    lengths = np.diff(interactions.offsets)
    num_items = len(catalog)
    users = np.repeat(np.arange(interactions.num_users, dtype=np.int64), lengths)
    num_pairs = len(np.unique(users * num_items + interactions.items))  # different (user, item)
    present = {name: np.array([bool(value.strip()) for value in values]) for name, values in catalog.attributes.items()}
    num_short = int((lengths < MIN_EVALUATED_LENGTH).sum())
    num_unused = num_items - len(np.unique(interactions.items))
    num_textless = int((~np.any(list(present.values()), axis=0)).sum())
    problems = [f"Every item lacks a {attribute}." for attribute, mask in present.items() if not mask.any()]
    if num_textless:
        problems.append(f"{num_textless} of {num_items} items have no text at all: an encoder cannot tell them apart.")
    if num_short:
        problems.append(
            f"{num_short} of {len(lengths)} users have fewer than {MIN_EVALUATED_LENGTH} interactions; they are not "
            "evaluated."
        )
    if num_unused:
        problems.append(f"{num_unused} of {num_items} items have no interactions.")
    return DomainInfo(
        manifest=manifest,
        min_length=int(lengths.min()),
        median_length=float(np.median(lengths)),
        max_length=int(lengths.max()),
        density=num_pairs / (len(lengths) * num_items),
        attribute_shares={attribute: float(mask.mean()) for attribute, mask in present.items()},
        num_short_users=num_short,
        num_unused_items=num_unused,
        num_repeats=len(interactions.items) - num_pairs,
        problems=tuple(problems),
    )


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise an error for a folder that write_domain may not write.

    Raises:
        DomainError: the target is a link, a file, another folder, or an existing domain without overwrite.
    """
    if folder.is_symlink():
        raise DomainError(f"{folder}: a symbolic link is never replaced. Give the folder that it points to.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DomainError(f"{folder}: a file of this name exists. Choose another name or folder.")
    if (folder / MANIFEST_FILE).exists():
        if not overwrite:
            raise DomainError(f"{folder}: a domain of this name exists. Choose another name, or ask to overwrite it.")
    elif any(folder.iterdir()):
        raise DomainError(f"{folder}: not a domain folder, so it is never replaced. Choose another folder.")


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _exchange(partial: Path, folder: Path, previous: Path) -> None:
    """Rename folder to previous and partial to folder; put folder back if the second fails."""
    folder.rename(previous)
    try:
        partial.rename(folder)
    except OSError:
        previous.rename(folder)
        raise


def _remove(previous: Path) -> None:
    try:
        shutil.rmtree(previous)
    except OSError as error:
        raise DomainError(
            f"{previous}: the new domain is in place, but this previous version could not be deleted ({error}). "
            "Delete it: it holds private interactions."
        ) from error
