"""The results that a benchmark's cells have left so far: merges, selected variants, and sums over users."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge.bench.cells import (
    MERGES,
    Cell,
    is_one_shot,
    joint_folder,
    target_folder,
)
from fedmerge.bench.config import head_row, joint_row, personal_row, ranks_by_text, woven_row
from fedmerge.bench.federated_heads import head_folder
from fedmerge.bench.grid import Grid, Place
from fedmerge.bench.personal import personal_folder
from fedmerge.bench.ranking import ranks_file, sums_of_ranks
from fedmerge.client.cache.folders import inputs_key
from fedmerge.config import ExperimentConfig, HeadVectors, Split
from fedmerge.evaluation.ranks import SELECTION_METRIC
from fedmerge.evaluation.sums import FEDERATED_HEAD, MetricSums, Variant
from fedmerge.files import read_json, write_json
from fedmerge.runs.checkpoints import ADAPTERS, merge_folder, read_sources


def merge_hashes(grid: Grid, place: Place, strategy: str) -> dict[str, str]:
    """Return label -> hash of a strategy's merges; empty if its cell failed."""
    merges: dict[str, str] = (read_json(grid.merges(place, strategy) / MERGES) or {}).get("merges", {})
    return merges


def merged_domains(grid: Grid, place: Place, strategy: str | None) -> list[str]:
    """Return the domains of a strategy's merges, which also select its variant.

    For strategy None: the domains of joint training.
    """
    out = {place.left_out, *(grid.excluded_by_gate(place, strategy) if strategy else ())}
    return [domain for domain in sorted(grid.experiment(place, strategy).domains.train) if domain not in out]


def tested_domains(grid: Grid, place: Place) -> list[str]:
    """Return the domains that are tested: those of the dataset, by default all; in a fold the left-out domain."""
    domains = grid.experiment(place, None).domains
    wanted = grid.dataset(place).tested or (*domains.train, *domains.unseen)
    return [place.left_out] if place.left_out else [*wanted]


def chosen_variant(grid: Grid, place: Place, strategy: str) -> str | None:
    """Return the label selected on validation; None if no merge was made or evaluated.

    The first selection is written to disk and is final.
    """
    file = grid.merges(place, strategy) / "choice.json"
    if made := read_json(file):
        return str(made["chosen"])
    merges = merge_hashes(grid, place, strategy)
    config = grid.evaluation(place, strategy)
    files = {
        domain: {label: ranking(grid, place, config, domain, "valid", strategy, label).result for label in merges}
        for domain in merged_domains(grid, place, strategy)
    }
    return _select(file, merges, files, config.privacy.min_users)


def woven_hashes(grid: Grid, place: Place, strategy: str) -> dict[str, dict[str, str]]:
    """Return domain -> label -> hash of a strategy's merges of single targets; empty without weaving."""
    woven: dict[str, dict[str, str]] = (read_json(grid.merges(place, strategy) / MERGES) or {}).get("woven", {})
    return woven


def woven_ranking(grid: Grid, place: Place, domain: str, split: Split, strategy: str, label: str) -> Cell:
    """Return the cell that ranks a domain with the merge of what it trained."""
    folder = target_folder(grid.merges(place, strategy), domain, label)
    sha256 = woven_hashes(grid, place, strategy)[domain][label]
    return ranking_of(grid, place, grid.evaluation(place, strategy), domain, split, label, folder, sha256)


def chosen_factor(grid: Grid, place: Place, strategy: str, domain: str) -> str | None:
    """Return the label of a domain's own woven merge that its validation users chose; as :func:`chosen_variant`."""
    file = grid.merges(place, strategy) / f"choice-{domain}.json"
    if made := read_json(file):
        return str(made["chosen"])
    labels = woven_hashes(grid, place, strategy).get(domain, {})
    files = {label: woven_ranking(grid, place, domain, "valid", strategy, label).result for label in labels}
    return _select(file, labels, {domain: files}, grid.evaluation(place, strategy).privacy.min_users)


def _select(
    file: Path, merges: Mapping[str, str], files: Mapping[str, Mapping[str, Path]], min_users: int
) -> str | None:
    """Write and return the label with the best mean over the domains; None if a merge is not evaluated yet."""
    scores: dict[str, float] = {}
    if len(merges) > 1:
        means: dict[str, list[float]] = {label: [] for label in merges}
        for domain, of_domain in files.items():
            if not all(each.is_file() for each in of_domain.values()):
                return None
            sums = sums_of_ranks(of_domain, domain, min_users)["unmasked"]
            for label in merges:
                means[label].append(sums.mean(label, SELECTION_METRIC))
        scores = {label: float(np.mean(values)) for label, values in means.items()}
    elif not merges:
        return None
    chosen = max(merges, key=lambda label: scores.get(label, 0.0))  # the first of equal ones
    write_json(file, {"chosen": chosen, "metric": SELECTION_METRIC, "validation": scores})
    return chosen


