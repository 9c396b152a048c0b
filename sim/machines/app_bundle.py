"""The Flower app as it travels: the bundle that the operator submits and every organisation approves."""

import tempfile
from pathlib import Path

from fedmerge.organisation.app import app_sha256
from sim.app_folder import copy_app
from sim.flower_internals import build_fab_from_disk


def build_app(app_dir: Path) -> bytes:
    """Return the bundle (Flower's FAB) that ``fedmerge run --federation`` submits; the same bytes every time.

    ``flwr build`` and ``flwr run`` in a checkout make another one, with the whole pyproject.toml inside.
    """
    with tempfile.TemporaryDirectory(prefix="fedmerge-app-") as folder:
        return build_fab_from_disk(copy_app(app_dir, Path(folder)))


def submitted_sha256(app_dir: Path) -> str:
    """Return the hash by which Flower and organisations name the bundle of :func:`build_app`."""
    return app_sha256(build_app(app_dir))
