"""Cost of a federation by its number of domains: seconds, memory and bytes, end to end through `fedmerge run`.

    python benchmarks/federation/bench_scaling.py --num-domains 10 50 200

Domains are small demo domains, the backbone is the demo's, and each client trains two steps, so that everything but the
training is measured. For each size: seconds in total, per domain and by phase; CPU seconds, which depend less on other
load; the memory of the process with server, Flower and Ray driver (resident set, and the private part of it: heap and
stacks), of the largest client process, and of the SuperLink; bytes from and to a client; the size of the run folder.
For comparison, Flower's own floor, measured on two cores with an app that does nothing: 4.6 ms per message of 4 KB, 32
ms per message of 1 MB.
"""

import argparse
import itertools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from fedmerge.domain.demo import write_demo
from fedmerge.encoder.demo_backbone import write_demo_backbone

REPOSITORY = Path(__file__).resolve().parents[2]
VARIABLE = "FEDMERGE_BENCH"  # environment variable that every process of a run inherits
SAMPLE_SECONDS = 0.5
FLOOR_SECONDS = {4_000: 0.0046, 1_000_000: 0.032}  # bytes -> seconds per message
MESSAGES = 4  # per domain: describe, train, evaluate on validation and on test

SETTINGS = {
    "text.max_tokens": 64,
    "text.max_items": 5,
    "train.max_steps": 2,
    "train.warmup_steps": 0,
    "train.validate_every_steps": 2,
    "train.batch_size": 16,
    "train.validation_users": 20,
    "merge.methods": "average,task-arithmetic",
    "merge.task_arithmetic_coefficients": "0.5",
    "evaluation.validation_users": 30,
    "server.wait_seconds": 120.0,
    "runtime.device": "cpu",
    "runtime.precision": "float32",
    "runtime.server_threads": 1,
}
PHASES = {  # beginning of the phase's first line in the run's log
    "gather": "waiting for ",
    "train": "training: ",
    "merge": "train: ",  # the last of these lines
    "validate": "evaluating on valid",
    "test": "evaluating on test",
    "report": "results",
}


