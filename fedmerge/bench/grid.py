"""A benchmark from its file to its tables, in stages; what trains and what runs the cells comes from outside.

DIR/benchmark.json                    the benchmark and its experiment, resolved; a later call must have the same
DIR/training/<experiment>/            run folders that end with the experts
DIR/joint/<dataset>/<seed>/<fold>/<drawing>/      joint.json, adapter/: trained on pooled data, which breaks isolation
DIR/admission/<dataset>/<seed>/<fold>/<gate>.json     what the gate found of the experts, of strategies that have one
DIR/merges/<dataset>/<seed>/<fold>/<strategy>/    merges.json, merged/<label>/; choice.json once validation chose
DIR/clients/<dataset>/<domain>/       ranks of users, audits: stands for the clients' disks
the tables of fedmerge.report.bench_tables
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge.bench.cells import (
    JOINT,
    MERGES,
    Cell,
    Ended,
    Running,
    is_one_shot,
    joint_folder,
    ranks_file,
    sums_of_ranks,
)
from fedmerge.bench.config import Bench, Drawing, joint_row
from fedmerge.client.cache.folders import inputs_key
from fedmerge.config import Admission, Attack, Audit, ExperimentConfig, Rounds, Split, flatten
from fedmerge.errors import ClientError, ConfigError, FedMergeError, RunDirError
from fedmerge.evaluation.sums import MetricSums, Variant
from fedmerge.files import read_json, write_json
from fedmerge.privacy.policy import Policy
from fedmerge.runs.checkpoints import ADAPTERS, ended_training, merge_folder
from fedmerge.runs.folder import DONE
from fedmerge.runs.round_checkpoints import members_of, round_records

BENCHMARK = "benchmark.json"

Train = Callable[[ExperimentConfig], None]
Execute = Callable[[Sequence[Cell]], Iterable[Ended | Running]]  # as they end
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """A column of the grid: one dataset, one seed, and who is left out of the merge ("" for nobody)."""

    dataset: str
    seed: int
    left_out: str

    @property
    def fold(self) -> str:
        """As a folder."""
        return f"without-{self.left_out}" if self.left_out else "all"

    def __str__(self) -> str:
        """For people."""
        return f"{self.dataset}, seed {self.seed}" + (f", without {self.left_out}" if self.left_out else "")


@dataclass(frozen=True)
class Grid:
    """A benchmark and its folder."""

    bench: Bench
    folder: Path

    def experiment(self, place: Place, strategy: str | None) -> ExperimentConfig:
        """A strategy's experiment at a place of the grid."""
        return self.bench.experiment(place.dataset, strategy, place.seed)

    def judge(self, place: Place, strategy: str | None) -> ExperimentConfig:
        """The same with the seed that says which users are evaluated: one for the whole benchmark."""
        return self.bench.experiment(place.dataset, strategy, int(self.bench.base["seed"]))

    def training(self, place: Place, strategy: str | None) -> ExperimentConfig:
        """The run that trains for a strategy: strategies that train experts alike share it, and so do all folds.

        What leaves a client does not change what it trains once, so strategies of every policy share it, too.
        A federation of rounds is a run of its own, in which who is left out takes no part.
        """
        wanted = self.experiment(place, strategy)
        runtime, rounds = wanted.runtime, not is_one_shot(wanted)
        left_out = place.left_out if rounds else ""
        domains = tuple(domain for domain in wanted.domains.train if domain != left_out)
        policy: Policy = wanted.privacy.policy if rounds else "adapter+catalog"
        attack = wanted.attack if wanted.attack.domain in domains else Attack()  # whoever is left out poisons nothing
        sections = [wanted.backbone, wanted.text, wanted.lora, wanted.train]
        sections += [wanted.rounds, wanted.mergerec, wanted.adamerging] if rounds else []
        for section, is_set in (
            (attack, attack.domain is not None),
            (wanted.dp, wanted.dp.mode != "none"),
            (wanted.audit, wanted.audit != Audit()),
        ):
            sections += [section] if is_set else []  # else left out, so that runs of earlier benchmarks are found
        transport = wanted.privacy.model_dump(include={"transport", "transport_density"})
        inputs = {
            "domains": [wanted.domains.root, sorted(domains)],
            "sections": [section.model_dump() for section in sections],
            "runtime": [runtime.threads_per_client, runtime.device, runtime.precision],
            "policy": policy,
            **(wanted.privacy.model_dump(include={"threshold", "value_range"}) if policy == "aggregate-only" else {}),
            **(transport if wanted.privacy.transport != "float32" else {}),
        }
        changes = {
            "name": "bench",
            "run_id": f"{place.dataset}-seed{place.seed}-{inputs_key(inputs)[:8]}",
            "output_dir": str(self.folder / "training"),
            "until": "train",
            "domains": wanted.domains.model_copy(update={"train": domains, "unseen": ()}),
            "lora": wanted.lora.model_copy(update={"ranks": wanted.lora.ranks_of(domains)}),
            "merge": wanted.merge.model_copy(update={"methods": ("average",)}),
            "rounds": wanted.rounds if rounds else Rounds(),
            "admission": Admission(),
            "attack": attack,
            "privacy": wanted.privacy.model_copy(update={"policy": policy}),
        }
        return wanted.model_copy(update=changes)

    def run(self, place: Place, strategy: str | None) -> Path:
        """Folder of the run that trains."""
        return self.folder / "training" / str(self.training(place, strategy).run_id)

    def gate(self, place: Place, strategy: str) -> Path | None:
        """What the gate of a strategy says of its experts: one file for all strategies with the same; None: no gate."""
        config = self.judge(place, strategy)
        if config.admission.action != "exclude":
            return None
        inputs = {"admission": config.admission.model_dump(), "run": self.run(place, strategy).name}
        folder = self.folder / "admission" / place.dataset / f"seed{place.seed}" / place.fold
        return folder / f"{inputs_key(inputs)[:8]}.json"

    def turned_away(self, place: Place, strategy: str) -> dict[str, str]:
        """Domain -> why the gate of a strategy keeps its expert out of the merges."""
        gate = self.gate(place, strategy)
        failed: dict[str, str] = (read_json(gate) or {}).get("failed", {}) if gate else {}
        return failed

    def merges(self, place: Place, strategy: str) -> Path:
        """Folder of a strategy's merges."""
        return self._at(place, "merges") / strategy

    def joint(self, place: Place, drawing: Drawing) -> Path:
        """What joint training leaves when it is done."""
        return self._at(place, "joint") / drawing / JOINT

    def _at(self, place: Place, what: str) -> Path:
        return self.folder / what / place.dataset / f"seed{place.seed}" / place.fold

    @property
    def strategies(self) -> list[str]:
        """In the order of the file."""
        return [strategy.name for strategy in self.bench.config.strategy]

    def places(self) -> list[Place]:
        """Every place; those that leave nobody out first."""
        config = self.bench.config
        whole = [Place(dataset.name, seed, "") for dataset in config.dataset for seed in config.seeds]
        folds = [
            Place(place.dataset, place.seed, domain)
            for place in whole
            for domain in self.experiment(place, None).domains.train
            if config.leave_one_out
        ]
        return whole + folds

    def joint_rows(self, place: Place) -> tuple[Drawing, ...]:
        """The rows of joint training at a place."""
        config = self.bench.config
        return () if place.left_out and not config.joint_folds else config.joint


