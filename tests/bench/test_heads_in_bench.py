"""Heads as a setting of strategies, and domains cut to a share of their users."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from in_process import finish, grid_in, here, small_experiment, tables_of, train
from small_bench import REPOSITORY, TRAIN, scores

from fedmerge.bench.grid import Grid, Place
from fedmerge.bench.outcomes import experts_run, head_cells
from fedmerge.bench.ranking import domain_of, head_report, rank_head
from fedmerge.bench.stages import run_grid
from fedmerge.bench.tables import strategy_of_row
from fedmerge.client import evaluate
from fedmerge.config import to_toml
from fedmerge.domain.cut import cut_domain
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.text import Tokens
from fedmerge.errors import ConfigError
from fedmerge.files import read_json
from fedmerge.report.bench.few_data import TRAIN_USERS
from fedmerge.report.bench.page import bench_page
from fedmerge.report.bench_tables import BenchTables
from fedmerge.runs.checkpoints import merge_folder

pytestmark = pytest.mark.federation

HEADS = (REPOSITORY / "configs" / "bench" / "heads-smoke.toml").read_text().partition("[[strategy]]")
STRATEGIES = "[[strategy]]" + HEADS[2]
HEAD_SETTINGS = {
    "head.hidden_size": 8,
    "head.max_epochs": 1,
    "head.max_minutes": None,
    "head.rounds": 2,
    "head.steps": 2,
}
FILE = f"""
title = "Heads"
experiment = "experiment.toml"
seeds = [0]
baseline = ["ids: head on the backbone", "alone: head on the expert, fused"]
{{datasets}}
{STRATEGIES}
"""
JOINED, ALONE = "average: head on the merge, fused", "alone: head on the expert, fused"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("heads")
    experiment = small_experiment(place, **{"privacy.min_users": 2, **HEAD_SETTINGS})
    (place / "experiment.toml").write_text(to_toml(experiment))
    cut_domain(place / "domains" / "books", place / "few", 0.5, seed=0)
    for name in ("beauty", "coffee", "camping"):
        shutil.copytree(place / "domains" / name, place / "few" / name)
    datasets = f"""
