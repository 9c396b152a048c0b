"""Which run folders can be deleted without losing anything, and deleting them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmerge.errors import RunDirError
from fedmerge.files import folder_size, read_record, table_or_empty
from fedmerge.runs.checkpoints import ADAPTERS
from fedmerge.runs.folder import DONE, LOCATION, is_locked, locked
from fedmerge.runs.overview.resuming import why_not_resumed
from fedmerge.runs.reading import REMERGED, describe_run, list_runs, summarise_run

# What a run may hold that another run of the same settings does not: merges made later, noise, answers of others.
_OWN = (REMERGED, "head", "released.jsonl", "privacy-audit.json", "tracking")
_DELETED = ".deleted-"


@dataclass(frozen=True)
class RunToClean:
    """A run folder, and what becomes of it.

    Attributes:
        folder: the run folder.
        state: "done", "failed" or "incomplete".
        size_bytes: of all its files.
        is_deleted: False to keep it.
        why: reason to delete or to keep it.
    """

    folder: Path
    state: str
    size_bytes: int
    is_deleted: bool
    why: str


def plan_cleaning(root: Path, named: Sequence[Path] = ()) -> list[RunToClean]:
    """Decide which run folders are deleted.

    Without names, only those from which nothing can be lost: runs that failed before anything was trained and would
    fail again, and finished runs whose settings and results another run has as well. Runs that can be resumed and the
    only copies of results are deleted if they are named; runs on which a process works never are.

    Args:
        root: folder of run folders.
        named: run folders to delete; then no others are considered.
    """
    if named:
        return [_named(folder) for folder in named]
    seen: dict[str, str] = {}
    planned = []
    for folder in sorted(list_runs(root), key=lambda folder: (str(summarise_run(folder).started), folder.name)):
        deleted, why = _unnamed(folder, seen)
        planned.append(RunToClean(folder, summarise_run(folder).state, folder_size(folder), deleted, why))
    return planned


def _named(folder: Path) -> RunToClean:
    state, size = summarise_run(folder).state, folder_size(folder)
    if is_locked(folder):
        return RunToClean(folder, state, size, False, "a process is working on it; end that first")
    lost = "its merges and results" if state == "done" else "what it has trained so far"
    return RunToClean(folder, state, size, True, f"named; {lost} may exist nowhere else")


def _unnamed(folder: Path, seen: dict[str, str]) -> tuple[bool, str]:
    """Return whether a run is deleted, and why; remember its results in ``seen``."""
    if is_locked(folder):
        return False, "a process is working on it"
    if (folder / DONE).is_file():
        results = _results(folder)
        if results is not None and results in seen:
            return True, f"same settings and results as {seen[results]}, which is kept"
        if results is not None:
            seen[results] = folder.name
        return False, "the only copy of its results"
    if not (why := why_not_resumed(folder)):
        return False, f"can be resumed: fedmerge run --resume {folder}"
    if any((folder / name).exists() for name in (ADAPTERS, "rounds", "secure-sum", "released.jsonl")):
        return False, f"cannot be resumed ({why}), but holds what its clients sent"
    return True, f"nothing was trained, and {why}"


def _results(folder: Path) -> str | None:
    """Return what a finished run found, as text to compare; None if it holds anything that only this run can have."""
    if any((folder / name).exists() for name in _OWN):
        return None
    try:
        run = describe_run(folder)
        merges = {merge.label: merge.provenance.sha256 for merge in run.merges}
        experts = read_record(folder / "experts.json")
        chosen = {key: run.choice.get(key) for key in ("served", "validation", "per_domain")}
    except RunDirError:
        return None
    if run.summary.problems or not merges or None in merges.values() or not table_or_empty(chosen["validation"]):
        return None
    settings = {key: value for key, value in run.settings.items() if key.rpartition(".")[2] not in LOCATION}
    reports = [(folder / name).read_bytes() for name in ("report.txt", "metrics.parquet") if (folder / name).is_file()]
    return repr((sorted(settings.items(), key=str), sorted(merges.items()), sorted(experts.items()), chosen, reports))


def delete_run(folder: Path) -> None:
    """Delete a run folder.

    Raises:
        RunDirError: a process is working on it, or it cannot be deleted.
    """
    hidden = folder.with_name(f"{_DELETED}{folder.name}")
    try:
        with locked(folder):
            folder.rename(hidden)  # a run that is half deleted must not look like one
        shutil.rmtree(hidden)
    except OSError as error:
        raise RunDirError(
            f"{folder}: cannot be deleted ({error.strerror}). Check the permissions there and in {hidden}."
        ) from error
