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
report.txt, run.log, DONE
lock                               held by the process that works on the run
"""

import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from fedmerge.config import ExperimentConfig, load_config, to_flat, to_toml, with_absolute_paths
from fedmerge.errors import ConfigError, RunDirError

CONFIG_FILE = "config.toml"
DONE = "DONE"
LOCK_FILE = "lock"
LOCK_ATTEMPTS = 3
ROWS_AT_ONCE = 10_000
WHERE_IT_LIES = {"output_dir", "run_id", "resume"}  # settings that name a run and do not change it
_SPACE = "Make space there or check the permissions, then do it again; a run goes on with fedmerge run --resume."


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
            f"{folder} exists; a run never overwrites another. Choose another run_id or output_dir, or go on with it: "
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
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    raise RunDirError(
                        f"{folder}: {holder} works on this run. Wait until it has ended, or end it; then try again."
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


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill; it takes its name, in place of an older one, only when the block ends well.

    Raises:
        RunDirError: the disk is full, or the folder cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunDirError(f"{folder} cannot be written ({error}). {_SPACE}") from error


def append_line(path: Path, data: Any) -> None:
    """Append one line of JSON; one that a killed process left unfinished before it does no harm.

    Raises:
        RunDirError: as :func:`write_text`.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(data, ensure_ascii=False))
    except OSError as error:
        raise RunDirError(f"{path} cannot be written ({error.strerror}). {_SPACE}") from error


def read_lines(path: Path) -> Iterator[Any]:
    """What :func:`append_line` wrote, without unfinished lines."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunDirError(f"{path} cannot be read ({error.strerror}). Check the permissions there.") from error


def read_json(path: Path) -> Any:
    """A JSON file of the run; None where there is none.

    Raises:
        RunDirError: it is damaged or cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunDirError(
            f"{path} cannot be read ({error}). Put the file back as it was, or start a new run: the clients keep their "
            "experts."
        ) from error


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
    """Write a file whole or not at all; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        RunDirError: the disk is full, or the folder is gone or may not be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunDirError(f"{path} cannot be written ({error.strerror}). {_SPACE}") from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all; see :func:`write_text`."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], schema: Any = None) -> None:
    """Write rows of equal keys as Parquet, whole or not at all; a few thousand at a time are in memory.

    Args:
        path: the file.
        rows: one or more; with a schema also none.
        schema: of pyarrow; None lets the first rows decide the types of the columns.

    Raises:
        RunDirError: as :func:`write_text`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        remaining = iter(rows)
        with ExitStack() as stack:
            writer = None if schema is None else stack.enter_context(pq.ParquetWriter(partial, schema))
            while some := [dict(row) for row in itertools.islice(remaining, ROWS_AT_ONCE)]:
                table = pa.Table.from_pylist(some, schema)
                if writer is None:
                    schema = table.schema
                    writer = stack.enter_context(pq.ParquetWriter(partial, schema))
                writer.write_table(table)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunDirError(f"{path} cannot be written ({error}). {_SPACE}") from error


def check_free(folder: Path) -> None:
    """Refuse a folder that holds something; RunDirError."""
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise RunDirError(f"{folder}: exists and is not an empty folder; nothing is overwritten. Choose another.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that is there as a whole or not at all: yields a hidden one beside it, which takes its name at the end.

    Args:
        folder: must be absent or empty.

    Raises:
        RunDirError: it holds something, or cannot be written; nothing is left behind.
    """
    folder = Path(os.path.abspath(folder))
    check_free(folder)
    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, folder)
    except (OSError, SafetensorError) as error:
        raise RunDirError(
            f"{folder}: cannot be written ({error}). Check the space and the permissions, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
