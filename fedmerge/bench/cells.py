"""The work of a benchmark in cells: plain functions that write one file, atomically, as their last step.

A cell whose file exists is skipped, so a killed benchmark resumes. Ranks of single users are under ``clients/``, which
represents the clients' own disks: only sums over users and the figures of configured audits leave it.
"""

import resource
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.bench.config import Drawing
from fedmerge.bench.federated_heads import rank_federated_head, train_federated_head
from fedmerge.bench.joint import train_jointly
from fedmerge.bench.personal import fit_personal, sent_coefficients
from fedmerge.bench.ranking import backbone_of, domain_of, num_users, questions, rank_baseline, rank_head, rank_model
from fedmerge.client.audit.attacks import Audited, audit_domain
from fedmerge.client.audit.similarity import factors_for
from fedmerge.client.coefficients.layer_maps import ndcg_of, validation_readers
from fedmerge.client.evaluate import evaluate
from fedmerge.client.training.settings import training_settings
from fedmerge.config import (
    LEARNED_METHODS,
    ExperimentConfig,
    Rounds,
)
from fedmerge.domain.catalog import Catalog, load_catalog
from fedmerge.domain.demo import domain_folder
from fedmerge.domain.manifest import check_catalog_is_public, read_manifest
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import FedMergeError
from fedmerge.evaluation.ranks import SELECTION_METRIC
from fedmerge.federated.rounds import aggregate, initial_state
from fedmerge.federated.rules import rule_named
from fedmerge.files import make_folder, read_json, whole_folder, write_json
from fedmerge.mergerec.layer_maps.candidates import LayerCandidates, LayerMap, assemble
from fedmerge.mergerec.layer_maps.episodes import FoundMap, Sums
from fedmerge.merging.candidate import Candidate, Origin, Provenance
from fedmerge.merging.methods import method_named
from fedmerge.merging.parameters import parse_parameters
from fedmerge.privacy.policy import check_enough_users
from fedmerge.runs.checkpoints import (
    MERGED,
    WOVEN_MERGES,
    merge_folder,
    read_candidates,
    read_sources,
    read_weave,
    stored_experts,
    stored_factors,
    stored_signals,
    stored_woven,
    weave_record,
    write_candidate,
)
from fedmerge.runs.folder import environment
from fedmerge.runs.round_checkpoints import round_records
from fedmerge.server.candidates import (
    candidate_of_rounds,
    learn_from_catalogs,
    merge_candidates,
    recipe_of,
    universal_candidate,
)
from fedmerge.server.gate import check_experts, leave_one_out_merges, votes_of
from fedmerge.server.layer_search import NDCG_SCALE, Search, search_on_pseudo_users, search_with
from fedmerge.server.refined import refined_candidates
from fedmerge.server.woven import woven_candidate_of, woven_candidates