def open_folder(folder: Path, bench: Bench) -> None:
    """Make a benchmark's folder, or see that it is this benchmark's.

    Raises:
        ConfigError: it holds another benchmark, or something else.
        RunDirError: it cannot be written.
    """
    wanted = {"benchmark": bench.config.model_dump(mode="json"), "experiment": bench.base}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = any(folder.iterdir())
    except OSError as error:
        raise RunDirError(f"{folder} cannot be made ({error.strerror}). Give --out a folder you can write.") from error
    kept = read_json(folder / BENCHMARK)
    if kept is None:
        if others:
            raise ConfigError(f"{folder}: holds something, but no benchmark; give --out a new or empty folder")
        write_json(folder / BENCHMARK, wanted)
    elif kept != json.loads(json.dumps(wanted)):
        flat = {name: flatten(of) for name, of in {"kept": kept, "wanted": wanted}.items()}
        keys = [key for key in {**flat["kept"], **flat["wanted"]} if flat["kept"].get(key) != flat["wanted"].get(key)]
        raise ConfigError(
            f"{folder}: was begun with another benchmark; {', '.join(sorted(keys))} differ. Give --out another folder, "
            "or put the files back as they were."
        )


def run_grid(grid: Grid, train: Train, execute: Execute, progress: Progress) -> list[str]:
    """Do all that is not done yet.

    Args:
        grid: what.
        train: runs an experiment until its experts are there, or goes on with one.
        execute: does cells, any number at once.
        progress: receives a line for everything that happens.

    Returns:
        What failed, a line each; what depends on it is left out.
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
            if config.rounds.rule is None:  # experts are everybody's
                raise
            failed.append(f"training: {run.name}: {error}")
            progress(failed[-1])
            incomplete.add(run)
    stages: list[tuple[str, Callable[[], list[Cell]]]] = [
        ("joint training", lambda: joint_cells(grid, places)),
        ("admission", lambda: admission_cells(grid, places)),
        ("merging", lambda: [cell for cell in merging_cells(grid, places) if cell.arguments["run"] not in incomplete]),
        ("validation", lambda: validation_cells(grid, places)),
        ("test", lambda: test_cells(grid, places)),
        ("audit", lambda: audit_cells(grid, places)),
    ]
    for name, cells_of in stages:
        cells = cells_of()
        left = [cell for cell in cells if not cell.result.is_file()]
        if not cells and name in ("admission", "audit"):
            continue
        progress(f"{name}: {len(cells) - len(left)} of {len(cells)} cells are done")
        failed += _do(name, left, execute, progress)
    return failed


def _check_all_took_part(run: Path, config: ExperimentConfig) -> None:
    """Strategies are compared on the same domains; ClientError where a training went on without one."""
    if config.rounds.rule is None:
        took_part = {*(ended_training(run) or {})}
    elif config.rounds.fraction < 1:  # not everybody is drawn for a round
        took_part = {*members_of(run)} - {*read_json(run / "clients.json")["excluded"]}
    else:
        took_part = set.intersection(*({*record["aggregation"]["client_weights"]} for record in round_records(run)))
    if missing := sorted({*config.domains.train} - took_part):
        raise ClientError(
            f"{run}: without {', '.join(missing)}; every strategy needs all domains. See its run.log and "
            "clients.json; correct what is said there, delete this folder, and start the benchmark again."
        )


def joint_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """Joint training at each place, without whoever is left out."""
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
    """One for each place and gate."""
    cells = {}
    for place in places:
        for strategy in grid.strategies:
            if gate := grid.gate(place, strategy):
                config = grid.judge(place, strategy)
                arguments = {"config": config, "run": grid.run(place, strategy), "left_out": place.left_out}
                cells[gate] = Cell("admission", f"gate ({place})", gate, arguments, config.runtime.server_threads)
    return list(cells.values())


def merging_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """One for each strategy and place; none where its gate failed."""
    return [
        Cell(
            "merging",
            f"{strategy} ({place})",
            grid.merges(place, strategy) / MERGES,
            {
                "config": (config := grid.experiment(place, strategy)),
                "run": grid.run(place, strategy),
                "without": tuple(
                    domain for domain in config.domains.train if domain not in merged_domains(grid, place, strategy)
                ),
            },
            config.runtime.server_threads,
        )
        for place in places
        for strategy in grid.strategies
        if (gate := grid.gate(place, strategy)) is None or gate.is_file()
    ]


def validation_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """Every variant of the strategies that have several, on the validation users of the domains that are merged."""
    cells = {}
    for place in places:
        for strategy in grid.strategies:
            merges = made_merges(grid, place, strategy)
            config = grid.judge(place, strategy)
            for domain in merged_domains(grid, place, strategy):
                for label in merges if len(merges) > 1 else ():
                    cell = _ranking(grid, place, config, domain, "valid", strategy, label)
                    cells[cell.result] = cell
    return list(cells.values())


def test_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """The reference rows, and each strategy's chosen variant. Choices are made, and written, before."""
    cells = {}
    for place in places:
        for strategy in grid.strategies:
            chosen_variant(grid, place, strategy)
    for place in places:
        for domain in tested_domains(grid, place):
            for cell in _test_rows(grid, place, domain).values():
                cells[cell.result] = cell
    return list(cells.values())


