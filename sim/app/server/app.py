"""The server: ask, train, collect, merge, evaluate on validation, choose, read test once, report.

Every phase writes each result as soon as it exists (see ``fedmerge.runs.folder``) and starts from the results on
disk, so a killed run resumes where it was.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedmerge.config import ExperimentConfig, Split, from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog, catalog_from_bytes, load_catalog
from fedmerge.domain.manifest import check_catalog_is_public, read_manifest
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.errors import ClientError
from fedmerge.evaluation.sums import EXPERT
from fedmerge.files import read_json, read_lines, write_json, write_table, write_text
from fedmerge.mergerec.variants import labels_from_catalogs
from fedmerge.merging.candidate import Candidate
from fedmerge.privacy.dp.accountant import opacus_accountants
from fedmerge.privacy.dp.agreement import check_releases, check_spent
from fedmerge.privacy.dp.statement import PRIVACY_FILE, privacy_statement, statement_text
from fedmerge.privacy.signatures import read_registered_keys
from fedmerge.privacy.transport import coding_of
from fedmerge.report.run.final_report import Evaluated, attack_note, metric_rows, product_rows, run_report
from fedmerge.report.tables import Role
from fedmerge.report.tracking import check_tracking, track_run
from fedmerge.runs import checkpoints
from fedmerge.runs.dp_spent import not_counted, spent_by_domain
from fedmerge.runs.folder import DONE, create_run, environment, locked, open_run, run_to_resume
from fedmerge.server.admission import adapter_bytes, check_adapter, layout_of
from fedmerge.server.candidates import merge_candidates
from fedmerge.server.choice import FALLBACK, choose, choose_per_domain, dropped_domains, roll_back, suffix_without
from fedmerge.server.gate import probes
from sim.app.messages import records
from sim.app.server.admission import pass_gate
from sim.app.server.asking import DESCRIBE_SECONDS, LEDGER, Federation, Question, ask, listed, own_noise, require_quorum
from sim.app.server.coefficients import learn_through_clients
from sim.app.server.evaluating import evaluate_models
from sim.app.server.joining import gather, greet, remember, say_who_took_part
from sim.app.server.releases import trainings_released
from sim.app.server.rounds import check_rounds, run_rounds
from sim.app.server.secure_sum import REPORT_BYTES, secure_candidates

CATALOG_BYTES_PER_ITEM = 4096  # at most, and a mebibyte for a small catalog
MOST_CATALOG_BYTES = 2**30  # however many items a client says that it has

app = ServerApp()
logger = logging.getLogger("fedmerge.server")


@dataclass(frozen=True)
class Choice:
    """What validation chose; final once it is on disk.

    Attributes:
        best: method -> label of its best variant.
        served: label of the best of all.
        domains: whose validation decided.
        per_domain: domain -> whether it is served the merge or its own expert, with both scores.
        dropped: domains that the merge chosen first ranks worse than their own expert, see
            :func:`fedmerge.server.choice.dropped_domains`.
        rollback: what was served in its place, see :func:`fedmerge.server.choice.roll_back`.
    """

    best: Mapping[str, str]
    served: str
    domains: list[str]
    per_domain: Mapping[str, Mapping[str, Any]]
    dropped: Mapping[str, Mapping[str, float]]
    rollback: Mapping[str, Any] | None


@dataclass(frozen=True)
class Made:
    """The merges that validation chooses from.

    Attributes:
        members: domains that are in them.
        sources: domain -> hash of its expert; empty after rounds, which leave none.
        candidates: the merges.
        failed: domain -> why the gate would not have its expert.
    """

    members: list[str]
    sources: Mapping[str, str]
    candidates: list[Candidate]
    failed: Mapping[str, str]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One experiment; raises when it cannot be finished, so that Flower marks the run as failed."""
    config = from_flat(context.run_config)
    wanted = Path(config.output_dir).expanduser().resolve() / str(config.run_id)
    folder = run_to_resume(wanted) if config.resume else create_run(config)
    if (folder / DONE).is_file():
        _log_to(None)
        logger.info("%s is finished; nothing is left to do", folder)
        return
    with locked(folder):
        if config.resume:
            open_run(config)
        _log_to(folder / "run.log")
        logger.info("run folder: %s%s", folder, ", resumed" if config.resume else "")
        try:
            server = config.server
            federation = Federation(grid, folder, server.messages_at_once, server.return_seconds)
            if server.client_keys is not None:
                federation.keys = read_registered_keys(Path(server.client_keys))
            _experiment(config, federation, folder)
        except Exception:
            logger.exception("the run failed")
            raise


