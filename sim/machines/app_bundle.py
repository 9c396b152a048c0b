"""The Flower app as it travels: the bundle that the operator submits and every organisation approves."""

import hashlib
import tempfile
from pathlib import Path

from sim.flower_internals import build_fab_from_disk
from sim.local.launch import copy_app


def app_sha256(app_dir: Path) -> str:
    """The hash by which Flower names the bundle of this app: SHA-256 of its bytes, which are always the same."""
    with tempfile.TemporaryDirectory(prefix="fedmerge-app-") as folder:
        return hashlib.sha256(build_fab_from_disk(copy_app(app_dir, Path(folder)))).hexdigest()
