"""A Ray cluster of two nodes, both on this machine: run and bench use it, and the results are the same."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from in_process import expert_of, finish, grid_in, small_experiment

from fedmerge.adapter import adapter_sha256
from fedmerge.bench.tables import bench_tables
from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import open_domain
from fedmerge.config import load_config, to_toml
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.demo_backbone import write_demo_backbone
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.merging.stack import linear_merge, stack_adapters
from fedmerge.report.bench_tables import read_bench_tables, write_bench_tables
from sim.local.launch import MARK, end_processes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NODE = "TRIAL_NODE"  # every process of a node inherits its number
DOMAINS = ("beauty", "books", "camping", "coffee")
EXPERIMENT = """
run_id = "cluster"
output_dir = "runs"
[domains]
root = "domains"
train = "beauty,books,camping,coffee"
unseen = ""
[backbone]
source = "backbone"
[text]
max_items = 3
max_tokens = 64
[lora]
rank = 2
[train]
batch_size = 16
max_steps = 4
validate_every_steps = 2
[merge]
methods = "average"
[runtime]
device = "cpu"
precision = "float32"
"""

BENCH = """
title = "Here or on a cluster"
experiment = "experiment.toml"
seeds = [0]
joint = ["balanced"]
baseline = "average"
[[strategy]]
name = "average"
set = { "merge.methods" = "average" }
[[strategy]]
name = "ties"
set = { "merge.methods" = "ties", "merge.coefficients" = "0.5,1" }
[[strategy]]
name = "mergerec"
set = { "merge.methods" = "mergerec", "mergerec.granularities" = "layer" }
"""


@pytest.fixture
def cluster() -> Iterator[str]:
    """Address of a cluster of two nodes with one CPU each."""
    mark = secrets.token_hex(16)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets want a short path
    address = f"127.0.0.1:{free_port()}"
    try:
        head = ["--head", "--port", address.partition(":")[2], "--temp-dir", str(folder)]
        head += ["--include-dashboard", "false", "--ray-client-server-port", str(free_port())]
        for number, place in enumerate((head, ["--address", address])):
            command = ["ray", "start", *place, "--num-cpus", "1"]
            command += ["--node-ip-address", "127.0.0.1", "--object-store-memory", str(10**8), "--disable-usage-stats"]
            command += ["--min-worker-port", "0", "--max-worker-port", "0"]
            command += ["--dashboard-agent-listen-port", str(free_port())]
            environment = {**os.environ, MARK: mark, NODE: str(number), "PATH": path_of_this_python()}
            environment["RAY_memory_monitor_refresh_ms"] = "0"  # it ends workers when others fill this machine
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        yield address
    finally:
        end_processes(mark)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def path_of_this_python() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def test_two_nodes_share_the_work_and_the_results_are_those_of_one_process(tmp_path: Path, cluster: str) -> None:
    write_demo(tmp_path / "domains", num_domains=4, num_users=60, num_items=40)
    write_demo_backbone(tmp_path / "backbone")
    (tmp_path / "experiment.toml").write_text(EXPERIMENT)
    command = [sys.executable, "-m", "fedmerge.cli", "run", "experiment.toml", "--set", f"cache_dir={tmp_path}/cache"]
    output, nodes = [], {}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": cluster},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            output.append(line)
            if (found := re.search(r"ClientAppActor pid=(\d+)", line)) and found[1] not in nodes:
                variables = Path(f"/proc/{found[1]}/environ").read_bytes().split(b"\0")
                nodes[found[1]] = next(entry for entry in variables if entry.startswith(NODE.encode()))
    assert process.returncode == 0, "".join(output)
    assert sorted(nodes.values()) == [f"{NODE}=0".encode(), f"{NODE}=1".encode()]  # one client process on each
    # Its clients share one backbone. Both nodes of one machine pass its logs on, so a line can come twice.
    loads = {line for line in output if "client backbone backbone (cpu" in line}
    assert len(loads) == 2, loads

    run_dir = tmp_path / "runs" / "cluster"
    config = load_config(tmp_path / "experiment.toml", [f"cache_dir={tmp_path}/cache-here"])
    backbone = load_backbone(str(tmp_path / "backbone"), "mean", resolve_compute("cpu", "float32"))
    opened = {name: open_domain(tmp_path / "domains" / name, backbone, config.text) for name in DOMAINS}
    experts = {name: expert_of(domain, config, lambda line: None)[0] for name, domain in opened.items()}
    for name, expert in experts.items():
        assert adapter_sha256(read_adapter(run_dir / "adapters" / name)) == adapter_sha256(expert)
    merged = linear_merge(stack_adapters(experts), np.full(4, 1 / 4))
    assert adapter_sha256(read_adapter(run_dir / "merged" / "average")) == adapter_sha256(merged)
    choice = json.loads((run_dir / "choice.json").read_text())
    scores = [
        evaluate(domain, {"average": merged}, "valid", 500, config.seed)["unmasked"].mean("average", "ndcg@10")
        for domain in opened.values()
    ]
    assert choice["validation"]["average"] == sum(scores) / 4


def test_a_benchmark_on_two_nodes_has_the_tables_of_one_process(tmp_path: Path, cluster: str) -> None:
    (tmp_path / "experiment.toml").write_text(to_toml(small_experiment(tmp_path, **{"privacy.min_users": 2})))
    (tmp_path / "bench.toml").write_text(BENCH)
    grid = grid_in(tmp_path, "here")
    grid_in(tmp_path, "there")
    finish(grid)
    write_bench_tables(grid.folder, bench_tables(grid))
    shutil.copytree(tmp_path / "here" / "training", tmp_path / "there" / "training")  # Flower has no part in this
    output: list[str] = []
    nodes: set[bytes] = set()
    with subprocess.Popen(
        [sys.executable, "-m", "fedmerge.cli", "bench", "bench.toml", "--out", "there", "--address", cluster],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            output.append(line)
            nodes |= nodes_at_work()
    assert process.returncode == 0, "".join(output)
    assert "test 1 of " in "".join(output)
    assert nodes == {f"{NODE}=0".encode(), f"{NODE}=1".encode()}
    found, expected = (read_bench_tables(tmp_path / name) for name in ("there", "here"))
    for table in ("results", "comparisons", "curves", "coefficients", "ranks"):
        assert getattr(found, table) == getattr(expected, table) != (), table
    sent = [[(row["strategy"], row["bytes_up"], row["bytes_down"]) for row in of.costs] for of in (found, expected)]
    assert sent[0] == sent[1]


def nodes_at_work() -> set[bytes]:
    """Return the cluster's nodes that work on a cell of a benchmark."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (place / "cmdline").read_bytes().startswith(b"ray::work_in_task"):
                variables = (place / "environ").read_bytes().split(b"\0")
                found |= {entry for entry in variables if entry.startswith(NODE.encode())}
    return found
