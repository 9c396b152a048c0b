"""Whole experiments through `fedmerge run`, for the end-to-end tests: files, settings, and finished runs."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from backbones import tiny_bert

from fedmerge.adapter import adapter_sha256
from fedmerge.config import ExperimentConfig, load_config
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.peft.folder import read_adapter

NUM_USERS, NUM_ITEMS = 60, 40
VALIDATION_USERS = 40

EXPERIMENT = f"""
name = "trial"

[backbone]
pooling = "mean"

[text]
max_attribute_tokens = 24
max_items = 3
max_tokens = 96

[lora]
rank = 2
alpha = 4

[train]
learning_rate = 0.03
batch_size = 16
max_steps = 8
warmup_steps = 1
validate_every_steps = 2

[merge]
task_arithmetic_coefficients = "0.4,1.0"

[mergerec]
granularities = "domain,layer"
steps = 3
learning_rate = 0.05

[evaluation]
validation_users = {VALIDATION_USERS}

[server]
wait_seconds = 5.0

[runtime]
device = "cpu"
precision = "float32"
threads_per_client = 1
server_threads = 1
"""

FACTS = ["domain", "role", "num_users", "num_items", "num_interactions", "synthetic", "policy"]
FACTS += [
    "catalog_sha256",
    "backbone_sha256",
    "precision",
    "fedmerge_version",
    "num_nodes",
    "layout_sha256",
    "attributes",
]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: its run folder.
        exit_code: exit code of the command.
        output: its standard output and standard error.
        settings: its settings as key=value.
    """

    folder: Path
    exit_code: int
    output: str
    settings: list[str]

    @property
    def config(self) -> ExperimentConfig:
        """The configuration that was asked for."""
        return load_config(self.folder.parents[1] / "experiment.toml", self.settings)

    def json(self, name: str) -> Any:
        """Read a JSON file of the run folder."""
        return json.loads((self.folder / name).read_text())

    def table(self, name: str) -> list[dict[str, Any]]:
        """Read the rows of a Parquet file of the run folder."""
        rows: list[dict[str, Any]] = pq.read_table(self.folder / name).to_pylist()
        return rows

    def adapter_hashes(self) -> dict[str, str]:
        """Return the hash of every expert and merge."""
        folders = sorted(file.parent for file in self.folder.glob("*/*/adapter_config.json"))
        return {str(folder.relative_to(self.folder)): adapter_sha256(read_adapter(folder)) for folder in folders}

    def values(self) -> dict[tuple[str, ...], tuple[int, float]]:
        """Return (split, variant, domain, method, metric) -> users and sum."""
        return {
            (row["split"], row["variant"], row["domain"], row["method"], row["metric"]): (row["num_users"], row["sum"])
            for row in self.table("metrics.parquet")
        }

    def num_workers(self) -> int:
        """Count the client processes that wrote to the log."""
        return len(set(re.findall(r"ClientAppActor pid=(\d+)", self.output)))


def write_place(root: Path) -> Path:
    """Write domains, a backbone and the experiment file."""
    write_demo(root / "domains", num_domains=8, num_users=NUM_USERS, num_items=NUM_ITEMS)
    tiny_bert(root / "backbone")
    (root / "experiment.toml").write_text(EXPERIMENT)
    return root


def run_experiment(
    place: Path, run_id: str, train: str, unseen: str, *, cache: str, domains: str, backbone: str, num_cpus: int = 2
) -> Run:
    """Run `fedmerge run` in a separate process on ``num_cpus`` CPUs."""
    settings = settings_of(place, run_id, train, unseen, cache, domains, backbone)
    cpus = sorted(os.sched_getaffinity(0))[:num_cpus]
    command = [sys.executable, "-m", "fedmerge.cli", "run", "experiment.toml", "--set", *settings]
    done = subprocess.run(
        command,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    return Run(place / "runs" / run_id, done.returncode, done.stdout, settings)


def settings_of(
    place: Path, run_id: str, train: str, unseen: str, cache: str, domains: str, backbone: str
) -> list[str]:
    """Return the settings of one run in the form of --set."""
    own = {
        "run_id": run_id,
        "output_dir": place / "runs",
        "cache_dir": place / cache,
        "backbone.source": place / backbone,
        "domains.root": place / domains,
        "domains.train": train,
        "domains.unseen": unseen,
    }
    return [f"{key}={value}" for key, value in own.items()]


def open_backbone(config: ExperimentConfig) -> Backbone:
    """Load the backbone of an experiment."""
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    return load_backbone(config.backbone.source, config.backbone.pooling, compute)
