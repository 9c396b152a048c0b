"""Problems of an experiment that this machine's files can show before anything is started."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fedmerge.backbone_files import find_backbone, missing_target_modules, model_type_of
from fedmerge.config import DEMO_ROOT, ExperimentConfig, Simulation
from fedmerge.domain.demo import BUNDLED_DOMAINS
from fedmerge.domain.folder import list_domains
from fedmerge.domain.manifest import (
    DP_BY_USER,
    MANIFEST_FILE,
    NOISED_METRICS,
    OTHER_ATTRIBUTES,
    Manifest,
    check_catalog_is_given,
    check_may_attack,
    read_manifest,
)
from fedmerge.encoder.families import check_decoder, conventions_of
from fedmerge.errors import BackboneError, ConfigError, FedMergeError
from fedmerge.storage.addresses import is_address
from fedmerge.storage.fetching import has_file


def check_simulation(config: ExperimentConfig) -> None:
    """Refuse an experiment that cannot work in a simulation on this machine.

    Raises:
        ConfigError: every problem, a line each.
    """
    _refuse(_simulation_problems(config))


def check_simulations(experiments: Mapping[str, ExperimentConfig]) -> None:
    """Refuse several experiments, each problem once with the first experiment that has it.

    Args:
        experiments: its name in the message -> experiment.

    Raises:
        ConfigError: every problem of any of them, a line each.
    """
    found: dict[str, list[str]] = {}
    for name, config in experiments.items():
        for problem in _simulation_problems(config):
            found.setdefault(problem, []).append(name)

    def described(problem: str, names: list[str]) -> str:
        if len(names) == len(experiments):
            return problem
        return f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}: {problem}"

    _refuse([described(problem, names) for problem, names in found.items()])


def check_for_federation(config: ExperimentConfig) -> None:
    """Refuse an experiment whose settings cannot work on a federation's machines, where the data are.

    Raises:
        ConfigError: every problem, a line each.
    """
    problems = _settings_problems(config)
    if config.simulation != Simulation():
        problems.append(
            "[simulation] is for simulations alone, and every client of a federation refuses it; remove its keys"
        )
    _refuse(problems)


def _refuse(problems: list[str]) -> None:
    if problems:
        plural = "s" * (len(problems) > 1)
        raise ConfigError(
            f"{len(problems)} problem{plural} found before the start\n" + "\n".join(f"  {p}" for p in problems)
        )


def _simulation_problems(config: ExperimentConfig) -> list[str]:
    problems = [*_settings_problems(config), *_backbone_problems(config), *_data_problems(config)]
    if config.runtime.device not in ("auto", "cpu", "cuda", "cuda:0"):
        problems.append(
            f"runtime.device = {config.runtime.device!r}: a simulated client sees only the GPUs that it is given, from "
            "'cuda:0' on. Set 'cuda'; CUDA_VISIBLE_DEVICES chooses among the machine's"
        )
    return problems


def _settings_problems(config: ExperimentConfig) -> list[str]:
    return [*_rule_problems(config), *_method_problems(config), *_tracking_problems(config)]


def _rule_problems(config: ExperimentConfig) -> Iterator[str]:
    if config.rounds.rule is not None:
        from fedmerge.federated.rules import check_rounds  # noqa: PLC0415  # imports torch, for which other runs need not wait

        yield from _problems_of(lambda: check_rounds(config.rounds, len(config.domains.train)))


def _method_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yield the functions of ``merge.methods`` that cannot be imported, or cannot be merging methods."""
    for name in config.merge.methods:
        if ":" in name:
            from fedmerge.merging.methods import method_named  # noqa: PLC0415  # imports torch, as the function does

            try:
                method_named(name)
            except FedMergeError as error:
                yield f"merge.methods: {error}"


def _tracking_problems(config: ExperimentConfig) -> Iterator[str]:
    tracking = config.tracking
    if tracking is not None:
        from fedmerge.report.tracking import check_tracking  # noqa: PLC0415  # imports the viewer's package

        yield from _problems_of(lambda: check_tracking(tracking))


