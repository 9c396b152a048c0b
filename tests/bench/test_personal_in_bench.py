"""Personal merges as a strategy of a benchmark: their row, the universal merge, what is resumed, and the costs."""

from pathlib import Path
from typing import Any

import pytest
from in_process import finish, grid_in, tables_of
from small_bench import FILE, TRAIN, scores

from fedmerge.adapter import adapter_sha256
from fedmerge.bench.config import load_bench
from fedmerge.bench.grid import Grid, Place
from fedmerge.bench.outcomes import merge_hashes, personal_cells
from fedmerge.bench.personal import personal_folder, sent_coefficients
from fedmerge.bench.ranking import domain_of, questions
from fedmerge.bench.tables import WEIGHTS
from fedmerge.client.coefficients.personal import fit_personal_merge, fitting_sequences, personal_settings
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import ConfigError
from fedmerge.files import read_json
from fedmerge.mergerec.directions import universal_merge
from fedmerge.report.bench_tables import BenchTables
from fedmerge.runs.checkpoints import read_sources, stored_experts

pytestmark = pytest.mark.federation

PERSONAL = """
[[strategy]]
name = "personal"
[strategy.set]
privacy = { policy = "catalog-private" }
personal = { directions = "module", steps = 4, learning_rate = 0.3 }
[[strategy]]
name = "decider"
[strategy.set]
privacy = { policy = "catalog-private" }
personal = { directions = "module", steps = 4, learning_rate = 0.3, universal = true }
"""
FEW = ["evaluation.validation_users=10", "train.validation_users=10", "merge.methods=average"]
ALL, WITHOUT_BOOKS = Place("main", 0, ""), Place("main", 0, "books")
PLACES = pytest.mark.parametrize("place", [ALL, WITHOUT_BOOKS], ids=str)


@pytest.fixture(scope="module")
def personal_bench(bench_place: Path) -> tuple[Grid, BenchTables]:
    average = FILE.replace("[0, 1]", "[0]").partition('[[strategy]]\nname = "task-arithmetic"')[0]
    (bench_place / "personal.toml").write_text(average + PERSONAL)
    grid = grid_in(bench_place, "personal", "personal.toml", FEW)
    finish(grid)
    return grid, tables_of(grid)


def kept_at(place: Place) -> list[str]:
    return [domain for domain in TRAIN if domain != place.left_out]