[[dataset]]
name = "whole"
[[dataset]]
name = "few"
tested = ["books"]
test_root = "{place / "domains"}"
set = {{ "domains.root" = "{place / "few"}" }}
"""
    (place / "bench.toml").write_text(FILE.replace("{datasets}", datasets))
    return place


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Grid, BenchTables, list[str]]:
    grid = grid_in(place, "done")
    lines = finish(grid)
    return grid, tables_of(grid), lines


def test_every_head_has_two_rows_and_no_other_domain_has_any(finished: tuple[Grid, BenchTables, list[str]]) -> None:
    tables = finished[1]
    heads = {
        row + end
        for row in ("average: head on the merge", "alone: head on the expert", "alone: head on the backbone")
        for end in ("", ", fused")
    } | {"ids: head on the backbone", "ids: head on the backbone, fused"}
    for domain in TRAIN:
        found = scores(tables, dataset="whole", domain=domain)
        assert {*found} >= heads | {"average", "expert", "backbone"}
        assert not {"alone", "ids"} & {*found}  # their merge is that of "average"
    unseen = scores(tables, dataset="whole", domain="camping")
    assert not heads & {*unseen}
    assert {"federated: federated head", "federated: federated head, fused"} < {*unseen}
    assert "federated: head on the merge, fused" not in unseen
    assert not heads & {*tables.references}
    labels = {row["label"] for row in tables.results if row["strategy"] == JOINED}
    assert labels == {"average"}


def test_heads_are_compared_with_each_baseline(finished: tuple[Grid, BenchTables, list[str]]) -> None:
    compared = {(row["strategy"], row["baseline"]) for row in finished[1].comparisons if row["role"] == "train"}
    assert {(JOINED, ALONE), (JOINED, "ids: head on the backbone"), (ALONE, "ids: head on the backbone")} <= compared
    page = bench_page(finished[1])
    few = page[page.index('id="few-data"') :]
    legend = few[few.index('class="legend"') :].partition("</ul>")[0]
    assert legend.count("<li>") == len({row["strategy"] for row in finished[1].results if row["dataset"] == "few"})
    assert JOINED in legend


def test_a_head_costs_its_training_and_only_a_joined_one_traffic(
    finished: tuple[Grid, BenchTables, list[str]],
) -> None:
    grid, tables, _ = finished
    costs = {row["strategy"]: row for row in tables.costs if row["dataset"] == "whole"}
    assert {"alone", "ids"}.isdisjoint(costs)
    assert {row["strategy"] for row in tables.costs if row["dataset"] == "few"} == {*costs}
    assert costs["average: head on the merge"]["bytes_up"] == costs["average"]["bytes_up"] > 0
    assert costs["alone: head on the expert"]["bytes_up"] == 0
    cells = [head_cells(grid, Place("whole", 0, ""), domain, "average") for domain in TRAIN]
    seconds = sum(read_json(head_report(of["average: head on the merge"].result))["seconds"] for of in cells)
    head, merge = costs["average: head on the merge"], costs["average"]
    assert head["client_seconds"] == pytest.approx(merge["client_seconds"] + seconds)
    record = read_json(grid.federated_head(Place("whole", 0, ""), "federated"))
    shared = costs["federated: federated head"]
    assert shared["bytes_up"] == costs["federated"]["bytes_up"] + 2 * 3 * record["bytes"]
    run = grid.merges(Place("whole", 0, ""), "federated")
    merge_bytes = (merge_folder(run, "average") / "adapter_model.safetensors").stat().st_size
    assert shared["bytes_down"] == costs["federated"]["bytes_down"] + 2 * 3 * (record["bytes"] + merge_bytes)
    assert {*record["fusions"]} == {*TRAIN}


def test_a_cut_domain_trains_on_its_users_and_is_tested_on_all(
    place: Path, finished: tuple[Grid, BenchTables, list[str]]
) -> None:
    tables = finished[1]
    rows = [row for row in tables.results if row["dataset"] == "few"]
    assert {row["domain"] for row in rows} == {"books"}
    assert {row["num_users"] for row in rows} == {
        row["num_users"] for row in tables.results if (row["dataset"], row["domain"]) == ("whole", "books")
    }
    whole = scores(tables, dataset="whole", domain="books")
    few = scores(tables, dataset="few", domain="books")
    assert few["backbone"] == whole["backbone"]  # the same users under the same model
    sizes = {cell["dataset"]: cell[TRAIN_USERS]["books"] for cell in tables.cells}
    assert sizes["few"] == sizes["whole"] / 2


def test_a_finished_benchmark_trains_no_head_again(finished: tuple[Grid, BenchTables, list[str]]) -> None:
    lines = finish(finished[0])
    assert not [line for line in lines if "head on" in line or "federated head (" in line]


def test_the_catalog_is_not_encoded_again_to_rank_users(
    place: Path, finished: tuple[Grid, BenchTables, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, at = finished[0], Place("whole", 0, "")
    config = grid.experiment(at, "average")
    merge = merge_folder(grid.merges(at, "average"), "average")
    encoded: list[object] = []

    def listening(backbone: Backbone, sequences: Sequence[Tokens]) -> torch.Tensor:
        encoded.append(sequences)
        return encode(backbone, sequences)

    monkeypatch.setattr(evaluate, "encode", listening)
    rank_head(place / "again.npz", config, "books", "test", None, merge, "merge", 0, None)
    items = domain_of(config, "books").item_sequences
    assert encoded
    assert not any(sequences is items for sequences in encoded)


def test_rows_of_heads_in_a_later_dataset_have_their_strategy(place: Path) -> None:
    text = (place / "bench.toml").read_text()
    strategies = '[[strategy]]\nname = "joined"\nset = {"merge.methods" = "average"}\n'
    later = '[[dataset]]\nname = "later"\nset = {"head.kind" = "local"}\n'
    text = re.sub(r"baseline = .*", 'baseline = "expert"', text[: text.index("[[strategy]]")])
    (place / "later.toml").write_text(text + later + strategies)
    found = strategy_of_row(grid_in(place, "later-bench", "later.toml"))
    assert found["joined: head on the merge"] == found["joined"] == "joined"


def test_a_strategy_that_trains_longer_has_heads_on_its_own_experts(place: Path) -> None:
    more = '\n[[strategy]]\nname = "longer"\nset = {"train.max_steps" = 8, "head.kind" = "local"}\n'
    more += '[[strategy]]\nname = "rounds"\nset = {"rounds.rule" = "flora", "rounds.number" = 2}\n'
    (place / "longer.toml").write_text((place / "bench.toml").read_text() + more)
    grid, at = grid_in(place, "longer", "longer.toml"), Place("whole", 0, "")
    assert experts_run(grid, at, "alone") == experts_run(grid, at, "rounds") == grid.run(at, None)
    assert experts_run(grid, at, "longer") == grid.run(at, "longer") != grid.run(at, None)


def test_wrong_datasets_and_baselines_are_refused(place: Path) -> None:
    for change, message in (
        (('tested = ["books"]', 'tested = ["boks"]'), "tested names boks"),
        (("alone: head on the expert, fused", "alone: head on the merge"), "baseline.*alone: head on the merge"),
    ):
        (place / "wrong.toml").write_text((place / "bench.toml").read_text().replace(*change))
        with pytest.raises(ConfigError, match=message):
            grid_in(place, "wrong", "wrong.toml")


def test_users_of_another_catalog_are_refused(place: Path, finished: tuple[Grid, BenchTables, list[str]]) -> None:
    write_demo(place / "others", num_domains=8, num_users=30, num_items=30)
    text = (
        (place / "bench.toml")
        .read_text()
        .replace(f'test_root = "{place / "domains"}"', f'test_root = "{place / "others"}"')
    )
    (place / "others.toml").write_text(text)
    grid = grid_in(place, "others-bench", "others.toml")
    shutil.copytree(finished[0].folder / "training", grid.folder / "training")
    failed = run_grid(grid, train, here, lambda line: None)
    assert failed
    assert all("expected equal catalogs" in line for line in failed)
