"""The server: ask, train, collect, merge, evaluate on validation, choose, read test once, report."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedmerge import __version__
from fedmerge.client.metrics import METRICS, MetricSums, Variant
from fedmerge.config import ExperimentConfig, Split, from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog, catalog_from_bytes, load_catalog
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.lora import Adapter, adapter_sha256, write_adapter
from fedmerge.errors import ClientError, RunDirError
from fedmerge.report.tables import Role, differences_table, result_rows, results_table
from fedmerge.run_dir import DONE, create_run, write_json, write_table, write_text
from fedmerge.server.admission import check_adapter, expected_layout
from fedmerge.server.candidates import Candidate, choose, merge_candidates, write_candidate
from sim import records

POLL_SECONDS = 0.2
HEARTBEAT_SECONDS = 60.0

app = ServerApp()
logger = logging.getLogger("fedmerge.server")


@dataclass
class Federation:
    """The clients that take part; those that fail are taken out, by name and with the reason.

    Attributes:
        grid: Flower's connection to the nodes.
        nodes: domain -> node.
        descriptions: domain -> what its client said it is.
        excluded: domain (or node) -> why.
        exposure: rows of the ledger, one for each thing that left a client.
    """

    grid: Grid
    nodes: dict[str, int] = field(default_factory=dict)
    descriptions: dict[str, records.Description] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    exposure: list[dict[str, Any]] = field(default_factory=list)

    def of(self, role: str) -> list[str]:
        """The domains of one role that are still in, sorted."""
        return sorted(domain for domain in self.nodes if self.descriptions[domain].role == role)

    def exclude(self, domain: str, reason: str) -> None:
        """Take a domain out."""
        logger.warning("excluded: %s: %s", domain, reason)
        self.excluded[domain] = reason
        self.nodes.pop(domain, None)

    def rename(self, node: str, domain: str) -> None:
        """Put a domain's name into the ledger, once the node has said it."""
        for row in self.exposure:
            row["domain"] = domain if row["domain"] == node else row["domain"]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One experiment; raises when it cannot be finished, so that Flower marks the run as failed."""
    config = from_flat(context.run_config)
    run_dir = create_run(config)
    _log_to(run_dir / "run.log")
    logger.info("run folder: %s", run_dir)
    try:
        _experiment(config, Federation(grid), run_dir)
    except Exception:
        logger.exception("the run failed")
        raise


def _experiment(config: ExperimentConfig, federation: Federation, run_dir: Path) -> None:
    torch.set_num_threads(config.runtime.server_threads)
    started = time.monotonic()
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    backbone = load_backbone(config.backbone.source, config.backbone.pooling, compute, config.backbone.weights_sha256)
    try:
        _gather(federation, config, backbone)
        catalogs = _catalogs(federation, config) if "mergerec" in config.merge.methods else {}
        adapters = _train(federation, config, backbone, run_dir)
        candidates = merge_candidates(
            backbone,
            adapters,
            {domain: catalogs[domain] for domain in adapters if domain in catalogs},
            config,
            logger.info,
        )
        for candidate in candidates:
            write_candidate(candidate, run_dir / "merged", backbone.name)
        validation = _evaluate(federation, config, "valid", candidates, adapters)
        _require_quorum(federation, config)
        deciding = {domain: sums["unmasked"] for domain, sums in validation.items()}
        metric = config.evaluation.selection_metric
        best, served, scores = choose(candidates, deciding, federation.of("train"), metric)
        write_json(
            run_dir / "choice.json", {"metric": metric, "validation": scores, "best_variants": best, "served": served}
        )
        logger.info("validation chose %s; serving %s. Test is read now, once.", ", ".join(best.values()), served)
        chosen = [candidate for candidate in candidates if candidate.label in best.values()]
        test = _evaluate(federation, config, "test", chosen, adapters)
        _require_quorum(federation, config)
        write_table(
            run_dir / "metrics.parquet",
            [*_metric_rows("valid", validation, federation), *_metric_rows("test", test, federation)],
        )
        write_table(run_dir / "products.parquet", [*_product_rows("valid", validation), *_product_rows("test", test)])
    finally:
        participants = {domain: vars(federation.descriptions[domain]) for domain in sorted(federation.nodes)}
        write_json(run_dir / "clients.json", {"participants": participants, "excluded": federation.excluded})
        if federation.exposure:
            write_table(run_dir / "exposure.parquet", sorted(federation.exposure, key=lambda row: str(row["domain"])))
    report = _report(test, federation, [candidate.label for candidate in chosen], served)
    write_text(run_dir / "report.txt", report)
    write_text(run_dir / DONE, f"finished after {time.monotonic() - started:.0f} s\n")
    logger.info("results\n\n%s", report)
    _say_who_took_part(federation, config)
    logger.info("done in %.0f s, run folder: %s", time.monotonic() - started, run_dir)


def _gather(federation: Federation, config: ExperimentConfig, backbone: Backbone) -> None:
    """Wait for the nodes, ask each what it is, refuse those that do not fit."""
    expected = len(config.domains.train) + len(config.domains.unseen)
    logger.info("waiting for %d nodes, one a domain, at most %g s", expected, config.server.wait_seconds)
    deadline = time.monotonic() + config.server.wait_seconds
    while len(nodes := sorted(federation.grid.get_node_ids())) < expected and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    logger.info("%d nodes are connected, %d domains are expected", len(nodes), expected)
    replies: dict[str, records.Description] = {}

    def receive(name: str, content: RecordDict) -> None:
        replies[name] = records.read_description(content)

    names = {f"node {node}": node for node in nodes}
    _ask(federation, names, records.DESCRIBE, _nothing, config.server.describe_timeout_seconds, receive)
    for name, description in sorted(replies.items()):
        if description.role == "idle":
            continue
        problem = _misfit(description, backbone, config, federation)
        if problem:
            federation.rename(name, f"{description.domain} ({name})")
            federation.exclude(f"{description.domain} ({name})", problem)
            continue
        federation.nodes[description.domain] = int(name.removeprefix("node "))
        federation.descriptions[description.domain] = description
        federation.rename(name, description.domain)
        logger.info(
            "%s (%s%s): %d users, %d items, %d interactions",
            description.domain,
            description.role,
            ", synthetic" if description.synthetic else "",
            description.num_users,
            description.num_items,
            description.num_interactions,
        )
    _require_quorum(federation, config)
    _say_who_took_part(federation, config)


def _misfit(
    description: records.Description, backbone: Backbone, config: ExperimentConfig, federation: Federation
) -> str | None:
    domains = config.domains
    if description.domain not in (domains.train if description.role == "train" else domains.train + domains.unseen):
        return f"it says to be {description.domain!r} ({description.role}), which the experiment does not name as such"
    checks = {
        "domain": (description.domain in federation.nodes, False, "another client already is this domain"),
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
    for what, (found, wanted, remedy) in checks.items():
        if found != wanted:
            return f"its {what} is {found}, the server's {wanted}; {remedy}"
    return None


def _catalogs(federation: Federation, config: ExperimentConfig) -> dict[str, Catalog]:
    """The catalogs of the training domains, from the server's folder or from the clients, checked by hash."""
    domains = federation.of("train")
    catalogs: dict[str, Catalog] = {}
    if config.server.catalogs is not None:
        for domain in domains:
            catalogs[domain] = load_catalog(Path(config.server.catalogs) / domain)
    else:
        nodes = {domain: federation.nodes[domain] for domain in domains}

        def receive(domain: str, content: RecordDict) -> None:
            catalogs[domain] = catalog_from_bytes(records.read_catalog(content), domain)

        _ask(federation, nodes, records.CATALOG, _nothing, config.server.describe_timeout_seconds, receive)
    for domain, catalog in list(catalogs.items()):
        announced = federation.descriptions[domain].catalog_sha256
        if catalog.sha256 != announced:
            del catalogs[domain]
            federation.exclude(
                domain, f"the catalog has hash {catalog.sha256[:12]}, its client announced {announced[:12]}"
            )
    _require_quorum(federation, config)
    return catalogs