def _experiment(config: ExperimentConfig, federation: Federation, run_dir: Path) -> None:
    torch.set_num_threads(config.runtime.server_threads)
    started = time.monotonic()
    check_rounds(config)
    if config.simulation.attacker is not None:
        logger.warning("%s", attack_note(config.simulation))
    if config.dp.mode != "none":
        opacus_accountants()  # before any work
    check_releases(config)
    check_tracking(config.tracking)
    _say_what_changed(run_dir)
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    backbone = load_backbone(config.backbone.source, config.backbone.pooling, compute, config.backbone.weights_sha256)
    try:
        remember(federation, run_dir)
        gather(federation, config, backbone)
        catalogs = _catalogs(federation, config, run_dir)
        made = _candidates(federation, config, backbone, catalogs, run_dir)
        if config.until == "train":
            write_text(run_dir / DONE, f"the experts were there after {time.monotonic() - started:.0f} s\n")
            logger.info("the experts are there, run folder: %s", run_dir)
            return
        validation, choice = _choose(federation, config, made, run_dir)
        chosen = [candidate for candidate in made.candidates if candidate.label in choice.best.values()]
        if late := greet(federation, config, backbone):
            logger.info("came late and are tested as unseen: %s", listed(late))
        adapters = {candidate.label: candidate.adapter for candidate in chosen}
        test = evaluate_models(federation, config, "test", sorted(federation.nodes), adapters, made.sources, run_dir)
        require_quorum(federation, config, [domain for domain in test if domain in made.members])
    finally:
        federation.write_clients()
        federation.write_ledger()
        spent = _say_what_was_spent(config, run_dir)  # also of a run that fails: what was released has left its client
    roles: dict[str, Role] = {
        domain: "train" if domain in made.members else "unseen" for domain in [*validation, *test]
    }
    splits: dict[Split, dict[str, checkpoints.Sums]] = {"valid": validation, "test": test}
    write_table(run_dir / "metrics.parquet", metric_rows(splits, roles))
    write_table(run_dir / "products.parquet", product_rows(splits))
    report = run_report(
        Evaluated(
            test,
            roles,
            merged=[candidate.label for candidate in chosen],
            served=choice.served,
            per_domain=choice.per_domain,
            excluded={name: exclusion.reason for name, exclusion in federation.excluded.items()},
            merged_domains=made.members,
            synthetic=any(federation.descriptions[domain].synthetic for domain in test),
            attack=attack_note(config.simulation),
            flagged={domain: reason for domain, reason in made.failed.items() if domain in made.members},
            dropped=choice.dropped,
            rollback=choice.rollback,
        ),
        fallback=config.evaluation.fallback or (choice.rollback is not None and choice.rollback["to"] == FALLBACK),
    )
    report += spent
    write_text(run_dir / "report.txt", report)
    write_text(run_dir / DONE, f"finished after {time.monotonic() - started:.0f} s\n")
    federation.forget_ledger_lines()
    if config.tracking is not None:
        try:
            track_run(run_dir, config.tracking)
        except Exception:  # of a package that is not ours; the run is finished whatever it does
            logger.warning("tracking = '%s' failed; the run is finished without it", config.tracking, exc_info=True)
    logger.info("results\n\n%s", report)
    say_who_took_part(federation, config)
    logger.info("done in %.0f s, run folder: %s", time.monotonic() - started, run_dir)


