"""Addresses of folders on shared storage, and the file systems behind them (fsspec)."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedmerge.errors import FedMergeError, StorageError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

NEEDS: Mapping[str, str] = {"s3": "s3", "gs": "gs", "file": "", "memory": ""}  # scheme -> extra of this package
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL | re.IGNORECASE)
_URL = re.compile(r"\b\w+://[^\s'\"]+")
_SECRETS = re.compile(r"(?<=://)[^/\s@]*@|\?\S*")  # user and password, a query with a signature


@dataclass(frozen=True)
class Place:
    """A folder on shared storage.

    Attributes:
        address: as it was given, without a slash at the end.
        files: the file system.
        path: of the folder, in the form of the file system.
    """

    address: str
    files: "AbstractFileSystem"
    path: str

    def inside(self, name: str) -> str:
        """Return the path of a file, given its path within the folder."""
        return f"{self.path}/{name}"


def is_address(text: str) -> bool:
    """Return True for ``scheme://…``; anything else is a path on this machine or a name.

    >>> is_address("s3://bucket/shops"), is_address("data/shops"), is_address("org/name@main")
    (True, False, False)
    """
    return _ADDRESS.fullmatch(text) is not None


def name_of(address: str) -> str:
    """Return the last part of an address, which names the folder.

    >>> name_of("s3://bucket/shops/north/")
    'north'
    """
    return address.rstrip("/").rpartition("/")[2]


def address_problem(text: str) -> str:
    """Return what is wrong with an address, never with what it may keep secret; empty if nothing is.

    >>> address_problem("s3://id:secret@bucket/shops")
    "s3://…@bucket/shops holds a user or password; leave them out: the storage's own variables or files have them"
    """
    found = _ADDRESS.fullmatch(text)
    shown = without_secrets(text)
    if found is None:
        return f"{shown} is no address; expected one such as s3://bucket/folder"
    scheme, rest = found.groups()
    if scheme not in NEEDS:
        known = ", ".join(f"{name}://" for name in NEEDS if name != "memory")
        return f"{shown} begins with {scheme}://, expected one of {known}"
    if "@" in rest.partition("/")[0]:
        return f"{shown} holds a user or password; leave them out: the storage's own variables or files have them"
    if "?" in rest or "#" in rest:
        return f"{shown} has a query or a fragment, which may hold a signature; give the plain address of the folder"
    if any(part in ("", ".", "..") for part in rest.strip("/").split("/")):
        return f"{shown} has an empty part, or '.' or '..'; expected the address of a folder"
    return ""


def without_secrets(text: str) -> str:
    """Return a text in which addresses have neither user nor query.

    >>> without_secrets("GET https://a:b@host/x?X-Amz-Signature=1 failed")
    'GET https://…@host/x?… failed'
    """
    return _SECRETS.sub(lambda found: "…@" if found[0].endswith("@") else "?…", text)


def open_place(address: str) -> Place:
    """Open the file system of an address; nothing is read yet.

    Raises:
        StorageError: the address is malformed or holds a secret, or the package for its scheme is not installed.
    """
    if problem := address_problem(address):
        raise StorageError(f"address: {problem}.")
    import fsspec  # noqa: PLC0415 - only for addresses

    address = address.rstrip("/")
    scheme = address.partition("://")[0]
    options = {"auto_mkdir": True} if scheme == "file" else {}
    try:
        files, path = fsspec.url_to_fs(address, **options)
    except ImportError as error:
        raise StorageError(
            f"{address}: {scheme}:// needs a package that is not installed. Install it: "
            f"pip install 'fedmerge[{NEEDS[scheme]}]'"
        ) from error
    return Place(address, files, str(path).rstrip("/"))


@contextmanager
def reached(place: Place, what: str) -> Iterator[None]:
    """Turn whatever a file system raises into one error that names the address.

    Raises:
        StorageError: with the reason, without secrets and other addresses.
    """
    try:
        yield
    except FedMergeError:
        raise
    except Exception as error:  # every storage has errors of its own
        reason = _URL.sub("…", without_secrets(str(error))).replace(place.path, "…")  # a client's error may travel
        reason = " ".join(reason.split())[:300]
        raise StorageError(
            f"{place.address}: cannot be {what} ({type(error).__name__}: {reason}). Check the address, the network, "
            "and the credentials in the environment of this process."
        ) from None  # the cause may quote what was removed


def listing(place: Place) -> dict[str, dict[str, Any]]:
    """Return the files below an address: path within the folder -> what the storage says of it. Sorted.

    Raises:
        StorageError: the storage cannot be read.
    """
    with reached(place, "listed"):
        place.files.invalidate_cache()
        if not place.files.exists(place.path):
            return {}
        found = place.files.find(place.path, detail=True)
        start = f"{place.path}/"
        return {path.removeprefix(start): found[path] for path in sorted(found) if path.startswith(start)}
