"""A benchmark: its file, its cells, going on after a kill, and what its tables say."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from in_process import here, small_experiment, tables_of, train

import sim.local.bench
from fedmerge.bench.cells import Cell, Ended, Running, domain_of, joint_folder, sums_of_ranks, work
from fedmerge.bench.config import load_bench
from fedmerge.bench.grid import Grid, Place, open_folder
from fedmerge.bench.outcomes import merge_hashes, merged_domains
from fedmerge.bench.stages import run_grid
from fedmerge.bench.tables import WEIGHTS
from fedmerge.client.audit.attacks import Audited, audit_domain
from fedmerge.client.evaluate import evaluate
from fedmerge.config import DEMO_ROOT, ExperimentConfig, from_flat, load_config, to_flat, to_toml
from fedmerge.domain.demo import DEMO_DOMAINS
from fedmerge.encoder.peft_folder import read_adapter
from fedmerge.errors import ClientError, ConfigError, PolicyError, RunDirError
from fedmerge.federated.rules import RULES
from fedmerge.files import read_json, write_json
from fedmerge.merging.methods import METHODS
from fedmerge.report.bench.page import bench_page
from fedmerge.report.bench_tables import EVERY_FOLD, BenchTables, read_bench_tables
from fedmerge.runs.checkpoints import ended_training, merge_folder
from fedmerge.runs.round_checkpoints import round_records
from sim.app.server.rounds import check_rounds
from sim.local.bench import run_bench
from sim.local.in_process import run_in_process

pytestmark = pytest.mark.federation

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = ("beauty", "books", "coffee")
STRATEGIES = ("average", "task-arithmetic", "mergerec")
VARIANTS = ("task-arithmetic 0.2", "task-arithmetic 0.6")

FILE = """
title = "A small benchmark"
experiment = "experiment.toml"
seeds = [0, 1]
leave_one_out = true
baseline = "average"

[[strategy]]
name = "average"
set = { "merge.methods" = "average" }

[[strategy]]
name = "task-arithmetic"
[strategy.set.merge]
methods = "task-arithmetic"
task_arithmetic_coefficients = "0.2,0.6"

