"""The server: ask, train, collect, merge, evaluate on validation, choose, read test once, report.

Every phase writes what it has as soon as it has it (see ``fedmerge.run_dir``) and begins with what is there already, so
a run that was ended at any point goes on from there.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedmerge import __version__
from fedmerge.client.metrics import BACKBONE, EXPERT, METRICS
from fedmerge.config import ExperimentConfig, Split, from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog, catalog_from_bytes, load_catalog
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.errors import ClientError
from fedmerge.report.run_report import Evaluated, metric_rows, product_rows, run_report
from fedmerge.report.tables import Role
from fedmerge.report.tracking import check_tracking, track_run
from fedmerge.run_dir import (
    DONE,
    create_run,
    environment,
    locked,
    open_run,
    read_json,
    run_to_resume,
    write_json,
    write_table,
    write_text,
)
from fedmerge.server import checkpoints
from fedmerge.server.admission import adapter_bytes, check_adapter, check_sums, expected_layout, sums_bytes
from fedmerge.server.candidates import Candidate, choose, merge_candidates
from fedmerge.server.fallback import choose_per_domain
from fedmerge.server.learned import learned_labels
from sim import records
from sim.federation import POLL_SECONDS, Federation, Question, ask, listed, remembered_clients, require_quorum
from sim.rounds import check_rounds, run_rounds

CATALOG_BYTES_PER_ITEM = 4096  # at most, and a mebibyte for a small catalog
REPORT_BYTES = 2**20

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
    """

    best: Mapping[str, str]
    served: str
    domains: list[str]
    per_domain: Mapping[str, Mapping[str, Any]]


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
            _experiment(config, Federation(grid, folder, config.server.messages_at_once), folder)
        except Exception:
            logger.exception("the run failed")
            raise


def _experiment(config: ExperimentConfig, federation: Federation, run_dir: Path) -> None:
    torch.set_num_threads(config.runtime.server_threads)
    started = time.monotonic()
    check_rounds(config)
    check_tracking(config.tracking)
    _say_what_changed(run_dir)
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    backbone = load_backbone(config.backbone.source, config.backbone.pooling, compute, config.backbone.weights_sha256)
    try:
        _remember(federation, run_dir)
        _gather(federation, config, backbone)
        catalogs = _catalogs(federation, config, run_dir)
        sources: dict[str, str] = {}
        if config.rounds.rule is None:
            sources = _train(federation, config, backbone, catalogs, run_dir)
            members = list(sources)
        else:
            members, after_rounds = run_rounds(federation, config, backbone, catalogs, run_dir)
        if config.until == "train":
            write_text(run_dir / DONE, f"the experts were there after {time.monotonic() - started:.0f} s\n")
            logger.info("the experts are there, run folder: %s", run_dir)
            return
        if config.rounds.rule is None:
            candidates = _merge(config, backbone, sources, catalogs, run_dir)
        else:
            candidates = [after_rounds]
        validation, choice = _choose(federation, config, candidates, sources, run_dir)
        chosen = [candidate for candidate in candidates if candidate.label in choice.best.values()]
        test = _evaluate(federation, config, "test", sorted(federation.nodes), chosen, sources, run_dir)
        require_quorum(federation, config, [domain for domain in test if domain in members])
    finally:
        federation.write_clients()
        federation.write_ledger()
    roles: dict[str, Role] = {domain: "train" if domain in members else "unseen" for domain in [*validation, *test]}
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
            merged_domains=list(members),
            synthetic=any(federation.descriptions[domain].synthetic for domain in test),
        ),
        fallback=config.evaluation.fallback,
    )
    write_text(run_dir / "report.txt", report)
    if config.tracking is not None:
        track_run(run_dir, config.tracking)
    write_text(run_dir / DONE, f"finished after {time.monotonic() - started:.0f} s\n")
    federation.forget_ledger_lines()
    logger.info("results\n\n%s", report)
    _say_who_took_part(federation, config)
    logger.info("done in %.0f s, run folder: %s", time.monotonic() - started, run_dir)


def _remember(federation: Federation, run_dir: Path) -> None:
    """Who was excluded in a phase that has ended stays so; who failed in one that goes on is asked again."""
    federation.descriptions, excluded = remembered_clients(run_dir)
    ended = {"catalogs", "train"} if checkpoints.ended_training(run_dir) else set()
    ended |= {"validation"} if read_json(run_dir / "choice.json") else set()
    federation.excluded = {name: exclusion for name, exclusion in excluded.items() if exclusion.phase in ended}