def _candidates(
    federation: Federation,
    config: ExperimentConfig,
    backbone: Backbone,
    catalogs: Mapping[str, Catalog],
    run_dir: Path,
) -> Made:
    """Train and merge: over rounds, in secure sums, or once from the experts; no merges where the run ends before."""
    if config.rounds.rule is not None:
        members, after_rounds = run_rounds(federation, config, backbone, catalogs, run_dir)
        return Made(list(members), {}, [after_rounds], {})
    if config.privacy.policy == "aggregate-only":
        sources, sums = secure_candidates(federation, config, backbone, run_dir)
        return Made(list(sources), sources, sums, {})
    sources = _train(federation, config, backbone, catalogs, run_dir)
    if config.until == "train":
        return Made(list(sources), sources, [], {})
    sources, failed = pass_gate(federation, config, backbone, catalogs, sources, run_dir)
    candidates = _merge(federation, config, backbone, sources, catalogs, run_dir)
    if config.admission.rollback and failed and failed.keys() < sources.keys():
        candidates += _merge(federation, config, backbone, sources, catalogs, run_dir, without=sorted(failed))
    return Made(list(sources), sources, candidates, failed)


def _say_what_was_spent(config: ExperimentConfig, run_dir: Path) -> str:
    """Write down what differential privacy the run gives, if any; what the report says of it."""
    if config.dp.mode == "none":
        return ""
    catalogs = bool(labels_from_catalogs(config)) or probes(config)
    evaluated = any(line["message"] == records.EVALUATE for line in read_lines(run_dir / LEDGER))
    spent = spent_by_domain(run_dir, config)
    statement = privacy_statement(config.dp, spent, evaluated, catalogs, not_counted(run_dir))
    write_json(run_dir / PRIVACY_FILE, statement)
    return "\n" + statement_text(statement)


def _catalogs(federation: Federation, config: ExperimentConfig, run_dir: Path) -> dict[str, Catalog]:
    """The catalogs of the training domains, from the server's folder or from the clients, checked by hash.

    None is needed without a learned merge and without a probe, or when all that needs them is on disk.
    """
    labels = labels_from_catalogs(config)
    if not labels and not probes(config):
        return {}
    sources = checkpoints.ended_training(run_dir)
    probed = not probes(config) or read_json(run_dir / checkpoints.ADMISSION) is not None
    if sources is not None and probed:
        away = checkpoints.turned_away(run_dir)
        merged = {domain: sha256 for domain, sha256 in sources.items() if domain not in away}
        made = not config.admission.rollback or read_json(run_dir / "choice.json")  # else a second merge may be missing
        if made and labels <= checkpoints.kept_merges(run_dir, merged).keys():
            return {}
    federation.phase = "catalogs"
    domains = [domain for domain in federation.of("train") if sources is None or domain in sources]
    catalogs: dict[str, Catalog] = {}
    if config.server.catalogs is not None:
        for domain in domains:
            check_catalog_is_public(domain, read_manifest(Path(config.server.catalogs) / domain).public_catalog)
            catalogs[domain] = load_catalog(Path(config.server.catalogs) / domain)
    else:
        nodes = {domain: federation.nodes[domain] for domain in domains}

        def receive(domain: str, content: RecordDict) -> None:
            catalogs[domain] = catalog_from_bytes(records.read_catalog(content), domain)

        def limit_bytes(domain: str) -> int:
            return min(2**20 + CATALOG_BYTES_PER_ITEM * federation.descriptions[domain].num_items, MOST_CATALOG_BYTES)

        timeout_seconds = DESCRIBE_SECONDS
        ask(federation, nodes, Question(records.CATALOG, timeout_seconds, limit_bytes=limit_bytes), receive)
    for domain, catalog in list(catalogs.items()):
        announced = federation.descriptions[domain].catalog_sha256
        if catalog.sha256 != announced:
            del catalogs[domain]
            federation.exclude(
                domain, f"the catalog has hash {catalog.sha256[:12]}, its client announced {announced[:12]}"
            )
    require_quorum(federation, config, federation.of("train"))
    return catalogs


