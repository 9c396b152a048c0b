"""The cache of a client for secure sums, on its own disk: the values of the next sum; records of sessions and reveals.

The difference of two sums that share some values reveals the others. So a client reveals the same values again only
with the same clients, coefficients and range, for example when a killed run repeats the sum. (Sums of values that are
cut at different ranges would reveal how large they are.) A second training for the same sum gives almost the same
values. So without counted noise a client reveals one set of values per training or round.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.client.cache.folders import inputs_key
from fedmerge.config import DP
from fedmerge.errors import ClientError, PolicyError, RunDirError
from fedmerge.files import make_folder, read_sealed, seal, write_bytes
from fedmerge.privacy.secagg.agreement import Summand


def cache_values(cache_dir: str, domain: str, values: NDArray[np.float32]) -> str:
    """Cache the client's values for the next sum in place of earlier ones, and return their hash.

    Args:
        cache_dir: folder on the client's own disk.
        domain: the client's domain.
        values: (n,).

    Raises:
        ClientError: they cannot be written.
    """
    data = io.BytesIO()
    np.save(data, values, allow_pickle=False)
    _write(_folder(cache_dir, domain) / "values.npy", data.getvalue())
    return hashlib.sha256(values.tobytes()).hexdigest()


def read_cached_values(cache_dir: str, domain: str, sha256: str) -> NDArray[np.float32]:
    """Read the values of :func:`cache_values`.

    Raises:
        ClientError: they are missing, damaged, or replaced by another run of this client.
    """
    path = _folder(cache_dir, domain) / "values.npy"
    try:
        values: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, SyntaxError, TokenError) as error:  # NumPy parses the header as Python
        raise ClientError(
            f"domain {domain}: its values for the sum cannot be read from {path} ({error}). Keep cache_dir during a "
            "run."
        ) from error
    if hashlib.sha256(values.tobytes()).hexdigest() != sha256:
        raise ClientError(
            f"domain {domain}: {path} does not hold the values that this run trained: another run of this client "
            "replaced them. Run one experiment at a time, or give each its own cache_dir."
        )
    return values


def sum_key(dp: DP, run_id: str | None, number: int, what: Summand = "adapter") -> str:
    """Return the key of a run's training (number 0) or of a round, of which one set of values may be revealed.

    A round of the federated head is another than the round of adapters with the same number.

    The key is empty if the values may differ when they are trained again: they contain noise of the client and every
    release is counted, or the run has no name and cannot resume.
    """
    if dp.mode != "none" or run_id is None:
        return ""
    return f"{inputs_key({'run': run_id})}-{'head-' if what == 'head' else ''}{number}"


def check_same_as_revealed(cache_dir: str, domain: str, sha256: str, key: str) -> None:
    """Refuse values other than those that a sum of the same run and round has revealed, before any of them leave.

    Args:
        cache_dir: folder on the client's own disk.
        domain: the client's domain.
        sha256: hash of the values.
        key: :func:`sum_key`.

    Raises:
        PolicyError: a sum has revealed other values, or the record of it is damaged.
    """
    path = _folder(cache_dir, domain) / "revealed" / f"run-{key}.json"
    revealed = _read_revealed(path, domain) if key else None
    if revealed and revealed["sha256"] != sha256:
        raise PolicyError(
            f"domain {domain}: its training differs from the one that a sum of this run has revealed. The difference "
            "of the two sums could reveal a single adapter. Start a new run with another seed; or, if the domain's "
            f"owner accepts the risk, remove {path}."
        )


def record_answered(cache_dir: str, domain: str, digest: bytes) -> None:
    """Record a session before masked values leave for it, so that it gets one answer, whatever the node remembers.

    Args:
        cache_dir: folder on the client's own disk.
        domain: the client's domain.
        digest: SHA-256 of the session.

    Raises:
        PolicyError: the session was answered before.
        ClientError: the record cannot be written.
    """
    folder = _created(_folder(cache_dir, domain) / "answered")
    try:
        os.close(os.open(folder / digest.hex(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise PolicyError(
            f"domain {domain}: it has sent masked values for this session already, and sends them once. Repeat the sum "
            "in a new session."
        ) from None
    except OSError as error:
        raise ClientError(f"{folder} cannot be written ({error.strerror}). Check the permissions there.") from error
    _sync(folder)


def record_revealed(
    cache_dir: str, domain: str, sha256: str, coefficients: Mapping[str, float], value_range: float, key: str = ""
) -> None:
    """Record the sum that reveals the client's values, before it does.

    Args:
        cache_dir: folder on the client's own disk.
        domain: the client's domain.
        sha256: hash of the values.
        coefficients: client -> its part of the sum, for all clients in it.
        value_range: range to which the values are cut.
        key: :func:`sum_key`.

    Raises:
        PolicyError: another sum has revealed these values, or a sum of the same run and round has revealed others; or
            a record is damaged.
        ClientError: the record cannot be written.
    """
    check_same_as_revealed(cache_dir, domain, sha256, key)
    path = _folder(cache_dir, domain) / "revealed" / f"{sha256}.json"
    parts = dict(sorted(coefficients.items()))
    if found := _read_revealed(path, domain):
        before, before_range = found["parts"], found["value_range"]
        if before_range != value_range:
            raise PolicyError(
                f"domain {domain}: the same adapter was summed before with a range of {before_range:g}; this sum has "
                f"{value_range:g}. The difference of the two sums would reveal how large its values are. Train again "
                f"with another seed; or, if the domain's owner accepts the risk, remove {path}."
            )
        if before.keys() != parts.keys() or not all(
            math.isclose(before[client], part, rel_tol=1e-9) for client, part in parts.items()
        ):  # not exactly equal: after a dropout the parts are rounded differently
            raise PolicyError(
                f"domain {domain}: the same adapter was summed before with the parts {_list_parts(before)}; this sum "
                f"has {_list_parts(parts)}. The difference of the two sums would reveal the others. Train again with "
                f"another seed; or, if the domain's owner accepts the risk, remove {path}."
            )
    else:
        _write(path, json.dumps(seal({"parts": parts, "value_range": value_range}), indent=2).encode())
    if key:
        _write(path.with_name(f"run-{key}.json"), json.dumps(seal({"sha256": sha256})).encode())


def _read_revealed(path: Path, domain: str) -> dict[str, Any] | None:
    try:
        return read_sealed(path)
    except RunDirError as error:
        raise PolicyError(
            f"domain {domain}: the record of what a sum has revealed is damaged ({error}), so nothing more is summed. "
            f"Restore {path}; or, if the domain's owner accepts the risk, remove it."
        ) from error


def _list_parts(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{client} {part:.3g}" for client, part in parts.items())


def _folder(cache_dir: str, domain: str) -> Path:
    return Path(cache_dir).expanduser() / "sums" / domain


def _write(path: Path, data: bytes) -> None:
    folder = _created(path.parent)
    write_bytes(path, data)
    _sync(folder)


def _created(folder: Path) -> Path:
    try:
        make_folder(folder)
    except OSError as error:
        raise ClientError(
            f"{folder} cannot be created ({error.strerror}). Check the permissions there, or set cache_dir."
        ) from error
    return folder


def _sync(folder: Path) -> None:
    """Bring a new entry of a folder to the disk: without it a power cut forgets what was revealed."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