def _gather(federation: Federation, config: ExperimentConfig, backbone: Backbone) -> None:
    """Wait for the nodes, ask each what it is as it comes, refuse those that do not fit."""
    federation.phase = "gather"
    expected = num_domains = len(config.domains.train) + len(config.domains.unseen)
    logger.info("waiting for %d nodes, one a domain, at most %g s", expected, config.server.wait_seconds)
    deadline = time.monotonic() + config.server.wait_seconds
    asked: set[int] = set()

    def receive(name: str, content: RecordDict) -> str | None:
        nonlocal expected
        description = records.read_description(content)
        if description.num_nodes:  # a simulation: there are so many and no more
            expected = min(expected, description.num_nodes)
        if description.role == "idle":
            return None
        if problem := _misfit(description, backbone, config, federation):
            name = f"{description.domain} ({name})"
            federation.exclude(name, problem)
            return name
        if description.domain in federation.excluded:
            return description.domain  # in a phase that has ended
        federation.nodes[description.domain] = int(name.removeprefix("node "))
        federation.descriptions[description.domain] = description
        log = logger.info if expected <= 20 else logger.debug
        log(
            "%s (%s%s): %d users, %d items, %d interactions",
            description.domain,
            description.role,
            ", synthetic" if description.synthetic else "",
            description.num_users,
            description.num_items,
            description.num_interactions,
        )
        return description.domain

    question = Question(records.DESCRIBE, config.server.describe_timeout_seconds)
    while True:
        new = sorted(set(federation.grid.get_node_ids()) - asked)
        ask(federation, {f"node {node}": node for node in new}, question, receive)
        asked |= set(new)
        if len(asked) >= expected or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    federation.write_clients()
    logger.info("%d nodes are connected, %d domains are expected", len(asked), num_domains)
    require_quorum(federation, config, federation.of("train"))
    _say_who_took_part(federation, config)


def _misfit(
    description: records.Description, backbone: Backbone, config: ExperimentConfig, federation: Federation
) -> str | None:
    domains = config.domains
    if description.domain not in (domains.train if description.role == "train" else domains.train + domains.unseen):
        return f"it says to be {description.domain!r} ({description.role}), which the experiment does not name as such"
    if description.domain in federation.nodes:
        return f"another client already is {description.domain}; start one client for each domain"
    checks = {
        "backbone": (
            description.backbone_sha256,
            backbone.sha256,
            "use the same backbone and tokenizer files everywhere",
        ),
        "precision": (
            description.precision,
            backbone.compute.precision,
            "'auto' is what each machine multiplies best, so set runtime.precision to float32 or bfloat16 for both",
        ),
        "fedmerge version": (description.fedmerge_version, __version__, "install the same version everywhere"),
        "policy": (description.policy, config.privacy.policy, "agree on privacy.policy"),
    }
    if before := federation.descriptions.get(description.domain):  # the run is resumed
        data = {"role", "num_users", "num_items", "num_interactions", "catalog_sha256"}
        remedy = "a run has one state of the data: put it back, or start a new run"
        checks |= {key: (getattr(description, key), getattr(before, key), remedy) for key in sorted(data)}
    for what, (found, wanted, remedy) in checks.items():
        if found != wanted:
            return f"its {what} is {found}, the server's {wanted}; {remedy}"
    return None


def _catalogs(federation: Federation, config: ExperimentConfig, run_dir: Path) -> dict[str, Catalog]:
    """The catalogs of the training domains, from the server's folder or from the clients, checked by hash.

    None is needed without a learned merge, or when all learned merges are on disk.
    """
    labels = learned_labels(config)
    if not labels:
        return {}
    sources = checkpoints.ended_training(run_dir)
    if sources is not None and labels <= checkpoints.kept_merges(run_dir, sources).keys():
        return {}
    federation.phase = "catalogs"
    domains = [domain for domain in federation.of("train") if sources is None or domain in sources]
    catalogs: dict[str, Catalog] = {}
    if config.server.catalogs is not None:
        for domain in domains:
            catalogs[domain] = load_catalog(Path(config.server.catalogs) / domain)
    else:
        nodes = {domain: federation.nodes[domain] for domain in domains}

        def receive(domain: str, content: RecordDict) -> None:
            catalogs[domain] = catalog_from_bytes(records.read_catalog(content), domain)

        def limit_bytes(domain: str) -> int:
            return 2**20 + CATALOG_BYTES_PER_ITEM * federation.descriptions[domain].num_items

        timeout_seconds = config.server.describe_timeout_seconds
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
    by_rank = {rank: expected_layout(backbone, lora) for rank, lora in of_rank.items()}
    layouts = {domain: by_rank[config.lora.of(domain).rank] for domain in config.domains.train}
    ended = checkpoints.ended_training(run_dir)
    may_join = {*config.domains.train} - {*federation.excluded}
    if learned_labels(config):
        may_join &= {*catalogs}  # without its catalog a domain cannot be merged
    wanted = sorted(may_join if ended is None else ended)
    sources = {domain: sha256 for domain in wanted if (sha256 := checkpoints.kept_expert(run_dir, domain))}
    if sources:
        logger.info("training: on disk already: %s", listed(sorted(sources)))

    def admit(domain: str, content: RecordDict) -> None:
        adapter, report = records.read_expert(content)
        check_adapter(domain, adapter, layouts[domain])
        seconds = float(report.get("seconds", 0))
        log = logger.info if len(nodes) <= 20 else logger.debug
        log(
            "%s: expert received (%s steps, best at %s, stopped by %s, %.0f s%s)",
            domain,
            report.get("steps"),
            report.get("best_step"),
            report.get("stopped_by"),
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
        most = {domain: adapter_bytes(layout) + REPORT_BYTES for domain, layout in layouts.items()}
        question = Question(records.TRAIN, config.server.train_timeout_seconds, limit_bytes=most.__getitem__)
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
    config: ExperimentConfig,
    backbone: Backbone,
    sources: Mapping[str, str],
    catalogs: Mapping[str, Catalog],
    run_dir: Path,
) -> list[Candidate]:
    """Every merge, each written as it is made; those on disk are not made again."""

    def keep(candidate: Candidate) -> None:
        checkpoints.keep_merge(run_dir, candidate, backbone.name)

    return merge_candidates(
        backbone,
        checkpoints.KeptExperts(run_dir, sources),
        {domain: catalogs[domain] for domain in sources if domain in catalogs},
        config,
        logger.info,
        finished=checkpoints.kept_merges(run_dir, sources),
        keep=keep,
    )