def _train(
    federation: Federation,
    config: ExperimentConfig,
    backbone: Backbone,
    catalogs: Mapping[str, Catalog],
    run_dir: Path,
) -> dict[str, str]:
    """Every training client's expert, admitted and written to disk as it arrives: domain -> hash.

    Experts that are on disk, whole, are not asked for again, whether their client is there or not. Once training has
    ended, which experts are merged is fixed.
    """
    federation.phase = "train"
    of_rank = {lora.rank: lora for lora in map(config.lora.of, config.domains.train)}
    likes = {rank: fresh_adapter(backbone, lora, seed=0) for rank, lora in of_rank.items()}
    by_rank = {rank: layout_of(like) for rank, like in likes.items()}
    layouts = {domain: by_rank[config.lora.of(domain).rank] for domain in config.domains.train}
    ended = checkpoints.ended_training(run_dir)
    may_join = {*config.domains.train} - {*federation.excluded}
    if labels_from_catalogs(config) or probes(config):
        may_join &= {*catalogs}  # without its catalog a domain cannot be merged
    wanted = sorted(may_join if ended is None else ended)
    sources = {domain: sha256 for domain in wanted if (sha256 := checkpoints.kept_expert(run_dir, domain))}
    if sources:
        logger.info("training: on disk already: %s", listed(sorted(sources)))

    def admit(domain: str, content: RecordDict) -> None:
        coding = coding_of(config, domain, backbone)
        adapter, report = records.read_expert(content, coding, likes[config.lora.of(domain).rank])
        check_adapter(domain, adapter, layouts[domain])
        check_spent(domain, config, report.get("privacy"), federation.descriptions[domain].num_users)
        if sent := report.get("transport"):
            logger.info("%s: expert came as %s, relative residual %s", domain, sent.get("kind"), sent.get("residual"))
        seconds = float(report.get("seconds", 0))
        log = logger.info if len(nodes) <= 20 else logger.debug
        log(
            "%s: expert received (%s steps, best at %s, stopped by %s, %.0f s%s)",
            domain,
            report.get("steps"),
            report.get("best_step", "(not told)"),
            report.get("stopped_by", "(not told)"),
            seconds,
            ", from the client's disk" if report.get("cached") else "",
        )
        sources[domain] = checkpoints.keep_expert(
            run_dir, domain, adapter, report, backbone.name
        )  # nothing may fail after

    roles = federation.of("train")
    nodes = {domain: federation.nodes[domain] for domain in wanted if domain in roles and domain not in sources}
    if nodes:
        logger.info("training: %s", listed(list(nodes)))
        transport = config.privacy.transport
        most = {domain: adapter_bytes(layout, transport) + REPORT_BYTES for domain, layout in layouts.items()}
        timeout_seconds, noise = config.server.timeout_seconds, own_noise(config)
        released = trainings_released(federation, config)
        question = Question(
            records.TRAIN, timeout_seconds, limit_bytes=most.__getitem__, noise=noise, released=released
        )
        ask(federation, nodes, question, admit)
    sources = dict(sorted(sources.items()))
    if ended is None:
        require_quorum(federation, config, list(sources))
        checkpoints.end_training(run_dir, sources)
    elif sources != ended:
        damaged = [domain for domain in ended if sources.get(domain) != ended[domain]]
        raise ClientError(
            f"{run_dir}: the experts of {listed(damaged)} were merged, but are missing or damaged on disk, and their "
            "clients did not send the same again. Put them back, or start a new run."
        )
    for domain in federation.of("train"):
        if domain not in sources:
            federation.exclude(domain, "its expert was not there when training ended")
    return sources


