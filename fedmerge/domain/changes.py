"""Change a domain without a new import: items, users, attributes. Written whole or not at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmerge.domain.catalog import Catalog, load_catalog, make_catalog
from fedmerge.domain.folder import write_domain
from fedmerge.domain.importers.reading.formats import open_table
from fedmerge.domain.importers.reading.table import RECOGNISED, check_columns
from fedmerge.domain.importers.reading.values import to_ids, to_texts
from fedmerge.domain.interactions import Interactions, load_interactions, make_interactions
from fedmerge.domain.manifest import ID_COLUMN, Manifest, read_manifest, read_template
from fedmerge.errors import DomainError

SHOWN = 3  # ids in a message


@dataclass(frozen=True, slots=True)
class Change:
    """The result of a change.

    Attributes:
        before, after: the manifests; equal if nothing was to be done.
        num_known: items that the domain had already, or ids to forget that it does not have.
        absent: attributes that the table of new items, or the mapping, has no column for; they are empty.
        notes: what else is to be said of the table of new items.
    """

    before: Manifest
    after: Manifest
    num_known: int
    absent: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def add_items(folder: Path, table: Path, item_column: str = ID_COLUMN) -> Change:
    """Append the items of a table to the catalog; the indices of the old ones stay, and so do the interactions.

    Args:
        folder: the domain folder.
        table: a table of any format that imports read, with columns named like the domain's attributes.
        item_column: the column of ids.

    Raises:
        DomainError: an unreadable table, no column of an attribute, a row without id, an id with two texts, or one that
            the domain has with another text.
    """
    manifest, catalog = read_manifest(folder), load_catalog(folder)
    names = tuple(catalog.attributes)
    opened = open_table(table, [item_column, *names], 0.0, None, RECOGNISED, "catalog")
    present = [name for name in names if name in opened.columns]
    if not present:
        raise DomainError(
            f"{opened.source}: found the columns {', '.join(opened.columns)}, expected some of {', '.join(names)}, the "
            f"attributes of {manifest.name}. Rename the columns."
        )
    check_columns(opened, [item_column, *present])
    known = dict(zip(catalog.item_ids, zip(*catalog.attributes.values(), strict=True), strict=True))
    old = set(known)
    changed, repeated = list[str](), set[str]()
    for batch in opened.batches([item_column, *present]):
        item_ids = to_ids(opened.source, item_column, batch.column(item_column)).to_pylist()
        texts = [to_texts(batch.column(name), opened.bad) if name in present else [""] * len(batch) for name in names]
        for item_id, row in zip(item_ids, zip(*texts, strict=True), strict=True):
            if item_id is None:
                raise DomainError(f"{opened.source}: found a row without an id in {item_column!r}. Give each item one.")
            if known.setdefault(item_id, row) != row:
                changed.append(item_id)
            repeated |= {item_id} & old
    notes = opened.bad.report(len(known)).notes
    if changed:
        raise DomainError(
            f"{opened.source}: {len(changed)} items have another text than in {manifest.name} or in an earlier row: "
            f"{_some(changed)}. Items are only added, since experts and heads were trained on the old texts; remove "
            "these rows, or import the domain again."
        )
    if len(known) == len(catalog):
        return Change(manifest, manifest, len(repeated), notes=notes)
    columns = dict(zip(names, map(list, zip(*known.values(), strict=True)), strict=True))
    made = make_catalog(catalog.name, list(known), columns, catalog.limits)
    absent = tuple(name for name in names if name not in present)
    return Change(manifest, _write(folder, manifest, made, load_interactions(folder)), len(repeated), absent, notes)


def forget_users(folder: Path, user_ids: Sequence[str], skip_unknown: bool = False) -> Change:
    """Remove users with all their interactions; the catalog stays.

    Args:
        folder: the domain folder.
        user_ids: their ids.
        skip_unknown: ids that the domain does not have are counted, so that the same call can be repeated.

    Raises:
        DomainError: unknown ids, of which the message gives the number, or no users are left.
    """
    return _forget(folder, "users", user_ids, skip_unknown)


def forget_items(folder: Path, item_ids: Sequence[str], skip_unknown: bool = False) -> Change:
    """Remove items from the catalog and from all histories; the others keep their order, and users without rows go.

    Args:
        folder: the domain folder.
        item_ids: their ids.
        skip_unknown: ids that the domain does not have are counted, so that the same call can be repeated.

    Raises:
        DomainError: unknown ids, or no items or no interactions are left.
    """
    return _forget(folder, "items", item_ids, skip_unknown)


def map_attributes(
    folder: Path, template: Sequence[str], mapping: Mapping[str, str], dropped: Sequence[str] = ()
) -> Change:
    """Give a catalog the attributes of other domains: renamed, ordered, joined or dropped; ids and histories stay.

    Args:
        folder: the domain folder.
        template: the attributes to have, in the order of an item's text, with their limits of tokens if any.
        mapping: attribute -> attribute of the template, for those that are named otherwise. The values of several that
            become one are joined by commas, in the order of the catalog.
        dropped: attributes to leave out.

    Raises:
        DomainError: an unusable template, a name that the domain or the template does not have, an attribute that
            becomes nothing and is not dropped.
    """
    manifest, catalog = read_manifest(folder), load_catalog(folder)
    limits = read_template(template, f"{folder}: the template")
    unknown = sorted({*mapping, *dropped} - {*catalog.attributes})
    if unknown:
        raise DomainError(
            f"{folder}: found no attributes {', '.join(map(repr, unknown))}, expected some of "
            f"{', '.join(catalog.attributes)}; nothing was changed. Correct the names."
        )
    becomes = {name: mapping.get(name, name) for name in catalog.attributes if name not in dropped}
    lost = sorted(name for name, target in becomes.items() if target not in limits)
    if lost:
        raise DomainError(
            f"{folder}: {', '.join(f'{name!r} becomes {becomes[name]!r}' for name in lost)}, expected one of "
            f"{', '.join(limits)}; nothing was changed. Map each of them (--map {lost[0]}=…), or leave it out (--drop)."
        )
    columns = {}
    for target in limits:
        sources = [catalog.attributes[name] for name, becoming in becomes.items() if becoming == target]
        joined = [", ".join(filter(None, values)) for values in zip(*sources, strict=True)]
        columns[target] = joined or [""] * len(catalog)  # no source: an empty attribute
    stated = {name: limit for name, limit in limits.items() if limit is not None}
    made = make_catalog(catalog.name, catalog.item_ids, columns, stated)
    if made.sha256 == catalog.sha256:
        return Change(manifest, manifest, 0)
    absent = tuple(target for target in limits if target not in becomes.values())
    return Change(manifest, _write(folder, manifest, made, load_interactions(folder)), 0, absent)


def _forget(folder: Path, what: str, ids: Sequence[str], skip_unknown: bool) -> Change:
    """Remove users or items with their interactions; ids of users are never part of a message."""
    manifest, catalog, interactions = read_manifest(folder), load_catalog(folder), load_interactions(folder)
    present = {"users": interactions.user_ids, "items": catalog.item_ids}
    wanted = set(ids)
    unknown = sorted(wanted - set(present[what]))
    if unknown and not skip_unknown:
        shown = f": {_some(unknown)}" if what == "items" else ""
        raise DomainError(
            f"{folder}: {len(unknown)} of {len(wanted)} {what} to forget are not in the domain{shown}; nothing was "
            "changed. Correct the ids, or skip those with --skip-unknown."
        )
    stays = {name: np.array([name != what or id_ not in wanted for id_ in all_]) for name, all_ in present.items()}
    if stays[what].all():
        return Change(manifest, manifest, len(unknown))
    if not stays[what].any():
        raise _nothing_left(folder, what)
    rows = np.flatnonzero(stays["items"]).tolist()
    columns = {name: [values[row] for row in rows] for name, values in catalog.attributes.items()}
    left = make_catalog(catalog.name, [catalog.item_ids[row] for row in rows], columns, catalog.limits)
    place = np.cumsum(stays["items"]) - 1  # index of each old item that stays
    histories: dict[str, list[int]] = {}
    for user in np.flatnonzero(stays["users"]).tolist():
        items = interactions.sequence(user)
        if len(items := items[stays["items"][items]]):
            histories[interactions.user_ids[user]] = place[items].tolist()
    if not histories:
        raise _nothing_left(folder, "interactions")
    remaining = make_interactions(list(histories), list(histories.values()))
    return Change(manifest, _write(folder, manifest, left, remaining), len(unknown))


def read_ids(file: Path) -> list[str]:
    """Read ids from a text file, one a line; empty lines and white space around ids do not count.

    Raises:
        DomainError: a file that is missing, is not UTF-8, or holds no id.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise DomainError(f"{file}: cannot be read ({error}), expected a UTF-8 text with an id a line.") from error
    if not (ids := [line.strip() for line in lines if line.strip()]):
        raise DomainError(f"{file}: found no ids, expected one a line. Add them.")
    return ids


def _write(folder: Path, manifest: Manifest, catalog: Catalog, interactions: Interactions) -> Manifest:
    return write_domain(
        folder,
        catalog,
        interactions,
        public_catalog=manifest.public_catalog,
        synthetic=manifest.synthetic,
        source=manifest.source,
        catalog_source=manifest.catalog_source,
        overwrite=True,
    )


def _nothing_left(folder: Path, what: str) -> DomainError:
    return DomainError(
        f"{folder}: no {what} would be left, expected at least one; nothing was changed. To end the domain, delete its "
        "folder."
    )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:SHOWN])) + (", …" if len(ids) > SHOWN else "")


def change_counts(change: Change) -> Mapping[str, int]:
    """Return the differences in users, items and interactions."""
    names = ("users", "items", "interactions")
    return {name: getattr(change.after, f"num_{name}") - getattr(change.before, f"num_{name}") for name in names}
