"""The tables of a benchmark, made from the files of its cells."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fedmerge.bench.cells import MERGES, is_one_shot, target_folder
from fedmerge.bench.config import (
    REFERENCES,
    Drawing,
    head_row,
    joint_row,
    personal_row,
    ranks_by_text,
    rows_of,
    woven_row,
)
from fedmerge.bench.grid import Grid, Place
from fedmerge.bench.outcomes import (
    audit_of,
    chosen_factor,
    chosen_variant,
    experts_run,
    head_cells,
    merge_hashes,
    merged_domains,
    personal_cells,
    test_sums,
    tested_domains,
    woven_hashes,
)
from fedmerge.bench.personal import personal_folder
from fedmerge.bench.ranking import head_report
from fedmerge.client.audit.attacks import EXPERT
from fedmerge.config import ExperimentConfig, HeadVectors
from fedmerge.domain.catalog import CATALOG_FILE
from fedmerge.domain.demo import domain_folder
from fedmerge.domain.manifest import read_manifest
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.evaluation.ranks import SELECTION_METRIC
from fedmerge.evaluation.sums import FEDERATED_HEAD, PERSONAL, VARIANTS, MetricSums, Variant
from fedmerge.federated.rules import rule_named
from fedmerge.federated.shared_items import mean_similarity
from fedmerge.federated.summed import num_summed
from fedmerge.files import read_json
from fedmerge.merging.candidate import Provenance, largest_rank
from fedmerge.privacy.dp.releases import coefficient_messages
from fedmerge.report.bench.few_data import TRAIN_USERS
from fedmerge.report.bench_tables import EVERY_FOLD, NOTHING_LEARNED, BenchTables
from fedmerge.report.statistics import comparison_rows, rank_rows
from fedmerge.report.tables import Role
from fedmerge.runs.checkpoints import ADAPTERS, merge_folder, read_untrained, read_weave, stored_factors, woven_folder
from fedmerge.runs.round_checkpoints import round_records

Sums = dict[tuple[Place, str], dict[Variant, MetricSums]]  # place and domain -> variant -> sums
WEIGHTS = "adapter_model.safetensors"
CURVE_POINTS = 200
BYTES_OF_A_VALUE = 4


def bench_tables(grid: Grid) -> BenchTables:
    """Return all tables of the report; failed cells have no rows but in ``cells``."""
    places = grid.places()
    sums: Sums = {
        (place, domain): found
        for place in places
        for domain in tested_domains(grid, place)
        if (found := test_sums(grid, place, domain))
    }
    strategy_of = strategy_of_row(grid)
    baselines = {row for of_domain in sums.values() for row in of_domain["unmasked"].methods} - {*strategy_of}
    cells = [(place, strategy) for place in places for strategy in grid.strategies]
    joint = [(place, drawing) for place in places for drawing in grid.joint_rows(place)]
    return BenchTables(
        title=grid.bench.config.title,
        synthetic=_synthetic(grid, places),
        results=list(_results(grid, sums)),
        comparisons=list(_comparisons(grid, sums)),
        costs=[
            *(
                row
                for place, strategy in cells
                if chosen_variant(grid, place, strategy)
                for row in _costs(grid, place, strategy)
            ),
            *(_joint_cost(grid, place, drawing) for place, drawing in joint if read_json(grid.joint(place, drawing))),
        ],
        curves=[*_curves(grid, places), *_joint_curves(grid, joint)],
        coefficients=[row for place, strategy in cells for row in _coefficients(grid, place, strategy)],
        ranks=list(_ranks(grid, sums)),
        leaks=[row for place, strategy in cells if not place.left_out for row in _leaks(grid, place, strategy)],
        cells=[
            *(_cell(grid, place, strategy) for place, strategy in cells),
            *(_joint_cell(grid, place, drawing) for place, drawing in joint),
        ],
        references=tuple(row for row in (*REFERENCES, *sorted(baselines - {*REFERENCES})) if row in baselines),
    )


def strategy_of_row(grid: Grid) -> dict[str, str]:
    """Return row -> strategy, for the rows of merges and of their heads in any dataset."""
    return {
        row: strategy
        for dataset in grid.bench.config.dataset
        for strategy in grid.strategies
        for row in rows_of(strategy, grid.bench.experiment(dataset.name, strategy, grid.bench.config.seeds[0]))
    }


def _results(grid: Grid, sums: Sums) -> Iterator[dict[str, Any]]:
    strategy_of = strategy_of_row(grid)
    for (place, domain), variants in sums.items():
        for variant, of_variant in variants.items():
            for strategy, metrics in of_variant.metrics_by_method().items():
                whose = strategy_of.get(strategy)
                label = chosen_variant(grid, place, whose) if whose else strategy
                if whose and strategy == woven_row(whose):
                    label = chosen_factor(grid, place, whose, domain)
                if whose and strategy == personal_row(whose):
                    label = PERSONAL
                for metric, value in metrics.items():
                    yield {
                        **_named(place, strategy),
                        "label": label,
                        "domain": domain,
                        "role": _role(grid, place, domain),
                        "split": "test",
                        "variant": variant,
                        "metric": metric,
                        "num_users": of_variant.num_users,
                        "value": value,
                    }


def _comparisons(grid: Grid, sums: Sums) -> Iterator[dict[str, Any]]:
    """Compare on merged domains, and on unmerged ones: unseen domains, and each domain in the fold that left it out."""
    groups: tuple[tuple[str, Role], ...] = (
        ("", "train"),
        (EVERY_FOLD if grid.bench.config.leave_one_out else "", "unseen"),
    )
    for dataset in grid.bench.config.dataset:
        for left_out, role in groups:
            for variant in VARIANTS:
                of_role = {
                    (place.seed, domain): variants[variant]
                    for (place, domain), variants in sums.items()
                    if place.dataset == dataset.name and _role(grid, place, domain) == role
                }
                for baseline in grid.bench.config.baselines:
                    of_group = {key: found for key, found in of_role.items() if baseline in found.methods}
                    if of_group:
                        yield from comparison_rows(
                            of_group, dataset=dataset.name, baseline=baseline, role=role, left_out=left_out
                        )


def _ranks(grid: Grid, sums: Sums) -> list[dict[str, Any]]:
    scores = {
        (place.dataset, domain, place.seed): {
            strategy: of_strategy[SELECTION_METRIC]
            for strategy, of_strategy in variants["unmasked"].metrics_by_method().items()
            if strategy in grid.strategies
        }
        for (place, domain), variants in sums.items()
        if _role(grid, place, domain) == "train"
    }
    return rank_rows(scores)


def _costs(grid: Grid, place: Place, strategy: str) -> Iterator[dict[str, Any]]:
    """Yield the costs of a strategy's merge and of its heads: those of a head on own vectors are its client's alone."""
    of_merge, head = _cost(grid, place, strategy), grid.experiment(place, strategy).head
    if ranks_by_text(head):
        yield of_merge
    if woven := woven_hashes(grid, place, strategy):
        yield _cost_of_targets(grid, place, strategy, of_merge, list(woven))
    if fitted := personal_cells(grid, place, strategy):
        ranks = [largest_rank(read_adapter(personal_folder(cell.result))) for cell in fitted.values()]
        down = of_merge["bytes_down"] - _merge_bytes(grid, place, strategy) * len(fitted)  # each has its own already
        yield {**of_merge, "strategy": personal_row(strategy), "bytes_down": down, "rank": max(ranks)}
    nothing = {"bytes_up": 0.0, "bytes_down": 0.0, "server_seconds": 0.0, "rank": None, "error": None, "residual": None}
    run, domains = experts_run(grid, place, strategy), merged_domains(grid, place, strategy)
    of_experts = sum(float(_report(run / ADAPTERS / domain)["seconds"]) for domain in domains)
    if shared := read_json(grid.federated_head(place, strategy)):
        merge = merge_folder(grid.merges(place, strategy), str(chosen_variant(grid, place, strategy)))
        requests = head.rounds * len(domains)  # each carries the merge; the head goes up every round, and down after it
        of_merge = {
            **of_merge,
            "strategy": f"{strategy}: {FEDERATED_HEAD}",
            "bytes_up": of_merge["bytes_up"] + requests * shared["bytes"],
            "bytes_down": of_merge["bytes_down"] + requests * (shared["bytes"] + (merge / WEIGHTS).stat().st_size),
            "client_seconds": of_merge["client_seconds"] + shared["seconds"],
        }
        yield of_merge
    before: Mapping[HeadVectors, dict[str, Any]] = {
        "merge": of_merge,
        "expert": {**of_merge, **nothing, "client_seconds": of_experts},
        "backbone": {**of_merge, **nothing, "client_seconds": 0.0},
    }
    tested = [domain for domain in domains if domain in tested_domains(grid, place)]
    cells = [head_cells(grid, place, domain, strategy) for domain in tested]
    for vectors in head.vectors if head.kind else ():
        row = head_row(strategy, vectors)
        reports = [read_json(head_report(of_domain[row].result)) for of_domain in cells if row in of_domain]
        if reports and None not in reports:
            seconds = before[vectors]["client_seconds"] + sum(report["seconds"] for report in reports)
            yield {**before[vectors], "strategy": row, "client_seconds": seconds, "peak_bytes": None}


def _cost_of_targets(
    grid: Grid, place: Place, strategy: str, of_merge: Mapping[str, Any], domains: Sequence[str]
) -> dict[str, Any]:
    """Return the costs of the merges of single targets: those of the universal merge, but each goes to one domain."""
    merges = grid.merges(place, strategy)
    chosen = {domain: chosen_factor(grid, place, strategy, domain) for domain in domains}
    folders = [target_folder(merges, domain, label) for domain, label in chosen.items() if label is not None]
    down = of_merge["bytes_down"] - _merge_bytes(grid, place, strategy) * len(merged_domains(grid, place, strategy))
    return {
        **of_merge,
        "strategy": woven_row(strategy),
        "bytes_down": down + sum((folder / WEIGHTS).stat().st_size for folder in folders),
        "rank": max((largest_rank(read_adapter(folder)) for folder in folders), default=None),
    }


def _merge_bytes(grid: Grid, place: Place, strategy: str) -> int:
    merge = merge_folder(grid.merges(place, strategy), str(chosen_variant(grid, place, strategy)))
    return (merge / WEIGHTS).stat().st_size


def _cost(grid: Grid, place: Place, strategy: str) -> dict[str, Any]:
    """Return bytes, seconds and memory of a strategy.

    Up: an expert per domain, and the catalogs if the strategy needs them; down: the merge to every merged domain. A
    domain that a gate excludes has trained and sent like the others. Under ``aggregate-only`` a masked update of every
    weight goes up instead. Under ``catalog-private`` no catalog goes up, but the experts go down to every domain; in
    each step coefficients down and an answer up, in each reading of a layer-wise search a map down and a sum up. For a
    federation of rounds: bytes up and down in all rounds. With weaving: every continued adapter goes up, and its start,
    of the same size, down. With personal merges: the experts go down to every domain, and for the universal one
    coefficients up.
    """
    config = grid.experiment(place, strategy)
    run, merged = grid.run(place, strategy), merged_domains(grid, place, strategy)
    sent = [domain for domain in sorted(config.domains.train) if domain != place.left_out]
    merge = merge_folder(grid.merges(place, strategy), str(chosen_variant(grid, place, strategy)))
    record = read_json(grid.merges(place, strategy) / MERGES)
    provenance = Provenance.from_dict(read_json(merge / "provenance.json"))
    down = _merge_bytes(grid, place, strategy) * len(merged)
    weaves = config.weave.schedule is not None
    if is_one_shot(config.rounds):
        experts = [run / ADAPTERS / domain for domain in sent]
        up, sends_cohort = _bytes_of_experts(run, sent), False
        if config.privacy.hides_adapters:
            summed = rule_named(config.rounds.rule or "weighted-average").summed or "updates"
            up = sum(BYTES_OF_A_VALUE * num_summed(summed, read_adapter(expert)) for expert in experts)
        elif not weaves and config.rounds.rule is None and (messages := coefficient_messages(config)):
            answer = BYTES_OF_A_VALUE * _most_coefficients(grid, place, strategy)
            sends_cohort = True
            down += len(merged) * 2 * answer * messages
            up += len(merged) * answer * messages
        elif provenance.search is not None and config.rmm.reward == "validation":
            readings, groups = provenance.search["readings"], len(provenance.search["map"])
            sends_cohort = True
            down += len(merged) * BYTES_OF_A_VALUE * groups * readings
            up += len(merged) * 2 * BYTES_OF_A_VALUE * readings  # a number of users and a sum
        seconds = sum(float(_report(expert)["seconds"]) for expert in experts)
        if (personal := _of_personal_merges(grid, place, strategy)) is not None:
            sends_cohort, seconds, up = True, seconds + personal[0], up + personal[1]
        if sends_cohort:  # once, whatever asks for it
            down += len(merged) * sum((run / ADAPTERS / domain / WEIGHTS).stat().st_size for domain in merged)
        if weaves:
            hashes = read_weave(run) or {}
            continued = sum(read_adapter(woven_folder(run, each)).size_bytes for each in hashes)
            shared, means = _bytes_of_similarity(run)
            up, down = up + continued + shared, down + continued + means
            seconds += sum(float(_report(woven_folder(run, each))["seconds"]) for each in hashes)
    else:
        rounds = [of_round["aggregation"] for of_round in round_records(run)]
        up = sum(sum(of_round["bytes_up"].values()) for of_round in rounds)
        for of_round, following in pairwise(rounds):
            down += sum(of_round["bytes_down"][domain] for domain in following["client_weights"])
        clients = [client for of_round in round_records(run) for client in of_round["clients"].values()]
        seconds = sum(client["seconds"] for client in clients)
    gate = grid.gate(place, strategy)
    probed = gate is not None and config.admission.probe_items is not None
    read = config.methods_from_catalogs or config.refines_merges or config.shares_similarity or probed
    if read and config.server.catalogs is None:
        up += sum((_folder(config, domain) / CATALOG_FILE).stat().st_size for domain in sent)
    judged = (read_json(gate) or {}) if gate else {}
    last = (provenance.rounds or [{}])[-1]
    return {
        **_named(place, strategy),
        "bytes_up": up,
        "bytes_down": down + judged.get("bytes_down", 0),
        "client_seconds": seconds + judged.get("client_seconds", 0.0),
        "server_seconds": record["seconds"] + judged.get("seconds", 0.0),
        "peak_bytes": record["peak_bytes"],
        "rank": provenance.rank,
        "error": last.get("error"),
        "residual": max(last.get("start_residuals", {}).values(), default=None),
    }


def _bytes_of_similarity(run: Path) -> tuple[int, int]:
    """Return the bytes of similarity factors up, and of their means down; zeros without any."""
    sent = stored_factors(run)
    shared, factors = {name: each[0] for name, each in sent.items()}, {name: each[1] for name, each in sent.items()}
    means = [mean_similarity(name, shared, factors) for name in sent]
    up = sum(of_domain.nbytes for of_domain in factors.values())
    return up, sum(mean.factors.nbytes + mean.present.nbytes for mean in means)


def _of_personal_merges(grid: Grid, place: Place, strategy: str) -> tuple[float, int] | None:
    """Return the clients' seconds for personal merges, and the bytes of what is sent of them; None without any."""
    fitted = [read_json(cell.result) for cell in personal_cells(grid, place, strategy).values()]
    if not fitted:
        return None
    sent = fitted if grid.experiment(place, strategy).personal.universal else []
    size_bytes = sum(BYTES_OF_A_VALUE * np.size([*record["coefficients"].values()]) for record in sent)
    return sum(float(record["seconds"]) for record in fitted), size_bytes


