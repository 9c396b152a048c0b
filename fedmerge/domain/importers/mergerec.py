"""Import a domain in the JSON layout that MergeRec publishes (the layout of RecFormer's preprocessing)."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmerge.config import ATTRIBUTES
from fedmerge.domain.catalog import Catalog, make_catalog
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import Interactions, make_interactions
from fedmerge.domain.manifest import CatalogSource, Manifest, check_name, folder_name
from fedmerge.errors import DomainError

PARTS = ("train", "val", "test")  # the order in time


def import_mergerec(
    src: Path,
    dst: Path,
    *,
    name: str | None = None,
    overwrite: bool = False,
    public_catalog: bool = False,
    catalog_source: CatalogSource | None = None,
) -> Manifest:
    """Import ``train/val/test/meta_data/smap/umap.json`` as the domain folder ``dst/name``.

    A user's sequence is train + val + test, so leave-one-out restores the split of the source. Users without val or
    test keep their items, and leave-one-out applies to those: Pantry has two such users with 3 train items each, of
    which the last two become the validation and the test target (the source evaluates 14,178 users, here 14,180). A
    user with fewer than 3 items only trains. Entries of meta_data without a number in smap are left out.

    Args:
        src: folder of the six files.
        dst: folder that holds the domains; the domain is written to ``dst/name``.
        name: the domain's name; None means the name of src.
        overwrite: replace an existing domain of that name.
        public_catalog: True if the owner lets the catalog leave the client.
        catalog_source: the owner's word on where the items come from; None: "interactions", since the published files
            hold a 5-core.

    Returns:
        The manifest. Item index = smap value, item id = smap key, users in the order of the umap values.

    Raises:
        DomainError: a missing or malformed file, ids that do not match, or a folder that may not be replaced.
    """
    name = folder_name(src) if name is None else name
    check_name(name)
    files = {stem: src / f"{stem}.json" for stem in (*PARTS, "meta_data", "smap", "umap")}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise DomainError(
            f"{src}: no {', '.join(missing)}; expected {', '.join(p.name for p in files.values())}. Add them."
        )
    catalog = _read_catalog(name, files)
    interactions = _read_interactions(files, len(catalog))
    return write_domain(
        dst / name,
        catalog,
        interactions,
        public_catalog=public_catalog,
        synthetic=False,
        source=f"MergeRec layout, folder {folder_name(src)!r}",
        catalog_source=catalog_source or "interactions",
        overwrite=overwrite,
    )


def _read_catalog(name: str, files: Mapping[str, Path]) -> Catalog:
    item_ids = _read_numbering(files["smap"])
    meta = _read_object(files["meta_data"])
    unknown = [item_id for item_id in item_ids if item_id not in meta]
    if unknown:
        raise DomainError(
            f"{files['meta_data']}: {len(unknown)} items of {files['smap'].name} are missing, first {unknown[0]!r}; "
            f'expected an entry for each. Add them, with "" for an attribute that is not known.'
        )
    for item_id in item_ids:
        entry = meta[item_id]
        if not isinstance(entry, dict) or not all(isinstance(entry.get(attribute), str) for attribute in ATTRIBUTES):
            raise DomainError(
                f"{files['meta_data']}: item {item_id!r} is {_short(entry)}, expected an object with the texts "
                f'{", ".join(ATTRIBUTES)}. Correct it, with "" for an attribute that is not known.'
            )
    return make_catalog(name, item_ids, {a: [meta[item_id][a] for item_id in item_ids] for a in ATTRIBUTES})


def _read_interactions(files: Mapping[str, Path], num_items: int) -> Interactions:
    user_ids = _read_numbering(files["umap"])
    keys = {str(user): user for user in range(len(user_ids))}
    sequences: list[list[int]] = [[] for _ in user_ids]
    for part in PARTS:
        path = files[part]
        for key, items in _read_object(path).items():
            if key not in keys:
                raise DomainError(
                    f"{path}: user {key!r} is not in {files['umap'].name}, expected 0 to {len(user_ids) - 1}. "
                    "Use files of the same preprocessing."
                )
            if not isinstance(items, list) or not all(type(i) is int and 0 <= i < num_items for i in items):
                raise DomainError(
                    f"{path}: user {key!r} has {_short(items)}, expected a list of items from 0 to {num_items - 1}. "
                    f"Correct it, or use the matching {files['smap'].name}."
                )
            if part != "train" and len(items) > 1:
                raise DomainError(
                    f"{path}: user {key!r} has {len(items)} items, expected one (leave-one-out). "
                    f"Move all but the last to {files['train'].name}."
                )
            sequences[keys[key]] += items
    empty = [user for user, sequence in enumerate(sequences) if not sequence]
    if empty:
        raise DomainError(
            f"{files['umap']}: {len(empty)} users have no item in {', '.join(PARTS)}, the first is user {empty[0]}; "
            "expected at least one each. Remove these users and renumber the others."
        )
    return make_interactions(user_ids, sequences)


def _read_numbering(path: Path) -> list[str]:
    """Return the keys of {id: number} in the order of their numbers, which must be 0 to n - 1, each once."""
    numbering = _read_object(path)
    for key, number in numbering.items():
        if type(number) is not int:
            raise DomainError(f"{path}: {key!r} has number {_short(number)}, expected an integer. Correct it.")
    ordered = sorted(numbering, key=numbering.__getitem__)
    for expected, key in enumerate(ordered):
        if numbering[key] != expected:
            raise DomainError(
                f"{path}: found number {numbering[key]} ({key!r}) where {expected} was expected: the numbers must be "
                f"0 to {len(ordered) - 1}, each once. Renumber them, here and in the other files."
            )
    if not ordered:
        raise DomainError(f"{path}: found no entries, expected at least one. Take the file from a complete copy.")
    return ordered


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; json alone would let the last of two equal keys win in silence."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            [(key, count)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"key {key!r} occurs {count} times in one object")
        return parsed

    try:
        parsed = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise DomainError(
            f"{path}: cannot be read as JSON ({error}). Correct the file or take a complete copy."
        ) from error
    if not isinstance(parsed, dict):
        raise DomainError(
            f"{path}: found {_short(parsed)}, expected a JSON object. Take the file from a complete copy."
        )
    return parsed


def _short(value: object) -> str:
    """The value's repr, cut to what a message can bear."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
