"""fedmerge as organisations install it: a wheel of the checkout in a separate virtual environment, without network.

Dependencies come from the environment of the tests; the checkout is not on the path.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt", "fedmerge", "sim", "configs")
PROGRAMS_OF = ("flwr", "ray")


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel.

    Attributes:
        folder: the virtual environment.
        wheel: the file that was installed.
    """

    folder: Path
    wheel: Path

    @property
    def python(self) -> str:
        """Return the interpreter."""
        return str(self.folder / "bin" / "python")

    @property
    def package(self) -> Path:
        """Return the folder of the installed package."""
        found = self.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        return found / "fedmerge"

    def run(
        self, *arguments: str | Path, folder: Path, more: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run ``fedmerge`` until it ends; return both streams together."""
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | dict(more or {})
        return subprocess.run(
            [self.folder / "bin" / "fedmerge", *arguments],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the checkout, which leaves no build/ in the checkout."""
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in BUILT_FROM:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            source.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, source / name)
    (source / "build" / "lib" / "fedmerge").mkdir(parents=True)
    (source / "build" / "lib" / "fedmerge" / "deleted.py").touch()  # from an earlier build
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder / "dist", source)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def install_wheel(wheel: Path, folder: Path) -> Installed:
    """Install only the wheel, then make the tests' dependencies importable there."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    made = Installed(folder, wheel)
    pip("--python", made.python, "install", "--no-deps", "--no-index", wheel)
    lent = sysconfig.get_path("purelib")  # .pth files of that environment, such as the checkout's, are not read there
    (made.package.parent / "lent.pth").write_text(f"{lent}\n")
    for name in PROGRAMS_OF:
        for entry in distribution(name).entry_points.select(group="console_scripts"):
            program = folder / "bin" / entry.name
            module, _, function = entry.value.partition(":")
            program.write_text(
                f"#!{made.python}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
            )
            program.chmod(0o755)
    return made


def pip(*arguments: str | Path) -> None:
    """Run pip offline; an error contains its output."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
