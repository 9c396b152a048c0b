"""``fedmerge merge``."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_overrides, add_runs_folder

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.config import ExperimentConfig


def add_commands(commands: "Commands") -> None:
    """Add it to the parser."""
    merge = commands.add_parser("merge", help="merge adapters again with other settings; nothing is trained")
    what = merge.add_mutually_exclusive_group(required=True)
    what.add_argument("run", nargs="?", metavar="RUN", help="a run folder, or the beginning of a run's id")
    what.add_argument("--adapters", nargs="+", metavar="[NAME=]DIR", help="PEFT LoRA folders in place of a run's")
    merge.add_argument("--exclude", nargs="+", action="extend", default=[], metavar="DOMAIN", help="leave domains out")
    merge.add_argument(
        "--catalogs",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of domains or catalogs, for mergerec (default: server.catalogs, else domains.root)",
    )
    merge.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help="folder to make (default: RUN/remerged/TIME)"
    )
    merge.add_argument(
        "--config", type=Path, default=None, help="experiment file (default: that of the run the adapters lie in)"
    )
    add_overrides(merge)
    add_runs_folder(merge)
    merge.set_defaults(command=_merge)


def _merge(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config, with_absolute_paths
    from fedmerge.errors import ConfigError
    from fedmerge.runs import find_run

    run = find_run(options.run, options.dir) if options.run is not None else None
    folders = _named(options.adapters or [])
    if run is None and options.out is None:
        raise ConfigError("merge --adapters: found no --out, expected the folder to make. Give --out DIR.")
    path = options.config or (run / "config.toml" if run else _config_of(list(folders.values())))
    overrides = list(options.overrides)
    if options.catalogs is not None:
        overrides.append(f"server.catalogs={json.dumps(str(options.catalogs))}")
    config = with_absolute_paths(load_config(path, overrides), Path.cwd())

    import torch

    from fedmerge.device import resolve_compute
    from fedmerge.encoder.backbone import load_backbone
    from fedmerge.report.runs import coefficients_text
    from fedmerge.server import remerge

    torch.set_num_threads(config.runtime.server_threads)
    out = options.out or remerge.new_merge_folder(run or Path.cwd())
    remerge.check_free(out)
    experts = remerge.experts_of_run(run, options.exclude) if run else remerge.experts_in(folders, options.exclude)
    backbone, catalogs = None, {}
    if remerge.needs_backbone(config):
        root = Path(config.server.catalogs) if config.server.catalogs is not None else _domains_root(config)
        catalogs = remerge.catalogs_of(experts, root, ask_owner=config.server.catalogs is None)
        compute = resolve_compute(config.runtime.device, config.runtime.precision)
        source = config.backbone
        backbone = load_backbone(source.source, source.pooling, compute, source.weights_sha256)
    candidates = remerge.merge_again(
        experts, config, backbone, catalogs, lambda line: print(line, file=sys.stderr, flush=True)
    )
    written = remerge.write_merges(candidates, experts, config, out)
    without = f", without {', '.join(experts.excluded)}" if experts.excluded else ""
    print(f"merged {', '.join(experts.adapters)}{without}")
    for candidate in candidates:
        print(f"{written[candidate.label]}: {coefficients_text(candidate.provenance)}")
    return 0


def _named(adapters: list[str]) -> dict[str, Path]:
    """``NAME=DIR`` or ``DIR``, which is called like its folder."""
    from fedmerge.errors import ConfigError

    folders: dict[str, Path] = {}
    for argument in adapters:
        name, equals, path = argument.partition("=")
        folder = Path(path) if equals and not Path(argument).exists() else Path(argument)
        name = name if folder != Path(argument) else folder.resolve().name
        if name in folders:
            raise ConfigError(
                f"merge --adapters: {folders[name]} and {folder} are both called {name!r}, expected different names. "
                f"Give one as NAME={folder}."
            )
        folders[name] = folder
    return folders


def _config_of(adapters: list[Path]) -> Path | None:
    """The configuration of the runs the adapters lie in, where backbone and texts are the same in all of them."""
    from fedmerge.config import load_config
    from fedmerge.errors import ConfigError
    from fedmerge.runs import config_of_adapter

    paths = [path for adapter in adapters if (path := config_of_adapter(adapter))]
    configs = [load_config(path) for path in dict.fromkeys(paths)]
    if any((config.backbone, config.text) != (configs[0].backbone, configs[0].text) for config in configs):
        raise ConfigError(
            f"merge --adapters: their runs have different backbone or text settings ({', '.join(map(str, paths))}). "
            "Give --config FILE."
        )
    return paths[0] if paths else None


def _domains_root(config: "ExperimentConfig") -> Path:
    from fedmerge.config import DEMO_ROOT
    from fedmerge.domain.demo import bundled_demo

    if config.domains.root == DEMO_ROOT:
        return bundled_demo(Path(config.cache_dir).expanduser())
    return Path(config.domains.root)