def test_sums(grid: Grid, place: Place, domain: str) -> dict[Variant, MetricSums]:
    """Return a domain's sums over its test users, with a row per reference and per strategy that did not fail."""
    rows = {row: cell.result for row, cell in rows_on_test(grid, place, domain).items() if cell.result.is_file()}
    return sums_of_ranks(rows, domain, grid.experiment(place, None).privacy.min_users) if rows else {}


def personal_cells(grid: Grid, place: Place, strategy: str) -> dict[str, Cell]:
    """Return domain -> cell that fits its personal merge; empty without personal merges."""
    config, domains = grid.experiment(place, strategy), merged_domains(grid, place, strategy)
    arguments = {
        "config": config,
        "run": grid.run(place, strategy),
        "without": tuple(domain for domain in config.domains.train if domain not in domains),
        "evaluation": grid.evaluation(place, strategy),
    }
    threads = config.runtime.threads_per_client
    return {
        domain: Cell(
            "personal merge",
            f"{personal_row(strategy)} on {domain} ({place})",
            grid.personal(place, strategy, domain),
            {**arguments, "domain": domain},
            threads,
        )
        for domain in (domains if config.personal.directions is not None else ())
    }


def audit_of(grid: Grid, place: Place, strategy: str, domain: str) -> dict[str, Any] | None:
    """Return the record of an audit; None without one."""
    cell = audit_cell(grid, place, strategy, domain)
    found: dict[str, Any] | None = read_json(cell.result) if cell else None
    return found


def audit_cell(grid: Grid, place: Place, strategy: str, domain: str) -> Cell | None:
    config = grid.experiment(place, strategy)
    label = chosen_variant(grid, place, strategy) if config.simulation.held_out_users else None
    if label is None:
        return None
    run, merged = grid.run(place, strategy), merge_folder(grid.merges(place, strategy), label)
    inputs = {"run": run.name, "merged": merge_hashes(grid, place, strategy)[label]}
    arguments = {
        "config": config,
        "domain": domain,
        "expert": run / ADAPTERS / domain if is_one_shot(config.rounds) else None,
        "merged": merged,
        "run": run,
    }
    file = grid.folder / "clients" / place.dataset / domain / "audit" / f"{inputs_key(inputs)}.json"
    return Cell("audit", f"audit of {label} on {domain} ({place})", file, arguments, config.runtime.threads_per_client)


def rows_on_test(grid: Grid, place: Place, domain: str) -> dict[str, Cell]:
    """Return row -> cell, for the references and for each strategy with a selected variant."""
    shared = grid.evaluation(place, None)
    clients = grid.folder / "clients" / place.dataset
    rows = {"backbone": ranking(grid, place, shared, domain, "test", None, None)}
    for baseline in shared.evaluation.baselines:
        root = grid.test_root(place, "test")
        file = ranks_file(clients, shared, domain, "test", root, baseline)
        arguments = {"config": shared, "domain": domain, "split": "test", "test_root": root, "baseline": baseline}
        threads = shared.runtime.threads_per_client
        rows[baseline] = Cell("baseline", f"{baseline} on {domain} ({place.dataset})", file, arguments, threads)
    if domain in shared.domains.train:
        run = grid.run(place, None)
        expert = (read_sources(run) or {})[domain]
        folder = run / ADAPTERS / domain
        rows["expert"] = ranking_of(grid, place, shared, domain, "test", f"expert of seed {place.seed}", folder, expert)
    for drawing in grid.joint_rows(place):
        made = grid.joint(place, drawing)
        if record := read_json(made):
            title = joint_row(drawing)
            rows[title] = ranking_of(grid, place, shared, domain, "test", title, joint_folder(made), record["sha256"])
    for strategy in grid.strategies:
        label = chosen_variant(grid, place, strategy)
        if label is not None:
            config = grid.evaluation(place, strategy)
            if ranks_by_text(config.head):
                rows[strategy] = ranking(grid, place, config, domain, "test", strategy, label)
            if (factor := chosen_factor(grid, place, strategy, domain)) is not None:
                rows[woven_row(strategy)] = woven_ranking(grid, place, domain, "test", strategy, factor)
            fit = personal_cells(grid, place, strategy).get(domain)
            if fit is not None and (record := read_json(fit.result)):
                row, folder = personal_row(strategy), personal_folder(fit.result)
                rows[row] = ranking_of(grid, place, config, domain, "test", row, folder, record["sha256"])
            rows |= head_cells(grid, place, domain, strategy)
            if record := read_json(grid.federated_head(place, strategy)):
                row = f"{strategy}: {FEDERATED_HEAD}"
                rows[row] = federated_cell(grid, place, domain, strategy, label, record["sha256"])
    return rows