def _bytes_of_experts(run: Path, domains: Sequence[str]) -> int:
    """Return the bytes of experts in a training's ledger; an expert sent twice counts once."""
    ledger = pq.read_table(run / "exposure.parquet", columns=["domain", "message", "late", "name", "size_bytes"])
    sizes = {
        (row["domain"], row["name"]): int(row["size_bytes"])
        for row in ledger.to_pylist()
        if row["message"] == "train" and row["name"].startswith("adapter.") and not row["late"]
    }
    return sum(size for (domain, _), size in sizes.items() if domain in domains)


def _most_coefficients(grid: Grid, place: Place, strategy: str) -> int:
    """Return the number of coefficients of a strategy's largest learned merge."""
    folders = [merge_folder(grid.merges(place, strategy), label) for label in merge_hashes(grid, place, strategy)]
    records = [Provenance.from_dict(read_json(folder / "provenance.json")) for folder in folders]
    learned = [(record.coefficients or {}).values() for record in records if record.is_learned]
    return max((sum(np.size(of_domain) for of_domain in values) for values in learned), default=0)


def _joint_cost(grid: Grid, place: Place, drawing: Drawing) -> dict[str, Any]:
    """Return the costs of joint training: one machine does all the work, and moving the data is not counted."""
    record = read_json(grid.joint(place, drawing))
    return {
        **_named(place, joint_row(drawing)),
        "bytes_up": None,
        "bytes_down": None,
        "client_seconds": None,
        "server_seconds": record["training"]["seconds"],
        "peak_bytes": record["peak_bytes"],
        "rank": grid.experiment(place, None).lora.rank,
        "error": None,
        "residual": None,
    }


