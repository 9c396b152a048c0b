"""The Flower app as it travels: the bundle that the operator submits and every organisation approves."""

import hashlib
from pathlib import Path

from flwr.cli.build import build_fab_from_disk


def app_sha256(app_dir: Path) -> str:
    """The hash by which Flower names the bundle of this app: SHA-256 of its bytes, which are always the same."""
    return hashlib.sha256(build_fab_from_disk(app_dir)).hexdigest()
