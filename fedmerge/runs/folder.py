"""A run folder. Files and folders are written whole or not at all; results are never overwritten; ``DONE`` is last."""

import fcntl
import importlib.metadata
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmerge.config import ExperimentConfig, load_config, to_flat, to_toml, with_absolute_paths
from fedmerge.errors import ConfigError, RunDirError
from fedmerge.files import write_json, write_text

CONFIG_FILE = "config.toml"
DONE = "DONE"
REPORT_PAGE, COMPARED_PAGE = "report.html", "compared.html"
LOCK_FILE = "lock"
ADMISSION = "admission.json"
LOCK_ATTEMPTS = 3
FILES: Mapping[str, str] = {
    "config.toml, environment.json": "settings; versions and hardware",
    "run.log, attempts.jsonl": "the log; start and duration of each attempt",
    "progress.json": "until the end: what clients were asked so far, for `fedmerge watch`",
    "clients.json": "who takes part; who was absent or excluded, in which phase, why",
    "adapters/<domain>/": "each expert: a PEFT folder with `training.json`, written as it arrives (not under "
    "`aggregate-only`)",
    "experts.json": "the experts to merge, by hash; ends the training",
    "woven/<domain>/<source>/, weave.json": "with `weave.schedule`: each adapter that a domain continued, as in "
    "`adapters/`; their hashes, final",
    "similarity/": "with `weave.schedule = 'similarity'`: each domain's similarity factors of shared items; which are "
    "averaged, by hash, final",
    "woven-merges/<domain>/": "with `weave.schedule`: the woven merge of each domain, as in `merged/`",
    "admission/<domain>.json, admission.json": "metric sums of the merges without each domain, if the gate needs "
    "them; the gate's findings on each expert, final",
    "learning/": "with coefficients learned through the clients: the cohort, the answers to each message",
    "rounds/": "with `rounds.rule`: members, replies, state; `<number>.json` of every round",
    "head-rounds/, head/": "with `head.kind = 'federated'`: its rounds, as in `rounds/`; the head as a PEFT "
    "folder with `provenance.json`",
    "secure-sum/, secure-sum.jsonl": "under `aggregate-only`: the mean and its record; whose values each sum revealed",
    "merged/<label>/": "each merge: a PEFT folder with `provenance.json` (source domains and hashes, method, "
    "coefficients, policy)",
    "validation/<domain>.json, test/<domain>.json": "metric sums of each domain, written as they arrive",
    "selection.json, heads/<domain>.json, heads-validation/<domain>.json": "with `head.kind`: the merge that heads are "
    "trained over, final; each client's reports of its heads; metric sums of that merge, the expert and the heads",
    "choice.json": "validation scores, the merge to serve, what each domain is served; written before test is read, "
    "final",
    "metrics.parquet, products.parquet": "metric sums and counts; sums of products for paired intervals",
    "exposure.jsonl, exposure.parquet": "the ledger: what arrived from each client; one row per line until the end, "
    "then a table",
    "released.jsonl": "if clients add noise: every noised reply, including late and refused ones",
    "privacy.json": "with differential privacy: the budget spent per unit, and its assumptions",
    "privacy-audit.json, privacy-audit.txt": "results of `fedmerge privacy audit`",
    "tracking/": "with `tracking`: results for TensorBoard or MLflow",
    "report.txt, report.html, compared.html": "the report; the same and more as a page; this run against others",
    "lock, DONE": "held by the process that works on the run; written last",
}
LOCATION = {"output_dir", "run_id", "resume"}  # settings that locate a run and do not change its results


def new_run_id(name: str) -> str:
    """Return a fresh id: ``<name>-<UTC time>-<four random hex digits>``."""
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def create_run(config: ExperimentConfig) -> Path:
    """Create the folder of a new run and write its configuration and environment.

    Raises:
        RunDirError: the folder exists, or cannot be written.
    """
    folder = Path(config.output_dir).expanduser().resolve() / (config.run_id or new_run_id(config.name))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError as error:
        if not folder.parent.is_dir():
            raise RunDirError(f"{folder.parent} is a file, expected a folder. Set output_dir to a folder.") from error
        raise run_exists(folder) from error
    except OSError as error:
        raise RunDirError(
            f"{folder} cannot be created ({error.strerror}). Set output_dir to a folder you can write."
        ) from error
    write_json(folder / "environment.json", environment())
    named = config.model_copy(update={"run_id": folder.name, "resume": False})
    write_text(folder / CONFIG_FILE, to_toml(named))
    return folder