def audit_cells(grid: Grid, places: Sequence[Place]) -> list[Cell]:
    """What strategies that left users out of their trainings tell of the others: places that leave no domain out.

    An expert that a gate turned away was sent, and is audited with the others.
    """
    cells = {}
    for place in places:
        for strategy in grid.strategies if not place.left_out else ():
            for domain in grid.experiment(place, strategy).domains.train:
                if cell := _audit(grid, place, strategy, domain):
                    cells[cell.result] = cell
    return list(cells.values())


def audit_of(grid: Grid, place: Place, strategy: str, domain: str) -> dict[str, Any] | None:
    """What an audit measured; None if there is none."""
    cell = _audit(grid, place, strategy, domain)
    found: dict[str, Any] | None = read_json(cell.result) if cell else None
    return found


def _audit(grid: Grid, place: Place, strategy: str, domain: str) -> Cell | None:
    config = grid.experiment(place, strategy)
    label = chosen_variant(grid, place, strategy) if config.audit.held_out_users else None
    if label is None:
        return None
    run, merged = grid.run(place, strategy), merge_folder(grid.merges(place, strategy), label)
    inputs = {"run": run.name, "merged": made_merges(grid, place, strategy)[label]}
    arguments = {
        "config": config,
        "domain": domain,
        "expert": run / ADAPTERS / domain if is_one_shot(config) else None,
        "merged": merged,
    }
    file = grid.folder / "clients" / place.dataset / domain / "audit" / f"{inputs_key(inputs)}.json"
    return Cell("audit", f"audit of {label} on {domain} ({place})", file, arguments, config.runtime.threads_per_client)


