"""A run on disk. Every file and folder is there whole or not at all, nothing finished is overwritten, ``DONE`` is last.

config.toml, environment.json      what was run, and on what
clients.json                       who takes part, who was excluded in which phase and why
adapters/<domain>/                 each expert, a PEFT folder, with training.json; written as it arrives
experts.json                       which experts there are to be merged, by hash; ends the training
admission/<domain>.json            metric sums of the merges without each domain, where the gate asks for them
admission.json                     what the gate found of each expert, and who is not merged; final
learning/                          coefficients learned through the clients: the cohort, what each message gave
merged/<label>/                    each merge, a PEFT folder, with provenance.json
validation/<domain>.json           metric sums of each domain; written as they arrive
choice.json                        what validation chose; written before test is read, and final
test/<domain>.json                 as validation
metrics.parquet, products.parquet  sums and counts per split, variant, domain, method and metric
exposure.parquet                   what left each client: names, shapes, dtypes, bytes (exposure.jsonl until the end)
released.jsonl                     with noise of the clients' own: what arrived of it, also what was late or refused
privacy.json                       with differential privacy: what was spent of every unit, assumptions included
privacy-audit.json, .txt           what an audit measured, where one was made
tracking/                          with `tracking`: the same for TensorBoard or MLflow (fedmerge.report.tracking)
attempts.jsonl                     when each attempt started and how long it worked (fedmerge.runs.attempts)
report.txt, run.log, DONE
lock                               held by the process that works on the run
"""

import fcntl
import importlib.metadata
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmerge.config import ExperimentConfig, load_config, to_flat, to_toml, with_absolute_paths
from fedmerge.errors import ConfigError, RunDirError
from fedmerge.files import write_json, write_text

CONFIG_FILE = "config.toml"
DONE = "DONE"
LOCK_FILE = "lock"
LOCK_ATTEMPTS = 3
WHERE_IT_LIES = {"output_dir", "run_id", "resume"}  # settings that name a run and do not change it


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
        if is_locked(folder):
            raise RunDirError(
                f"{folder}: {_holder(folder)} works on this run. Wait until it has ended, or choose another run_id or "
                "output_dir."
            ) from error
        raise RunDirError(
            f"{folder} exists; a run never overwrites another. Choose another run_id or output_dir, or resume it: "
            f"fedmerge run --resume {folder}"
        ) from error
    except OSError as error:
        raise RunDirError(
            f"{folder} cannot be created ({error.strerror}). Set output_dir to a folder you can write."
        ) from error
    write_json(folder / "environment.json", environment())
    named = config.model_copy(update={"run_id": folder.name, "resume": False})
    write_text(folder / CONFIG_FILE, to_toml(named))
    return folder


def run_to_resume(run: str | Path, output_dir: str | Path = "runs") -> Path:
    """The folder of a run, by its path or by its name in ``output_dir``.

    Raises:
        RunDirError: there is none, or it was ended before it began.
    """
    places = list(dict.fromkeys([Path(run).expanduser(), Path(output_dir).expanduser() / run]))
    for folder in places:
        if (folder / CONFIG_FILE).is_file():
            return folder.resolve()
    for folder in places:
        if folder.is_dir():
            raise RunDirError(
                f"{folder} holds no {CONFIG_FILE}: it is no run folder, or of a run that was ended before it began. "
                "There is nothing to go on with; start the run again under another name."
            )
    raise RunDirError(f"there is no run {run} (looked for {' and '.join(map(str, places))}). Give its folder.")


def run_config(folder: Path) -> ExperimentConfig:
    """What a run was started with, and where it lies now.

    Raises:
        RunDirError: its config.toml is missing or damaged, or of another version.
    """
    try:
        config = load_config(folder / CONFIG_FILE)
    except ConfigError as error:
        raise RunDirError(
            f"{folder}: its {CONFIG_FILE} cannot be used. Put the file back as it was, or start a new run. {error}"
        ) from error
    return config.model_copy(update={"output_dir": str(folder.parent), "run_id": folder.name})


def check_same_config(folder: Path, config: ExperimentConfig) -> None:
    """Refuse to go on with a run under another configuration; nothing is changed.

    Raises:
        ConfigError: naming every setting that differs.
        RunDirError: as :func:`run_config`.
    """
    kept, given = (to_flat(with_absolute_paths(each, Path.cwd())) for each in (run_config(folder), config))
    different = [key for key in kept if key not in WHERE_IT_LIES and kept[key] != given[key]]
    if different:
        lines = "".join(f"\n  {key}: the run has {kept[key]!r}, given is {given[key]!r}" for key in different)
        raise ConfigError(
            f"{folder}: the configuration differs from that of the run in {len(different)} "
            f"setting{'s' * (len(different) > 1)}, so it cannot be resumed with it:{lines}\nResume without a "
            "configuration file and --set, or start a new run: the clients keep their experts."
        )


def open_run(config: ExperimentConfig) -> Path:
    """The folder of the run that the configuration says to resume; what was half written is removed.

    To be called under :func:`locked`.

    Raises:
        RunDirError, ConfigError: it is not there, not readable, or has another configuration.
    """
    folder = run_to_resume(Path(config.output_dir).expanduser() / str(config.run_id))
    check_same_config(folder, config)
    try:
        for partial in [*folder.glob(".*.partial"), *folder.glob("*/.*.partial")]:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    except OSError as error:
        raise RunDirError(f"{folder} cannot be cleaned ({error}). Check the permissions there.") from error
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Work on a run alone. The lock is the operating system's: it ends with its process, however that ends.

    Raises:
        RunDirError: another process works on the run, or the folder cannot be locked.
    """
    path = folder / LOCK_FILE
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise RunDirError(f"{path} cannot be written ({error.strerror}). Check the permissions there.") from error
    with file:
        for attempt in range(LOCK_ATTEMPTS):  # whoever looks whether it is locked holds it for a moment
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if attempt == LOCK_ATTEMPTS - 1:
                    raise RunDirError(
                        f"{folder}: {_holder(folder)} works on this run. Wait until it has ended, or end it; then try "
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
    """Whether a process works on the run now."""
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _holder(folder: Path) -> str:
    """Return the process that holds the lock, by its own words."""
    try:
        return (folder / LOCK_FILE).read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"


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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
