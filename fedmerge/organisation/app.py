"""Approval of the app that an operator submits: code that asks to run beside an organisation's data.

A client of ``fedmerge client start`` never runs the code that arrives. It runs its own installed ``sim.app``, and only
for an app whose bundle (Flower's FAB) was approved by its hash and holds the same ``sim.app``, byte for byte, and
nothing more.
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
PACKED_AS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})  # others unpack a block to hundreds of MB at once


def app_sha256(bundle: bytes) -> str:
    """Return the hash that names an app, as Flower shows it."""
    return hashlib.sha256(bundle).hexdigest()


def installed_code(package: Path) -> Mapping[str, str]:
    """Return path in a bundle -> SHA-256 of the files that a bundle must hold as they are installed here.

    Args:
        package: folder of the ``sim`` package of this installation.
    """
    files = (package / "__init__.py", *(package / "app").rglob("*.py"))
    return {
        f"sim/{path.relative_to(package).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def check_app(bundle: bytes, approved: Collection[str], installed: Mapping[str, str]) -> None:
    """Refuse an app that is not approved, or whose bundle holds anything but the code that is installed here.

    Args:
        bundle: the FAB.
        approved: SHA-256 of the approved bundles.
        installed: see :func:`installed_code`.

    Raises:
        PolicyError: the app is refused; nothing of it has been run.
    """
    sha256 = app_sha256(bundle)
    if sha256 not in approved:
        raise PolicyError(
            f"the app {sha256} is not approved here and was not run. If it is the one that you agreed on, the "
            "organisation approves it once, with fedmerge client approve."
        )
    check_contents(bundle, installed)


def check_contents(bundle: bytes, installed: Mapping[str, str]) -> None:
    """Refuse a bundle that holds anything but the installed ``sim.app``, pyproject.toml and the licence.

    Names are compared as they are in the archive, so another spelling of a path (case, ``..``, a leading slash) is
    another file and is refused.

    Raises:
        PolicyError: a file is missing, different or not expected.
    """
    short = app_sha256(bundle)[:12]
    found = _files(bundle, short)
    if shadow := sorted(name for name in found if name.split("/")[0] == "fedmerge"):
        raise PolicyError(
            f"the app {short}… brings its own fedmerge ({shadow[0]}), which would replace the one installed here; it "
            "was not run. Ship only sim/app/ and pyproject.toml."
        )
    if extra := sorted(name for name in found if name not in BESIDE and not name.startswith(CODE)):
        raise PolicyError(
            f"the app {short}… holds {extra[0]}; it was not run. Expected only sim/app/, pyproject.toml and LICENSE."
        )
    shipped = {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if name.startswith(CODE)}
    names = installed.keys() | shipped.keys()
    if different := sorted(name for name in names if installed.get(name) != shipped.get(name)):
        raise PolicyError(
            f"the app {short}… differs from the fedmerge installed here in {different[0]} ({len(different)} files "
            "differ); it was not run. Install the same version of fedmerge on both sides."
        )


def _files(bundle: bytes, short: str) -> Mapping[str, bytes]:
    """Return name -> content; at most ``MOST_BYTES`` are unpacked, into memory only."""
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            members = archive.infolist()
            names = [member.orig_filename for member in members]  # zipfile cuts a name at a null byte
            if len(set(names)) < len(names):
                raise PolicyError(
                    f"the app {short}… holds a file twice; it was not run. The operator submits it with fedmerge run."
                )
            if sum(member.file_size for member in members) > MOST_BYTES:
                raise PolicyError(
                    f"the app {short}… unpacks to more than {MOST_BYTES:,} bytes; it was not run. Expected code only."
                )
            if not {member.compress_type for member in members} <= PACKED_AS:
                raise PolicyError(
                    f"the app {short}… is packed in a way that Flower does not use; it was not run. Expected deflate."
                )
            return {member.orig_filename: archive.read(member) for member in members}
    except PolicyError:
        raise
    except Exception as error:  # zipfile and the decompressors raise many kinds
        raise PolicyError(f"the app {short}… is not a Flower app bundle ({error}); it was not run.") from error