MERGES = "merges.json"
JOINT = "joint.json"


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    Attributes:
        kind: a key of WORK.
        title: name in progress lines and errors.
        result: file that the cell writes last.
        arguments: arguments of the function, besides ``result``.
        threads: CPUs that it uses.
    """

    kind: str
    title: str
    result: Path
    arguments: Mapping[str, Any]
    threads: int


@dataclass(frozen=True)
class Ended:
    """A cell that finished or failed: the error ("" if none), and the seconds of its own work."""

    cell: Cell
    problem: str
    seconds: float


@dataclass(frozen=True)
class Running:
    """Report that no cell has ended for a while, with the running cells."""

    cells: tuple[Cell, ...]


def work(cell: Cell) -> Ended:
    """Run a cell in this process; a FedMergeError becomes its problem."""
    started = time.monotonic()
    problem = ""
    try:
        _do(cell)
    except FedMergeError as error:
        problem = f"{type(error).__name__}: {error}"
    return Ended(cell, problem, time.monotonic() - started)


def work_in_task(cell: Cell) -> Ended:
    """Do a cell in a Ray task; whatever is raised is its problem, with the traceback.

    Here, since the processes of Ray can import ``fedmerge`` everywhere, and ``sim`` in a checkout only.
    """
    try:
        return work(cell)
    except Exception:
        return Ended(cell, traceback.format_exc(), 0.0)


def _do(cell: Cell) -> None:
    torch.set_num_threads(cell.threads)
    cell.result.parent.mkdir(parents=True, exist_ok=True)
    WORK[cell.kind](cell.result, **cell.arguments)


def is_one_shot(rounds: Rounds) -> bool:
    """Return True if a strategy merges experts that are trained once.

    This includes a rule of a single round, if it does not change the clients' training.
    """
    if rounds.rule is None:
        return True
    plain = rounds.number == 1 and rounds.fraction == 1 and rounds.weights == "equal" and not rounds.proximal
    return plain and rounds.rule not in LEARNED_METHODS and rule_named(rounds.rule).trained == "A and B"


def check_admission(result: Path, config: ExperimentConfig, run: Path, left_out: str) -> None:
    """Run the admission gate on the experts of a training run.

    Args:
        result: receives the gate's record, seconds of the server and of the clients, and bytes to the clients.
        config: an experiment with a gate, and with the seed that selects the evaluated users.
        run: folder of the training run.
        left_out: a domain that is not merged, or "".

    Raises:
        FedMergeError: the check failed.
    """
    started = time.monotonic()
    sources = {domain: sha256 for domain, sha256 in (read_sources(run) or {}).items() if domain != left_out}
    experts = stored_experts(run, sources)
    votes, size_bytes, client_seconds = {}, 0, 0.0
    if config.admission.leave_one_out and (merges := leave_one_out_merges(experts)):
        voting = time.monotonic()
        for voter in sources:
            sums = evaluate(
                domain_of(config, voter), merges, "valid", num_users(config.evaluation, "valid"), config.seed
            )
            check_enough_users(voter, sums["unmasked"].num_users, config.privacy.min_users)
            others = [domain for domain in sources if domain != voter]
            votes[voter] = votes_of(sums["unmasked"], others, SELECTION_METRIC)
        size_bytes = sum(merge.size_bytes for merge in merges.values()) * len(sources)
        client_seconds = time.monotonic() - voting
    probed = config.admission.probe_items is not None
    backbone = backbone_of(config.backbone, config.runtime) if probed else None
    catalogs = _catalogs(config, sources) if probed else {}
    record = check_experts(experts, config.admission, config.text, config.seed, backbone, catalogs, votes)
    seconds = time.monotonic() - started - client_seconds
    write_json(result, {**record, "seconds": seconds, "client_seconds": client_seconds, "bytes_down": size_bytes})


def write_merges(
    result: Path,
    config: ExperimentConfig,
    run: Path,
    without: tuple[str, ...],
    evaluation: ExperimentConfig,
    fits: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Make every merge of a strategy from the experts of a training run.

    Args:
        result: receives the merges' labels and hashes, seconds and peak memory; the merges are beside it.
        config: the strategy's experiment.
        run: folder of the training run.
        without: domains that are not merged.
        evaluation: the experiment with the seed that selects the evaluated users.
        fits: domain -> record of its personal merge, for the universal one.

    Raises:
        FedMergeError: a merge failed.
    """
    started = time.monotonic()
    _forget_peak()
    if not is_one_shot(config.rounds):
        _take_rounds(result, run, started)
        return
    sources = {domain: sha256 for domain, sha256 in (read_sources(run) or {}).items() if domain not in without}
    if config.rounds.rule is not None:
        write_candidate(
            result.parent, _one_round(config, stored_experts(run, sources), sources), config.backbone.source
        )
        _write_merges(result, read_candidates(result.parent, sources).values(), started)
        return
    if config.weave.schedule is not None:
        _write_woven(result, config, run, sources, started)
        return
    origin, recipe = Origin(sources, None, config.privacy.policy), replace(recipe_of(config), at_clients=False)
    variants, experts = recipe.variants(), stored_experts(run, sources)
    learn = search = backbone = None
    catalogs: Mapping[str, Catalog] = {}
    if config.refines_merges or any(method_named(variant.method).learned for variant in variants):
        public = not config.privacy.learns_through_clients  # else the cell reads catalogs in place of the clients
        backbone, catalogs = backbone_of(config.backbone, config.runtime), _catalogs(config, sources, public)
        learn = learn_from_catalogs(backbone, experts, catalogs, config.text)
        search = search_on_pseudo_users(backbone, experts, catalogs, config, folder=result.parent)
        if config.rmm.reward == "validation":
            search = _search_on_validation(config, evaluation, experts, result.parent)
        origin = replace(origin, backbone=backbone.record)
    finished = read_candidates(result.parent, sources)

    def keep(made: Candidate) -> None:
        write_candidate(result.parent, made, config.backbone.source)

    candidates = merge_candidates(
        experts,
        variants,
        origin,
        recipe,
        learn=learn,
        search=search,
        signals=stored_signals(run, experts),
        finished=finished,
        keep=keep,
    )
    candidates += refined_candidates(
        candidates, backbone, catalogs, config, folder=result.parent, finished=finished, keep=keep
    )
    if config.personal.universal:
        sent = sent_coefficients(fits, config.privacy.min_users)
        candidates.append(universal_candidate(experts, sent, config.personal, origin))
        write_candidate(result.parent, candidates[-1], config.backbone.source)
    _write_merges(result, candidates, started)