def _choose(
    federation: Federation,
    config: ExperimentConfig,
    candidates: list[Candidate],
    sources: Mapping[str, str],
    run_dir: Path,
) -> tuple[dict[str, checkpoints.Sums], Choice]:
    """Evaluate on validation, then choose, once: a choice on disk is final. Unseen domains have no say."""
    made = read_json(run_dir / "choice.json")
    deciding = made["domains"] if made else federation.of("train")
    validation = _evaluate(federation, config, "valid", deciding, candidates, sources, run_dir)
    if made:
        logger.info("validation chose before: serving %s", made["served"])
        validation = {domain: sums for domain, sums in validation.items() if domain in made["domains"]}
        return validation, Choice(made["best_variants"], made["served"], made["domains"], made["per_domain"])
    require_quorum(federation, config, list(validation))
    deciding_sums = {domain: sums["unmasked"] for domain, sums in validation.items()}
    metric = config.evaluation.selection_metric
    best, served, scores = choose(candidates, deciding_sums, list(validation), metric)
    per_domain = choose_per_domain(deciding_sums, served, metric, config.evaluation.fallback)
    write_json(
        run_dir / "choice.json",
        {
            "metric": metric,
            "validation": scores,
            "best_variants": best,
            "served": served,
            "domains": list(validation),
            "per_domain": per_domain,
        },
    )
    logger.info("validation chose %s; serving %s. Test is read now, once.", ", ".join(best.values()), served)
    return validation, Choice(best, served, list(validation), per_domain)


def _evaluate(
    federation: Federation,
    config: ExperimentConfig,
    split: Split,
    domains: list[str],
    candidates: list[Candidate],
    sources: Mapping[str, str],
    run_dir: Path,
) -> dict[str, checkpoints.Sums]:
    """All models on the users of some domains, on test with the reference rows; what is on disk is not asked again."""
    test = split == "test"
    federation.phase = checkpoints.SUMS[split]
    labels = [candidate.label for candidate in candidates]
    models = records.model_records({candidate.label: candidate.adapter for candidate in candidates})

    def asked_models(domain: str) -> list[str]:
        return [*([BACKBONE] if test else []), *([EXPERT] if domain in sources else []), *labels]

    kept = checkpoints.kept_sums(run_dir, split)
    results = {
        domain: sums for domain, sums in kept.items() if set(asked_models(domain)) <= set(sums["unmasked"].methods)
    }

    def request(domain: str) -> RecordDict:
        return records.evaluation_request_record(
            records.EvaluationRequest(split, test, sources.get(domain, ""), test), models
        )

    def receive(domain: str, content: RecordDict) -> None:
        sums = records.read_metric_sums(content)
        num_users = (config.privacy.min_users, federation.descriptions[domain].num_users)
        check_sums(domain, sums, asked_models(domain), test, num_users)
        checkpoints.keep_sums(run_dir, split, domain, sums)
        results[domain] = sums

    nodes = {
        domain: federation.nodes[domain] for domain in domains if domain in federation.nodes.keys() - results.keys()
    }
    if results:
        logger.info("evaluated on %s already: %s", split, listed(list(results)))
    if nodes:
        logger.info("evaluating on %s: %s", split, ", ".join(labels))
    most = sums_bytes(len(labels) + 2, len(METRICS))
    timeout_seconds = config.server.evaluate_timeout_seconds
    ask(federation, nodes, Question(records.EVALUATE, timeout_seconds, request, lambda _: most, split), receive)
    return dict(sorted(results.items()))


def _say_who_took_part(federation: Federation, config: ExperimentConfig) -> None:
    named = config.domains.train + config.domains.unseen
    absent = [domain for domain in named if domain not in federation.nodes]
    logger.info(
        "taking part: %s",
        listed([*federation.of("train"), *(f"{domain} (unseen)" for domain in federation.of("unseen"))]),
    )
    if absent:
        logger.info(
            "not taking part: %s. For all %d domains: fedmerge run CONFIG, or "
            "flwr run . --federation-config 'num-supernodes=%d client-resources-num-cpus=%d'",
            listed(absent),
            len(named),
            len(named),
            config.runtime.threads_per_client,
        )


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
