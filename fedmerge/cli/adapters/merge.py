"""``fedmerge merge`` and ``fedmerge methods``."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge.cli.options import add_overrides, add_runs_folder, fetched_adapter

if TYPE_CHECKING:
    import torch

    from fedmerge.cli.options import Commands
    from fedmerge.merging.training_free import MergedAdapter
    from fedmerge.server.remerge import Experts

HubSources = dict[str, dict[str, str]]  # name -> repository, revision, commit

DESCRIPTION = """\
Merge LoRA adapters of one backbone into one adapter, without training and without reading data.

With --method, make one merge; --out is its PEFT folder. Without --method, make all merges of an experiment's settings
(those of the run or of --config, changed by --set), each in a folder below --out."""

EXAMPLES = """\
examples:
  fedmerge merge --method ties --density 0.3 --out merged law/ medicine/          any PEFT LoRA folders
  fedmerge merge --method average --coefficients law=2,medicine=1 --out merged law/ medicine/
  fedmerge merge --method tsv --output-rank 32 --out merged law=runs/7/best medicine=runs/8/best
  fedmerge merge --method average --out merged law/ some-org/medicine-lora@main   an adapter of the hub
  fedmerge merge --method average --out merged law/ medicine=s3://bucket/medicine  an adapter on shared storage
  fedmerge merge --of-merges --method average --out all north/ south/             the average of the adapters in merges
  fedmerge merge demo-2026 --method pcb                                           the experts of a run
  fedmerge merge demo-2026 --exclude coffee-small                                 its own merges, without one domain
  fedmerge merge demo-2026 --set merge.methods=mergerec mergerec.steps=1000       other settings"""

# Parameters of the training-free methods. A test compares them with METHODS, whose import would slow every command.
PARAMETERS = {
    "coefficient": "factor on the whole merge",
    "density": "fraction of entries kept",
    "ties_density": "fraction of DARE's entries that TIES keeps",
    "clamp": "fraction of magnitudes clamped at each end",
    "drop_smallest": "fraction of smallest magnitudes dropped",
    "drop_largest": "fraction of largest magnitudes dropped",
    "common_fraction": "share of common directions",
    "epsilon": "DELLA: difference of the largest and the smallest probability",
    "mask_threshold": "consensus: λ of the TALL masks",
    "min_domains": "consensus: domains to which an entry must matter",
    "t": "SLERP: 0 for the first adapter, 1 for the second",
    "weights": "linear-by-layer: NAME=w or NAME=w_0:…:w_n for each adapter, from the first layer to the last",
    "normalize": "linear-by-layer: divide the weights of a layer by their sum (true, false)",
    "per_step": "livar-style: divide training signals by the steps of the training (true, false)",
    "per_entry": "livar-style: divide training signals by the root of a factor's entries (true, false)",
    "spread": "livar-style: weigh by the spread of a client's users, too (true, false)",
}


def add_commands(commands: "Commands") -> None:
    """Add the commands to the parser."""
    methods = commands.add_parser("methods", help="describe the merging methods: parameters, cost, sources, laws")
    methods.add_argument("names", nargs="*", metavar="METHOD", help="methods to describe (default: all)")
    methods.set_defaults(command=_methods)

    merge = commands.add_parser(
        "merge",
        help="merge LoRA adapters or the experts of a run, without training",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="two or more PEFT LoRA folders as [NAME=]DIR or adapters of the hub as [NAME=]ORG/REPO@REVISION, or one "
        "run: its folder or the beginning of its id",
    )
    merge.add_argument(
        "--method", help="method of a single merge (see `fedmerge methods`), or your own as module:function"
    )
    merge.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to create (default for a run: a new folder in RUN/remerged)"
    )
    merge.add_argument(
        "--exclude", nargs="+", action="extend", default=[], metavar="NAME", help="adapters to leave out"
    )
    merge.add_argument(
        "--base-model", metavar="NAME[@REVISION]", help="name of the base model, needed if the adapters disagree"
    )
    merge.add_argument(
        "--base", type=Path, metavar="DIR", help="weights of the base model, for adapters with DoRA or whole modules"
    )
    merge.add_argument(
        "--leave-out",
        metavar="PART,…",
        default="",
        help="parts of the adapters to leave out: dora, modules_to_save, bias, embeddings",
    )
    merge.add_argument(
        "--cache-dir", metavar="DIR", help="cache for adapters at addresses (default: ~/.cache/fedmerge)"
    )
    add_runs_folder(merge)

    one = merge.add_argument_group("with --method")
    one.add_argument(
        "--coefficients",
        metavar="NAME=X,…",
        help="factors on the adapters before merging (default: 1); for folders also X,… in their order",
    )
    one.add_argument(
        "--of-merges",
        action="store_true",
        help="merge merges into the average or task arithmetic of all adapters in them, with exact weights",
    )
    one.add_argument("--scope", choices=("tensor", "layer", "model"), help="extent of a threshold [tensor]")
    one.add_argument("--space", choices=("full", "core"), help="coordinates of the merge [full]")
    one.add_argument("--output-rank", metavar="R", help="compress every module to this rank, or 'exact' [exact]")
    one.add_argument("--seed", type=int, help="seed of methods that sample [0]")
    one.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="type of the tensors [float32]")
    for name, meaning in PARAMETERS.items():
        one.add_argument(_flag(name), metavar="X", help=meaning)
    one.add_argument(
        "--parameter",
        action="append",
        metavar="NAME=VALUE",
        help="any parameter of the method, for example of your own package.module:function",
    )

    several = merge.add_argument_group("without --method")
    several.add_argument("--config", type=Path, help="experiment file (default: that of the adapters' run)")
    add_overrides(several)
    several.add_argument(
        "--catalogs",
        type=Path,
        metavar="DIR",
        help="folder of domains or catalogs, for learned methods (default: server.catalogs, else domains.root)",
    )
    merge.set_defaults(command=_merge)


def _methods(options: argparse.Namespace) -> int:
    from fedmerge.merging.descriptions import describe_method
    from fedmerge.merging.methods import METHODS, method_named

    for name in options.names:
        method_named(name)
    print("\n".join(describe_method(name) for name in options.names or METHODS), end="")
    return 0


def _merge(options: argparse.Namespace) -> int:
    from fedmerge.errors import ConfigError
    from fedmerge.runs.reading import find_run

    _check_groups(options)
    folders, hub = _adapters(options.sources, options.cache_dir)
    run = None if folders else find_run(options.sources[0], options.dir)
    if run is None and options.out is None:
        raise ConfigError("merge: found no --out; expected a folder to create. Give --out DIR.")
    merge = _merge_one if options.method else _merge_settings
    return merge(options, run, folders, hub)


def _merge_one(options: argparse.Namespace, run: Path | None, folders: dict[str, Path], hub: HubSources) -> int:
    """Make one merge by ``--method``."""
    from fedmerge.files import check_free, scratch_folder
    from fedmerge.merging.folders.writing import rounded, write_merge
    from fedmerge.merging.merge_of_merges import merge_of_merges, read_part
    from fedmerge.merging.parameters import parse_parameters
    from fedmerge.merging.training_free import checked_settings, merge_adapters

    rank: Any = options.output_rank or "exact"
    settings: dict[str, Any] = {
        "scope": options.scope or "tensor",
        "space": options.space or "full",
        "output_rank": int(rank) if re.fullmatch(r"\d+", rank) else rank,
    }
    given = [f"{name}={value}" for name in PARAMETERS if (value := getattr(options, name)) is not None]
    parameters: dict[str, Any] = {**parse_parameters([*given, *(options.parameter or [])])}
    coefficients = _coefficients(options.coefficients, list(folders))
    checked_settings(options.method, **settings, parameters=parameters)
    if options.out is not None:
        check_free(options.out)

    from fedmerge.server import remerge

    experts = _experts(options, run, folders, hub, whole=not options.of_merges)
    out = options.out or remerge.new_merge_folder(run or Path.cwd()) / options.method
    dtype = _dtype(options.dtype)
    with scratch_folder(out) as scratch:
        if options.of_merges:
            hashes = experts.sources.hashes()
            parts = {name: read_part(name, folders[name], hashes[name]) for name in experts.adapters}
            del settings["scope"]
            merged = merge_of_merges(experts.adapters, parts, options.method, **settings, scratch=scratch, **parameters)
        else:
            merged = merge_adapters(
                experts.adapters,
                options.method,
                coefficients=coefficients,
                **settings,
                seed=options.seed or 0,
                scratch=scratch,
                signals=experts.sources.signals,
                **parameters,
            )
        merged = rounded(merged, dtype)
        used = merged.merges or merged.coefficients
        absent = {name: "coefficient 0" for name in experts.adapters if name not in used}
        excluded = {**experts.excluded, **absent}
        write_merge(merged, experts.sources, out, experts.run, excluded, _config_beside(run, experts), dtype)

        print(f"merged {', '.join(merged.coefficients)}{_without([*experts.excluded, *absent])}")
        _print_merged(merged, experts, out)
        _print_note(_lacking_signals(merged, experts))
    _print_note(remerge.heads_note(run))
    return 0


def _lacking_signals(merged: "MergedAdapter", experts: "Experts") -> str:
    from fedmerge.merging.signals import without_signals

    if not merged.module_weights:
        return ""
    domains = tuple(merged.coefficients)
    lacking = without_signals(domains, experts.sources.signals, bool(merged.parameters["spread"]))
    found = f"no training signals in training.json of {', '.join(lacking)}: 1/{len(domains)} in every module"
    return found if lacking else ""


def _print_merged(merged: "MergedAdapter", experts: "Experts", out: Path) -> None:
    chosen = ", ".join(f"{name} {value}" for name, value in {**merged.parameters, **merged.settings}.items())
    print(f"{merged.method}: {chosen.replace('_', ' ')}")
    _print_lines(experts.sources.notes())
    print("  rank  residual  module")
    for name, module in merged.adapter.modules.items():
        print(f"{module.rank:>6}{merged.residuals[name]:>10.4f}  {name}")
    worst = max(merged.residuals, key=lambda name: merged.residuals[name])
    print(
        f"{out}: {len(merged.residuals)} modules, {merged.adapter.size_bytes / 1e6:.1f} MB, "
        f"largest residual {merged.residuals[worst]:.4f}"
    )


def _merge_settings(options: argparse.Namespace, run: Path | None, folders: dict[str, Path], hub: HubSources) -> int:
    """Make every merge of an experiment's settings."""
    from fedmerge.config import load_config, with_absolute_paths
    from fedmerge.errors import ConfigError

    path = options.config or (run / "config.toml" if run else _config_of(list(folders.values())))
    if path is None and not options.overrides:
        raise ConfigError("merge: found no --method; expected one of those that `fedmerge methods` lists.")
    overrides = list(options.overrides)
    if options.catalogs is not None:
        overrides.append(f"server.catalogs={json.dumps(str(options.catalogs))}")
    config = with_absolute_paths(load_config(path, overrides), Path.cwd())

    import torch

    from fedmerge.device import resolve_compute
    from fedmerge.domain.demo import domains_root
    from fedmerge.encoder.backbone import open_backbone
    from fedmerge.files import check_free
    from fedmerge.report.run.listing import coefficients_text
    from fedmerge.server import remerge

    torch.set_num_threads(config.runtime.server_threads)
    out = options.out or remerge.new_merge_folder(run or Path.cwd())
    check_free(out)
    experts = _experts(options, run, folders, hub)
    if config.mergerec.domains_per_step is None:
        experts = _in_memory(experts)  # each merge reads all of them
    backbone, catalogs = None, {}
    if remerge.needs_backbone(config):
        root = (
            Path(config.server.catalogs)
            if config.server.catalogs is not None
            else domains_root(config.domains.root, config.cache_dir)
        )
        catalogs = remerge.catalogs_of(experts, root)
        compute = resolve_compute(config.runtime.device, config.runtime.precision)
        source = config.backbone
        backbone = open_backbone(source, compute)
    candidates = remerge.merge_again(
        experts, config, backbone, catalogs, lambda line: print(line, file=sys.stderr, flush=True)
    )
    written = remerge.write_merges(candidates, experts, config, out)
    print(f"merged {', '.join(experts.adapters)}{_without(list(experts.excluded))}")
    _print_lines(experts.sources.notes())
    for candidate in candidates:
        print(f"{written[candidate.label]}: {coefficients_text(candidate.provenance.coefficients)}")
    _print_note(remerge.heads_note(run))
    return 0


