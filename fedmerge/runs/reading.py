"""Find, summarise and describe run folders. A damaged or unfinished run is described, not refused."""

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from fedmerge.config import flatten
from fedmerge.errors import RunDirError
from fedmerge.files import read_record, table_or_empty, text_or_none
from fedmerge.merging.candidate import Provenance
from fedmerge.runs.folder import DONE
from fedmerge.runs.overview.missing import find_merged, find_missing

State = Literal["done", "failed", "incomplete"]

REMERGED = "remerged"  # merges made after the run, in its folder
_MARKS = ("environment.json", "run.log", "clients.json", DONE)  # not config.toml: remerged folders hold one, too
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d (.*)")
_FAILED = "the run failed"
_TIME_IN_ID = re.compile(r"-(\d{8}-\d{6})-[0-9a-f]{4}$")


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run in one line.

    Attributes:
        id: name of the run folder.
        folder: absolute path.
        state: "done"; "failed" if the log ends with an error; "incomplete" if the run is still running or was killed.
        started: start in UTC; None if unknown.
        seconds: time from start to ``DONE``; None if not done.
        train: training domains that are in the merges; before the merge, those that are not missing.
        unseen: domains that are only evaluated, without the missing ones.
        missing: domain or node -> why it was absent, excluded or not merged.
        methods: merging methods.
        metric: metric of the selection on validation.
        served: label of the merge selected on validation.
        test: test mean of ``metric`` over the training domains, unmasked, of the served merge.
        synthetic: True if the data of any participant are generated; None if no participant has described its data.
        problems: sentences about damaged files.
    """

    id: str
    folder: Path
    state: State
    started: datetime | None
    seconds: float | None
    train: tuple[str, ...]
    unseen: tuple[str, ...]
    missing: Mapping[str, str]
    methods: tuple[str, ...]
    metric: str | None
    served: str | None
    test: float | None
    synthetic: bool | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class MergeRecord:
    """A merge on disk and its provenance."""

    folder: Path
    label: str
    provenance: Provenance = field(repr=False)


@dataclass(frozen=True)
class RunDetails:
    """All textual content of a run folder.

    Attributes:
        summary: summary in one line.
        settings: dotted key -> value of the configuration.
        participants: domain -> its client's description.
        excluded: domain -> reason.
        experts: domain -> training report, without the individual validations.
        merges: merges made by the run.
        remerges: merges of its adapters made after the run.
        choice: content of ``choice.json``: the selected merge and the score of every merge.
        failure: error that ended the run; None if it did not fail.
        report: content of ``report.txt``; None if it is missing.
    """

    summary: RunSummary
    settings: Mapping[str, Any]
    participants: Mapping[str, Mapping[str, Any]]
    excluded: Mapping[str, str]
    experts: Mapping[str, Mapping[str, Any]]
    merges: tuple[MergeRecord, ...]
    remerges: tuple[MergeRecord, ...]
    choice: Mapping[str, Any]
    failure: str | None
    report: str | None


def find_run(name: str, root: Path) -> Path:
    """Return the folder of a run.

    Args:
        name: path of a run folder, or a run id under ``root``; an unambiguous prefix of the id is enough.
        root: folder that contains run folders.

    Raises:
        RunDirError: no run or several runs match, or the folder is not a run folder.
    """
    if not name:
        raise RunDirError("run: found an empty name, expected the path of a run folder or its id.")
    for folder in (Path(name), root / name):
        if is_run(folder):
            return folder.resolve()
    ids = [folder.name for folder in list_runs(root)] if root.is_dir() else []
    matching = [run_id for run_id in ids if run_id.startswith(name)]
    if len(matching) == 1:
        return (root / matching[0]).resolve()
    if matching:
        raise RunDirError(
            f"run {name!r}: found {len(matching)} runs in {root} with this prefix: {_some(matching)}. Give more of "
            "the id."
        )
    if Path(name).is_dir():
        raise RunDirError(f"{name}: not a run folder, expected one of {', '.join(_MARKS)} in it. Give a run folder.")
    known = f"it holds {_some(ids)}" if ids else "it holds no run"
    raise RunDirError(f"run {name!r}: neither a run folder nor a run in {root}; {known}. Give a path, or --dir.")


def list_runs(root: Path) -> list[Path]:
    """Return the run folders directly under ``root``, sorted by name; other folders are ignored.

    Raises:
        RunDirError: no such folder.
    """
    if not root.is_dir():
        raise RunDirError(f"{root}: not found, expected a folder of run folders. Set --dir.")
    try:
        return sorted(folder for folder in root.iterdir() if is_run(folder))
    except OSError as error:
        raise RunDirError(f"{root}: cannot be read ({error.strerror}). Check the permissions there.") from error


def is_run(folder: Path) -> bool:
    """Return True if the folder holds at least one of the files that only a run writes."""
    try:
        return any((folder / mark).is_file() for mark in _MARKS)
    except OSError:
        return False


def summarise_run(folder: Path) -> RunSummary:
    """Summarise a run in one line, whatever the state of its folder."""
    problems: list[str] = []
    settings = _settings(folder, problems)
    choice = _record(folder / "choice.json", problems)
    clients = _record(folder / "clients.json", problems)
    participants = table_or_empty(clients.get("participants"))
    train, unseen = _names(settings.get("domains.train")), _names(settings.get("domains.unseen"))
    missing, merged = _missing(folder, clients, (*train, *unseen), problems)
    synthetic = [bool(table_or_empty(client).get("synthetic")) for client in participants.values()]
    done = _read(folder / DONE, problems)
    found = re.search(r"after ([\d.]+) s", done or "")
    state: State = "done" if done is not None else "failed" if _log_says_failed(folder, problems) else "incomplete"
    metric = text_or_none(choice.get("metric"))
    served = text_or_none(choice.get("served"))
    return RunSummary(
        id=folder.resolve().name,
        folder=folder.resolve(),
        state=state,
        started=_started(folder),
        seconds=float(found.group(1)) if found else None,
        train=tuple(name for name in train if (name in merged if merged else name not in missing)),
        unseen=tuple(name for name in unseen if name not in missing),
        missing=missing,
        methods=_names(settings.get("merge.methods")),
        metric=metric,
        served=served,
        test=_test_mean(folder, served, metric, problems) if served and metric else None,
        synthetic=any(synthetic) if synthetic else None,
        problems=tuple(problems),
    )


def describe_run(folder: Path) -> RunDetails:
    """Return all textual content of a run folder, whatever its state."""
    folder = folder.resolve()
    summary = summarise_run(folder)
    problems: list[str] = []
    clients = _record(folder / "clients.json", [])
    experts = {
        path.parent.name: {key: value for key, value in _record(path, problems).items() if key != "validations"}
        for path in sorted(folder.glob("adapters/*/training.json"))
    }
    merges = _merges(sorted(folder.glob("merged/*/provenance.json")), problems)
    remerges = _merges(sorted(folder.glob(f"{REMERGED}/*/*/provenance.json")), problems)
    report = _read(folder / "report.txt", problems)
    return RunDetails(
        summary=replace(summary, problems=(*summary.problems, *problems)),
        settings=_settings(folder, []),
        participants={
            name: table_or_empty(client) for name, client in table_or_empty(clients.get("participants")).items()
        },
        excluded={name: str(reason) for name, reason in table_or_empty(clients.get("excluded")).items()},
        experts=experts,
        merges=merges,
        remerges=remerges,
        choice=_record(folder / "choice.json", []),
        failure=failure_of(folder) if summary.state == "failed" else None,
        report=report,
    )


def _missing(
    folder: Path, clients: Mapping[str, Any], named: Sequence[str], problems: list[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    try:
        return find_missing(folder, clients, named), find_merged(folder)
    except RunDirError as error:
        problems.append(str(error))
        return {}, ()


def _merges(paths: Sequence[Path], problems: list[str]) -> tuple[MergeRecord, ...]:
    merges = []
    for path in paths:
        merges.append(MergeRecord(path.parent, path.parent.name, Provenance.from_dict(_record(path, problems))))
    return tuple(merges)


def _settings(folder: Path, problems: list[str]) -> dict[str, Any]:
    """Return the configuration as written, including keys of other versions."""
    text = _read(folder / "config.toml", problems)
    if text is None:
        problems.append("config.toml is missing: the settings of the run are unknown.")
        return {}
    try:
        return flatten(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        problems.append(f"config.toml is not valid TOML ({error}).")
        return {}


def _record(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return read_record(path)
    except RunDirError as error:
        problems.append(str(error))
        return {}


def _read(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error}).")
        return None


def _log_says_failed(folder: Path, problems: list[str]) -> bool:
    lines = (_read(folder / "run.log", problems) or "").splitlines()
    messages = [found.group(1) for line in lines if (found := _LOG_LINE.fullmatch(line))]
    return bool(messages) and messages[-1] == _FAILED


def failure_of(folder: Path) -> str | None:
    """Return the error that ended a run: the end of the last traceback in its log, without the exception's package."""
    lines = (_read(folder / "run.log", []) or "").rpartition(f" {_FAILED}\n")[2].splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    message = list(itertools.dropwhile(lambda line: line.startswith(" "), lines[frames[-1] :] if frames else []))
    return re.sub(r"^(\w+\.)+", "", "\n".join(message).strip()) or None


def _started(folder: Path) -> datetime | None:
    if found := _TIME_IN_ID.search(folder.resolve().name):
        try:
            return datetime.strptime(found.group(1), "%Y%m%d-%H%M%S").replace(tzinfo=UTC)
        except ValueError:
            pass
    try:
        return datetime.fromtimestamp((folder / "config.toml").stat().st_mtime, UTC).replace(microsecond=0)
    except OSError:
        return None


def _test_mean(folder: Path, served: str, metric: str, problems: list[str]) -> float | None:
    path = folder / "metrics.parquet"
    if not path.is_file():
        return None
    wanted = {"split": "test", "variant": "unmasked", "role": "train", "method": served, "metric": metric}
    try:
        rows = pq.read_table(path, filters=[(key, "=", value) for key, value in wanted.items()]).to_pylist()
        means = [row["sum"] / row["num_users"] for row in rows]
    except (OSError, KeyError, TypeError, ZeroDivisionError, pa.ArrowException) as error:
        problems.append(f"metrics.parquet: damaged ({str(error).splitlines()[0]}).")
        return None
    return sum(means) / len(means) if means else None


def _names(value: Any) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else ()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
