"""The manifest of a domain folder: counts, origin, the attributes of its items, and the hashes of its tables."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from fedmerge.config import ATTRIBUTE, ATTRIBUTES, DOMAIN_NAME
from fedmerge.domain.tables import RESTORE, read_file
from fedmerge.errors import DomainError, PolicyError

FORMATS = (1, 2)  # 1 has no key "attributes": they are ATTRIBUTES, without limits
MANIFEST_FILE = "manifest.json"
NAME_PATTERN = re.compile(DOMAIN_NAME)
ATTRIBUTE_PATTERN, MOST_ATTRIBUTES = re.compile(ATTRIBUTE), 64
ID_COLUMN = "item_id"
OTHER_ATTRIBUTES = (  # the remedy, where a domain's differ from those of an experiment
    "state the attributes of all in domains.attributes, give the domain these ('fedmerge data map-attributes'), or let "
    "domains differ with domains.attributes = ''"
)

CatalogSource = Literal["given", "interactions"]
DP_BY_USER, NOISED_METRICS = "dp.mode = 'user'", "privacy.metrics = 'noised'"  # guarantees that need a given catalog


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of a domain folder.

    Attributes:
        name: the domain's name, equal to the folder's.
        public_catalog: True if the owner lets the catalog leave the client.
        catalog_source: "given" if the catalog is a whole table of items, whatever users did; "interactions" if its
            items survived a filter on interactions, so that one user can decide which items exist. A manifest without
            it counts as "interactions", unless the data is synthetic.
        synthetic: True if the data is generated.
        source: origin of the data, in words.
        num_items: rows of the catalog.
        num_users: different users of the interactions.
        num_interactions: rows of the interactions.
        catalog_sha256: ``catalog_fingerprint`` of the catalog.
        interactions_sha256: ``interactions_fingerprint`` of the interactions.
        attributes: the template of an item's text, see :func:`read_template`.
    """

    name: str
    public_catalog: bool
    catalog_source: CatalogSource
    synthetic: bool
    source: str
    num_items: int
    num_users: int
    num_interactions: int
    catalog_sha256: str
    interactions_sha256: str
    attributes: tuple[str, ...] = ATTRIBUTES


def check_name(name: str, where: str = "") -> None:
    """Raise DomainError for a name that cannot be a folder, an entry of a comma-separated setting and a record key."""
    if not NAME_PATTERN.fullmatch(name):
        raise DomainError(
            f"{where}Domain name {name!r}: expected at most 64 ASCII letters, digits and '._-', the first a letter or "
            "digit. Choose such a name."
        )


def read_template(template: Sequence[str], where: str) -> dict[str, int | None]:
    """Return the attributes of an item's text in order, each with its limit of tokens.

    Args:
        template: an attribute's name each, such as ``title``, or a name and its limit, ``colour=8``.
        where: subject of the error message.

    Returns:
        Name -> limit; None: ``text.max_attribute_tokens``.

    Raises:
        DomainError: no attributes or too many, a repeated or unusable name, or an unusable limit.
    """
    names = [part.partition("=")[0] for part in template]
    for name, part in zip(names, template, strict=True):
        if not ATTRIBUTE_PATTERN.fullmatch(part) or name == ID_COLUMN or names.count(name) > 1:
            raise DomainError(
                f"{where}: found the attribute {part!r}, expected different names of at most 64 letters, digits, "
                f"blanks and '._-' that begin and end with a letter or digit, none of them {ID_COLUMN!r}; a limit of "
                "tokens is 1 to 99999, as in 'colour=8'. Rename the column."
            )
    if not 0 < len(names) <= MOST_ATTRIBUTES:
        raise DomainError(
            f"{where}: found {len(names)} attributes, expected 1 to {MOST_ATTRIBUTES}. Choose columns with text."
        )
    return {name: int(part.partition("=")[2] or 0) or None for name, part in zip(names, template, strict=True)}


def make_template(names: Sequence[str], limits: Mapping[str, int]) -> tuple[str, ...]:
    """Inverse of :func:`read_template`, of which the result is not checked; ``limits`` holds stated limits only."""
    return tuple(f"{name}={limits[name]}" if name in limits else name for name in names)


def check_catalog_is_public(domain: str, public_catalog: bool) -> None:
    """Refuse a catalog that its owner has not declared public, under any policy.

    Raises:
        PolicyError: the catalog is private.
    """
    if not public_catalog:
        raise PolicyError(
            f"domain {domain}: its manifest says public_catalog = false, so the catalog does not leave the client. "
            "Import the domain again with --public-catalog, learn through the clients (privacy.policy = "
            "'catalog-private'), or remove the methods that need catalogs."
        )