def _print_note(note: str) -> None:
    if note:
        print(note)


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        print(line)


def _experts(
    options: argparse.Namespace, run: Path | None, folders: dict[str, Path], hub: HubSources, whole: bool = False
) -> "Experts":
    from dataclasses import replace

    from fedmerge.errors import ConfigError
    from fedmerge.server import remerge

    if run is not None:
        if options.leave_out or options.base is not None:
            raise ConfigError(
                "merge: found --leave-out or --base beside a run, whose adapters are plain LoRA. Omit it."
            )
        return remerge.experts_of_run(run, options.exclude)
    parts = {"whole": whole, "leave_out": _parts(options.leave_out), "base": options.base}
    experts = remerge.experts_in(folders, options.exclude, options.base_model, **parts)
    kept = {name: source for name, source in hub.items() if name in experts.adapters}
    return replace(experts, sources=replace(experts.sources, hub=kept))


def _in_memory(experts: "Experts") -> "Experts":
    from dataclasses import replace

    from fedmerge.adapter import in_memory

    adapters = {name: in_memory(adapter) for name, adapter in experts.adapters.items()}
    return replace(experts, sources=replace(experts.sources, adapters=adapters))


def _parts(text: str) -> list[str]:
    from fedmerge.encoder.peft.contents import PARTS
    from fedmerge.errors import ConfigError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"merge: --leave-out: found {', '.join(unknown)}; expected some of {', '.join(PARTS)}.")
    return parts