def processes(mark: str) -> Iterator[int]:
    """Yield every process that inherited the mark."""
    entry = f"{VARIABLE}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def sample(pid: int | str) -> tuple[str, dict[str, float]]:
    """Return the kind of a process, its resident and private MB (10^6 bytes) and CPU seconds; ``self`` is this one."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    kind = next(
        (kind for kind in ("flwr-simulation", "ray::ClientAppActor", "flower-superlink") if kind in command), ""
    )
    status = Path(f"/proc/{pid}/status").read_text()
    fields = {"rss": r"VmRSS:\s+(\d+)", "own": r"RssAnon:\s+(\d+)"}
    found = {name: re.search(pattern, status) for name, pattern in fields.items()}
    sizes = {name: float(match[1]) * 1024 / 1e6 for name, match in found.items() if match}
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return kind, {**sizes, "cpu": sum(map(int, times)) / os.sysconf("SC_CLK_TCK")}


def run(folder: Path, label: str, domains: Path, names: Sequence[str], changes: Sequence[str]) -> dict[str, float]:
    """Run one federation; return the figures of its row.

    Args:
        folder: has the backbone in ``backbone``; receives run, cache and the files named by the label.
        label: of the run.
        domains: folder of the domains.
        names: of the domains, all of which train.
        changes: ``KEY=VALUE``, further settings.
    """
    num_domains = len(names)
    own = {
        "run_id": label,
        "output_dir": folder / "runs",
        "cache_dir": folder / f"cache-{label}",
        "backbone.source": folder / "backbone",
        "domains.root": domains,
        "domains.train": ",".join(names),
        "domains.unseen": "",
    }
    run_dir = folder / "runs" / label
    for old in (run_dir, folder / f"cache-{label}"):
        shutil.rmtree(old, ignore_errors=True)
    settings = [f"{key}={value}" for key, value in {**SETTINGS, **own}.items()] + [*changes]
    mark = secrets.token_hex(8)
    (folder / "empty.toml").write_text("")
    command = [sys.executable, "-m", "fedmerge.cli", "run", "empty.toml", "--app", str(REPOSITORY), "--set", *settings]
    environment = {**os.environ, VARIABLE: mark, "PYTHONPATH": str(REPOSITORY)}
    peaks: dict[tuple[str, int], dict[str, float]] = {}
    curve: list[tuple[float, float]] = []  # seconds, private MB of the server
    started = time.perf_counter()
    with (folder / f"output-{label}.log").open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for pid in processes(mark):
                with suppress(OSError):
                    kind, values = sample(pid)
                    of_process = peaks.setdefault((kind, pid), {})
                    for name, value in values.items():
                        of_process[name] = max(value, of_process.get(name, 0.0))
                    if kind == "flwr-simulation" and "own" in values:
                        curve.append((time.perf_counter() - started, values["own"]))
            time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{label}: the run failed, see {folder / f'output-{label}.log'}")
    (folder / f"memory-{label}.json").write_text(json.dumps(curve))
    phases = phase_seconds(run_dir / "run.log")

    def peak(kind: str, name: str) -> float:
        return max(values.get(name, 0.0) for (its_kind, _), values in peaks.items() if its_kind == kind)

    def cpu(*kinds: str) -> float:
        return sum(values["cpu"] for (kind, _), values in peaks.items() if kind in kinds)

    left = pc.sum(pq.read_table(run_dir / "exposure.parquet", columns=["size_bytes"])["size_bytes"]).as_py()
    merged = [file.stat().st_size for file in run_dir.glob("merged/*/adapter_model.safetensors")]
    return {
        "domains": num_domains,
        "data MB": size_of(domains) / 1e6,
        "all s": seconds,
        "in the app s": sum(phases.values()),
        **{f"{phase} s": value for phase, value in phases.items()},
        "s a domain": sum(phases.values()) / num_domains,
        "floor s a domain": floor_seconds([1_000, left / num_domains, sum(merged), sum(merged)]),
        "server CPU s": cpu("flwr-simulation"),
        "clients CPU s": cpu("ray::ClientAppActor"),
        "others CPU s": cpu("", "flower-superlink"),
        "server rss MB": peak("flwr-simulation", "rss"),
        "server own MB": peak("flwr-simulation", "own"),
        "client own MB": peak("ray::ClientAppActor", "own"),
        "superlink own MB": peak("flower-superlink", "own"),
        "kB from a client": left / num_domains / 1e3,
        "kB to a client": (2 * sum(merged)) / 1e3,
        "run folder kB a domain": size_of(run_dir) / num_domains / 1e3,
    }


def floor_seconds(sizes: list[float]) -> float:
    """Return Flower's own seconds for messages of these sizes, on a line through two measured points."""
    (small, low), (large, high) = FLOOR_SECONDS.items()
    return sum(low + max(0.0, size - small) * (high - low) / (large - small) for size in sizes)


def phase_seconds(log: Path) -> dict[str, float]:
    """Return the seconds of each phase, from the times in the run's log (whole seconds)."""
    begins: dict[str, datetime] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        found = re.match(r"(\d\d:\d\d:\d\d) (.*)", line)
        if not found:
            continue
        end = datetime.strptime(found[1], "%H:%M:%S")
        for phase, words in PHASES.items():
            if found[2].startswith(words) and (phase == "merge" or phase not in begins):
                begins[phase] = end
    times = [*(begins[phase] for phase in PHASES), end]
    spans = [(after - before).total_seconds() % 86400 for before, after in itertools.pairwise(times)]
    return dict(zip(PHASES, spans, strict=True))


def size_of(folder: Path) -> int:
    """Return the bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    """Run the federations one after the other, and print a row when each ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-domains", type=int, nargs="+", default=[5])
    parser.add_argument("--num-users", type=int, default=60)
    parser.add_argument("--num-items", type=int, default=40)
    parser.add_argument(
        "--folder", type=Path, default=None, help="for the files (default: a temporary folder, removed at the end)"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the experiment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedmerge-scale-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "backbone").exists():
            write_demo_backbone(folder / "backbone")
        rows = []
        for num_domains in options.num_domains:
            domains = folder / f"domains-{num_domains}"
            sizes = {"num_domains": num_domains, "num_users": options.num_users, "num_items": options.num_items}
            names = write_demo(domains, **sizes, overwrite=True)
            rows.append(run(folder, f"scale-{num_domains}", domains, names, options.set))
            print(json.dumps(rows[-1]), flush=True)
            with (folder / "rows.jsonl").open("a") as kept:
                kept.write(json.dumps(rows[-1]) + "\n")
    for name in rows[0]:
        print(f"{name:<24}" + "".join(f"{row[name]:>12,.3f}" for row in rows))
    print(f"load of the machine at the end: {os.getloadavg()[1]:.1f} runnable on {len(os.sched_getaffinity(0))} CPUs")


if __name__ == "__main__":
    main()
