"""The app that an operator submits is code beside an organisation's data: what is not approved here is refused.

A client of ``fedmerge client start`` never runs the code that arrives. It runs its own installed ``sim.app``, and only
for an app whose bundle (Flower's FAB) was approved by hash and holds the same ``sim.app``, byte for byte, and nothing
more.
"""

import hashlib
import io
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

from fedmerge.errors import PolicyError

BESIDE = frozenset({"pyproject.toml", "LICENSE", ".info/CONTENT"})
CODE = ("sim/__init__.py", "sim/app/")  # the files that travel
MOST_BYTES = 10 * 2**20  # unpacked; Flower's limit for a packed bundle is the same


def app_sha256(bundle: bytes) -> str:
    """The hash that names an app, as Flower shows it."""
    return hashlib.sha256(bundle).hexdigest()


def check_app(bundle: bytes, approved: Collection[str], installed: Path) -> None:
    """Refuse an app that is not approved, or whose bundle holds anything but the code that is installed here.

    Args:
        bundle: the FAB.
        approved: SHA-256 of the bundles that are.
        installed: folder of the ``sim`` package of this installation.

    Raises:
        PolicyError: nothing of it has been run.
    """
    sha256 = app_sha256(bundle)
    if sha256 not in approved:
        raise PolicyError(
            f"the app {sha256} is not approved here and was not run. If it is the one you agreed on, the organisation "
            "approves it once: fedmerge client approve."
        )
    check_contents(bundle, installed)


def check_contents(bundle: bytes, installed: Path) -> None:
    """Refuse a bundle that holds anything but the ``sim.app`` that is installed here, pyproject.toml and the licence.

    Raises:
        PolicyError: which file.
    """
    short = app_sha256(bundle)[:12]
    found = _files(bundle, short)
    if shadow := sorted(name for name in found if name.split("/")[0] == "fedmerge"):
        raise PolicyError(
            f"the app {short}… brings a fedmerge of its own ({shadow[0]}), which would take the place of the one "
            "installed here; it was not run. Ship sim/app/ and pyproject.toml alone."
        )
    if extra := sorted(name for name in found if name not in BESIDE and not name.startswith(CODE)):
        raise PolicyError(
            f"the app {short}… holds {extra[0]}; it was not run. Expected nothing but sim/app/, pyproject.toml and "
            "LICENSE."
        )
    files = (installed / "__init__.py", *(installed / "app").rglob("*.py"))
    own = {f"sim/{path.relative_to(installed).as_posix()}": path.read_bytes() for path in files}
    shipped = {name: data for name, data in found.items() if name.startswith(CODE)}
    if different := sorted(name for name in own.keys() | shipped.keys() if own.get(name) != shipped.get(name)):
        raise PolicyError(
            f"the app {short}… has another {different[0]} than the fedmerge installed here ({len(different)} files "
            "differ); it was not run. Install the same version of fedmerge on both sides."
        )


def _files(bundle: bytes, short: str) -> Mapping[str, bytes]:
    """Name -> content; nothing is unpacked beyond the limit, and nothing onto the disk."""
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(set(names)) < len(names):
                raise PolicyError(f"the app {short}… holds a file twice; it was not run. Build it with flwr build.")
            if sum(member.file_size for member in members) > MOST_BYTES:
                raise PolicyError(
                    f"the app {short}… unpacks to more than {MOST_BYTES:,} bytes; it was not run. Expected code only."
                )
            return {member.filename: archive.read(member) for member in members}
    except PolicyError:
        raise
    except Exception as error:  # of zipfile and of the decompressors: many kinds
        raise PolicyError(f"the app {short}… is no Flower app bundle ({error}); it was not run.") from error