def run_exists(folder: Path, resume: str | None = None) -> RunDirError:
    """Return the error for a new run whose folder exists; the remedy depends on whether a process is working on it.

    Args:
        folder: the existing folder.
        resume: command that resumes the run; None means ``fedmerge run --resume`` with the folder.
    """
    if is_locked(folder):
        return RunDirError(
            f"{folder}: {_holder(folder)} is working on this run. Wait until it ends, or choose another run_id or "
            "output_dir."
        )
    return RunDirError(
        f"{folder} exists; a run never overwrites another. Choose another run_id or output_dir, or resume it: "
        f"{resume or f'fedmerge run --resume {folder}'}"
    )


def run_to_resume(run: str | Path, output_dir: str | Path = "runs") -> Path:
    """Return the folder of a run, given its path or its name in ``output_dir``.

    Raises:
        RunDirError: no such run, or a folder without configuration.
    """
    places = list(dict.fromkeys([Path(run).expanduser(), Path(output_dir).expanduser() / run]))
    for folder in places:
        if (folder / CONFIG_FILE).is_file():
            return folder.resolve()
    for folder in places:
        if folder.is_dir():
            raise RunDirError(
                f"{folder} holds no {CONFIG_FILE}: it is not a run folder, or its run ended before it started. "
                "There is nothing to resume; start a new run under another name."
            )
    raise RunDirError(
        f"run {run}: not found (looked for {' and '.join(map(str, places))}). Give the path of a run folder."
    )


def run_config(folder: Path) -> ExperimentConfig:
    """Return the configuration of a run, with the current location of its folder.

    Raises:
        RunDirError: config.toml is missing, damaged or of another version.
    """
    try:
        config = load_config(folder / CONFIG_FILE)
    except ConfigError as error:
        raise RunDirError(
            f"{folder}: {CONFIG_FILE} cannot be used. Restore the file, or start a new run. {error}"
        ) from error
    return config.model_copy(update={"output_dir": str(folder.parent), "run_id": folder.name})


def check_same_config(folder: Path, config: ExperimentConfig) -> None:
    """Refuse to resume a run with another configuration; nothing on disk changes.

    Raises:
        ConfigError: the configurations differ; the message names every such setting.
        RunDirError: as :func:`run_config`.
    """
    stored, given = (to_flat(with_absolute_paths(each, Path.cwd())) for each in (run_config(folder), config))
    different = [key for key in stored if key not in LOCATION and stored[key] != given[key]]
    if different:
        lines = "".join(f"\n  {key}: the run has {stored[key]!r}, given is {given[key]!r}" for key in different)
        raise ConfigError(
            f"{folder}: the configuration differs from that of the run in {len(different)} "
            f"setting{'s' * (len(different) > 1)}, expected the same:{lines}\nResume without a configuration file and "
            "--set, or start a new run: it reuses the experts that clients have cached."
        )


def open_run(config: ExperimentConfig) -> Path:
    """Return the folder of the run to resume, and remove partially written files from it.

    Call this under :func:`locked`.

    Raises:
        RunDirError, ConfigError: the run is missing, unreadable, or has another configuration.
    """
    folder = run_to_resume(Path(config.output_dir).expanduser() / str(config.run_id))
    check_same_config(folder, config)
    try:
        for partial in [*folder.glob(".*.partial"), *folder.glob("*/.*.partial")]:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    except OSError as error:
        raise RunDirError(
            f"{folder}: partial files cannot be removed ({error}). Check the permissions there."
        ) from error
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run exclusively. The operating system releases the lock when its process ends, however it ends.

    Raises:
        RunDirError: another process is working on the run, or the folder cannot be locked.
    """
    path = folder / LOCK_FILE
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise RunDirError(f"{path} cannot be written ({error.strerror}). Check the permissions there.") from error
    with file:
        for attempt in range(LOCK_ATTEMPTS):  # is_locked holds the lock for a moment
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if attempt == LOCK_ATTEMPTS - 1:
                    raise RunDirError(
                        f"{folder}: {_holder(folder)} is working on this run. Wait until it ends, or end it, then try "
                        "again."
                    ) from error
                time.sleep(0.1)
            except OSError as error:
                raise RunDirError(
                    f"{path} cannot be locked ({error.strerror}). Set output_dir to a folder on a file system with "
                    "locks."
                ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Return True if a process is working on the run."""
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _holder(folder: Path) -> str:
    """Return the process that holds the lock, as written in the lock file."""
    try:
        return (folder / LOCK_FILE).read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"


def environment() -> dict[str, Any]:
    """Return versions and hardware that can change numbers."""
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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