def made_merges(grid: Grid, place: Place, strategy: str) -> dict[str, str]:
    """Label -> hash of what a strategy's cell has merged; empty if it failed."""
    merges: dict[str, str] = (read_json(grid.merges(place, strategy) / MERGES) or {}).get("merges", {})
    return merges


def merged_domains(grid: Grid, place: Place, strategy: str | None) -> list[str]:
    """Whose experts are merged: they decide among variants. None: whose data are pooled."""
    out = {place.left_out, *(grid.turned_away(place, strategy) if strategy else ())}
    return [domain for domain in sorted(grid.experiment(place, strategy).domains.train) if domain not in out]


def tested_domains(grid: Grid, place: Place) -> list[str]:
    """With nobody left out all domains, else the one that is."""
    domains = grid.experiment(place, None).domains
    return [place.left_out] if place.left_out else [*domains.train, *domains.unseen]


def chosen_variant(grid: Grid, place: Place, strategy: str) -> str | None:
    """The label that validation chose, once: what is on disk is final. None if no merge was made or judged."""
    file = grid.merges(place, strategy) / "choice.json"
    if made := read_json(file):
        return str(made["chosen"])
    merges = made_merges(grid, place, strategy)
    config = grid.judge(place, strategy)
    metric = config.evaluation.selection_metric
    scores: dict[str, float] = {}
    if len(merges) > 1:
        means: dict[str, list[float]] = {label: [] for label in merges}
        for domain in merged_domains(grid, place, strategy):
            files = {label: _ranking(grid, place, config, domain, "valid", strategy, label).result for label in merges}
            if not all(file.is_file() for file in files.values()):
                return None
            sums = sums_of_ranks(files, domain, config.privacy.min_users)["unmasked"]
            for label in merges:
                means[label].append(sums.mean(label, metric))
        scores = {label: float(np.mean(values)) for label, values in means.items()}
    elif not merges:
        return None
    chosen = max(merges, key=lambda label: scores.get(label, 0.0))  # of equal ones the first
    write_json(file, {"chosen": chosen, "metric": metric, "validation": scores})
    return chosen