def _search_on_validation(
    config: ExperimentConfig, evaluation: ExperimentConfig, experts: Mapping[str, Adapter], folder: Path
) -> Search:
    """Return a layer-wise search by validation users, in place of the clients; the readings are in ``folder``."""
    rmm = config.rmm

    def search(candidates: LayerCandidates) -> FoundMap:
        opened = {domain: domain_of(config, domain) for domain in sorted(experts)}
        readers = {}
        for name, domain in opened.items():
            validated = questions(evaluation, name, "valid", None)
            readers[name] = validation_readers(domain, validated, rmm.users, rmm.shards, config.seed)

        def read(layer_map: LayerMap, shard: int) -> Sums:
            adapter, sums = assemble(candidates, layer_map), dict[str, tuple[int, float]]()
            for name, domain in opened.items():
                users = readers[name].at(shard)
                check_enough_users(name, len(users), config.privacy.min_users)
                num_users, ndcg = ndcg_of(domain, adapter, users, config.seed)
                sums[name] = num_users, NDCG_SCALE * ndcg
            return sums

        return search_with(candidates, read, config, experts, lambda line: None, folder)

    return search


def _write_woven(result: Path, config: ExperimentConfig, run: Path, sources: Mapping[str, str], started: float) -> None:
    """Write the universal merges of woven adapters, and for each domain those of what it trained, with each factor."""
    hashes = read_weave(run) or {}
    experts, woven = stored_experts(run, sources), stored_woven(run, hashes)
    origin, record = Origin(sources, None, config.privacy.policy), weave_record(hashes)
    candidates = woven_candidates(
        experts,
        woven,
        config.weave,
        record,
        origin,
        finished=read_candidates(result.parent, sources),
        keep=lambda made: write_candidate(result.parent, made, config.backbone.source),
    )
    of_targets: dict[str, dict[str, str]] = {}
    for domain in sorted({each.target for each in hashes}):
        for factor in config.weave.factors:
            made = woven_candidate_of(domain, experts[domain], woven, factor, config.weave, record, origin)
            folder = target_folder(result.parent, domain, made.label)
            make_folder(folder.parent)
            with whole_folder(folder) as filled:
                write_adapter(made.adapter, filled, config.backbone.source)
            of_targets.setdefault(domain, {})[made.label] = made.provenance.sha256
    _write_merges(result, candidates, started, of_targets)


def target_folder(merges: Path, domain: str, label: str) -> Path:
    """Return the folder of a merge of what one domain trained, in the folder of a strategy's merges."""
    return merges / WOVEN_MERGES / domain / label.replace(" ", "-")


