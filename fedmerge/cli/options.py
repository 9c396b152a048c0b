"""Arguments that several commands share."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmerge.config import ExperimentConfig

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def config_file(text: str) -> Path:
    """Return the file that an argument names, or the shipped configuration of that name."""
    from fedmerge.errors import ConfigError
    from fedmerge.installation import find_config

    try:
        return find_config(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def app_folder(options: argparse.Namespace) -> Path:
    """Return the folder of the Flower app: that of ``--app``, else that of this installation."""
    from fedmerge.installation import root

    return options.app or root()


def add_app(parser: argparse.ArgumentParser) -> None:
    """Add ``--app`` for :func:`app_folder`."""
    parser.add_argument(
        "--app",
        type=Path,
        metavar="DIR",
        help="folder with pyproject.toml and sim/ (default: the app of this fedmerge)",
    )


def add_overrides(parser: argparse._ActionsContainer) -> None:
    """Add ``--set KEY=VALUE …``."""
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change settings"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of :func:`adapter_config` and :func:`run_of`: an adapter or a run, and its experiment file."""
    parser.add_argument(
        "adapter",
        metavar="MODEL",
        help="a run (its folder or the beginning of its id), for what it serves the domain; a PEFT folder, or its "
        "address on shared storage; or 'none', the backbone alone",
    )
    parser.add_argument(
        "--config",
        type=config_file,
        default=None,
        help="experiment file for backbone, text and runtime (default: that of the run)",
    )
    add_overrides(parser)
    run = parser.add_argument_group("with a run")
    run.add_argument(
        "--model",
        metavar="NAME",
        help="model to take in place of the run's choice: merged, expert, backbone, 'personal merge', "
        "'woven merge', 'group merge', 'head on the merge', 'head on the merge, fused', …",
    )
    run.add_argument(
        "--cache-dir", metavar="DIR", help="cache of this organisation's client (default: cache_dir of the run)"
    )
    add_runs_folder(run)


def add_domain(parser: argparse._ActionsContainer, told: str, required: bool = True) -> None:
    """Add ``--domain``: a folder, or an address that :func:`adapter_config` copies to the cache."""
    parser.add_argument("--domain", type=_source, required=required, metavar="DIR", help=f"{told}, or its address")


def _source(text: str) -> str | Path:
    from fedmerge.storage.addresses import is_address

    return text if is_address(text) else Path(text)


def run_of(options: argparse.Namespace) -> Path | None:
    """Return the folder of the run that MODEL names; None if it names an adapter.

    Raises:
        ConfigError: ``--model`` or ``--cache-dir`` beside an adapter.
        RunDirError: several runs have this prefix.
    """
    from fedmerge.errors import ConfigError
    from fedmerge.runs.reading import find_run, is_run, list_runs

    _fetch_adapter(options)
    folder = Path(options.adapter)
    if options.adapter != "none" and not (folder / "adapter_config.json").is_file():
        if is_run(folder):
            return folder.resolve()
        runs = list_runs(options.dir) if options.dir.is_dir() and not folder.exists() else []
        if any(run.name.startswith(options.adapter) for run in runs):
            return find_run(options.adapter, options.dir)
    if given := [flag for flag, value in (("--model", options.model), ("--cache-dir", options.cache_dir)) if value]:
        raise ConfigError(
            f"{options.adapter}: found {', '.join(given)} with an adapter, expected a run. Give a run folder, or omit "
            f"{', '.join(given)}."
        )
    return None


def adapter_config(options: argparse.Namespace) -> "ExperimentConfig":
    """Return the settings that a model is used with: those of its run, unless there is an experiment file."""
    from fedmerge.config import load_config
    from fedmerge.encoder.adapter_records import config_of_adapter

    run = run_of(options)
    of_run = None if options.adapter == "none" else config_of_adapter(run or Path(options.adapter))
    overrides = list(options.overrides)
    if options.cache_dir is not None:
        overrides.append(f"cache_dir={json.dumps(options.cache_dir)}")
    config = load_config(options.config or of_run, overrides)
    if isinstance(getattr(options, "domain", None), str):
        from fedmerge.storage.fetching import local_folder

        options.domain = local_folder(options.domain, config.cache_dir, "domains")
    return config


def _fetch_adapter(options: argparse.Namespace) -> None:
    """Replace the address of an adapter by its copy in the cache."""
    from fedmerge.storage.addresses import is_address

    if is_address(options.adapter):
        options.adapter = str(fetched_adapter(options.adapter, options.cache_dir))


def fetched_adapter(address: str, cache_dir: str | None = None) -> Path:
    """Return the local copy of an adapter at an address, in a client's cache; None is the default one."""
    from fedmerge.config import ExperimentConfig
    from fedmerge.storage.fetching import local_folder

    return local_folder(address, cache_dir or ExperimentConfig().cache_dir, "adapters")


def add_runs_folder(parser: argparse._ActionsContainer, *, again: bool = False) -> None:
    """Add ``--dir``, the folder in which runs are found by their id.

    Args:
        parser: of the command.
        again: for an action of a command that has the option: it must not reset what was given before its name.
    """
    default = argparse.SUPPRESS if again else Path("runs")
    told = "folder of run folders (default: runs)"
    parser.add_argument("--dir", type=Path, default=default, metavar="DIR", help=told)


def add_open(parser: argparse._ActionsContainer) -> None:
    """Add ``--open`` for :func:`open_page`."""
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def open_page(path: Path) -> None:
    """Open a page in the user's browser, or say that there is none."""
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        print(f"fedmerge: found no browser; open {path} in one", file=sys.stderr)