def test_sums(grid: Grid, place: Place, domain: str) -> dict[Variant, MetricSums]:
    """What a domain tells of its test users: a row for each reference and strategy that did not fail."""
    rows = {row: cell.result for row, cell in _test_rows(grid, place, domain).items() if cell.result.is_file()}
    return sums_of_ranks(rows, domain, grid.experiment(place, None).privacy.min_users) if rows else {}


def _test_rows(grid: Grid, place: Place, domain: str) -> dict[str, Cell]:
    """Row -> cell."""
    shared = grid.judge(place, None)
    clients = grid.folder / "clients" / place.dataset
    rows = {"backbone": _ranking(grid, place, shared, domain, "test", None, None)}
    for baseline in shared.evaluation.baselines:
        file = ranks_file(clients, shared, domain, "test", baseline)
        arguments = {"config": shared, "domain": domain, "split": "test", "baseline": baseline}
        threads = shared.runtime.threads_per_client
        rows[baseline] = Cell("baseline", f"{baseline} on {domain} ({place.dataset})", file, arguments, threads)
    if domain in shared.domains.train:
        run = grid.run(place, None)
        expert = (ended_training(run) or {})[domain]
        folder = run / ADAPTERS / domain
        rows["expert"] = _ranking_of(
            grid, place, shared, domain, "test", f"expert of seed {place.seed}", folder, expert
        )
    for drawing in grid.joint_rows(place):
        made = grid.joint(place, drawing)
        if record := read_json(made):
            title = joint_row(drawing)
            rows[title] = _ranking_of(grid, place, shared, domain, "test", title, joint_folder(made), record["sha256"])
    for strategy in grid.strategies:
        label = chosen_variant(grid, place, strategy)
        if label is not None:
            config = grid.judge(place, strategy)
            rows[strategy] = _ranking(grid, place, config, domain, "test", strategy, label)
    return rows


def _ranking(
    grid: Grid,
    place: Place,
    config: ExperimentConfig,
    domain: str,
    split: Split,
    strategy: str | None,
    label: str | None,
) -> Cell:
    """A merge, or with no strategy the backbone alone, on a domain's users."""
    if strategy is None or label is None:
        return _ranking_of(grid, place, config, domain, split, "backbone", None, "backbone")
    folder = merge_folder(grid.merges(place, strategy), label)
    return _ranking_of(grid, place, config, domain, split, label, folder, made_merges(grid, place, strategy)[label])


def _ranking_of(
    grid: Grid,
    place: Place,
    config: ExperimentConfig,
    domain: str,
    split: Split,
    title: str,
    adapter: Path | None,
    model: str,
) -> Cell:
    file = ranks_file(grid.folder / "clients" / place.dataset, config, domain, split, model)
    arguments = {"config": config, "domain": domain, "split": split, "adapter": adapter}
    return Cell("ranking", f"{title} on {domain} ({place})", file, arguments, config.runtime.threads_per_client)


def _do(stage: str, cells: Sequence[Cell], execute: Execute, progress: Progress) -> list[str]:
    """Do cells with a line for each: how many, and how much longer at the pace so far."""
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