def _backbone_problems(config: ExperimentConfig) -> Iterator[str]:
    source, targets = config.backbone.source, config.lora.target_modules
    try:
        name, folder = find_backbone(source, download=False)
    except BackboneError as error:
        if Path(source).expanduser().is_dir() or source.startswith((".", "/", "~")):  # else the run downloads it
            yield str(error)
        return
    try:
        conventions_of(config.backbone, folder)
        missing = missing_target_modules(folder, targets)
        if asked := config.asks_for_decoder:
            check_decoder(model_type_of(folder), name, asked)
    except FedMergeError as error:
        yield str(error)
        return
    if missing:
        yield (
            f"lora.target_modules: {name} has no linear layer {', '.join(missing)}; name layers of its own, or "
            "'all-linear'"
        )


def _data_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yield problems of the domain folders, as their manifests show them; the bundled demo can only lack a name."""
    root, names = config.domains.root, config.domains.train + config.domains.unseen
    if is_address(root):
        try:
            missing = [name for name in names if not has_file(f"{root.rstrip('/')}/{name}", MANIFEST_FILE)]
        except FedMergeError as error:
            yield f"domains.root: {error}"
        else:
            if missing:
                yield f"domains.root = {root!r} has no domain {', '.join(missing)}; correct the address or the names"
        return
    try:
        known = BUNDLED_DOMAINS if root == DEMO_ROOT else list_domains(Path(root).expanduser())
    except FedMergeError as error:
        yield f"domains.root: {error}"
        return
    if missing := [name for name in names if name not in known]:
        yield (
            f"domains.root = {root!r} has no domain {', '.join(missing)}; it has: {', '.join(known) or 'none'}. "
            "Make domain folders with 'fedmerge data import' or 'fedmerge data demo', or correct domains.train and "
            "domains.unseen."
        )
    if config.server.catalogs is not None and not Path(config.server.catalogs).expanduser().is_dir():
        yield f"server.catalogs = {config.server.catalogs!r}: no such folder; correct the path, or set 'none'"
    for name in names if root != DEMO_ROOT else ():
        if name not in missing:
            try:
                manifest = read_manifest(Path(root).expanduser() / name)
            except FedMergeError as error:
                yield str(error)
            else:
                yield from _domain_problems(config, manifest)


def _domain_problems(config: ExperimentConfig, manifest: Manifest) -> Iterator[str]:
    name, dp = manifest.name, config.dp
    trains, wanted = name in config.domains.train, config.domains.attributes
    if wanted and manifest.attributes != wanted:
        yield (
            f"domain {name}: its items have the attributes {','.join(manifest.attributes)}, but domains.attributes is "
            f"{','.join(wanted)}; {OTHER_ATTRIBUTES}"
        )
    if (by_user := trains and dp.mode == "user") or config.privacy.metrics == "noised":
        setting = DP_BY_USER if by_user else NOISED_METRICS
        yield from _problems_of(lambda: check_catalog_is_given(manifest, setting))
    if not trains:
        return
    if name == config.simulation.attacker:
        yield from _problems_of(lambda: check_may_attack(manifest))
    if dp.mode == "user" and dp.delta is not None and dp.delta >= 1 / manifest.num_users:
        yield (
            f"domain {name}: dp.delta = {dp.delta:g} is not below one over its {manifest.num_users} users; set "
            f"dp.delta well below {1 / manifest.num_users:.2g}"
        )
    if not manifest.public_catalog and dp.mode == "user":
        yield (
            f"domain {name}: dp.mode = 'user' needs a public catalog, since every item is every user's negative, but "
            "its manifest says public_catalog = false; import the domain again with --public-catalog, or leave it out"
        )
    elif not manifest.public_catalog and _clients_send_catalogs(config):
        yield (
            f"domain {name}: its manifest says public_catalog = false, but the experiment asks for its catalog; set "
            "privacy.policy = 'catalog-private', leave learned merges and admission.probe_items out, or import the "
            "domain again with --public-catalog"
        )


def _clients_send_catalogs(config: ExperimentConfig) -> bool:
    if not config.privacy.sends_catalogs or config.server.catalogs is not None:
        return False
    return bool(
        config.admission.probe_items
        or config.refines_merges
        or (config.methods_from_catalogs and config.until != "train")
    )


def _problems_of(check: Callable[[], None]) -> Iterator[str]:
    try:
        check()
    except FedMergeError as error:
        yield str(error)
