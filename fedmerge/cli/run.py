"""``fedmerge run`` and ``fedmerge check``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_overrides

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.config import ExperimentConfig


def add_commands(commands: "Commands") -> None:
    """Add them to the parser."""
    run = commands.add_parser("run", help="run an experiment through Flower's simulation engine")
    run.add_argument("config", type=Path, nargs="?", help="experiment file, for example configs/demo.toml")
    run.add_argument(
        "--resume", metavar="RUN", help="go on with a run that was ended, by its folder or its name in runs/"
    )
    add_overrides(run)
    run.add_argument(
        "--app", type=Path, default=None, help="folder with pyproject.toml and sim/ (default: the installed checkout)"
    )
    run.set_defaults(command=_run)

    check = commands.add_parser("check", help="validate an experiment file without running it")
    check.add_argument("config", type=Path)
    add_overrides(check)
    check.set_defaults(command=_check)


def _run(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config, with_absolute_paths
    from fedmerge.errors import ConfigError

    if options.resume is not None:
        config = _config_to_resume(options.resume, options.config, options.overrides)
    elif options.config is None:
        raise ConfigError("run: name an experiment file, for example configs/demo.toml, or a run: --resume RUN.")
    else:
        config = with_absolute_paths(load_config(options.config, options.overrides), Path.cwd())

    from sim.run import run_experiment

    return run_experiment(config, options.app or Path(__file__).resolve().parents[2])


def _config_to_resume(run: str, path: Path | None, overrides: list[str]) -> "ExperimentConfig":
    """The run's own configuration; with a file or --set, what they say, which must be the same."""
    from fedmerge.config import load_config, with_absolute_paths
    from fedmerge.run_dir import CONFIG_FILE, run_to_resume

    given = load_config(path, overrides) if path else None
    folder = run_to_resume(run, given.output_dir if given else "runs")
    config = given or load_config(folder / CONFIG_FILE, overrides)
    where = {"output_dir": str(folder.parent), "run_id": folder.name, "resume": True}
    return with_absolute_paths(config.model_copy(update=where), Path.cwd())


def _check(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config

    config = load_config(options.config, options.overrides)
    domains = f"{len(config.domains.train)} training and {len(config.domains.unseen)} unseen domains"
    print(
        f"{options.config}: valid ({config.name}: {domains}, methods {', '.join(config.merge.methods)}, "
        f"seed {config.seed})"
    )
    return 0