def _train(federation: Federation, config: ExperimentConfig, backbone: Backbone, run_dir: Path) -> dict[str, Adapter]:
    """Every training client's expert, admitted and written to disk as it arrives."""
    layout = expected_layout(backbone, config.lora)
    adapters: dict[str, Adapter] = {}

    def admit(domain: str, content: RecordDict) -> None:
        adapter, report = records.read_expert(content)
        check_adapter(domain, adapter, layout)
        folder = run_dir / "adapters" / domain
        write_adapter(adapter, folder, backbone.name)
        write_json(folder / "training.json", {**report, "sha256": adapter_sha256(adapter)})
        seconds = float(report.get("seconds", 0))
        logger.info(
            "%s: expert received (%s steps, best at %s, stopped by %s, %.0f s%s)",
            domain,
            report.get("steps"),
            report.get("best_step"),
            report.get("stopped_by"),
            seconds,
            ", from the client's disk" if report.get("cached") else "",
        )
        adapters[domain] = adapter  # last: whatever raises above excludes the client

    nodes = {domain: federation.nodes[domain] for domain in federation.of("train")}
    logger.info("training: %s", ", ".join(nodes))
    _ask(federation, nodes, records.TRAIN, _nothing, config.server.train_timeout_seconds, admit)
    _require_quorum(federation, config)
    return dict(sorted(adapters.items()))


