"""Build steps beyond pyproject.toml: put the Flower side and the configurations into the wheel.

In a checkout both are at the top: the bundle that Flower ships needs the name ``sim``, outside ``fedmerge``, which is
installed on every node. A wheel holds them as files in ``fedmerge/shipped``, so that it installs no package called
``sim``. ``fedmerge.installation`` finds them in both places.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

SHIPPED = ("pyproject.toml", "LICENSE", "constraints.txt", "sim/**/*.py", "configs/**/*.toml")


def shipped_files() -> list[Path]:
    """Return the files outside the package that the wheel holds, relative to this folder."""
    return sorted(path for pattern in SHIPPED for path in Path().glob(pattern))


class BuildWithShipped(build_py):  # type: ignore[misc]  # setuptools has no type information
    """Copy the shipped files beside the modules; an editable installation uses them where they are."""

    def run(self) -> None:
        """Build in an empty folder, so that modules deleted since the last build are not in the wheel."""
        if self.editable_mode:
            super().run()
            return
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        for source in shipped_files():
            target = Path(self.build_lib, "fedmerge", "shipped", source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_source_files(self) -> list[str]:
        """Return the files that a source distribution needs."""
        return [*super().get_source_files(), *(str(path) for path in shipped_files())]


class EditableWithSim(editable_wheel):  # type: ignore[misc]  # likewise
    """Make ``sim`` importable as well, for tests and benchmarks of a checkout."""

    def run(self) -> None:
        """Add the package before the finder is written."""
        self.distribution.packages = [*self.distribution.packages, "sim"]
        super().run()


setup(cmdclass={"build_py": BuildWithShipped, "editable_wheel": EditableWithSim})
