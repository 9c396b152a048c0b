"""Which runs can be resumed, and the latest of them."""

from pathlib import Path

from fedmerge.errors import RunDirError
from fedmerge.runs.folder import CONFIG_FILE, DONE, run_config
from fedmerge.runs.reading import failure_of, list_runs, summarise_run

FAILS_AGAIN = ("ConfigError", "PolicyError")  # a resumed run has the same configuration, so these recur


def why_not_resumed(folder: Path) -> str:
    """Return why a run cannot be resumed; empty if it can."""
    if (folder / DONE).is_file():
        return "it is finished"
    if not (folder / CONFIG_FILE).is_file():
        return f"it has no {CONFIG_FILE}"
    error = failure_of(folder) or ""
    if error.startswith(FAILS_AGAIN):
        return f"it would fail in the same way: {error.splitlines()[0]}"
    return ""


def latest_to_resume(root: Path, name: str | None = None) -> Path:
    """Return the run that was started last among those that can be resumed.

    Args:
        root: folder of run folders.
        name: of the experiment; None takes any.

    Raises:
        RunDirError: there is none.
    """
    folders = [folder for folder in list_runs(root) if name is None or _experiment(folder) == name]
    left = [folder for folder in folders if not why_not_resumed(folder)]
    if not left:
        of = "" if name is None else f" of {name}"
        raise RunDirError(
            f"{root}: found {len(folders)} runs{of}, none of which can be resumed: they are finished, or would fail in "
            "the same way. Start a new run, or name one that is elsewhere."
        )
    started = {folder: summarise_run(folder).started for folder in left}
    return max(left, key=lambda folder: (started[folder] is not None, started[folder], folder.name))


def _experiment(folder: Path) -> str | None:
    """Return the name of a run's experiment, which its id need not begin with; None if its settings are unusable."""
    try:
        return run_config(folder).name
    except RunDirError:
        return None
