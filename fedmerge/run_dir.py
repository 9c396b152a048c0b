"""A run on disk. Every file is there whole or not at all, nothing is overwritten, ``DONE`` is written last.

config.toml, environment.json      what was run, and on what
adapters/<domain>/                 each expert, a PEFT folder, with training.json
merged/<label>/                    each merge, a PEFT folder, with provenance.json
choice.json                        what validation chose, written before test is read
metrics.parquet, products.parquet  sums and counts per split, variant, domain, method and metric
exposure.parquet                   what left each client: names, shapes, dtypes, bytes
clients.json                       who took part, who was excluded and why
report.txt, run.log, DONE
"""

import importlib.metadata
import json
import os
import platform
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedmerge.config import ExperimentConfig, to_toml
from fedmerge.errors import RunDirError

DONE = "DONE"


def new_run_id(name: str) -> str:
    """``<name>-<UTC time>-<four random hex digits>``."""
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def create_run(config: ExperimentConfig) -> Path:
    """Make the folder of a new run and write its configuration and environment.

    Raises:
        RunDirError: it exists, or cannot be written.
    """
    folder = Path(config.output_dir).expanduser().resolve() / (config.run_id or new_run_id(config.name))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError as error:
        if not folder.parent.is_dir():
            raise RunDirError(f"{folder.parent} is a file. Set output_dir to a folder.") from error
        raise RunDirError(
            f"{folder} exists; a run never overwrites another. Choose another run_id or output_dir."
        ) from error
    except OSError as error:
        raise RunDirError(
            f"{folder} cannot be created ({error.strerror}). Set output_dir to a folder you can write."
        ) from error
    write_text(folder / "config.toml", to_toml(config))
    write_json(folder / "environment.json", environment())
    return folder


def environment() -> dict[str, Any]:
    """Versions and processor, as far as they can change numbers."""
    packages = ("fedmerge", "flwr", "ray", "torch", "transformers", "peft", "numpy", "tokenizers")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "packages": versions,
    }


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        RunDirError: the disk is full, or the folder is gone or may not be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunDirError(
            f"{path} cannot be written ({error.strerror}). Check the space and the permissions there."
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all; see :func:`write_text`."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys as Parquet, whole or not at all.

    Raises:
        RunDirError: as :func:`write_text`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), partial)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunDirError(f"{path} cannot be written ({error}). Check the space and the permissions there.") from error


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