def record_of(grid: Grid, place: Place, domain: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(grid.personal(place, "personal", domain))
    return found


@PLACES
def test_each_merged_domain_has_the_merge_that_its_client_fits(
    personal_bench: tuple[Grid, BenchTables], place: Place
) -> None:
    grid, _ = personal_bench
    config, run = grid.experiment(place, "personal"), grid.run(place, "personal")
    assert run == grid.run(place, "average")  # the same experts
    hashes = read_sources(run) or {}
    experts = dict(stored_experts(run, {domain: hashes[domain] for domain in kept_at(place)}))
    assert [*personal_cells(grid, place, "personal")] == kept_at(place)
    moved = 0
    for name in kept_at(place):
        domain, settings = domain_of(config, name), personal_settings(config)
        choosing = questions(grid.evaluation(place, "personal"), name, "valid", None).users
        sequences = fitting_sequences(domain, settings, choosing)
        made = fit_personal_merge(domain, experts, settings, sequences)
        record = record_of(grid, place, name)
        assert record["sha256"] == adapter_sha256(made.adapter)
        assert record["num_users"] == len(sequences) > 0
        assert adapter_sha256(read_adapter(personal_folder(grid.personal(place, "personal", name)))) == record["sha256"]
        moved += record["sha256"] != hashes[name]
    assert moved


def test_personal_merges_are_a_row_in_domain_and_unseen_domains_get_the_shared_merge(
    personal_bench: tuple[Grid, BenchTables],
) -> None:
    grid, tables = personal_bench
    for domain in TRAIN:
        found = scores(tables, domain=domain, left_out="")
        assert {"average", "personal", "personal: personal merge", "decider: personal merge"} <= found.keys()
        assert found["personal"] == found["average"]
        assert found["personal: personal merge"] == found["decider: personal merge"]  # the same fit, from the cache
        if record_of(grid, ALL, domain)["best_step"] == 0:
            assert found["personal: personal merge"] == found["expert"]
    labels = {row["strategy"]: row["label"] for row in tables.results if row["domain"] == "coffee"}
    assert labels["personal: personal merge"] == "personal merge"
    for unseen, left_out in (("camping", ""), ("books", "books")):
        found = scores(tables, domain=unseen, left_out=left_out)
        assert not [row for row in found if row.endswith("personal merge")]
        assert found["personal"] == found["average"]
        assert "decider" in found
    compared = {(row["strategy"], row["role"]) for row in tables.comparisons}
    assert ("personal: personal merge", "train") in compared
    assert ("personal: personal merge", "unseen") not in compared


@PLACES
def test_the_universal_merge_is_a_candidate_beside_the_others(
    personal_bench: tuple[Grid, BenchTables], place: Place
) -> None:
    grid, _ = personal_bench
    merges, shared = merge_hashes(grid, place, "decider"), merge_hashes(grid, place, "average")
    assert [*merges] == ["average", "fedecider-style"]
    assert merges["average"] == shared["average"]
    hashes = read_sources(grid.run(place, "decider")) or {}
    experts = dict(stored_experts(grid.run(place, "decider"), {domain: hashes[domain] for domain in kept_at(place)}))
    files = {domain: cell.result for domain, cell in personal_cells(grid, place, "decider").items()}
    sent = sent_coefficients(files, min_users=2)
    assert [*sent] == kept_at(place)
    assert merges["fedecider-style"] == adapter_sha256(universal_merge(experts, sent, "module"))
    assert sent_coefficients(files, min_users=10**6) == {}  # fewer users: nothing leaves


def test_a_lost_fit_is_made_again_with_the_same_bytes(
    bench_place: Path, personal_bench: tuple[Grid, BenchTables]
) -> None:
    grid, tables = personal_bench
    record = grid.personal(ALL, "personal", "beauty")
    before = record.read_bytes()
    record.unlink()  # as if it had been killed before the record was written
    lines = finish(grid)
    assert sum(line.startswith("personal merges 1 of 1") for line in lines) == 1
    again = read_json(record)
    assert again == record_of(grid, ALL, "beauty")
    assert record.read_bytes() == before  # from the client's cache, seconds included
    assert tables_of(grid).results == tables.results
    for folder in bench_place.glob("cache/personal/beauty-*"):
        (folder / "personal.json").write_text("damaged")
    record.unlink()
    finish(grid)
    assert read_json(record)["sha256"] == again["sha256"]
    assert tables_of(grid).results == tables.results


def test_costs_count_the_cohort_down_and_coefficients_up(personal_bench: tuple[Grid, BenchTables]) -> None:
    grid, tables = personal_bench
    costs = {row["strategy"]: row for row in tables.costs if row["left_out"] == ""}
    run, average, personal = grid.run(ALL, "personal"), costs["average"], costs["personal"]
    cohort = sum((run / "adapters" / name / WEIGHTS).stat().st_size for name in TRAIN)
    assert personal["bytes_up"] == average["bytes_up"]
    assert personal["bytes_down"] == average["bytes_down"] + 3 * cohort
    assert costs["personal: personal merge"]["bytes_down"] == 3 * cohort  # it lies where it is served
    assert costs["personal: personal merge"]["rank"] <= 3 * 2
    groups = len(record_of(grid, ALL, "books")["groups"])
    assert costs["decider"]["bytes_up"] == average["bytes_up"] + 3 * (3 * groups) * 4
    assert personal["client_seconds"] > average["client_seconds"]


def test_a_strategy_weaves_or_has_personal_merges(bench_place: Path) -> None:
    both = PERSONAL.partition('[[strategy]]\nname = "decider"')[0] + 'weave = { schedule = "all" }\n'
    (bench_place / "both.toml").write_text(FILE + both)
    with pytest.raises(ConfigError, match=r"with weave.schedule, personal.directions = 'module'"):
        load_bench(bench_place / "both.toml")