def _curves(grid: Grid, places: Sequence[Place]) -> Iterator[dict[str, Any]]:
    """Yield the curves of the shared experts, of rounds, and of learned merges."""
    for place in places:
        run = grid.run(place, None)
        for expert in sorted((run / ADAPTERS).glob("[!.]*")) if not place.left_out else ():
            yield from _validation_points(place, "expert", expert.name, _report(expert))
        for strategy in grid.strategies:
            if not is_one_shot(grid.experiment(place, strategy).rounds):
                for number, of_round in enumerate(round_records(grid.run(place, strategy)), 1):
                    for domain, client in of_round["clients"].items():
                        if client["loss"] is not None:
                            yield _point(place, strategy, domain, number, "loss", client["loss"])
                continue
            provenance = _provenance(grid, place, strategy)
            losses = (provenance and provenance.losses) or []
            for step in range(0, len(losses), max(1, len(losses) // CURVE_POINTS)):
                yield _point(place, strategy, "", step, "loss", losses[step]["total"])


def _joint_curves(grid: Grid, joint: Sequence[tuple[Place, Drawing]]) -> Iterator[dict[str, Any]]:
    for place, drawing in joint:
        if record := read_json(grid.joint(place, drawing)):
            yield from _validation_points(place, joint_row(drawing), "all together", record["training"])


def _validation_points(place: Place, row: str, domain: str, report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for validation in report["validations"]:
        for name, value in (("loss", validation["loss"]), ("ndcg@10", validation["ndcg"])):
            if value is not None:
                yield _point(place, row, domain, validation["step"], name, value)


def _coefficients(grid: Grid, place: Place, strategy: str) -> Iterator[dict[str, Any]]:
    """Yield the coefficients of a learned merge, or of a searched one that is linear."""
    provenance = _provenance(grid, place, strategy)
    if provenance and (provenance.is_learned or provenance.search is not None):
        for domain, values in (provenance.coefficients or {}).items():
            each = values if isinstance(values, list) else [values]
            for group, value in zip(provenance.coefficient_groups or (), each, strict=True):
                yield {**_named(place, strategy), "domain": domain, "group": group, "value": value}


def _leaks(grid: Grid, place: Place, strategy: str) -> Iterator[dict[str, Any]]:
    """Yield audit results of the merge, and of the expert unless only its client sees it."""
    config = grid.experiment(place, strategy)
    hidden = config.privacy.hides_adapters
    for domain in config.domains.train:
        audit = audit_of(grid, place, strategy, domain)
        if audit is None:
            continue
        attacks = [
            *audit["membership"],
            *({**row, "attack": "canaries"} for row in audit["canaries"]),
            *({**row, "model": row["from"], "attack": "pairs"} for row in audit["recovery"]["rows"]),
        ]
        for row in attacks:
            if hidden and row["model"].startswith(EXPERT):  # for pairs also "expert minus backbone"
                continue
            measured = {key: row[key] for key in ("auc", "mean_exposure") if key in row}
            measured |= {key: value for key, value in row.items() if key.startswith("tpr_at_fpr_")}
            measured |= {f"precision@{k}": value for k, value in row.get("precision_at", {}).items()}
            for metric, value in measured.items():
                yield {
                    **_named(place, strategy),
                    "domain": domain,
                    "model": row["model"],
                    "attack": row["attack"],
                    "metric": metric,
                    "value": value,
                    "error": row["auc_error"] if metric == "auc" else None,
                }


def _cell(grid: Grid, place: Place, strategy: str) -> dict[str, Any]:
    config, record = grid.experiment(place, strategy), read_json(grid.merges(place, strategy) / MERGES) or {}
    run = grid.run(place, strategy)
    return {
        **_named(place, strategy),
        "status": "done" if chosen_variant(grid, place, strategy) else "failed",
        "config": config.model_dump(mode="json"),
        "environment": record.get("environment") or read_json(run / "environment.json"),
        "seconds": record.get("seconds"),
        TRAIN_USERS: {
            domain: read_manifest(_folder(config, domain)).num_users for domain in tested_domains(grid, place)
        },
        **({"excluded": away} if (away := grid.excluded_by_gate(place, strategy)) else {}),
        **({NOTHING_LEARNED: zero} if (zero := read_untrained(run, merged_domains(grid, place, strategy))) else {}),
    }


def _joint_cell(grid: Grid, place: Place, drawing: Drawing) -> dict[str, Any]:
    record = read_json(grid.joint(place, drawing))
    return {
        **_named(place, joint_row(drawing)),
        "status": "done" if record else "failed",
        "config": grid.experiment(place, None).model_dump(mode="json"),
        "environment": (record or {}).get("environment") or read_json(grid.run(place, None) / "environment.json"),
        "seconds": record["training"]["seconds"] if record else None,
    }


def _point(place: Place, strategy: str, domain: str, step: int, name: str, value: float) -> dict[str, Any]:
    return {**_named(place, strategy), "domain": domain, "step": step, "name": name, "value": value}


def _named(place: Place, strategy: str) -> dict[str, Any]:
    return {"dataset": place.dataset, "strategy": strategy, "seed": place.seed, "left_out": place.left_out}


def _role(grid: Grid, place: Place, domain: str) -> Role:
    return "train" if not place.left_out and domain in grid.experiment(place, None).domains.train else "unseen"


def _provenance(grid: Grid, place: Place, strategy: str) -> Provenance | None:
    chosen = chosen_variant(grid, place, strategy)
    record = read_json(merge_folder(grid.merges(place, strategy), chosen) / "provenance.json") if chosen else None
    return Provenance.from_dict(record) if record else None


def _report(expert: Path) -> dict[str, Any]:
    report: dict[str, Any] = read_json(expert / "training.json")
    return report


def _folder(config: ExperimentConfig, domain: str) -> Path:
    return domain_folder(config.domains.root, domain, config.cache_dir)


def _synthetic(grid: Grid, places: Sequence[Place]) -> bool:
    folders = {
        _folder(config, domain)
        for place in places
        for config in [grid.experiment(place, None)]
        for domain in tested_domains(grid, place)
    }
    return any(read_manifest(folder).synthetic for folder in folders)
