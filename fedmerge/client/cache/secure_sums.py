"""What a client keeps on its own disk for secure sums: the values that are summed next, and what it has revealed.

Two sums that hold the same values beside different ones show, subtracted, what differs. So a client reveals the same
values again only in the same company, with the same coefficients: as when a run was killed and begins the sum anew.
Without noise that is counted, what is trained again for the same sum is hardly another, so of a run's training, or of a
round of it, it reveals nothing but the same values.
"""

import hashlib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmerge.client.cache.folders import inputs_key
from fedmerge.config import ExperimentConfig
from fedmerge.errors import ClientError, PolicyError
from fedmerge.files import write_bytes


def cache_values(cache_dir: str, domain: str, values: NDArray[np.float32]) -> str:
    """Keep what the client adds to the next sum, in place of what was kept before; return its hash.

    Args:
        cache_dir: the client's own disk.
        domain: its name.
        values: (n,).

    Raises:
        ClientError: it cannot be written.
    """
    data = io.BytesIO()
    np.save(data, values, allow_pickle=False)
    _write(_folder(cache_dir, domain) / "values.npy", data.getvalue())
    return hashlib.sha256(values.tobytes()).hexdigest()


def read_cached_values(cache_dir: str, domain: str, sha256: str) -> NDArray[np.float32]:
    """What :func:`cache_values` kept.

    Raises:
        ClientError: it is gone, damaged, or another run of this client has kept other values since.
    """
    path = _folder(cache_dir, domain) / "values.npy"
    try:
        values: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ClientError(
            f"domain {domain}: {path}, what it adds to the sum, cannot be read ({error}). Keep cache_dir during a run."
        ) from error
    if hashlib.sha256(values.tobytes()).hexdigest() != sha256:
        raise ClientError(
            f"domain {domain}: {path} holds other values than this run trained. Another run of this client replaced "
            "them: one run at a time, or give each a cache_dir of its own."
        )
    return values


def sum_key(config: ExperimentConfig, number: int) -> str:
    """Names the training of a run (number 0), or a round of it; empty where its values may be others when made again.

    That is where noise of the client's own is in them, and every release is counted; and in a run without a name, which
    cannot be resumed.
    """
    if config.dp.mode != "none" or config.run_id is None:
        return ""
    return f"{inputs_key({'run': config.run_id})}-{number}"


def check_same_as_revealed(cache_dir: str, domain: str, sha256: str, of: str) -> None:
    """Refuse other values than a sum of the same run and round has shown, before anything of them leaves.

    Args:
        cache_dir: the client's own disk.
        domain: its name.
        sha256: of the values.
        of: :func:`sum_key`.

    Raises:
        PolicyError: others were in a sum.
    """
    path = _folder(cache_dir, domain) / "revealed" / f"run-{of}.json"
    if of and path.exists() and json.loads(path.read_text())["sha256"] != sha256:
        raise PolicyError(
            f"domain {domain}: its training came out otherwise than the one that a sum of this run has shown. The two "
            "sums, subtracted, could show a single adapter. Start a new run, with another seed; or, if its owner "
            f"accepts that, remove {path}."
        )


def record_revealed(cache_dir: str, domain: str, sha256: str, coefficients: Mapping[str, float], of: str = "") -> None:
    """Write down in which company values are revealed, before they are.

    Args:
        cache_dir: the client's own disk.
        domain: its name.
        sha256: of the values.
        coefficients: client -> its part of the sum, of all that are in it.
        of: :func:`sum_key`.

    Raises:
        PolicyError: they were revealed before, in another company; or others in their place.
        ClientError: it cannot be written.
    """
    check_same_as_revealed(cache_dir, domain, sha256, of)
    path = _folder(cache_dir, domain) / "revealed" / f"{sha256}.json"
    company = dict(sorted(coefficients.items()))
    if path.exists():
        before = json.loads(path.read_text())
        if before.keys() != company.keys() or not all(
            math.isclose(before[client], part, rel_tol=1e-9) for client, part in company.items()
        ):  # parts of a sum from which somebody dropped out are rounded otherwise
            raise PolicyError(
                f"domain {domain}: the same adapter was summed before, with {_told(before)}, and now with "
                f"{_told(company)}. The two sums, subtracted, would show what differs. Train anew (another seed); or, "
                f"if its owner accepts that, remove {path}."
            )
    else:
        _write(path, json.dumps(company, indent=2).encode())
    if of:
        _write(path.with_name(f"run-{of}.json"), json.dumps({"sha256": sha256}).encode())


def _told(company: Mapping[str, float]) -> str:
    return ", ".join(f"{client} {part:.3g}" for client, part in company.items())


def _folder(cache_dir: str, domain: str) -> Path:
    return Path(cache_dir).expanduser() / "sums" / domain


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClientError(f"{path.parent} cannot be made ({error.strerror}). Check the permissions there.") from error
    write_bytes(path, data)
