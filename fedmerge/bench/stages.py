"""The stages of a benchmark: training, joint training, admission, personal merges, merging, validation, test, audit.

The caller provides the functions that train and that run cells.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fedmerge.bench.cells import (
    MERGES,
    Cell,
    Ended,
    Running,
)
from fedmerge.bench.grid import Grid, Place
from fedmerge.bench.outcomes import (
    audit_cell,
    chosen_factor,
    chosen_variant,
    merge_hashes,
    merged_domains,
    personal_cells,
    ranking,
    rows_on_test,
    tested_domains,
    woven_hashes,
    woven_ranking,
)
from fedmerge.config import ExperimentConfig
from fedmerge.errors import ClientError, FedMergeError
from fedmerge.files import read_json
from fedmerge.runs.checkpoints import merge_folder, read_sources, read_weave
from fedmerge.runs.folder import DONE
from fedmerge.runs.round_checkpoints import read_members, round_records

Train = Callable[[ExperimentConfig], None]
Execute = Callable[[Sequence[Cell]], Iterable[Ended | Running]]  # as they end
Progress = Callable[[str], None]


def run_grid(grid: Grid, train: Train, execute: Execute, progress: Progress) -> list[str]:
    """Run everything that is not finished yet.

    Args:
        grid: the benchmark.
        train: runs or resumes an experiment until its experts are trained.
        execute: runs cells, any number at once.
        progress: receives a line per event.

    Returns:
        One line per failure; cells that depend on a failed one are skipped.
    """
    failed: list[str] = []
    places = grid.places()
    runs = {
        grid.run(place, strategy): grid.training(place, strategy)
        for place in places
        for strategy in (None, *grid.strategies)  # None: the experts of the reference row
    }
    incomplete = set()
    untrained = sum(not (run / DONE).is_file() for run in runs)
    trained: list[float] = []  # seconds
    for number, (run, config) in enumerate(runs.items(), 1):
        try:
            if not (run / DONE).is_file():
                pace = sum(trained) / len(trained) if trained else 0
                about = f", about {_duration(pace * untrained)} of training left" if trained else ""
                progress(f"training {number} of {len(runs)}: {run.name}{about}")
                started, untrained = time.monotonic(), untrained - 1
                train(config)
                trained.append(time.monotonic() - started)
            _check_all_took_part(run, config)
        except FedMergeError as error:
            if config.rounds.rule is None and config.weave.schedule is None:  # all strategies share the experts
                raise
            failed.append(f"training: {run.name}: {error}")
            progress(failed[-1])
            incomplete.add(run)
    stages: list[tuple[str, Callable[[], list[Cell]]]] = [
        ("joint training", lambda: joint_cells(grid, places)),
        ("admission", lambda: admission_cells(grid, places)),
        ("personal merges", lambda: fitting_cells(grid, places)),
        ("merging", lambda: [cell for cell in merging_cells(grid, places) if cell.arguments["run"] not in incomplete]),
        ("validation", lambda: validation_cells(grid, places)),
        ("federated heads", lambda: federated_head_cells(grid, places)),
        ("test", lambda: test_cells(grid, places)),
        ("audit", lambda: audit_cells(grid, places)),
    ]
    for name, cells_of in stages:
        cells = cells_of()
        left = [cell for cell in cells if not cell.result.is_file()]
        if not cells and name in ("admission", "personal merges", "federated heads", "audit"):
            continue
        progress(f"{name}: {len(cells) - len(left)} of {len(cells)} cells are done")
        failed += _do(name, left, execute, progress)
    return failed


def joint_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """Return a cell of joint training per place and drawing, without the left-out domain."""
    return [
        Cell(
            "joint training",
            f"{drawing} ({place})",
            grid.joint(place, drawing),
            {
                "config": (config := grid.experiment(place, None)),
                "domains": merged_domains(grid, place, None),
                "drawing": drawing,
            },
            config.runtime.threads_per_client,
        )
        for place in places
        for drawing in grid.joint_rows(place)
    ]


def admission_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """Return a cell per place and gate."""
    cells = {}
    for place in places:
        for strategy in grid.strategies:
            if gate := grid.gate(place, strategy):
                config = grid.evaluation(place, strategy)
                arguments = {"config": config, "run": grid.run(place, strategy), "left_out": place.left_out}
                cells[gate] = Cell("admission", f"gate ({place})", gate, arguments, config.runtime.server_threads)
    return list(cells.values())


def fitting_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """Return a cell per personal merge; none where the gate failed."""
    return [
        cell
        for place in places
        for strategy in grid.strategies
        if _passed_gate(grid, place, strategy)
        for cell in personal_cells(grid, place, strategy).values()
    ]


def merging_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """Return a cell per strategy and place; none where its gate or a fit for its universal merge failed."""
    return [
        Cell(
            "merging",
            f"{strategy} ({place})",
            grid.merges(place, strategy) / MERGES,
            {
                "config": (config := grid.experiment(place, strategy)),
                "run": grid.run(place, strategy),
                "evaluation": grid.evaluation(place, strategy),
                "without": tuple(
                    domain for domain in config.domains.train if domain not in merged_domains(grid, place, strategy)
                ),
                "fits": fits if config.personal.universal else {},
            },
            config.runtime.server_threads,
        )
        for place in places
        for strategy in grid.strategies
        if _passed_gate(grid, place, strategy)
        for fits in [{domain: cell.result for domain, cell in personal_cells(grid, place, strategy).items()}]
        if all(fit.is_file() for fit in fits.values())
    ]


def _passed_gate(grid: Grid, place: Place, strategy: str) -> bool:
    return (gate := grid.gate(place, strategy)) is None or gate.is_file()


def validation_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """Return the cells that rank validation users of the merged domains, for strategies with several variants.

    Of the merges of single targets, each is ranked on its own domain only.
    """
    cells = {}
    for place in places:
        for strategy in grid.strategies:
            merges = merge_hashes(grid, place, strategy)
            config = grid.evaluation(place, strategy)
            for domain in merged_domains(grid, place, strategy):
                for label in merges if len(merges) > 1 else ():
                    cell = ranking(grid, place, config, domain, "valid", strategy, label)
                    cells[cell.result] = cell
            for domain, labels in woven_hashes(grid, place, strategy).items():
                for label in labels if len(labels) > 1 else ():
                    cell = woven_ranking(grid, place, domain, "valid", strategy, label)
                    cells[cell.result] = cell
    return list(cells.values())


def federated_head_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """Return a cell per place and strategy with a federated head, on the vectors of its selected variant."""
    cells = []
    for place in places:
        for strategy in grid.strategies:
            config, label = grid.experiment(place, strategy), chosen_variant(grid, place, strategy)
            if config.head.kind == "federated" and label is not None:
                arguments = {
                    "config": config,
                    "merge": merge_folder(grid.merges(place, strategy), label),
                    "domains": merged_domains(grid, place, strategy),
                }
                file, threads = grid.federated_head(place, strategy), config.runtime.threads_per_client
                cells.append(Cell("federated head", f"{strategy}: federated head ({place})", file, arguments, threads))
    return cells


def test_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """Return the cells of the reference rows and the selected variants; all selections are written first.

    Those of one model on one domain stand together, since a process keeps the vectors of the last ones.
    """
    cells = {}
    for place in places:
        for strategy in grid.strategies:
            chosen_variant(grid, place, strategy)
            for domain in woven_hashes(grid, place, strategy):
                chosen_factor(grid, place, strategy, domain)
    for place in places:
        for domain in tested_domains(grid, place):
            for cell in rows_on_test(grid, place, domain).values():
                cells[cell.result] = cell
    return sorted(cells.values(), key=_domain_and_model)


def _domain_and_model(cell: Cell) -> tuple[str, str]:
    given = cell.arguments
    return str(given["domain"]), str(given.get("adapter") or given.get("merge") or "")


def audit_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """Return the audits of strategies that held users out of training, at places without a left-out domain.

    An expert that a gate excluded was sent to the server, so it is audited as well.
    """
    cells = {}
    for place in places:
        for strategy in grid.strategies if not place.left_out else ():
            for domain in grid.experiment(place, strategy).domains.train:
                if cell := audit_cell(grid, place, strategy, domain):
                    cells[cell.result] = cell
    return list(cells.values())


def _check_all_took_part(run: Path, config: ExperimentConfig) -> None:
    """Raise ClientError if a training lost a domain: strategies are compared on the same domains."""
    rounds, domains = config.rounds, config.domains.train
    if config.weave.schedule is not None:
        took_part = {each.target for each in read_weave(run) or {}}
    elif rounds.rule is None:
        took_part = {*(read_sources(run) or {})}
    elif rounds.fraction < 1:  # a round samples clients
        took_part = {*read_members(run)} - {*read_json(run / "clients.json")["excluded"]}
    else:
        took_part = set.intersection(*({*record["aggregation"]["client_weights"]} for record in round_records(run)))
    if missing := sorted({*domains} - took_part):
        raise ClientError(
            f"{run}: trained without {', '.join(missing)}; every strategy needs all domains. See its run.log and "
            "clients.json, fix the cause, delete this folder, and start the benchmark again."
        )


def _do(stage: str, cells: Sequence[Cell], execute: Execute, progress: Progress) -> list[str]:
    """Run cells, with a progress line for each: its number, and the time left at the pace so far."""
    failed = []
    started = time.monotonic()
    own, number = 0.0, 0
    for ended in execute(cells):
        spent = time.monotonic() - started
        if isinstance(ended, Running):
            titles = "; ".join(cell.title for cell in ended.cells)
            progress(f"{stage}: {number} of {len(cells)} ended, {_duration(spent)} so far; running: {titles}")
            continue
        number += 1
        own += ended.seconds
        left = len(cells) - number
        about = f", about {_duration(spent / number * left)} of {stage} left" if left else ""
        how = f": FAILED: {ended.problem}" if ended.problem else f", {_duration(ended.seconds)}"
        progress(f"{stage} {number} of {len(cells)}: {ended.cell.title}{how}{about}")
        if ended.problem:
            failed.append(f"{stage}: {ended.cell.title}: {ended.problem}")
    if cells:
        progress(f"{stage}: {own:.1f} s of work in {time.monotonic() - started:.1f} s")
    return failed


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