def _dtype(name: str | None) -> "torch.dtype":
    import torch

    dtype: torch.dtype = getattr(torch, name or "float32")
    return dtype


def _without(names: list[str]) -> str:
    return f", without {', '.join(names)}" if names else ""


def _config_beside(run: Path | None, experts: "Experts") -> dict[str, str]:
    """Write the settings of the run beside a merge of its experts, for its evaluation."""
    from fedmerge.config import load_config, to_toml
    from fedmerge.server.remerge import settings_of

    if run is None or not (run / "config.toml").is_file():
        return {}
    return {"config.toml": to_toml(settings_of(experts, load_config(run / "config.toml")))}


def _check_groups(options: argparse.Namespace) -> None:
    """Raise ConfigError for flags that the selected form of the command does not read."""
    from fedmerge.errors import ConfigError

    of_one = ["coefficients", "scope", "space", "output_rank", "seed", "dtype", "parameter", *PARAMETERS]
    given = [_flag(name) for name in of_one if getattr(options, name) is not None]
    if given and options.method is None:
        raise ConfigError(f"merge: found {', '.join(given)} without --method. Give --method, or settings with --set.")
    named = {"--config": options.config, "--set": options.overrides or None, "--catalogs": options.catalogs}
    given = [flag for flag, value in named.items() if value is not None]
    if options.of_merges and (options.coefficients is not None or options.method is None or len(options.sources) < 2):
        raise ConfigError(
            "merge: --of-merges takes --method average or task-arithmetic and two or more folders of merges, and no "
            "--coefficients: it computes them. Correct the command, or omit --of-merges."
        )
    if given and options.method is not None:
        raise ConfigError(
            f"merge: found {', '.join(given)} beside --method, which reads no settings. Omit --method, or give "
            f"its parameters as flags (`fedmerge methods {options.method}`)."
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _adapters(sources: list[str], cache_dir: str | None) -> tuple[dict[str, Path], HubSources]:
    """Parse ``NAME=DIR`` or ``DIR``, named after its folder; return nothing if the only source must be a run.

    A source ``ORG/REPO@REVISION`` that is no folder is fetched from the hub or its cache, an address of shared storage
    to the client's cache.
    """
    from fedmerge.config import DOMAIN_NAME
    from fedmerge.encoder.peft.hub import fetch_adapter, hub_adapter
    from fedmerge.errors import ConfigError, LayoutMismatchError
    from fedmerge.runs.reading import is_run
    from fedmerge.storage.addresses import is_address, name_of

    folders: dict[str, Path] = {}
    hub: HubSources = {}
    for source in sources:
        name, equals, path = source.partition("=")
        folder = Path(path) if equals and not Path(source).exists() else Path(source)
        name = name if folder != Path(source) else folder.resolve().name
        if is_address(path if equals else source):
            name, folder = name if equals else name_of(source), fetched_adapter(path if equals else source, cache_dir)
        elif not folder.exists() and (found := hub_adapter(str(folder))):
            name = found.name if folder == Path(source) else name
            folder, commit = fetch_adapter(found)
            hub[name] = {"repository": found.repository, "revision": found.revision, "commit": commit}
        adapter = (folder / "adapter_config.json").is_file()
        if len(sources) == 1 and not adapter:
            return {}, {}
        if not adapter and is_run(folder):
            raise ConfigError(
                f"merge: {folder} is a run, expected a PEFT folder beside other adapters. Give only the run, "
                f"or its adapters: {folder / 'adapters'}/*."
            )
        if not folder.is_dir():
            raise LayoutMismatchError(
                f"adapter {folder}: no such folder. Give an adapter of the hub with its revision: ORG/REPO@main."
            )
        if name in folders:
            raise ConfigError(
                f"merge: {folders[name]} and {folder} are both named {name!r}; expected different names. "
                f"Give one as NAME={folder}."
            )
        if not re.fullmatch(DOMAIN_NAME, name):
            raise ConfigError(
                f"merge: found the name {name!r}; expected letters, digits, '.', '_' and '-', at most 64. "
                f"Give it as NAME={folder}."
            )
        folders[name] = folder
    if len(folders) == 1:
        raise ConfigError(f"merge: found one adapter, {sources[0]}; expected at least two adapters or one run.")
    return folders, hub


def _coefficients(text: str | None, names: list[str]) -> dict[str, float] | None:
    """Parse ``NAME=X,…``, or ``X,…`` in the order of the folders."""
    from fedmerge.errors import ConfigError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    pairs = [part.rpartition("=") for part in parts]
    try:
        values = [float(value) for _, _, value in pairs]
    except ValueError:
        values = []
    named = all(equals for _, equals, _ in pairs)
    keys = [name for name, _, _ in pairs] if named else names
    mixed = any(equals for _, equals, _ in pairs) and not named
    if not values or mixed or len(keys) != len(values) or len(set(keys)) != len(keys):
        expected = f"NAME=X,… or {len(names)} numbers, for {', '.join(names)}" if names else "NAME=X,…"
        raise ConfigError(f"merge: --coefficients: found {text!r}; expected {expected}.")
    return dict(zip(keys, values, strict=True))


def _config_of(adapters: list[Path]) -> Path | None:
    """Return the configuration of the adapters' runs, which must agree in backbone and text settings."""
    from fedmerge.config import load_config
    from fedmerge.encoder.adapter_records import config_of_adapter
    from fedmerge.errors import ConfigError

    paths = [path for adapter in adapters if (path := config_of_adapter(adapter))]
    configs = [load_config(path) for path in dict.fromkeys(paths)]
    if any((config.backbone, config.text) != (configs[0].backbone, configs[0].text) for config in configs):
        raise ConfigError(
            "merge: the runs of these adapters have different backbone or text settings "
            f"({', '.join(map(str, paths))}). Give --config FILE."
        )
    return paths[0] if paths else None
