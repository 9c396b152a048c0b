"""`fedmerge run`: one experiment in Flower's simulation engine, from its checks to the last line of its log."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from fedmerge.config import ExperimentConfig, to_toml
from fedmerge.errors import ClientError
from fedmerge.report.run.live import showing
from fedmerge.runs.folder import (
    CONFIG_FILE,
    DONE,
    REPORT_PAGE,
    check_same_config,
    is_locked,
    locked,
    new_run_id,
    run_exists,
)
from sim.checks import check_simulation
from sim.local.gpus import gpus_of_client
from sim.local.launch import run_federation


def run_experiment(config: ExperimentConfig, app_dir: Path, mark: str | None = None) -> int:
    """Run an experiment, or resume one, and print its log as it comes.

    Args:
        config: with absolute paths; to resume a run, with ``resume`` and its ``run_id``.
        app_dir: the folder of the Flower app.
        mark: see :func:`sim.local.launch.run_federation`.

    Returns:
        0 if the run finished and its folder is complete, else 1.

    Raises:
        ConfigError: all problems that this machine's files show, or a configuration other than the run's; raised before
            anything starts.
        RunDirError: the run to resume is missing, the run exists already, or a process is working on it.
        ClientError: Flower could not be started, or died during the run.
    """
    config = config.model_copy(update={"run_id": config.run_id or new_run_id(config.name)})
    run_dir = Path(config.output_dir) / str(config.run_id)
    if config.resume:
        check_same_config(run_dir, config)
        if (run_dir / DONE).is_file():
            print(f"this run is finished; nothing is left to do\nrun folder: {run_dir}")
            return 0
        with locked(run_dir):
            pass  # no other process is working on it
    elif run_dir.exists():
        raise run_exists(run_dir)
    check_simulation(config)
    with tempfile.TemporaryDirectory(prefix="fedmerge-config-") as folder:
        resolved = Path(folder) / "experiment.toml"
        resolved.write_text(to_toml(config), encoding="utf-8")
        try:
            with showing(run_dir) as on_line:
                outcome = run_federation(
                    app_dir,
                    resolved,
                    num_supernodes=len(config.domains.train) + len(config.domains.unseen),
                    cpus_per_client=config.runtime.threads_per_client,
                    gpus_per_client=gpus_of_client(config.runtime),
                    on_line=on_line,
                    is_over=_server_ended(run_dir),
                    mark=mark,
                )
        except ClientError as error:
            if not (run_dir / DONE).is_file():
                _print_remedy(run_dir)
                raise
            print(f"fedmerge: the run had finished before this happened: {error}", file=sys.stderr)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
            _print_remedy(run_dir)
            raise
    if (run_dir / DONE).is_file():
        print(f"run folder: {run_dir}")
        if (run_dir / REPORT_PAGE).is_file():
            print(f"report: {run_dir / REPORT_PAGE}")
        return 0
    print(f"fedmerge: the run did not finish: {outcome.status} {outcome.details}", file=sys.stderr)
    _print_remedy(run_dir)
    if outcome.kept:
        print(f"fedmerge: Flower's and Ray's logs are in {outcome.kept}", file=sys.stderr)
    return 1


def _server_ended(run_dir: Path) -> Callable[[], bool]:
    """Return a function that is true once the server has held the run's lock and released it."""
    was_locked = False

    def ended() -> bool:
        nonlocal was_locked
        now_locked = is_locked(run_dir)
        was_locked = was_locked or now_locked
        return was_locked and not now_locked

    return ended


def _print_remedy(run_dir: Path) -> None:
    """Print how to resume an unfinished run, unless its configuration would fail again."""
    if not (run_dir / CONFIG_FILE).is_file() or (run_dir / DONE).is_file():
        return
    from fedmerge.runs.overview.resuming import why_not_resumed  # noqa: PLC0415  # imports pyarrow; others start sooner

    if why_not_resumed(run_dir):
        remedy = "resuming would fail in the same way; correct the configuration and start a new run"
    else:
        remedy = f"resume with: fedmerge run --resume {run_dir}"
    print(f"fedmerge: partial results are in {run_dir}; {remedy}", file=sys.stderr)