def _evaluate(
    federation: Federation,
    config: ExperimentConfig,
    split: Split,
    candidates: list[Candidate],
    adapters: Mapping[str, Adapter],
) -> dict[str, dict[Variant, MetricSums]]:
    """All models on the users of the domains that decide; on test on everybody's, with the reference rows."""
    merged = {candidate.label: candidate.adapter for candidate in candidates}

    def request(domain: str) -> RecordDict:
        expert = adapter_sha256(adapters[domain]) if domain in adapters else ""
        return records.evaluation_request_record(
            records.EvaluationRequest(split, split == "test", expert, split == "test"), merged
        )

    logger.info("evaluating on %s: %s", split, ", ".join(merged))
    results: dict[str, dict[Variant, MetricSums]] = {}

    def receive(domain: str, content: RecordDict) -> None:
        sums = records.read_metric_sums(content)
        missing = sorted(merged.keys() - set(sums["unmasked"].methods))
        if missing:
            raise ClientError(f"its metric sums lack {missing}")
        masked = sums["masked"]
        if masked.methods != sums["unmasked"].methods or masked.num_users != sums["unmasked"].num_users:
            raise ClientError("its masked and unmasked metric sums are of different methods or users")
        if masked.num_users < config.privacy.min_users:
            raise ClientError(f"its metric sums are over {masked.num_users} users, fewer than privacy.min_users")
        results[domain] = sums

    deciding = federation.of("train")  # unseen domains have no say in the choice
    nodes = {domain: node for domain, node in federation.nodes.items() if split == "test" or domain in deciding}
    _ask(federation, nodes, records.EVALUATE, request, config.server.evaluate_timeout_seconds, receive)
    return dict(sorted(results.items()))


def _ask(
    federation: Federation,
    nodes: Mapping[str, int],
    message_type: str,
    request: Callable[[str], RecordDict],
    timeout_seconds: float,
    on_reply: Callable[[str, RecordDict], None],
) -> None:
    """Ask nodes at once and handle each reply as it comes.

    Who fails, is late, or sends what ``on_reply`` raises on, is excluded by name.
    """
    waiting: dict[str, str] = {}
    for name, node in nodes.items():
        message = Message(request(name), dst_node_id=node, message_type=message_type, ttl=timeout_seconds)
        for message_id in federation.grid.push_messages([message]):
            waiting[message_id] = name
    for name in nodes.keys() - waiting.values():
        federation.exclude(name, f"{message_type}: Flower could not send the message")
    started = heartbeat = time.monotonic()
    while waiting and time.monotonic() - started < timeout_seconds:
        for reply in federation.grid.pull_messages(list(waiting)):
            name = waiting.pop(reply.metadata.reply_to_message_id, "")
            if not name:
                continue
            if not _accepted(federation, name, message_type, reply, on_reply):
                continue
            seconds = time.monotonic() - started
            logger.info(
                "%s: %d of %d answered (%s, %.0f s)", message_type, len(nodes) - len(waiting), len(nodes), name, seconds
            )
        if waiting and time.monotonic() - heartbeat > HEARTBEAT_SECONDS:
            heartbeat = time.monotonic()
            late = ", ".join(sorted(waiting.values()))
            logger.info("%s: waiting for %s (%.0f s)", message_type, late, heartbeat - started)
        time.sleep(POLL_SECONDS)
    for name in waiting.values():
        federation.exclude(name, f"{message_type}: no answer within {timeout_seconds:g} s")


