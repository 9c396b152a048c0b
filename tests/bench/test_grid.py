"""The grid of a benchmark: trainings, cells, scores and tables."""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from in_process import finish, grid_in, tables_of, train
from small_bench import FILE, STRATEGIES, TRAIN, VARIANTS, scores

from fedmerge.adapter import is_zero
from fedmerge.bench.cells import Cell, Ended, Running, joint_folder, work
from fedmerge.bench.config import load_bench
from fedmerge.bench.grid import BENCHMARK, Grid, Place
from fedmerge.bench.outcomes import merge_hashes, merged_domains
from fedmerge.bench.ranking import domain_of
from fedmerge.bench.stages import run_grid
from fedmerge.client.evaluate import evaluate
from fedmerge.config import from_flat, to_flat
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import ConfigError
from fedmerge.files import read_json, write_json
from fedmerge.report.bench.page import bench_page
from fedmerge.report.bench_tables import EVERY_FOLD, NOTHING_LEARNED, BenchTables
from fedmerge.runs.checkpoints import merge_folder, read_sources

pytestmark = pytest.mark.federation


def test_the_grid_is_complete_and_experts_are_trained_once_per_seed(
    finished_bench: tuple[Grid, BenchTables, list[str]],
) -> None:
    grid, tables, lines = finished_bench
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
    assert {row["num_blocks"] for row in tables.ranks} == {len(TRAIN) * 2}  # seeds; no unseen domain is a block
    for cell in tables.cells:
        adapters = grid.run(Place(cell["dataset"], cell["seed"], cell["left_out"]), cell["strategy"]) / "adapters"
        zero = [domain for domain in TRAIN if is_zero(read_adapter(adapters / domain))]
        assert cell.get(NOTHING_LEARNED, []) == [domain for domain in zero if domain != cell["left_out"]]
    ranked = [line for line in lines if line.startswith("test ")]
    assert len(ranked) == len(set(ranked))
    trainings = [re.sub("[0-9]+ s", "9 s", line) for line in lines if line.startswith("training ")]
    assert re.fullmatch(r"training 1 of 2: main-seed0-\w{8}", trainings[0])
    assert re.fullmatch(r"training 2 of 2: main-seed1-\w{8}, about 9 s of training left", trainings[1])


