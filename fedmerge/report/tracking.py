"""Curves, scores and settings for TensorBoard or MLflow: a copy of a report's tables on this machine's disk.

A tracked run is one strategy at one place (dataset, seed, fold), or the part that all merges of a run share. Only
numbers in the tables are written, which hold sums over users at most. Neither package is a dependency; the setting
``tracking`` of an experiment selects one of them.
"""

import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fedmerge.config import Tracking, flatten
from fedmerge.errors import ConfigError
from fedmerge.files import whole_folder
from fedmerge.report.bench_tables import BenchTables
from fedmerge.report.mlflow_model import ServedMerge, served_merge, write_mlflow_model
from fedmerge.runs.reading import describe_run

FOLDER = "tracking"  # in the folder of a run or a benchmark
STORE = "mlflow.db"
_MODULES: Mapping[Tracking, str] = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
_UNNAMED = ".model"  # until MLflow has given it an identifier
_MOST_AT_ONCE, _LONGEST = 100, 6000  # MLflow's limits: parameters in a call, characters of a value


@dataclass(frozen=True)
class Tracked:
    """One tracked run.

    Attributes:
        name: ``demo/seed0/average``; for a method of a run, its label at the end.
        numbers: (name, step, value).
        settings: dotted key -> value.
        strategy: a merge, a baseline, or what all merges share.
    """

    name: str
    numbers: Sequence[tuple[str, int, float]]
    settings: Mapping[str, Any]
    strategy: str


def check_tracking(tracking: Tracking | None) -> None:
    """Check, before anything starts, that the package is installed.

    Raises:
        ConfigError: the package is not installed.
    """
    if tracking is not None and importlib.util.find_spec(_MODULES[tracking]) is None:
        raise ConfigError(
            f"tracking = '{tracking}', but the package {_MODULES[tracking]} is not installed. Install it with "
            f"pip install 'fedmerge[{tracking}]', or set tracking = 'none'."
        )


def track_run(run_dir: Path, tracking: Tracking) -> None:
    """Write the tables of a finished run for a viewer, into ``tracking`` in its folder."""
    from fedmerge.report.run.page import run_tables  # noqa: PLC0415  # imports scipy, which a server without tracking does not need

    run = describe_run(run_dir)
    write_tracking(run_tables(run), run_dir / FOLDER, tracking, served_merge(run))


def write_tracking(tables: BenchTables, folder: Path, tracking: Tracking, served: ServedMerge | None = None) -> None:
    """Write the tables of a run or a benchmark for a viewer; replace earlier ones.

    Args:
        tables: of a run or a benchmark.
        folder: to write: event files of TensorBoard in a folder per tracked run, or the SQLite file of MLflow.
        tracking: the viewer.
        served: the merge that MLflow gets as a model of its tracked run; None for a benchmark.

    Raises:
        ConfigError: the package is not installed.
        RunDirError: the folder cannot be written.
    """
    check_tracking(tracking)
    runs = list(tracked_runs(tables))
    with whole_folder(folder) as partial:
        if tracking == "mlflow":
            _write_mlflow(partial, folder.absolute(), tables.title, runs, served)
        else:
            _write_tensorboard(partial, runs)


def tracked_runs(tables: BenchTables) -> Iterator[Tracked]:
    """Yield a tracked run for every strategy and place of the tables."""
    numbers: dict[tuple[str, int, str, str], list[tuple[str, int, float | None]]] = {}
    for row in tables.curves:
        point = (_name(row["name"], row["domain"]), row["step"], row["value"])
        numbers.setdefault(_key(row), []).append(point)
    for row in tables.results:
        score = (_name(f"{row['split']} {row['variant']} {row['metric']}", row["domain"]), 0, row["value"])
        numbers.setdefault(_key(row), []).append(score)
    cells = {_key(cell): cell for cell in tables.cells}
    for key, found in numbers.items():
        dataset, seed, left_out, strategy = key
        cell = cells.get(key) or next(iter(tables.cells), {})  # a run has one cell for all its merges
        settings = {**flatten(cell.get("config", {})), **flatten(cell.get("environment") or {}, "environment.")}
        fold = f"/without-{left_out}" if left_out else ""
        known = [(name, step, value) for name, step, value in found if value is not None]
        yield Tracked(f"{dataset}/seed{seed}{fold}/{strategy}", known, settings, strategy)


def _key(row: Mapping[str, Any]) -> tuple[str, int, str, str]:
    return row["dataset"], row["seed"], row["left_out"], row["strategy"]


def _name(what: str, domain: str) -> str:
    """Return a name that both packages accept: ``test unmasked recall_at_10/books``."""
    return re.sub(r"[^\w\-. /]", "_", what.replace("@", "_at_") + (f"/{domain}" if domain else ""))


def _write_tensorboard(folder: Path, runs: Sequence[Tracked]) -> None:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an optional package

    for run in runs:
        place = folder.joinpath(*(re.sub(r"[^\w\-.=+]", "-", part) for part in run.name.split("/")))
        with SummaryWriter(str(place)) as writer:
            for name, step, value in run.numbers:
                writer.add_scalar(name, value, step)
            text = json.dumps(run.settings, indent=2)
            writer.add_text("settings", "    " + text.replace("\n", "\n    "))


def _write_mlflow(partial: Path, folder: Path, title: str, runs: Sequence[Tracked], served: ServedMerge | None) -> None:
    """Write into a folder that will have another name; MLflow's paths are absolute, so they begin with that name."""
    # MLflow reports its use to its makers, unless these are set before the import.
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    from mlflow.entities import Metric, Param  # noqa: PLC0415  # an optional package
    from mlflow.tracking import MlflowClient  # noqa: PLC0415  # as above

    client = MlflowClient(tracking_uri=f"sqlite:///{partial / STORE}")
    artifacts = folder / "artifacts"
    experiment = client.create_experiment(title, artifact_location=artifacts.as_uri())
    for run in runs:
        run_id = client.create_run(experiment, run_name=run.name).info.run_id
        params = [Param(key, json.dumps(value)[:_LONGEST]) for key, value in run.settings.items()]
        metrics = [Metric(name, value, 0, step) for name, step, value in run.numbers]
        for start in range(0, max(len(params), len(metrics)), _MOST_AT_ONCE):
            part = slice(start, start + _MOST_AT_ONCE)
            client.log_batch(run_id, metrics=metrics[part], params=params[part])
        client.set_terminated(run_id)
        if served is not None and run.strategy == served.label and write_mlflow_model(served, partial / _UNNAMED):
            model = client.create_logged_model(experiment, _model_name(served.label), source_run_id=run_id)
            place = partial / Path(url2pathname(urlsplit(model.artifact_location).path)).relative_to(folder)
            place.parent.mkdir(parents=True)
            (partial / _UNNAMED).rename(place)
            client.finalize_logged_model(model.model_id, "READY")


def _model_name(label: str) -> str:
    """Return a label without what MLflow refuses in the name of a model."""
    return re.sub(r"[/:.%\"']", "_", label)
