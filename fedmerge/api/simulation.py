"""Run whole federations in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge.api.evaluation import frame_of
from fedmerge.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from fedmerge.config import ExperimentConfig


@dataclass(frozen=True)
class SimulatedRun:
    """A finished run of :func:`simulate`.

    Attributes:
        folder: the run folder.
        report: the text of ``report.txt``.
        choice: the entries of ``choice.json``: variants, the served merge, and what each domain is served.
    """

    folder: Path
    report: str = field(repr=False)
    choice: Mapping[str, Any] = field(repr=False)

    @property
    def experts(self) -> dict[str, Path]:
        """Domain -> PEFT folder of its expert; empty after federated rounds."""
        return {path.name: path for path in sorted((self.folder / "adapters").glob("[!.]*"))}

    @property
    def merges(self) -> dict[str, Path]:
        """Folder name -> PEFT folder of every merge."""
        return {path.name: path for path in sorted((self.folder / "merged").glob("[!.]*"))}

    def to_frame(self) -> pd.DataFrame:
        """Return ``metrics.parquet``: sums and counts per split, variant, domain, method and metric."""
        import pyarrow.parquet as pq

        return frame_of(pq.read_table(self.folder / "metrics.parquet").to_pylist())


def simulate(
    config: ExperimentConfig | str | Path | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()
) -> SimulatedRun:
    """Run a whole federation in this process, without Ray: the same server and clients as ``fedmerge run``.

    Progress goes to the logger ``fedmerge``; no handler is installed.

    Args:
        config: an experiment file, the name of one that comes with fedmerge (``tiny``), or a configuration; None is the
            defaults.
        overrides: dotted key -> value, or ``key=value`` texts.

    Raises:
        ConfigError: settings that contradict each other.
        FedMergeError: whatever ends the run; its folder can be resumed with ``{"resume": True, "run_id": …}``.
    """
    from fedmerge.config import ExperimentConfig, load_config, with_absolute_paths
    from fedmerge.files import read_json
    from fedmerge.installation import find_config, import_flower_side
    from fedmerge.runs.folder import new_run_id

    import_flower_side()
    from sim.local.in_process import run_in_process

    pairs = dict(overrides) if isinstance(overrides, Mapping) else None
    texts = list(overrides) if pairs is None else [f"{key}={_toml(value)}" for key, value in pairs.items()]
    if isinstance(config, ExperimentConfig):
        if texts:
            raise ConfigError(
                "simulate: found overrides beside a complete configuration. Give a file, or no overrides."
            )
        experiment = config
    else:
        experiment = load_config(None if config is None else find_config(config), texts)
    experiment = with_absolute_paths(experiment, Path.cwd())
    if experiment.run_id is None:
        experiment = experiment.model_copy(update={"run_id": new_run_id(experiment.name)})
    run_in_process(experiment, console=False)
    folder = Path(experiment.output_dir) / str(experiment.run_id)
    report = folder / "report.txt"
    text = report.read_text(encoding="utf-8") if report.is_file() else ""
    return SimulatedRun(folder, text, read_json(folder / "choice.json") or {})


def _toml(value: Any) -> str:
    """Write a value as --set takes it; a sequence is a comma-separated text, None is "none"."""
    if value is None:
        return '"none"'
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value) if isinstance(value, str | Path) else ",".join(map(str, value)))