[[strategy]]
name = "mergerec"
set = { "merge.methods" = "mergerec", "mergerec.granularities" = "layer" }
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains, a tiny backbone, and a benchmark file."""
    place = tmp_path_factory.mktemp("bench")
    experiment = small_experiment(place, **{"privacy.min_users": 2})
    (place / "experiment.toml").write_text(to_toml(experiment))
    (place / "bench.toml").write_text(FILE)
    return place


def grid_in(place: Path, name: str, file: str = "bench.toml") -> Grid:
    bench = load_bench(place / file)
    open_folder(place / name, bench)
    return Grid(bench, place / name)


@pytest.fixture(scope="module")
def done(place: Path) -> tuple[Grid, BenchTables, list[str]]:
    lines: list[str] = []
    grid = grid_in(place, "done")
    run_in_process(load_config(place / "experiment.toml", ["seed=0", "until=train", "run_id=before"]))
    assert run_grid(grid, train, here, lines.append) == []
    return grid, tables_of(grid), lines


def scores(tables: BenchTables, **wanted: object) -> dict[str, float]:
    """Strategy -> recall@10, unmasked."""
    wanted = {"variant": "unmasked", "metric": "recall@10", **wanted}
    rows = [row for row in tables.results if all(row[key] == value for key, value in wanted.items())]
    assert len({row["strategy"] for row in rows}) == len(rows)
    return {row["strategy"]: row["value"] for row in rows}


def test_the_grid_is_complete_and_experts_are_trained_once_a_seed(done: tuple[Grid, BenchTables, list[str]]) -> None:
    _, tables, lines = done
    found = {(row["strategy"], row["seed"], row["left_out"], row["domain"]) for row in tables.results}
    rows = {*STRATEGIES, "backbone", "popularity", "last-item", "expert"}
    whole = {(row, seed, "", domain) for row in rows for seed in (0, 1) for domain in TRAIN}
    unseen = {(row, seed, "", "camping") for row in rows - {"expert"} for seed in (0, 1)}
    folds = {(row, seed, domain, domain) for row in rows for seed in (0, 1) for domain in TRAIN}
    assert found == whole | unseen | folds
    assert {row["role"] for row in tables.results if row["left_out"] or row["domain"] == "camping"} == {"unseen"}
    assert {row["num_users"] for row in tables.results} == {30}
    assert sum(line.startswith("training") for line in lines) == 2
    assert {(cell["strategy"], cell["status"]) for cell in tables.cells} == {(name, "done") for name in STRATEGIES}
    assert tables.synthetic
    assert set(tables.references) == rows - {*STRATEGIES}
    ranked = [line for line in lines if line.startswith("test ")]
    assert len(ranked) == len(set(ranked))
    trainings = [re.sub("[0-9]+ s", "9 s", line) for line in lines if line.startswith("training ")]
    assert re.fullmatch(r"training 1 of 2: main-seed0-\w{8}", trainings[0])
    assert re.fullmatch(r"training 2 of 2: main-seed1-\w{8}, about 9 s of training left", trainings[1])


def test_who_waits_is_told_what_is_running(place: Path, done: tuple[Grid, BenchTables, list[str]]) -> None:
    grid = grid_in(place, "slow")
    shutil.copytree(done[0].folder / "training", grid.folder / "training")

    def slow(cells: Sequence[Cell]) -> Iterator[Ended | Running]:
        for cell in cells:
            yield Running((cell, cells[-1]))
            yield work(cell)

    lines: list[str] = []
    assert run_grid(grid, train, slow, lines.append) == []
    merging = [line for line in lines if line.startswith("merging")]
    assert merging[0] == "merging: 0 of 24 cells are done"
    last = "mergerec (main, seed 1, without coffee)"
    assert merging[1] == f"merging: 0 of 24 ended, 0 s so far; running: average (main, seed 0); {last}"
    assert re.fullmatch(
        r"merging 1 of 24: average \(main, seed 0\), \d+ s, about \d+ (s|min) of merging left", merging[2]
    )
    assert re.fullmatch(rf"merging: 23 of 24 ended, \d+ s so far; running: {re.escape(f'{last}; {last}')}", merging[47])
    assert re.fullmatch(rf"merging 24 of 24: {re.escape(last)}, \d+ s", merging[48])
    assert re.fullmatch(r"merging: [\d.]+ s of work in [\d.]+ s", merging[49])


def test_experts_that_a_run_left_in_the_cache_are_not_trained_again(
    place: Path, done: tuple[Grid, BenchTables, list[str]]
) -> None:
    grid, _, _ = done
    for seed, expected in ((0, True), (1, False)):  # there was a run with seed 0 before
        run = grid.run(Place("main", seed, ""), None)
        reports = {name: read_json(run / "adapters" / name / "training.json") for name in TRAIN}
        assert {report["cached"] for report in reports.values()} == {expected}
    before = {name: read_json(place / "runs" / "before" / "adapters" / name / "training.json") for name in TRAIN}
    kept = ended_training(grid.run(Place("main", 0, ""), None))
    assert kept == {name: report["sha256"] for name, report in before.items()}


OTHERWISE = """
[[strategy]]
name = "plain"
set = { "merge.methods" = "average" }
[[strategy]]
name = "catalog"
set = { "train.negatives" = "catalog" }
[[strategy]]
name = "epsilon-8"
set = { "train.negatives" = "catalog", "dp.mode" = "user", "dp.epsilon" = 8, "dp.delta" = 1e-6 }
[[strategy]]
name = "epsilon-1"
set = { "train.negatives" = "catalog", "dp.mode" = "user", "dp.epsilon" = 1, "dp.delta" = 1e-6 }
[[strategy]]
name = "canaries"
set = { "audit.canaries" = 3 }
[[strategy]]
name = "int8"
set = { "privacy.transport" = "int8" }
[[strategy]]
name = "a-tenth"
set = { "privacy.transport" = "top-k" }
[[strategy]]
name = "a-half"
set = { "privacy.transport" = "top-k", "privacy.transport_density" = 0.5 }
"""


def test_strategies_that_train_otherwise_do_not_share_their_experts(place: Path) -> None:
    (place / "otherwise.toml").write_text(
        FILE[: FILE.index("[[strategy]]")].replace('"average"', '"plain"') + OTHERWISE
    )
    grid = grid_in(place, "otherwise", "otherwise.toml")
    names = [strategy.name for strategy in grid.bench.config.strategy]
    assert len({grid.run(Place("main", 0, ""), name) for name in names}) == len(names) == 8


def test_settings_of_the_experiment_are_changed_on_the_command_line(place: Path) -> None:
    bench = load_bench(place / "bench.toml", ["cache_dir=/elsewhere", "train.max_steps=3"])
    experiment = bench.experiment("main", "mergerec", 1)
    assert (experiment.cache_dir, experiment.train.max_steps, experiment.seed) == ("/elsewhere", 3, 1)
    with pytest.raises(ConfigError, match=r"did you mean train.max_steps\?"):
        load_bench(place / "bench.toml", ["train.max_step=3"])


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs" / "bench").glob("*.toml")), ids=lambda file: file.stem)
def test_every_benchmark_of_the_repository_is_valid(file: Path) -> None:
    bench = load_bench(file)
    for dataset, strategy in itertools.product(bench.config.dataset, bench.config.strategy):
        config = bench.experiment(dataset.name, strategy.name, 0)
        check_rounds(config)
        if config.rounds.rule in ("krum", "multi-krum"):
            assert len(config.domains.train) >= 5
        if config.domains.root == DEMO_ROOT:
            assert {*config.domains.train, *config.domains.unseen} <= {*DEMO_DOMAINS}
    text = file.read_text()
    assert f"fedmerge bench configs/bench/{file.name} --out bench/{file.stem}" in text


def test_the_benchmark_of_aggregation_has_every_merge_and_rule() -> None:
    bench = load_bench(REPOSITORY / "configs" / "bench" / "aggregation.toml")
    configs = [bench.experiment("demo", strategy.name, 0) for strategy in bench.config.strategy]
    merges = [name for config in configs if config.rounds.rule is None for name in config.merge.methods]
    assert merges == [name for name, method in METHODS.items() if not method.learned]
    assert [config.rounds.rule for config in configs if config.rounds.rule] == [*RULES]


def test_ranks_of_a_domain_that_is_left_out_are_left_out(place: Path) -> None:
    text = FILE + '\n[[strategy]]\nname = "flora"\n[strategy.set]\n"rounds.rule" = "flora"\n'
    (place / "ranks.toml").write_text(text + '"lora.ranks" = "books=3,coffee=4"\n')
    grid = Grid(load_bench(place / "ranks.toml"), place / "ranks")
    training = grid.training(Place("main", 0, "books"), "flora")
    assert training.domains.train == ("beauty", "coffee")
    assert from_flat(to_flat(training)).lora.ranks == ("coffee=4",)  # as Flower hands it over
    assert grid.training(Place("main", 0, "books"), None).domains.train == TRAIN


def test_scores_are_those_of_the_library_and_validation_chooses(done: tuple[Grid, BenchTables, list[str]]) -> None:
    grid, tables, _ = done
    place = Place("main", 1, "")
    config = grid.experiment(place, "task-arithmetic")
    merges = {label: read_adapter(merge_folder(grid.merges(place, "task-arithmetic"), label)) for label in VARIANTS}
    means = dict.fromkeys(VARIANTS, 0.0)
    for name in TRAIN:
        sums = evaluate(domain_of(config, name), merges, "valid", None, 0)["unmasked"]
        means = {label: mean + sums.mean(label, "ndcg@10") / 3 for label, mean in means.items()}
    chosen = max(means, key=lambda label: means[label])
    assert {row["label"] for row in tables.results if (row["strategy"], row["seed"]) == ("task-arithmetic", 1)} >= {
        chosen
    }
    for name in (*TRAIN, "camping"):
        expected = evaluate(domain_of(config, name), {chosen: merges[chosen]}, "test", None, 0)["unmasked"]
        found = scores(tables, seed=1, left_out="", domain=name)["task-arithmetic"]
        assert found == pytest.approx(expected.mean(chosen, "recall@10"), abs=1e-12)


def test_whoever_is_left_out_is_in_no_merge_and_has_no_say(done: tuple[Grid, BenchTables, list[str]]) -> None:
    grid, tables, _ = done
    for place in grid.places():
        for strategy in STRATEGIES:
            for label in merge_hashes(grid, place, strategy):
                provenance = read_json(merge_folder(grid.merges(place, strategy), label) / "provenance.json")
                assert {*provenance["domains"]} == {*TRAIN} - {place.left_out}
            assert merged_domains(grid, place, strategy) == sorted({*TRAIN} - {place.left_out})
    rows = [row for row in tables.comparisons if row["left_out"] == EVERY_FOLD]
    assert {row["role"] for row in rows} == {"unseen"}
    assert {row["domain"] for row in rows} == {*TRAIN, "camping", "mean"}  # camping is in no merge of any fold
    assert [row for row in tables.comparisons if row["role"] == "unseen" and row not in rows] == []
    page = bench_page(tables)
    assert "Unseen against seen domains" in page
    for domain in (*TRAIN, "camping"):
        assert f"{domain} (unseen)" in page


def test_costs_curves_and_coefficients(done: tuple[Grid, BenchTables, list[str]]) -> None:
    _, tables, _ = done
    up = {row["strategy"]: row["bytes_up"] for row in tables.costs if (row["seed"], row["left_out"]) == (0, "")}
    assert up["average"] == up["task-arithmetic"] < up["mergerec"]  # which needs the catalogs
    assert all(row["peak_bytes"] > 2**27 and row["server_seconds"] > 0 < row["client_seconds"] for row in tables.costs)
    assert {row["strategy"] for row in tables.coefficients} == {"mergerec"}
    assert {row["domain"] for row in tables.coefficients} == {*TRAIN}
    losses = [row for row in tables.curves if row["strategy"] == "mergerec" and row["name"] == "loss"]
    assert len(losses) == 2 * 4 * 2  # steps, folds, seeds
    assert {row["domain"] for row in tables.curves if row["name"] == "ndcg@10"} == {*TRAIN}


def test_killed_anywhere_ten_times_it_ends_as_if_it_had_not_been(
    place: Path, done: tuple[Grid, BenchTables, list[str]]
) -> None:
    finished, expected, _ = done
    grid = grid_in(place, "killed")
    shutil.copytree(finished.folder / "training", grid.folder / "training")  # test_resume.py kills trainings
    random = np.random.default_rng(0)
    did: list[Path] = []

    class Killed(BaseException):
        pass

    def dying(cells: Sequence[Cell]) -> Iterator[Ended]:
        for cell in cells:
            if random.random() < 0.12 and kills < 10:
                if random.random() < 0.5 and not cell.result.is_file():  # in the middle of a cell
                    cell.result.parent.mkdir(parents=True, exist_ok=True)
                    (cell.result.parent / f".{cell.result.name}.partial").write_bytes(b"half")
                raise Killed
            ended = work(cell)
            did.append(cell.result)
            yield ended

    kills = 0
    while True:
        try:
            assert run_grid(grid_in(place, "killed"), train, dying, lambda line: None) == []
            break
        except Killed:
            kills += 1
    assert kills == 10
    assert len(did) == len(set(did)), "a finished cell was done again"
    measured = {"server_seconds": 0, "peak_bytes": 0, "seconds": 0}
    found = tables_of(grid)
    for name in ("results", "comparisons", "curves", "coefficients", "ranks", "costs"):
        with_same = [
            [{**row, **{k: v for k, v in measured.items() if k in row}} for row in getattr(t, name)]
            for t in (found, expected)
        ]
        assert with_same[0] == with_same[1], name


def test_federations_of_rounds_are_strategies_like_others(
    place: Path, done: tuple[Grid, BenchTables, list[str]]
) -> None:
    text = FILE.replace("[0, 1]", "[1]").replace("leave_one_out = true", "")
    for rule in ("flora", "ffa-lora"):
        text += f'\n[[strategy]]\nname = "{rule}"\nset = {{ "rounds.rule" = "{rule}", "rounds.number" = 2 }}\n'
    (place / "rounds.toml").write_text(text)
    grid = grid_in(place, "rounds", "rounds.toml")
    shutil.copytree(done[0].folder / "training", grid.folder / "training")
    lines: list[str] = []
    assert run_grid(grid, train, here, lines.append) == []
    assert sum(line.startswith("training") for line in lines) == 2
    tables = tables_of(grid)
    shared = scores(done[1], domain="books", seed=1, left_out="")
    assert scores(tables, domain="books").items() >= shared.items()
    assert {"flora", "ffa-lora"} < set(scores(tables, domain="camping"))
    reports = [of_round["aggregation"] for of_round in round_records(grid.run(Place("main", 1, ""), "flora"))]
    costs = {row["strategy"]: row for row in tables.costs}
    assert costs["flora"]["bytes_up"] == 2 * 3 * 2048  # rounds, clients, tensors
    assert costs["average"]["bytes_up"] > 3 * 2048  # the tensors as Flower packs them
    assert costs["flora"]["error"] == reports[-1]["error"]
    assert costs["flora"]["residual"] == max(reports[-1]["start_residuals"].values())
    assert costs["flora"]["rank"] == reports[-1]["rank"] == 2 * costs["average"]["rank"]
    assert costs["average"]["error"] is costs["average"]["residual"] is None
    assert costs["ffa-lora"]["bytes_up"] < costs["flora"]["bytes_up"]
    assert [row["step"] for row in tables.curves if (row["strategy"], row["domain"]) == ("flora", "books")] == [1, 2]


def test_a_federation_that_fails_or_goes_on_without_a_domain_is_named_and_the_others_are_compared(
    place: Path, done: tuple[Grid, BenchTables, list[str]]
) -> None:
    text = FILE.replace("[0, 1]", "[1]").replace("leave_one_out = true", "")
    for rule in ("fedit", "weighted-average"):
        text += f'\n[[strategy]]\nname = "{rule}"\nset = {{ "rounds.rule" = "{rule}", "rounds.number" = 2 }}\n'
    (place / "lost.toml").write_text(text)
    grid = grid_in(place, "lost", "lost.toml")
    shutil.copytree(done[0].folder / "training", grid.folder / "training")

    def unlucky(config: ExperimentConfig) -> None:
        if config.rounds.rule == "fedit":
            raise ClientError("the experts could not be trained")
        train(config)
        (record,) = (grid.folder / "training" / str(config.run_id) / "rounds").glob("2.json")
        told = read_json(record)
        del told["aggregation"]["client_weights"]["books"]  # as of a client that diverged
        write_json(record, told)

    for _ in range(2):  # and again when it is called again
        failed = run_grid(grid, unlucky, here, lambda line: None)
        assert [line.partition(": ")[0] for line in failed] == ["training", "training"]
        assert "the experts could not be trained" in failed[0]
        assert "without books; every strategy needs all domains" in failed[1]
    tables = tables_of(grid)
    assert scores(tables, domain="books") == scores(done[1], domain="books", seed=1, left_out="")
    status = {cell["strategy"]: cell["status"] for cell in tables.cells}
    assert status == {**dict.fromkeys(STRATEGIES, "done"), "fedit": "failed", "weighted-average": "failed"}


@pytest.mark.parametrize(
    ("rule", "parameters", "message"),
    [
        ("trimmed-mean", "tirm=0.34", "tirm"),
        ("trimmed-mean", "trim=0.34", "leave_one_out = true, so of each fold: .* 2 clients in a round cuts off nobody"),
    ],
)
def test_what_a_rule_refuses_is_refused_before_anything_is_trained(
    place: Path, rule: str, parameters: str, message: str
) -> None:
    changes = f'"rounds.rule" = "{rule}", "rounds.number" = 2, "rounds.parameters" = "{parameters}"'
    (place / "rule.toml").write_text(FILE + f'\n[[strategy]]\nname = "rule"\nset = {{ {changes} }}\n')
    with pytest.raises(ConfigError, match=message):
        run_bench(place / "rule.toml", place / "rule", REPOSITORY)
    assert not (place / "rule").exists()


POLICIES = """
title = "Policies"
experiment = "experiment.toml"
seeds = [0]
baseline = "adapter"
[[dataset]]
name = "dp"
set = { "dp.mode" = "user", "dp.delta" = 1e-3, "dp.noise_multiplier" = 0.0, "train.negatives" = "catalog" }
[[strategy]]
name = "adapter"
set = { "privacy.policy" = "adapter" }
[[strategy]]
name = "aggregate-only"
set = { "privacy.policy" = "aggregate-only" }
[[strategy]]
name = "noised"
set = { "privacy.policy" = "aggregate-only", "dp.noise_multiplier" = "none", "dp.epsilon" = 1.0 }
[[strategy]]
name = "adapter+catalog"
set = { "merge.methods" = "mergerec" }
[[strategy]]
name = "catalog-private"
set = { "merge.methods" = "mergerec", "privacy.policy" = "catalog-private" }
"""


def test_what_may_travel_changes_bytes_and_not_what_is_merged(place: Path) -> None:
    (place / "policies.toml").write_text(POLICIES)
    overrides = ["merge.methods=average", "mergerec.granularities=layer", "dp.accountant=rdp"]
    bench = load_bench(place / "policies.toml", overrides)
    open_folder(place / "policies", bench)
    grid = Grid(bench, place / "policies")
    lines: list[str] = []
    assert run_grid(grid, train, here, lines.append) == []
    assert sum(line.startswith("training") for line in lines) == 2  # without noise, and with
    tables = tables_of(grid)
    for domain in (*TRAIN, "camping"):
        found = scores(tables, domain=domain)
        assert found["adapter"] == found["aggregate-only"]
        assert found["adapter+catalog"] == found["catalog-private"]
    up = {row["strategy"]: row["bytes_up"] for row in tables.costs}
    down = {row["strategy"]: row["bytes_down"] for row in tables.costs}
    at = Place("dp", 0, "")
    experts = [read_adapter(grid.run(at, "adapter") / "adapters" / name) for name in TRAIN]
    dense = sum(module.delta_weight().numel() for expert in experts for module in expert.modules.values())
    assert up["aggregate-only"] == up["noised"] == 4 * dense
    (label,) = merge_hashes(grid, at, "catalog-private")
    learned = read_json(merge_folder(grid.merges(at, "catalog-private"), label) / "provenance.json")["coefficients"]
    steps = grid.experiment(at, "catalog-private").mergerec.steps_made
    answers = 3 * 4 * sum(map(len, learned.values())) * steps
    assert up["catalog-private"] == up["adapter"] + answers
    cohort = sum((grid.run(at, "adapter") / "adapters" / name / WEIGHTS).stat().st_size for name in TRAIN)
    assert down["catalog-private"] == down["adapter"] + 3 * cohort + 2 * answers
    page = bench_page(tables)
    assert "Utility, privacy and bytes" in page
    assert "aggregate-only: average" in page
    assert {cell["config"]["privacy"]["policy"] for cell in tables.cells} == {
        "adapter",
        "aggregate-only",
        "adapter+catalog",
        "catalog-private",
    }


def test_what_an_audit_finds_stands_beside_the_scores(place: Path) -> None:
    audited = '"audit.held_out_users" = 0.5, "audit.canaries" = 4'
    text = POLICIES.replace('"dp.mode" = "user", "dp.delta" = 1e-3, "dp.noise_multiplier" = 0.0', audited)
    (place / "audited.toml").write_text(text.partition('[[strategy]]\nname = "noised"')[0])
    bench = load_bench(place / "audited.toml", ["merge.methods=average"])
    open_folder(place / "audited", bench)
    grid = Grid(bench, place / "audited")
    lines: list[str] = []
    assert run_grid(grid, train, here, lines.append) == []
    audits = [line for line in lines if line.startswith("audit ")]
    assert len(audits) == len(TRAIN)  # one for both policies, whose merge is the same
    tables = tables_of(grid)
    at = Place("dp", 0, "")
    config, run = grid.experiment(at, "adapter"), grid.run(at, "adapter")
    (label,) = merge_hashes(grid, at, "adapter")
    merged = read_adapter(merge_folder(grid.merges(at, "adapter"), label))
    expert = read_adapter(run / "adapters" / "books")
    found = audit_domain(Audited(domain_of(config, "books"), config, expert, merged, {}, None), num_shadows=0)
    assert found["members"] > 0 < found["non_members"]

    def leaks(**wanted: object) -> dict[tuple[str, str, str], float]:
        rows = [row for row in tables.leaks if all(row[key] == value for key, value in wanted.items())]
        return {(row["model"], row["attack"], row["metric"]): row["value"] for row in rows}

    told = leaks(domain="books", strategy="adapter")
    for row in found["membership"]:
        assert told[row["model"], row["attack"], "auc"] == row["auc"]
    for row in found["canaries"]:
        assert told[row["model"], "canaries", "mean_exposure"] == row["mean_exposure"]
    for row in found["recovery"]["rows"]:
        assert told[row["from"], "pairs", "precision@50"] == row["precision_at"]["50"]
    assert told["expert", "loss", "tpr_at_fpr_0.001"] is None  # too few users to see it
    hidden = leaks(domain="books", strategy="aggregate-only")
    assert hidden == {key: value for key, value in told.items() if not key[0].startswith("expert")}
    assert "Membership AUC, merge" in bench_page(tables)
    again: list[str] = []
    assert run_grid(grid, train, here, again.append) == []
    assert f"audit: {len(TRAIN)} of {len(TRAIN)} cells are done" in again


AUDITED = """
title = "Audited"
experiment = "experiment.toml"
seeds = [0]
leave_one_out = true
baseline = "average"
[[dataset]]
name = "poisoned"
[dataset.set]
audit = { held_out_users = 0.5 }
attack = { domain = "coffee", kind = "scaled-update", strength = 100.0 }
[[strategy]]
name = "average"
set = { "merge.methods" = "average" }
[[strategy]]
name = "rounds"
set = { "rounds.rule" = "fedit", "rounds.number" = 2 }
"""


def test_audits_and_an_attack_with_folds_and_rounds(place: Path) -> None:
    (place / "audited.toml").write_text(AUDITED)
    grid = grid_in(place, "audited-more", "audited.toml")
    assert run_grid(grid, train, here, lambda line: None) == []
    tables = tables_of(grid)
    assert {row["left_out"] for row in tables.results} == {"", *TRAIN}
    assert {row["left_out"] for row in tables.leaks} == {""}  # a fold's experts are those that are audited already
    of_average, of_rounds = (
        {(row["domain"], row["model"]) for row in tables.leaks if row["strategy"] == name and row["metric"] == "auc"}
        for name in ("average", "rounds")
    )
    assert of_average == {(domain, model) for domain in TRAIN for model in ("expert", "merged", "backbone")}
    assert of_rounds == {(domain, model) for domain, model in of_average if model != "expert"}
    trained = [load_config(run / "config.toml") for run in grid.folder.glob("training/*")]
    assert [config.attack.domain for config in trained if "coffee" in config.domains.train] == ["coffee"] * 4
    assert [config.attack.domain for config in trained if "coffee" not in config.domains.train] == [None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"through_clients.users": "own-users"},
            r"through_clients.users = 'own-users' is learned in a federation only",
        ),
        ({"through_clients.mode": "local-steps"}, r"through_clients.mode = 'local-steps' is .*; set 'exact'"),
        (
            {"dp.mode": "domain-local", "dp.epsilon": 4, "dp.delta": 1e-3},
            "dp.mode = 'domain-local' adds noise to every answer about coefficients, in a federation only",
        ),
    ],
)
def test_what_only_a_federation_learns_is_no_cell(place: Path, changes: dict[str, object], message: str) -> None:
    head = FILE[: FILE.index("[[strategy]]")]
    (place / "own.toml").write_text(f'{head}[[strategy]]\nname = "average"\n')
    wanted = {"privacy.policy": "catalog-private", "merge.methods": "mergerec", "privacy.min_users": 2, **changes}
    with pytest.raises(ConfigError, match=message):
        load_bench(place / "own.toml", [f"{key}={value}" for key, value in wanted.items()])


def test_a_fold_of_too_few_for_a_secure_sum_is_refused(place: Path) -> None:
    head = FILE[: FILE.index("[[strategy]]")]
    (place / "fold.toml").write_text(f'{head}[[strategy]]\nname = "average"\nset = {{ "merge.methods" = "average" }}\n')
    hidden = ["privacy.policy=aggregate-only", "merge.methods=average"]
    with pytest.raises(ConfigError, match=r"(?s)main, with leave_one_out = true: .*with 2 clients in a sum"):
        load_bench(place / "fold.toml", hidden)
    load_bench(place / "fold.toml", [*hidden, "domains.train=beauty,books,coffee,garden"])


def test_a_private_catalog_is_learned_from_where_its_client_would_learn(place: Path) -> None:
    text = FILE[: FILE.index("[[strategy]]")].replace("[0, 1]", "[0]").replace("leave_one_out = true", "")
    for policy in ("adapter+catalog", "catalog-private"):
        text += f'[[strategy]]\nname = "{policy}"\nset = {{ "privacy.policy" = "{policy}" }}\n'
    (place / "private.toml").write_text(text.replace('baseline = "average"', 'baseline = "backbone"'))
    shutil.copytree(place / "domains", place / "private-domains")
    for domain in TRAIN:
        manifest = place / "private-domains" / domain / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"public_catalog": true', '"public_catalog": false'))
    wanted = [f"domains.root={place / 'private-domains'}", "merge.methods=mergerec", "mergerec.granularities=layer"]
    bench = load_bench(place / "private.toml", wanted)
    open_folder(place / "private", bench)
    grid = Grid(bench, place / "private")
    (failed,) = run_grid(grid, train, here, lambda line: None)
    assert "merging: adapter+catalog" in failed
    assert "public_catalog = false" in failed
    at = Place("main", 0, "")
    (label,) = merge_hashes(grid, at, "catalog-private")
    made = read_json(merge_folder(grid.merges(at, "catalog-private"), label) / "provenance.json")
    assert made["policy"] == "catalog-private"
    (cost,) = [row for row in tables_of(grid).costs if row["strategy"] == "catalog-private"]
    assert cost["bytes_up"] > 0


def test_joint_training_is_a_row_for_reference_that_says_what_it_is(
    place: Path, done: tuple[Grid, BenchTables, list[str]]
) -> None:
    text = FILE[: FILE.index("[[strategy]]", FILE.index("average"))].replace("[0, 1]", "[1]")
    text = text.replace("leave_one_out", 'joint = ["shuffled", "balanced"]\nleave_one_out')
    text += '\n[[strategy]]\nname = "average"\nset = { "merge.methods" = "average" }\n'
    (place / "joint.toml").write_text(text)
    grid = grid_in(place, "joint", "joint.toml")
    for kept in ("training", "clients"):
        shutil.copytree(done[0].folder / kept, grid.folder / kept)
    lines: list[str] = []
    assert run_grid(grid, train, here, lines.append) == []
    assert sum(line.startswith("joint training ") for line in lines) == 2 * 4  # drawings, folds
    tables = tables_of(grid)
    rows = {"joint-shuffled (pooled)", "joint-balanced (pooled)"}
    for left_out, domain in (("", "books"), ("", "camping"), ("books", "books")):
        assert rows < set(scores(tables, left_out=left_out, domain=domain))
    assert rows < {*tables.references}
    assert not rows & {row["strategy"] for row in tables.ranks}
    assert rows < {row["strategy"] for row in tables.comparisons}
    assert {cell["strategy"] for cell in tables.cells if cell["status"] == "done"} == {*rows, "average"}
    costs = {row["strategy"]: row for row in tables.costs if not row["left_out"]}
    assert costs["joint-balanced (pooled)"]["bytes_up"] is None
    assert costs["joint-balanced (pooled)"]["server_seconds"] > 0
    points = [row for row in tables.curves if row["strategy"] in rows and row["name"] == "ndcg@10"]
    assert [row["step"] for row in points if not row["left_out"]] == [0, 3, 6, 9, 12] * 2
    assert [row["step"] for row in points if row["left_out"] == "books"] == [0, 2, 4, 6, 8] * 2  # two domains are left

    place_of_all = Place("main", 1, "")
    config = grid.experiment(place_of_all, None)
    adapter = read_adapter(joint_folder(grid.joint(place_of_all, "balanced")))
    expected = evaluate(domain_of(config, "coffee"), {"it": adapter}, "test", None, 0)["unmasked"]
    found = scores(tables, left_out="", domain="coffee")["joint-balanced (pooled)"]
    assert found == pytest.approx(expected.mean("it", "recall@10"), abs=1e-12)
    page = bench_page(tables).split("<section")
    assert "break isolation" in next(part for part in page if 'id="d0-scores"' in part)
    assert sum('class="tag">breaks isolation' in part for part in page) >= 4  # scores, differences, by domain, costs


def test_a_cell_that_fails_is_named_and_the_others_go_on(
    place: Path, done: tuple[Grid, BenchTables, list[str]]
) -> None:
    text = FILE.replace("leave_one_out = true", "").replace("[0, 1]", "[0]")
    text = text.replace('"layer" }', '"layer", "mergerec.kd_weight" = 1e300 }')
    (place / "failing.toml").write_text(text)
    grid = grid_in(place, "failing", "failing.toml")
    shutil.copytree(done[0].folder / "training", grid.folder / "training")
    (failed,) = run_grid(grid, train, here, lambda line: None)
    assert failed.startswith("merging: mergerec (main, seed 0): MergeError: mergerec, step")
    tables = tables_of(grid)
    assert {cell["strategy"]: cell["status"] for cell in tables.cells}["mergerec"] == "failed"
    assert set(scores(tables, domain="books")) == {
        "average",
        "task-arithmetic",
        "backbone",
        "popularity",
        "last-item",
        "expert",
    }
    assert len(run_grid(grid, train, here, lambda line: None)) == 1  # tried again


def test_a_domain_without_expert_ends_the_benchmark(place: Path, done: tuple[Grid, BenchTables, list[str]]) -> None:
    grid = grid_in(place, "incomplete")
    shutil.copytree(done[0].folder / "training", grid.folder / "training")
    run = grid.run(Place("main", 0, ""), None)
    experts = read_json(run / "experts.json")
    write_json(run / "experts.json", {name: sha256 for name, sha256 in experts.items() if name != "coffee"})
    with pytest.raises(ClientError, match="without coffee; every strategy needs all domains"):
        run_grid(grid, train, here, lambda line: None)


def test_ranks_of_too_few_users_do_not_leave_a_client(place: Path, done: tuple[Grid, BenchTables, list[str]]) -> None:
    file = next((done[0].folder / "clients").rglob("*.npz"))
    assert sums_of_ranks({"row": file}, "books", 30)["masked"].num_users == 30
    with pytest.raises(PolicyError, match="books"):
        sums_of_ranks({"row": file}, "books", 31)
    damaged = place / "damaged.npz"
    damaged.write_bytes(file.read_bytes()[:50])
    with pytest.raises(RunDirError, match=r"damaged\.npz cannot be read"):
        sums_of_ranks({"row": damaged}, "books", 2)


def test_a_folder_belongs_to_one_benchmark(place: Path, done: tuple[Grid, BenchTables, list[str]]) -> None:
    (place / "other.toml").write_text(FILE.replace("[0, 1]", "[0, 2]"))
    with pytest.raises(ConfigError, match=r"was begun with another benchmark; benchmark.seeds differ"):
        open_folder(place / "done", load_bench(place / "other.toml"))
    (place / "full").mkdir()
    (place / "full" / "thesis.doc").touch()
    with pytest.raises(ConfigError, match="holds something, but no benchmark; give --out a new or empty folder"):
        open_folder(place / "full", load_bench(place / "bench.toml"))
    with pytest.raises(RunDirError, match="cannot be made"):
        open_folder(place / "bench.toml" / "x", load_bench(place / "bench.toml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "A small benchmark"', "", r"title: Field required"),
        ("seeds = [0, 1]", "seeds = [1, 1]", r"seeds: 1 is there twice"),
        ("seeds = [0, 1]", "seeds = []", r"seeds: .*at least 1 item"),
        ("seeds = [0, 1]", "seed = [0]", r"seed: Extra inputs"),
        ('name = "average"', 'name = "mergerec"', r"strategy: mergerec is there twice"),
        ('name = "average"', 'name = "expert"', r"strategy: expert is there twice"),
        ('name = "average"', 'name = "a/b"', r"strategy.0.name: .*pattern"),
        (
            'baseline = "average"',
            'baseline = "avrage"',
            r"baseline: found 'avrage', expected one of backbone, expert, av",
        ),
        (
            '"merge.methods" = "average"',
            '"merge.method" = "average"',
            r"strategy average: 1 problem\n.*did you mean merge.methods",
        ),
        (
            '"merge.methods" = "average"',
            "seed = 3",
            r"strategy average: set: found seed, which a benchmark sets itself",
        ),
        (
            '"merge.methods" = "average"',
            '"evaluation.test_users" = 5',
            r"strategy average: found another \[evaluation\] than its dataset's; .* same domains and users",
        ),
        ('name = "average"', 'name = "popularity"', r"baseline: found|strategy: popularity is there twice"),
        ("leave_one_out", 'joint = ["both"]\nleave_one_out', r"joint.0: Input should be 'shuffled' or 'balanced'"),
        ("leave_one_out", 'joint = ["balanced", "balanced"]\nleave_one_out', r"joint: balanced is there twice"),
        ("experiment.toml", "absent.toml", r"absent.toml: cannot be read"),
        ("title =", "title", r"not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_starts(place: Path, old: str, new: str, message: str) -> None:
    assert old in FILE
    (place / "wrong.toml").write_text(FILE.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_bench(place / "wrong.toml")


def test_two_domains_are_too_few_to_leave_one_out(place: Path) -> None:
    (place / "wrong.toml").write_text(
        FILE + '\n[[dataset]]\nname = "pair"\nset = { "domains.train" = "beauty,books" }\n'
    )
    with pytest.raises(ConfigError, match=r"dataset pair: leave_one_out = true, but domains\.train names only 2"):
        load_bench(place / "wrong.toml")


def test_joint_training_may_do_without_the_folds(place: Path) -> None:
    (place / "folds.toml").write_text(FILE.replace("leave_one", 'joint = ["balanced"]\njoint_folds = false\nleave_one'))
    grid = Grid(load_bench(place / "folds.toml"), place / "folds")
    rows = {str(at): grid.joint_rows(at) for at in grid.places() if at.seed == 0}
    assert rows == {"main, seed 0": ("balanced",), **{f"main, seed 0, without {name}": () for name in TRAIN}}


def test_one_domain_is_too_few_to_pool(place: Path) -> None:
    alone = '\n[[dataset]]\nname = "one"\nset = { "domains.train" = "books", "server.min_train_clients" = 1 }\n'
    (place / "wrong.toml").write_text(FILE.replace("leave_one_out = true", 'joint = ["shuffled"]') + alone)
    with pytest.raises(ConfigError, match=r"dataset one: found joint, but domains\.train names only one"):
        load_bench(place / "wrong.toml")


@pytest.mark.e2e
def test_who_waits_for_ray_is_told_as_many_cells_as_run(
    place: Path, done: tuple[Grid, BenchTables, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    grid = grid_in(place, "waiting")
    shutil.copytree(done[0].folder / "training", grid.folder / "training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sim.local.bench, "SILENCE_SECONDS", 0.02)
        assert run_bench(place / "bench.toml", grid.folder, REPOSITORY) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.partition("; running: ")[2].split("; ") for line in lines if "; running: " in line]
    assert told
    assert {len(titles) for titles in told} <= set(range(1, len(os.sched_getaffinity(0)) + 1))
    ended = {line.partition(": ")[2].rpartition(", ")[0].partition(", about")[0] for line in lines if " of " in line}
    assert all(any(text.startswith(title) for text in ended) for titles in told for title in titles)
    assert read_bench_tables(grid.folder).results == done[1].results


@pytest.mark.e2e
def test_flower_and_ray_killed_on_the_way_give_the_tables_of_one_process(
    place: Path, done: tuple[Grid, BenchTables, list[str]]
) -> None:
    text = FILE.replace("[0, 1]", "[1]").replace("leave_one_out = true", "")
    text += '\n[[strategy]]\nname = "flora"\nset = { "rounds.rule" = "flora", "rounds.number" = 2 }\n'
    (place / "one.toml").write_text(text)
    command = [sys.executable, "-m", "fedmerge.cli", "bench", "one.toml", "--out", "one"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("validation 2"):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    finished = {file: file.stat().st_mtime_ns for file in (place / "one").rglob("*.npz")}
    again = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "training 1 of" not in again.stdout
    assert finished
    assert finished == {file: file.stat().st_mtime_ns for file in finished}
    tables = read_bench_tables(place / "one")
    assert {row["strategy"] for row in tables.results} > {"flora"}
    expected = tuple(row for row in done[1].results if row["seed"] == 1 and not row["left_out"])
    assert tuple(row for row in tables.results if row["strategy"] != "flora") == expected
    assert (place / "one" / "report.html").stat().st_size > 10_000
