"""The users behind a client's inexact metric sums: drawn with a secret, and remembered.

Whoever knows which users were evaluated twice, with one user more the second time, subtracts the sums and has that
user's outcome. So the draw is the client's own, it is the same for every run on the same data, and a set that differs
from an earlier one by a few users is refused.
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path

import numpy as np

from fedmerge.config import Split
from fedmerge.domain.interactions import Interactions
from fedmerge.domain.splits import Examples, evaluated_users, examples_of
from fedmerge.errors import PolicyError, RunDirError
from fedmerge.files import exclusive, make_folder, read_sealed, seal, sync, write_json

SECRET_FILE = "secret"

logger = logging.getLogger(__name__)


def read_secret(folder: Path) -> bytes:
    """Return the client's secret, 32 bytes; made at first use, and kept with its SHA-256.

    Raises:
        PolicyError: it cannot be read or written, so nothing may be disclosed.
    """
    path = folder / SECRET_FILE
    try:
        if not path.exists():
            make_folder(folder)
            partial = folder / f".{SECRET_FILE}-{secrets.token_hex(8)}"
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                made = secrets.token_bytes(32)
                file.write(made + hashlib.sha256(made).digest())
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):  # another process was faster
                os.link(partial, path)
            partial.unlink()
            sync(folder)
        data = path.read_bytes()
    except OSError as error:
        raise PolicyError(
            f"{path}: the secret that draws the evaluated users cannot be kept ({error.strerror}), so no metric sums "
            "leave. Check the space and the permissions there."
        ) from error
    secret, digest = data[:32], data[32:]
    if hashlib.sha256(secret).digest() != digest:
        raise PolicyError(
            f"{path}: the secret that draws the evaluated users was changed ({len(data)} bytes, expected 64, a secret "
            "and its hash), so no metric sums leave. Restore the file."
        )
    return secret


def draw_examples(interactions: Interactions, split: Split, max_users: int | None, secret: bytes) -> Examples:
    """Return the examples of one split, of users drawn with a secret.

    Users are ordered by a keyed hash of their id, so the users of a smaller ``max_users`` are among those of a larger
    one, and new users change the order of the others in nothing.

    Args:
        interactions: of the domain.
        split: "valid" or "test".
        max_users: largest number of users; None takes all.
        secret: of :func:`read_secret`.

    Raises:
        DomainError: no user has 3 interactions.
    """
    users = evaluated_users(interactions, split)
    if max_users is not None and max_users < len(users):
        order = sorted(users.tolist(), key=lambda user: _keyed(secret, split, interactions.user_ids[user]))
        users = np.sort(np.array(order[:max_users], dtype=np.int64))
    return examples_of(interactions, split, users)


def remember_users(
    folder: Path, interactions: Interactions, examples: Examples, split: Split, min_users: int, secret: bytes
) -> None:
    """Write down a set of evaluated users, before their sums leave; refuse one that is too close to an earlier set.

    Args:
        folder: of the domain.
        interactions: the domain's.
        examples: the evaluated users with their histories and targets.
        split: of the examples.
        min_users: smallest number of users by which two sets may differ; equal sets are fine.
        secret: of :func:`read_secret`; only keyed hashes are written.

    Raises:
        PolicyError: a set differs from an earlier one by too few users, or the record cannot be read or written.
    """
    current = {}
    for user, history, target in zip(examples.users.tolist(), examples.histories, examples.targets, strict=True):
        name = interactions.user_ids[user]
        current[_keyed(secret, "user", name)] = _keyed(secret, "data", name, history.tobytes().hex(), str(int(target)))
    path = folder / "users" / split / f"{_keyed(secret, json.dumps(current, sort_keys=True))}.json"
    if path.exists():
        return
    try:
        with exclusive(path.parent):
            for other in sorted(path.parent.glob("*.json")):
                earlier = read_sealed(other) or {}
                differing = sum(earlier.get(user) != current.get(user) for user in earlier.keys() | current.keys())
                if differing < min_users and other != path:
                    logger.error("%d of the %s users differ from those of an earlier evaluation", differing, split)
                    raise PolicyError(
                        f"the {split} users of this evaluation differ from those of an earlier one, but by fewer than "
                        f"min_users = {min_users}: the difference of the two sums would reveal these few. Evaluate "
                        "again when more users have changed, or on the earlier data."
                    )
            write_json(path, seal(current))
    except (OSError, RunDirError) as error:
        raise PolicyError(
            f"{path.parent}: the evaluated users cannot be recorded ({error}), so no metric sums leave. Check the "
            "files, the space and the permissions there."
        ) from error


def _keyed(secret: bytes, *parts: str) -> str:
    return hmac.digest(secret, json.dumps(parts).encode(), "sha256")[:8].hex()