def _accepted(
    federation: Federation,
    name: str,
    message_type: str,
    reply: Message,
    on_reply: Callable[[str, RecordDict], None],
) -> bool:
    """Record and handle one reply; whatever a client sends, it does not take the server down."""
    if reply.has_error():
        federation.exclude(name, f"{message_type} failed: {reply.error.reason} (Flower error {reply.error.code})")
        return False
    try:
        exposed = records.contents(reply.content)
        federation.exposure += [{"domain": name, "message": message_type, **row} for row in exposed]
        if error := records.read_error(reply.content):
            domain = records.read_error_domain(reply.content)
            if name not in federation.nodes and domain:  # its word alone must not exclude another domain
                federation.rename(name, f"{domain} ({name})")
                name = f"{domain} ({name})"
            federation.exclude(name, f"{message_type} failed: {error}")
            return False
        on_reply(name, reply.content)
    except (RunDirError, OSError):
        raise  # the server's own trouble, not the client's
    except Exception as error:
        federation.exclude(name, f"{message_type}: its reply is refused: {type(error).__name__}: {error}")
        return False
    return True


def _nothing(name: str) -> RecordDict:
    return RecordDict()


def _require_quorum(federation: Federation, config: ExperimentConfig) -> None:
    left = federation.of("train")
    if len(left) < config.server.min_train_clients:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in federation.excluded.items())
        raise ClientError(
            f"{len(left)} training clients are left ({', '.join(left) or 'none'}), server.min_train_clients is "
            f"{config.server.min_train_clients}. Excluded:{reasons or ' nobody; the others never connected'}"
        )


def _say_who_took_part(federation: Federation, config: ExperimentConfig) -> None:
    named = config.domains.train + config.domains.unseen
    absent = [domain for domain in named if domain not in federation.nodes]
    logger.info(
        "taking part: %s",
        ", ".join([*federation.of("train"), *(f"{domain} (unseen)" for domain in federation.of("unseen"))]),
    )
    if absent:
        logger.info(
            "not taking part: %s. For all %d domains: fedmerge run CONFIG, or "
            "flwr run . --federation-config 'num-supernodes=%d client-resources-num-cpus=%d'",
            ", ".join(absent),
            len(named),
            len(named),
            config.runtime.threads_per_client,
        )


def _metric_rows(
    split: str, results: Mapping[str, Mapping[Variant, MetricSums]], federation: Federation
) -> list[dict[str, Any]]:
    return [
        {
            "split": split,
            "variant": variant,
            "domain": domain,
            "role": federation.descriptions[domain].role,
            "method": method,
            "metric": metric,
            "num_users": sums.num_users,
            "sum": float(sums.sums[p, m]),
        }
        for domain, variants in results.items()
        for variant, sums in variants.items()
        for p, method in enumerate(sums.methods)
        for m, metric in enumerate(METRICS)
    ]


def _product_rows(split: str, results: Mapping[str, Mapping[Variant, MetricSums]]) -> list[dict[str, Any]]:
    return [
        {
            "split": split,
            "variant": variant,
            "domain": domain,
            "metric": metric,
            "method": left,
            "other": right,
            "sum_of_products": float(sums.products[m, p, q]),
        }
        for domain, variants in results.items()
        for variant, sums in variants.items()
        for m, metric in enumerate(METRICS)
        for p, left in enumerate(sums.methods)
        for q, right in enumerate(sums.methods)
        if q >= p
    ]


def _report(
    test: Mapping[str, Mapping[Variant, MetricSums]], federation: Federation, merged: list[str], served: str
) -> str:
    domains = [domain for role in ("train", "unseen") for domain in federation.of(role)]
    roles: dict[str, Role] = {domain: "train" if domain in federation.of("train") else "unseen" for domain in domains}
    synthetic = any(federation.descriptions[domain].synthetic for domain in domains)
    unmasked = {domain: test[domain]["unmasked"] for domain in domains}
    masked = {domain: test[domain]["masked"] for domain in domains}
    parts = [
        results_table(
            result_rows(unmasked, roles), variant="unmasked", split="test", merged_methods=merged, synthetic=synthetic
        ),
        results_table(
            result_rows(masked, roles), variant="masked", split="test", merged_methods=merged, synthetic=synthetic
        ),
    ]
    baseline = "average" if "average" in merged else merged[0]
    parts.append(differences_table(unmasked, roles, baseline=baseline, split="test", synthetic=synthetic))
    parts += [f"excluded: {name}: {reason}\n" for name, reason in sorted(federation.excluded.items())]
    parts.append(f"chosen on validation and to be served: {served}\n")
    return "\n".join(parts)


def _log_to(path: Path) -> None:
    library = logging.getLogger("fedmerge")
    library.setLevel(logging.INFO)
    library.propagate = False
    library.handlers.clear()
    for handler in (logging.StreamHandler(), logging.FileHandler(path, encoding="utf-8")):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        library.addHandler(handler)