def _merge(
    federation: Federation,
    config: ExperimentConfig,
    backbone: Backbone,
    sources: Mapping[str, str],
    catalogs: Mapping[str, Catalog],
    run_dir: Path,
    without: Sequence[str] = (),
) -> list[Candidate]:
    """Every merge, each written as it is made; those on disk are not made again. Who is left out is in the labels."""
    suffix = suffix_without(without)
    sources = {domain: sha256 for domain, sha256 in sources.items() if domain not in without}

    def renamed(candidate: Candidate) -> Candidate:
        label = candidate.label + suffix
        return replace(candidate, label=label, provenance={**candidate.provenance, "label": label})

    def keep(candidate: Candidate) -> None:
        checkpoints.keep_merge(run_dir, renamed(candidate), backbone.name)

    experts = checkpoints.KeptExperts(run_dir, sources)
    private = config.privacy.policy == "catalog-private"
    kept = checkpoints.kept_merges(run_dir, sources)
    made = merge_candidates(
        backbone,
        experts,
        {domain: catalogs[domain] for domain in sources if domain in catalogs},
        config,
        logger.info,
        finished={
            label.removesuffix(suffix): replace(candidate, label=label.removesuffix(suffix))
            for label, candidate in kept.items()
        },
        keep=keep,
        through_clients=learn_through_clients(federation, config, experts, run_dir) if private else None,
    )
    return [renamed(candidate) for candidate in made]


def _choose(
    federation: Federation,
    config: ExperimentConfig,
    merges: Made,
    run_dir: Path,
) -> tuple[dict[str, checkpoints.Sums], Choice]:
    """Evaluate on validation, then choose, once: a choice on disk is final. Unseen domains have no say."""
    made = read_json(run_dir / "choice.json")
    deciding = made["domains"] if made else [name for name in federation.of("train") if name in merges.members]
    adapters = {candidate.label: candidate.adapter for candidate in merges.candidates}
    validation = evaluate_models(federation, config, "valid", deciding, adapters, merges.sources, run_dir)
    if made:
        logger.info("validation chose before: serving %s", made["served"])
        validation = {domain: sums for domain, sums in validation.items() if domain in made["domains"]}
        keys = ("best_variants", "served", "domains", "per_domain", "dropped", "rollback")
        return validation, Choice(*(made[key] for key in keys))
    require_quorum(federation, config, list(validation))
    sums = {domain: of_domain["unmasked"] for domain, of_domain in validation.items()}
    metric = config.evaluation.selection_metric
    without = [candidate for candidate in merges.candidates if {*merges.sources} - {*candidate.provenance["domains"]}]
    best, served, scores = choose(
        [candidate for candidate in merges.candidates if candidate not in without], sums, list(validation), metric
    )
    dropped = {} if config.admission.action is None else dropped_domains(sums, served, metric)
    rollback = None
    if config.admission.rollback:
        rollback = roll_back(sums, served, [candidate.label for candidate in without], list(merges.failed), metric)
    per_domain = choose_per_domain(sums, served, metric, config.evaluation.fallback)
    if rollback is not None and rollback["to"] != FALLBACK:
        served = rollback["to"]
        best = {**best, "rolled back": served}
        per_domain = choose_per_domain(sums, served, metric, config.evaluation.fallback)
    elif rollback is not None:
        for domain in rollback["dropped"]:
            per_domain[domain]["serve"] = EXPERT
    choice = Choice(best, served, list(validation), per_domain, dropped, rollback)
    write_json(
        run_dir / "choice.json",
        {
            "metric": metric,
            "validation": scores,
            "best_variants": best,
            "served": served,
            "domains": list(validation),
            "per_domain": per_domain,
            "dropped": dropped,
            "rollback": rollback,
        },
    )
    logger.info("validation chose %s; serving %s. Test is read now, once.", ", ".join(best.values()), served)
    return validation, choice


def _say_what_changed(run_dir: Path) -> None:
    """Name the versions that are others than when the run began: they can change numbers."""
    then, now = read_json(run_dir / "environment.json"), environment()
    packages: Mapping[str, str] = (then or {}).get("packages", {})
    changed = [f"{name} {packages[name]} -> {now['packages'].get(name)}" for name in packages]
    changed = [
        line for name, line in zip(packages, changed, strict=True) if packages[name] != now["packages"].get(name)
    ]
    if changed:
        logger.warning(
            "since the run began these versions have changed, and can change numbers: %s", ", ".join(changed)
        )


def _log_to(path: Path | None) -> None:
    library = logging.getLogger("fedmerge")
    library.setLevel(logging.INFO)
    library.propagate = False
    library.handlers.clear()
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if path:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        library.addHandler(handler)
