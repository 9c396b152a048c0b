"""The catalog of a domain, its shareable half. Neither this module nor its imports can open a domain's private file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from fedmerge.config import ATTRIBUTES
from fedmerge.domain.manifest import ID_COLUMN, check_name, make_template, read_manifest, read_template
from fedmerge.domain.parquet import LONGEST_TEXT, Limits, decoded_limit, table_limits
from fedmerge.domain.tables import RESTORE, decode_table, encode_table, read_file
from fedmerge.errors import DomainError

CATALOG_FILE = "catalog.parquet"
BYTES_PER_ITEM = 4096  # at most on average, and a mebibyte for a small catalog
MOST_ITEMS, MOST_BYTES = 2**20, 2**27  # of a catalog that travels, decoded, whatever number of items a client claims
_HASHED_AT_ONCE = 10_000  # cells


@dataclass(frozen=True, slots=True)
class Catalog:
    """The items of a domain; an item's index is its position.

    Attributes:
        name: the domain's name.
        item_ids: (N,) original ids, unique.
        attributes: attribute -> (N,) values, in the order of an item's text; "" means absent.
        sha256: ``catalog_fingerprint`` of the content.
        limits: attribute -> number of tokens that are read of a value, for attributes that have their own limit.

    Raises:
        DomainError: an invalid name, unusable attributes or limits, no items, columns of unequal length, or an empty or
            repeated item id.
    """

    name: str
    item_ids: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]]
    sha256: str
    limits: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        _check_columns(f"Catalog of {self.name!r}", self.item_ids, self.attributes, self.limits)

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.item_ids)

    @property
    def template(self) -> tuple[str, ...]:
        """Attributes and limits as :func:`~fedmerge.domain.manifest.read_template` reads them."""
        return make_template(tuple(self.attributes), self.limits)

    @property
    def titles(self) -> tuple[str, ...]:
        """What names each item to a person: (N,) values of ``title_attribute``."""
        return self.attributes[self.title_attribute]

    @property
    def title_attribute(self) -> str:
        """``title``, or the first attribute in a catalog without titles."""
        return "title" if "title" in self.attributes else next(iter(self.attributes))


def catalog_fingerprint(
    item_ids: Sequence[str], attributes: Mapping[str, Sequence[str]], limits: Mapping[str, int] | None = None
) -> str:
    """Return the SHA-256 (hex) of ids and attributes in order, independent of file, compression and library version.

    Hashed is the JSON of the list of columns, a part at a time, after that of the template unless it is ATTRIBUTES: so
    the hash of a catalog covers the text of its items, and catalogs of title, brand and category keep theirs.
    """
    template = make_template(tuple(attributes), limits or {})
    digest = hashlib.sha256(b"" if template == ATTRIBUTES else json.dumps(template, separators=(",", ":")).encode())
    digest.update(b"[")
    for number, column in enumerate((item_ids, *attributes.values())):
        digest.update(b",[" if number else b"[")
        for start in range(0, len(column), _HASHED_AT_ONCE):
            some = json.dumps(column[start : start + _HASHED_AT_ONCE], separators=(",", ":")).encode()
            digest.update(b"," * (start > 0) + some[1:-1])
        digest.update(b"]")
    digest.update(b"]")
    return digest.hexdigest()


def make_catalog(
    name: str,
    item_ids: Sequence[str],
    attributes: Mapping[str, Sequence[str]],
    limits: Mapping[str, int] | None = None,
) -> Catalog:
    """Make a checked catalog with its fingerprint.

    Args:
        name: the domain's name.
        item_ids: (N,) original ids, unique.
        attributes: attribute -> (N,) values, in the order of an item's text; "" means absent.
        limits: attribute -> number of tokens that are read of a value, where that is not ``text.max_attribute_tokens``.

    Raises:
        DomainError: as for Catalog.
    """
    limits = dict(limits or {})
    _check_columns(f"Catalog of {name!r}", item_ids, attributes, limits)
    columns = {attribute: tuple(values) for attribute, values in attributes.items()}
    return Catalog(name, tuple(item_ids), columns, catalog_fingerprint(item_ids, columns, limits), limits)


def catalog_schema(names: Sequence[str]) -> pa.Schema:
    """Return the schema of a catalog with these attributes."""
    return pa.schema([pa.field(column, pa.string()) for column in (ID_COLUMN, *names)])


def catalog_to_bytes(catalog: Catalog) -> bytes:
    """Encode the catalog as Parquet bytes, as it is stored and sent."""
    columns = [catalog.item_ids, *catalog.attributes.values()]
    try:
        schema = catalog_schema(tuple(catalog.attributes))
        return encode_table(pa.table([pa.array(column, pa.string()) for column in columns], schema=schema))
    except (pa.ArrowException, TypeError, UnicodeEncodeError) as error:
        raise DomainError(
            f"Catalog of {catalog.name!r}: a value is not valid UTF-8 text ({error}). Correct it in the source."
        ) from error


def catalog_limits(num_items: int) -> Limits:
    """Return the limits of a catalog that travels and is said to have a number of items.

    A larger catalog reaches the server as a folder, see ``server.catalogs``.
    """
    num_items = min(num_items, MOST_ITEMS)
    return table_limits(num_items, min(2**20 + BYTES_PER_ITEM * num_items, MOST_BYTES))


def catalog_from_bytes(
    data: bytes, name: str, num_items: int = MOST_ITEMS, template: Sequence[str] = ATTRIBUTES
) -> Catalog:
    """Decode a catalog from Parquet bytes; its fingerprint is computed from the content, never trusted.

    Args:
        data: Parquet bytes.
        name: the domain's name.
        num_items: number of items that the catalog is said to have; more are not decoded.
        template: attributes that it is said to have, in order, with their limits.

    Raises:
        DomainError: damaged bytes, another schema, above :func:`catalog_limits`, null cells, no items, an empty or
            repeated item id.
    """
    return _decode(data, name, f"Catalog of {name!r}", catalog_limits(num_items), template)


def write_catalog(catalog: Catalog, path: Path) -> None:
    """Write one Parquet file; ``folder.write_domain`` writes a whole domain safely."""
    path.write_bytes(catalog_to_bytes(catalog))


def read_catalog(path: Path, name: str, num_items: int = MOST_ITEMS, template: Sequence[str] = ATTRIBUTES) -> Catalog:
    """Read one catalog file of at most ``num_items``; DomainError as for catalog_from_bytes, or if it is missing."""
    data = read_file(path)
    return _decode(data, name, str(path), table_limits(num_items, decoded_limit(len(data))), template)


def load_catalog(folder: Path) -> Catalog:
    """Load the catalog of a domain folder and verify it against the manifest; nothing else in the folder is opened.

    Raises:
        DomainError: a wrong manifest, a damaged catalog, or content that differs from the manifest.
    """
    manifest = read_manifest(folder)
    path = folder / CATALOG_FILE
    catalog = read_catalog(path, manifest.name, manifest.num_items, manifest.attributes)
    if (len(catalog), catalog.sha256) != (manifest.num_items, manifest.catalog_sha256):
        raise DomainError(
            f"{path}: found {len(catalog)} items with content hash {catalog.sha256[:12]}…, the manifest says "
            f"{manifest.num_items} items with {manifest.catalog_sha256[:12]}…; the content was changed. {RESTORE}"
        )
    return catalog


def _decode(data: bytes, name: str, where: str, limits: Limits, template: Sequence[str]) -> Catalog:
    of_tokens = read_template(template, where)
    stated = {attribute: limit for attribute, limit in of_tokens.items() if limit is not None}
    table = decode_table(data, where, catalog_schema(tuple(of_tokens)), limits)
    item_ids = tuple(table.column(ID_COLUMN).to_pylist())
    attributes = {attribute: tuple(table.column(attribute).to_pylist()) for attribute in of_tokens}
    _check_columns(where, item_ids, attributes, stated)
    return Catalog(name, item_ids, attributes, catalog_fingerprint(item_ids, attributes, stated), stated)


def _check_columns(
    where: str, item_ids: Sequence[str], attributes: Mapping[str, Sequence[str]], limits: Mapping[str, int]
) -> None:
    if unknown := sorted(limits.keys() - attributes.keys()):
        raise DomainError(f"{where}: found limits of {unknown}, expected of {list(attributes)}. Correct the names.")
    read_template(make_template(tuple(attributes), limits), where)
    lengths = {ID_COLUMN: len(item_ids), **{attribute: len(values) for attribute, values in attributes.items()}}
    if len(set(lengths.values())) != 1:
        raise DomainError(f'{where}: columns of unequal length, {lengths}. Give one value per item ("" is absent).')
    if not item_ids:
        raise DomainError(
            f"{where}: the catalog is empty, expected at least one item. Import the domain with its items."
        )
    for column, values in ((ID_COLUMN, item_ids), *attributes.items()):
        longest = max(values, key=len)
        if len(longest) > LONGEST_TEXT:
            raise DomainError(
                f"{where}: item {values.index(longest)} has a {column} of {len(longest):,} characters, at most "
                f"{LONGEST_TEXT:,} are read. Shorten it in the source."
            )
    rows: dict[str, int] = {}
    for row, item_id in enumerate(item_ids):
        if not item_id:
            raise DomainError(f"{where}: item {row} has an empty id, expected a unique one. Correct it in the source.")
        if rows.setdefault(item_id, row) != row:
            raise DomainError(
                f"{where}: items {rows[item_id]} and {row} have the same id, expected unique ids. "
                "Remove the duplicate in the source."
            )