def experts_run(grid: Grid, place: Place, strategy: str) -> Path:
    """Return the training run with the experts of a strategy: its own, or the shared one if it trains in rounds."""
    return grid.run(place, strategy if is_one_shot(grid.experiment(place, strategy).rounds) else None)


def federated_cell(grid: Grid, place: Place, domain: str, strategy: str, label: str, sha256: str) -> Cell:
    """Return the cell that ranks with a strategy's federated head, on any domain."""
    config, merges = grid.evaluation(place, strategy), grid.merges(place, strategy)
    root = grid.test_root(place, "test")
    model = f"{sha256} on {merge_hashes(grid, place, strategy)[label]}"
    file = ranks_file(grid.folder / "clients" / place.dataset, config, domain, "test", root, model, place.seed)
    arguments = {
        "config": config,
        "domain": domain,
        "split": "test",
        "test_root": root,
        "merge": merge_folder(merges, label),
        "head": grid.federated_head(place, strategy),
    }
    title = f"{strategy}: {FEDERATED_HEAD}, on {domain} ({place})"
    return Cell("federated ranking", title, file, arguments, config.runtime.threads_per_client)


def head_cells(grid: Grid, place: Place, domain: str, strategy: str) -> dict[str, Cell]:
    """Return row -> cell for the heads of a strategy: none on a domain that does not train."""
    config, label = grid.evaluation(place, strategy), chosen_variant(grid, place, strategy)
    if config.head.kind is None or label is None or domain not in merged_domains(grid, place, strategy):
        return {}
    run, merges = experts_run(grid, place, strategy), grid.merges(place, strategy)
    adapters: dict[HeadVectors, tuple[Path | None, str]] = {
        "merge": (merge_folder(merges, label), merge_hashes(grid, place, strategy)[label]),
        "expert": (run / ADAPTERS / domain, (read_sources(run) or {})[domain]),
        "backbone": (None, "backbone"),
    }
    clients, root = grid.folder / "clients" / place.dataset, grid.test_root(place, "test")
    shared = read_json(grid.federated_head(place, strategy))
    if config.head.kind == "federated" and shared is None:  # it failed
        return {}
    cells = {}
    for vectors in config.head.vectors:
        adapter, model = adapters[vectors]
        continues = shared if vectors == "merge" else None  # the other heads are the organisation alone
        row = head_row(strategy, vectors)
        arguments = {
            "config": config,
            "domain": domain,
            "split": "test",
            "test_root": root,
            "adapter": adapter,
            "vectors": vectors,
            "seed": place.seed,
            "anchor": head_folder(grid.federated_head(place, strategy)) if continues else None,
        }
        model += f", continues {continues['sha256']}" if continues else ""
        file = ranks_file(clients, config, domain, "test", root, model, place.seed)
        cells[row] = Cell("head", f"{row}, on {domain} ({place})", file, arguments, config.runtime.threads_per_client)
    return cells


def ranking(
    grid: Grid,
    place: Place,
    config: ExperimentConfig,
    domain: str,
    split: Split,
    strategy: str | None,
    label: str | None,
) -> Cell:
    """Return the cell that ranks with a merge, or without a strategy with the backbone alone."""
    if strategy is None or label is None:
        return ranking_of(grid, place, config, domain, split, "backbone", None, "backbone")
    folder = merge_folder(grid.merges(place, strategy), label)
    return ranking_of(grid, place, config, domain, split, label, folder, merge_hashes(grid, place, strategy)[label])


def ranking_of(
    grid: Grid,
    place: Place,
    config: ExperimentConfig,
    domain: str,
    split: Split,
    title: str,
    adapter: Path | None,
    model: str,
) -> Cell:
    root = grid.test_root(place, split)
    file = ranks_file(grid.folder / "clients" / place.dataset, config, domain, split, root, model)
    arguments = {"config": config, "domain": domain, "split": split, "test_root": root, "adapter": adapter}
    return Cell("ranking", f"{title} on {domain} ({place})", file, arguments, config.runtime.threads_per_client)
