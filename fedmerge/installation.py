"""The parts outside the package: the Flower side (``sim``) and the configurations, in a checkout or in a wheel.

Both have one layout: pyproject.toml, LICENSE, constraints.txt, ``sim/`` and ``configs/``. They are at the top of a
checkout and in ``fedmerge/shipped`` of an installed wheel, where setup.py puts them.
"""

import difflib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from fedmerge.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
FLOWER_SIDE = "sim"


def check_platform() -> None:
    """Refuse other systems than Linux at once, in place of an import that fails on the way.

    Raises:
        ConfigError: this system.
    """
    if sys.platform != "linux":
        raise ConfigError(
            f"this system is {sys.platform}; fedmerge runs on Linux only: it needs /proc and flock. Use Linux, a "
            "container, or WSL 2 on Windows."
        )


def root() -> Path:
    """Return the folder of the Flower app and the configurations.

    Raises:
        ConfigError: the installation has neither layout.
    """
    for folder in (PACKAGE / "shipped", PACKAGE.parent):
        if (folder / "pyproject.toml").is_file() and (folder / FLOWER_SIDE / "__init__.py").is_file():
            return folder
    raise ConfigError(
        f"{PACKAGE}: this installation has no Flower app: found neither {PACKAGE / 'shipped'} nor a checkout around "
        "the package. Install fedmerge again, from its wheel or from a whole checkout."
    )


def import_flower_side() -> None:
    """Make ``sim`` importable, whatever else has that name on ``sys.path``.

    The package is loaded from its folder, so ``sys.path`` stays as it is.

    Raises:
        ConfigError: another package of that name is imported already.
    """
    package = root() / FLOWER_SIDE
    loaded = sys.modules.get(FLOWER_SIDE)
    if loaded is None:
        spec = spec_from_file_location(FLOWER_SIDE, package / "__init__.py", submodule_search_locations=[str(package)])
        if spec is None or spec.loader is None:  # never for a file that exists
            raise ConfigError(f"{package}: cannot be imported. Install fedmerge again.")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[FLOWER_SIDE] = module
    elif package not in [Path(place).resolve() for place in getattr(loaded, "__path__", ())]:
        raise ConfigError(
            f"a package called {FLOWER_SIDE} is imported already from {getattr(loaded, '__file__', 'somewhere')}; "
            f"expected the one in {package}. Use fedmerge in a process that does not import it."
        )


def shipped_configs() -> dict[str, Path]:
    """Return the configurations that come with fedmerge: name, as ``demo`` or ``bench/smoke`` -> file."""
    folder = root() / "configs"
    files = sorted(folder.rglob("*.toml"), key=lambda file: (len(file.relative_to(folder).parts), file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_config(path: str | Path) -> Path:
    """Return the file, or the shipped configuration of that name where no such file exists.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(path)
    if path.suffix or (path.exists() and not path.is_dir()):  # its reader reports the problem
        return path
    known = shipped_configs()
    if path.as_posix() in known:
        return known[path.as_posix()]
    close = difflib.get_close_matches(path.as_posix(), known, n=1)
    raise ConfigError(
        f"{path}: no such file, and no shipped configuration of this name. "
        + (f"Did you mean {close[0]}? " if close else "")
        + "'fedmerge configs' lists them."
    )


def summary(config: Path) -> str:
    """Return the first sentence of the comment at the top of a configuration."""
    lines = config.read_text(encoding="utf-8").splitlines()
    comment = ""
    for line in lines:
        if not line.startswith("# "):
            break
        comment += f" {line[2:].strip()}"
    head = comment.strip()
    end = next((place for mark in (". ", "   ") if (place := head.find(mark)) > 0), -1)
    return (head if end < 0 else head[:end]).rstrip(".:")
