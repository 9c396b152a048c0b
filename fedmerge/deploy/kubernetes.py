"""The Helm chart for Kubernetes, which lies beside this module as files."""

import shutil
from pathlib import Path

from fedmerge.deploy import texts
from fedmerge.files import new_folder, write_text
from fedmerge.installation import root

CHART = Path(__file__).parent / "chart"
IMAGE = "image"  # beside the chart's files; .helmignore leaves it out of packages


def write_chart(folder: Path) -> None:
    """Write the chart, and what its image is built from: ``image/Dockerfile`` and the tested versions.

    Args:
        folder: absent or empty.

    Raises:
        RunDirError: it is not empty, or cannot be written.
    """
    with new_folder(folder) as partial:
        shutil.copytree(CHART, partial, dirs_exist_ok=True)
        (partial / IMAGE).mkdir()
        write_text(partial / ".helmignore", f"{IMAGE}/\n")
        write_text(partial / IMAGE / "Dockerfile", texts.dockerfile())
        write_text(partial / IMAGE / "constraints.txt", (root() / "constraints.txt").read_text(encoding="utf-8"))