def _write_merges(
    result: Path,
    candidates: Iterable[Candidate],
    started: float,
    woven: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> None:
    hashes = {candidate.label: candidate.provenance.sha256 for candidate in candidates}
    measured = {"seconds": time.monotonic() - started, "peak_bytes": _peak_bytes()}
    of_targets = {"woven": woven} if woven else {}
    write_json(result, {"merges": hashes, **of_targets, **measured, "environment": environment()})


def _one_round(config: ExperimentConfig, experts: Mapping[str, Adapter], sources: Mapping[str, str]) -> Candidate:
    """Aggregate the experts as one round of a federation that starts from B = 0."""
    rule = str(config.rounds.rule)
    adapters = dict(experts)
    starts = {
        domain: Adapter(
            {
                name: LoraModule(module.lora_A, torch.zeros_like(module.lora_B), module.scaling)
                for name, module in adapter.modules.items()
            }
        )
        for domain, adapter in adapters.items()
    }
    parameters = parse_parameters(config.rounds.parameters)
    state = aggregate(rule, initial_state(starts), adapters, None, seed=config.seed, **parameters)
    aggregations = [asdict(state.report)] if state.report else []
    origin = Origin(sources, None, config.privacy.policy)
    return candidate_of_rounds(state.adapter, config.rounds, aggregations, origin)


def _take_rounds(result: Path, run: Path, started: float) -> None:
    """Copy the global adapter of a federation of rounds, which is its strategy's only merge."""
    (made,) = (run / MERGED).glob("[!.]*")
    provenance = Provenance.from_dict(read_json(made / "provenance.json"))
    label = str(provenance.label)
    with whole_folder(merge_folder(result.parent, label)) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True)
    seconds = sum(record["seconds"] for record in round_records(run)) + time.monotonic() - started
    merges = {label: provenance.sha256}
    write_json(result, {"merges": merges, "seconds": seconds, "peak_bytes": None})


def train_joint(result: Path, config: ExperimentConfig, domains: Sequence[str], drawing: Drawing) -> None:
    """Train one adapter on pooled data, or resume that training.

    Args:
        result: receives the adapter's hash, the report of the training and peak memory; the adapter is beside it.
        config: lora, train, text, backbone, runtime and seed count.
        domains: domains whose users are pooled.
        drawing: order in which their users are drawn.

    Raises:
        FedMergeError: a domain without training users, or a training that diverges.
    """
    _forget_peak()
    checkpoint = result.with_name("checkpoint.safetensors")
    opened = {domain: domain_of(config, domain) for domain in domains}
    lora = config.lora.model_copy(update={"ranks": ()})
    adapter, training = train_jointly(opened, lora, config.train, config.seed, drawing, checkpoint=checkpoint)
    with whole_folder(joint_folder(result)) as folder:
        write_adapter(adapter, folder, config.backbone.source)
    report = asdict(training)
    report["validations"][0]["loss"] = None  # no loss before training; JSON has no NaN
    measured = {"peak_bytes": _peak_bytes(), "training": report, "environment": environment()}
    write_json(result, {"sha256": adapter_sha256(adapter), **measured})
    checkpoint.unlink(missing_ok=True)


def joint_folder(result: Path) -> Path:
    """Return the folder of a jointly trained adapter."""
    return result.with_name("adapter")


def audit_adapters(
    result: Path, config: ExperimentConfig, domain: str, expert: Path | None, merged: Path, run: Path
) -> None:
    """Audit an expert and a merge with attacks that need no shadow trainings.

    Args:
        result: on the client's own disk; see :func:`fedmerge.client.audit.attacks.audit_domain`.
        config: configuration of the training: audit, train, text, backbone, runtime and seed count.
        domain: its name.
        expert: a PEFT folder; None after rounds.
        merged: the same.
        run: folder of the training run, which holds what else was sent.
    """
    adapter = None if expert is None else read_adapter(expert)
    opened, settings, factors = domain_of(config, domain), training_settings(config), stored_factors(run)
    audited = Audited(opened, settings, adapter, read_adapter(merged), {}, None, factors=factors_for(domain, factors))
    write_json(result, audit_domain(audited, num_shadows=0))


WORK: Mapping[str, Callable[..., None]] = {
    "joint training": train_joint,
    "admission": check_admission,
    "personal merge": fit_personal,
    "merging": write_merges,
    "ranking": rank_model,
    "baseline": rank_baseline,
    "head": rank_head,
    "federated head": train_federated_head,
    "federated ranking": rank_federated_head,
    "audit": audit_adapters,
}


# ---- catalogs, memory


def _catalogs(config: ExperimentConfig, domains: Mapping[str, str], public: bool = True) -> dict[str, Catalog]:
    given = config.server.catalogs
    folders = {
        domain: domain_folder(config.domains.root, domain, config.cache_dir) if given is None else Path(given) / domain
        for domain in domains
    }
    for domain in domains if public else ():
        check_catalog_is_public(domain, read_manifest(folders[domain]).public_catalog)
    return {domain: load_catalog(folder) for domain, folder in folders.items()}


def _forget_peak() -> None:
    """Reset this process's peak memory, if the kernel supports it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
