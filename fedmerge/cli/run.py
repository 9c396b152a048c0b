"""``fedmerge run`` and ``fedmerge check``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_app, add_open, add_overrides, app_folder, config_file, open_page

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.config import ExperimentConfig

LATEST = ""  # --resume without a name


def add_commands(commands: "Commands") -> None:
    """Add the commands to the parser."""
    run = commands.add_parser("run", help="run an experiment through Flower's simulation engine")
    run.add_argument(
        "config", type=config_file, nargs="?", help="experiment file, or a name from 'fedmerge configs', such as demo"
    )
    run.add_argument(
        "--resume",
        nargs="?",
        const=LATEST,
        metavar="RUN",
        help="resume an interrupted run, named by its folder or by its name in runs/; without a name the latest there, "
        "of the given experiment if there is one",
    )
    add_overrides(run)
    add_app(run)
    run.add_argument("--federation", metavar="NAME", help="run on the machines of a federation instead of a simulation")
    add_open(run)
    run.set_defaults(command=_run)

    stop = commands.add_parser("stop", help="stop a run on the machines of a federation")
    stop.add_argument("run", metavar="RUN", help="name of its run folder, or Flower's number")
    stop.add_argument("--federation", metavar="NAME", required=True)
    stop.set_defaults(command=_stop)

    check = commands.add_parser("check", help="report every problem of an experiment without running it")
    check.add_argument("config", type=config_file)
    add_overrides(check)
    check.add_argument(
        "--federation", action="store_true", help="check only the settings, because the data are on other machines"
    )
    check.set_defaults(command=_check)


def _run(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config, with_absolute_paths
    from fedmerge.errors import ConfigError

    if options.federation is not None:
        return _run_on_federation(options)
    if options.resume is not None:
        config = with_absolute_paths(_config_to_resume(options.resume, options.config, options.overrides), Path.cwd())
    elif options.config is None:
        raise ConfigError(
            "run: found neither an experiment nor --resume. Give an experiment, such as demo, or --resume RUN."
        )
    else:
        config = with_absolute_paths(load_config(options.config, options.overrides), Path.cwd())

    return run_here(config, app_folder(options), then_open=options.open)


def run_here(config: "ExperimentConfig", app_dir: Path, *, then_open: bool) -> int:
    """Run an experiment with absolute paths on this machine and, if it is wanted, open its page; return the exit code.

    Raises:
        FedMergeError: as :func:`sim.local.run.run_experiment`.
    """
    from fedmerge.runs.folder import REPORT_PAGE, new_run_id
    from sim.local.run import run_experiment

    config = config.model_copy(update={"run_id": config.run_id or new_run_id(config.name)})
    code = run_experiment(config, app_dir)
    if then_open and code == 0:
        open_page(Path(config.output_dir) / str(config.run_id) / REPORT_PAGE)
    return code


def _run_on_federation(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config
    from fedmerge.errors import ConfigError
    from sim.checks import check_for_federation
    from sim.machines.runs import find_connection, run_on_federation

    if options.open:
        raise ConfigError(
            "run: found --open with --federation, expected one of them: the page is on the SuperLink's machine. Open "
            "it there: fedmerge report RUN --open"
        )
    to = find_connection(options.federation)
    if options.resume == LATEST and to.operator is None:
        raise ConfigError(
            "run: found --resume without a name, expected one: run folders are on the SuperLink's machine. List the "
            f"runs: fedmerge runs --federation {options.federation}"
        )
    if options.resume is not None and to.operator is not None:
        config = _config_to_resume(options.resume, options.config, options.overrides, to.operator)
    elif options.config is None:
        raise ConfigError(
            "run: found no experiment file. Give one: a run can be resumed without it only on the SuperLink's machine, "
            "where its folder is."
        )
    else:
        config = load_config(options.config, options.overrides)
        if options.resume is not None:
            config = config.model_copy(update={"run_id": options.resume, "resume": True})
    check_for_federation(config)
    return run_on_federation(config, app_folder(options), to)


def _stop(options: argparse.Namespace) -> int:
    from sim.machines.runs import find_connection, stop_run

    number = stop_run(options.run, find_connection(options.federation))
    print(f"run {options.run}, Flower's number {number}: stopped; finished parts are kept")
    return 0


def _config_to_resume(run: str, path: Path | None, overrides: list[str], start: Path = Path()) -> "ExperimentConfig":
    """Return the configuration of a run to resume: the given one, which must equal the run's own, or the run's own."""
    from fedmerge.config import load_config
    from fedmerge.runs.folder import CONFIG_FILE, run_to_resume

    given = load_config(path, overrides) if path else None
    root = start / (given.output_dir if given else "runs")
    if run == LATEST:
        from fedmerge.runs.overview.resuming import latest_to_resume

        run = str(latest_to_resume(root, given.name if given else None))
        print(f"resuming {run}", flush=True)
    folder = run_to_resume(run, root)
    config = given or load_config(folder / CONFIG_FILE, overrides)
    return config.model_copy(update={"output_dir": str(folder.parent), "run_id": folder.name, "resume": True})


def _check(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config, with_absolute_paths
    from sim.checks import check_for_federation, check_simulation

    config = load_config(options.config, options.overrides)
    if options.federation:
        check_for_federation(config)
    else:
        check_simulation(with_absolute_paths(config, Path.cwd()))
    domains = f"{len(config.domains.train)} training and {len(config.domains.unseen)} unseen domains"
    print(
        f"{options.config}: valid ({config.name}: {domains}, methods {', '.join(config.merge.methods)}, "
        f"seed {config.seed})"
    )
    return 0
