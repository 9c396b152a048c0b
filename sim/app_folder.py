"""A copy of the app's folder with the files that Flower bundles and nothing else. Imports neither Flower nor Ray."""

import json
import re
import shutil
import tomllib
from pathlib import Path

from fedmerge.config import flatten
from fedmerge.errors import RunDirError

APP_PROJECT = ("name", "version", "description", "license")  # the keys of [project] that travel
# Patterns that Flower, as git, and glob interpret alike.
PLAIN_PATTERN = re.compile(r"[\w.-]+(/[\w.-]+)*(/\*\*/\*\.\w+)?")


def copy_app(app_dir: Path, folder: Path) -> Path:
    """Copy the files that an app's ``fab-include`` names, and of its pyproject.toml what Flower needs.

    Flower builds the same bundle from the copy of a checkout and of an installed wheel, and its hash does not depend on
    settings of tools or on development dependencies. The copy also saves time, since Flower first looks at every file
    of a folder, and a checkout with its virtual environment has sixty thousand.

    Args:
        app_dir: folder of the app's pyproject.toml.
        folder: destination of the copies.

    Returns:
        The folder to give to Flower. It is ``app_dir`` itself if ``fab-include`` has patterns other than files of the
        root and ``folder/**/*.ending``, or if pyproject.toml cannot be read, which Flower then reports.

    Raises:
        RunDirError: the copies cannot be written.
    """
    try:
        settings = tomllib.loads((app_dir / "pyproject.toml").read_text(encoding="utf-8"))
        app = settings["tool"]["flwr"]["app"]
        patterns = app["fab-include"]
        if "fab-exclude" in app or not all(PLAIN_PATTERN.fullmatch(pattern) for pattern in patterns):
            return app_dir
        project = {key: settings["project"][key] for key in APP_PROJECT if key in settings["project"]}
        # Flower requires itself among the dependencies; everything else is installed on every node with fedmerge.
        project["dependencies"] = [name for name in settings["project"]["dependencies"] if name.startswith("flwr")]
        reduced = flatten({"project": project, "tool": {"flwr": settings["tool"]["flwr"]}})
    except (OSError, ValueError, LookupError, TypeError):
        return app_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in reduced.items()]
        (folder / "pyproject.toml").write_text("".join(lines), encoding="utf-8")
        for pattern in (".gitignore", *patterns):
            for file in app_dir.glob(pattern):
                if file.is_file() and not file.is_symlink():
                    copied = folder / file.relative_to(app_dir)
                    copied.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copied)
    except OSError as error:
        raise RunDirError(f"{folder}: cannot be written ({error.strerror}). Make room, or set TMPDIR.") from error
    return folder