def check_may_attack(manifest: Manifest) -> None:
    """Refuse to poison a training on data that are not synthetic.

    Raises:
        PolicyError: names the domain.
    """
    if not manifest.synthetic:
        raise PolicyError(
            f"domain {manifest.name}: simulation.attacker asks it to poison its training, but its data are not "
            "synthetic. Use the demo domains, or set simulation.attacker = 'none'."
        )


def check_catalog_is_given(manifest: Manifest, setting: str) -> None:
    """Refuse a catalog that interactions decided, for a guarantee by user: it is a part of every user's result.

    Args:
        manifest: of the domain.
        setting: asks for the guarantee, for the message.

    Raises:
        DomainError: ``catalog_source`` is "interactions".
    """
    if manifest.catalog_source != "given":
        raise DomainError(
            f"domain {manifest.name}: {setting} needs a catalog that does not depend on users, since every user is "
            "ranked against all of it, but its manifest says catalog_source = 'interactions': one user may decide "
            "which items exist. Import the domain again with --keep-all-items, or with --catalog-source given if no "
            "user's interactions decided which items it has."
        )


def default_catalog_source(synthetic: bool) -> CatalogSource:
    """Return the ``catalog_source`` of a domain whose origin nobody stated."""
    return "given" if synthetic else "interactions"


def folder_name(folder: Path) -> str:
    """Return the folder's own name, also for paths like ``.`` (symbolic links are not followed)."""
    return Path(os.path.abspath(folder)).name


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """Encode the manifest as the JSON of ``manifest.json``, in the oldest format that can hold it."""
    fields = {"format": 2, **dataclasses.asdict(manifest)}
    if manifest.attributes == ATTRIBUTES:
        del fields["attributes"]
        fields["format"] = 1
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``; no other file of the domain is opened.

    Args:
        folder: the domain folder.

    Raises:
        DomainError: a missing folder or manifest, damaged JSON, another format, wrong fields, or a different name.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise DomainError(f"{folder}: domain folder not found. {_interrupted_overwrite(folder) or 'Check the path.'}")
    data = read_file(path)
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DomainError(f"{path}: not JSON ({error}). {RESTORE}") from error
    if not isinstance(fields, dict):
        raise DomainError(f"{path}: found a JSON {type(fields).__name__}, expected an object. {RESTORE}")
    fields.setdefault("catalog_source", default_catalog_source(fields.get("synthetic") is True))
    _check_fields(path, fields)
    fields["attributes"] = tuple(fields.get("attributes", ATTRIBUTES))
    manifest = Manifest(**{key: value for key, value in fields.items() if key != "format"})
    if manifest.name != folder_name(folder):
        raise DomainError(
            f"{path}: the domain is called {manifest.name!r} but its folder {folder_name(folder)!r}. "
            f"Rename the folder to {manifest.name!r}, or import the domain again under the other name."
        )
    return manifest


def _check_fields(path: Path, fields: dict[str, Any]) -> None:
    """Check format, keys, types and bounds of the parsed manifest."""
    if type(fields.get("format")) is not int or fields["format"] not in FORMATS:
        raise DomainError(
            f"{path}: found format {fields.get('format')!r}, expected {FORMATS[0]} or {FORMATS[1]}. Import the domain "
            "again, or update fedmerge."
        )
    expected = {**get_type_hints(Manifest), "catalog_source": str, "attributes": list}
    if fields["format"] == 1:
        del expected["attributes"]
    missing, unknown = sorted(expected.keys() - fields.keys()), sorted(fields.keys() - expected.keys() - {"format"})
    if missing or unknown:
        raise DomainError(f"{path}: missing keys {missing}, unknown keys {unknown}. {RESTORE}")
    for key, expected_type in expected.items():
        value = fields[key]
        if type(value) is not expected_type:
            raise DomainError(f"{path}: {key!r} is {value!r}, expected {expected_type.__name__}. {RESTORE}")
        if type(value) is int and value < 1:
            raise DomainError(f"{path}: {key!r} is {value}, expected at least 1. {RESTORE}")
    if fields["catalog_source"] not in get_args(CatalogSource):
        raise DomainError(
            f"{path}: 'catalog_source' is {fields['catalog_source']!r}, expected one of "
            f"{', '.join(get_args(CatalogSource))}. {RESTORE}"
        )
    check_name(fields["name"], f"{path}: ")
    if not all(isinstance(attribute, str) for attribute in fields.get("attributes", ())):
        raise DomainError(f"{path}: 'attributes' is {fields['attributes']!r}, expected a list of texts. {RESTORE}")
    read_template(fields.get("attributes", ATTRIBUTES), str(path))


def _interrupted_overwrite(folder: Path) -> str:
    """Return a remedy if an interrupted overwrite left the previous version beside the folder, else ""."""
    previous = sorted(folder.parent.glob(f".{folder.name}.previous-*"))
    return f"An interrupted overwrite left the previous version in {previous[-1]}: rename it back." if previous else ""