def test_progress_names_the_running_cells(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    grid = grid_in(bench_place, "slow")
    shutil.copytree(finished_bench[0].folder / "training", grid.folder / "training")

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


def test_experts_cached_by_an_earlier_run_are_reused(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    grid, _, _ = finished_bench
    for seed, expected in ((0, True), (1, False)):  # an earlier run had seed 0
        run = grid.run(Place("main", seed, ""), None)
        reports = {name: read_json(run / "adapters" / name / "training.json") for name in TRAIN}
        assert {report["cached"] for report in reports.values()} == {expected}
    before = {name: read_json(bench_place / "runs" / "before" / "adapters" / name / "training.json") for name in TRAIN}
    kept = read_sources(grid.run(Place("main", 0, ""), None))
    assert kept == {name: report["sha256"] for name, report in before.items()}


def test_a_folder_with_another_split_of_batches_is_refused(bench_place: Path) -> None:
    grid = grid_in(bench_place, "split")
    grid_in(bench_place, "split")  # the same benchmark again
    kept = read_json(grid.folder / BENCHMARK)
    assert kept.pop("batches") == "equal"
    for found in (
        {},
        {"batches": "random"},
    ):  # a folder of another split of batches lacks the entry or has another value
        write_json(grid.folder / BENCHMARK, {**kept, **found})
        with pytest.raises(ConfigError) as caught:
            grid_in(bench_place, "split")
        assert all(part in str(caught.value) for part in (str(grid.folder), found.get("batches", "floor"), "equal"))


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
set = { "simulation.canaries" = 3 }
[[strategy]]
name = "int8"
set = { "privacy.transport" = "int8" }
[[strategy]]
name = "top-k"
set = { "privacy.transport" = "top-k" }
"""


def test_strategies_with_different_training_do_not_share_experts(bench_place: Path) -> None:
    (bench_place / "otherwise.toml").write_text(
        FILE[: FILE.index("[[strategy]]")].replace('"average"', '"plain"') + OTHERWISE
    )
    grid = grid_in(bench_place, "otherwise", "otherwise.toml")
    names = [strategy.name for strategy in grid.bench.config.strategy]
    assert len({grid.run(Place("main", 0, ""), name) for name in names}) == len(names) == 7


def test_a_fold_drops_the_rank_of_the_domain_it_leaves_out(bench_place: Path) -> None:
    text = FILE + '\n[[strategy]]\nname = "flora"\n[strategy.set]\n"rounds.rule" = "flora"\n'
    (bench_place / "ranks.toml").write_text(text + '"lora.ranks" = "books=3,coffee=4"\n')
    grid = Grid(load_bench(bench_place / "ranks.toml"), bench_place / "ranks")
    training = grid.training(Place("main", 0, "books"), "flora")
    assert training.domains.train == ("beauty", "coffee")
    assert from_flat(to_flat(training)).lora.ranks == ("coffee=4",)  # as Flower hands it over
    assert grid.training(Place("main", 0, "books"), None).domains.train == TRAIN


def test_scores_match_the_library_and_validation_selects(finished_bench: tuple[Grid, BenchTables, list[str]]) -> None:
    grid, tables, _ = finished_bench
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


def test_a_left_out_domain_is_neither_merged_nor_used_for_selection(
    finished_bench: tuple[Grid, BenchTables, list[str]],
) -> None:
    grid, tables, _ = finished_bench
    for place in grid.places():
        for strategy in STRATEGIES:
            for label in merge_hashes(grid, place, strategy):
                provenance = read_json(merge_folder(grid.merges(place, strategy), label) / "provenance.json")
                assert {*provenance["domains"]} == {*TRAIN} - {place.left_out}
            assert merged_domains(grid, place, strategy) == sorted({*TRAIN} - {place.left_out})
    rows = [row for row in tables.comparisons if row["left_out"] == EVERY_FOLD]
    assert {row["role"] for row in rows} == {"unseen"}
    assert {row["domain"] for row in rows} == {*TRAIN, "camping", "mean"}  # camping is never merged
    assert [row for row in tables.comparisons if row["role"] == "unseen" and row not in rows] == []
    page = bench_page(tables)
    assert "Unseen against seen domains" in page
    for domain in (*TRAIN, "camping"):
        assert f"{domain} (unseen)" in page


def test_costs_curves_and_coefficients(finished_bench: tuple[Grid, BenchTables, list[str]]) -> None:
    _, tables, _ = finished_bench
    up = {row["strategy"]: row["bytes_up"] for row in tables.costs if (row["seed"], row["left_out"]) == (0, "")}
    assert up["average"] == up["task-arithmetic"] < up["mergerec"]  # mergerec needs the catalogs
    assert all(row["peak_bytes"] > 2**27 and row["server_seconds"] > 0 < row["client_seconds"] for row in tables.costs)
    assert {row["strategy"] for row in tables.coefficients} == {"mergerec"}
    assert {row["domain"] for row in tables.coefficients} == {*TRAIN}
    losses = [row for row in tables.curves if row["strategy"] == "mergerec" and row["name"] == "loss"]
    assert len(losses) == 2 * 4 * 2  # steps, folds, seeds
    assert {row["domain"] for row in tables.curves if row["name"] == "ndcg@10"} == {*TRAIN}


def test_joint_training_is_a_reference_row_marked_as_pooled(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    text = FILE[: FILE.index("[[strategy]]", FILE.index("average"))].replace("[0, 1]", "[1]")
    text = text.replace("leave_one_out", 'joint = ["shuffled", "balanced"]\nleave_one_out')
    text += '\n[[strategy]]\nname = "average"\nset = { "merge.methods" = "average" }\n'
    (bench_place / "joint.toml").write_text(text)
    grid = grid_in(bench_place, "joint", "joint.toml")
    for kept in ("training", "clients"):
        shutil.copytree(finished_bench[0].folder / kept, grid.folder / kept)
    lines = finish(grid)
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
    assert [row["step"] for row in points if row["left_out"] == "books"] == [0, 2, 4, 6, 8] * 2  # two domains remain

    place_of_all = Place("main", 1, "")
    config = grid.experiment(place_of_all, None)
    adapter = read_adapter(joint_folder(grid.joint(place_of_all, "balanced")))
    expected = evaluate(domain_of(config, "coffee"), {"it": adapter}, "test", None, 0)["unmasked"]
    found = scores(tables, left_out="", domain="coffee")["joint-balanced (pooled)"]
    assert found == pytest.approx(expected.mean("it", "recall@10"), abs=1e-12)
    page = bench_page(tables).split("<section")
    assert "break isolation" in next(part for part in page if 'id="d0-scores"' in part)
    assert sum('class="tag">breaks isolation' in part for part in page) >= 4  # scores, differences, by domain, costs


def test_joint_training_can_skip_the_folds(bench_place: Path) -> None:
    (bench_place / "folds.toml").write_text(
        FILE.replace("leave_one", 'joint = ["balanced"]\njoint_folds = false\nleave_one')
    )
    grid = Grid(load_bench(bench_place / "folds.toml"), bench_place / "folds")
    rows = {str(at): grid.joint_rows(at) for at in grid.places() if at.seed == 0}
    assert rows == {"main, seed 0": ("balanced",), **{f"main, seed 0, without {name}": () for name in TRAIN}}
