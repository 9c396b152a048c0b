"""Weaving as a strategy of a benchmark: its runs, its two rows, the choice of factors, and its costs."""

from pathlib import Path

import pytest
from in_process import finish, grid_in, tables_of
from small_bench import FILE, TRAIN, scores

from fedmerge.adapter import adapter_sha256
from fedmerge.bench.config import load_bench
from fedmerge.bench.grid import Grid, Place
from fedmerge.bench.outcomes import chosen_factor, chosen_variant, merge_hashes, woven_hashes
from fedmerge.errors import ConfigError
from fedmerge.federated.weaving import target_merge, woven_merge
from fedmerge.files import read_json
from fedmerge.report.bench_tables import BenchTables
from fedmerge.runs.checkpoints import read_sources, read_weave, stored_experts, stored_woven

pytestmark = pytest.mark.federation

WEAVE = """
[[strategy]]
name = "weave"
[strategy.set]
privacy = { policy = "catalog-private" }
weave = { schedule = "ring", steps = 2, factors = "1.0,1.4" }
"""
ALL, WITHOUT_BOOKS = Place("main", 0, ""), Place("main", 0, "books")


@pytest.fixture(scope="module")
def woven_bench(bench_place: Path) -> tuple[Grid, BenchTables]:
    average = FILE.replace("[0, 1]", "[0]").partition('[[strategy]]\nname = "task-arithmetic"')[0]
    (bench_place / "woven.toml").write_text(average + WEAVE)
    grid = grid_in(bench_place, "woven", "woven.toml")
    finish(grid)
    return grid, tables_of(grid)


@pytest.mark.parametrize("place", [ALL, WITHOUT_BOOKS], ids=str)
def test_a_weaving_is_a_run_of_its_own_over_the_same_experts(
    woven_bench: tuple[Grid, BenchTables], place: Place
) -> None:
    grid, _ = woven_bench
    run, sources = grid.run(place, "weave"), read_sources(grid.run(place, "weave"))
    shared, woven = read_sources(grid.run(place, "average")), read_weave(run)
    assert sources is not None
    assert shared is not None
    assert woven is not None
    kept = [domain for domain in TRAIN if domain != place.left_out]
    assert sources == {domain: shared[domain] for domain in kept}
    assert {each.target for each in woven} == {each.source for each in woven} == {*kept}
    experts, adapters = stored_experts(run, sources), stored_woven(run, woven)
    for factor in (1.0, 1.4):
        label = f"weave factor {factor:g}"
        universal = woven_merge(experts, adapters, factor)
        assert merge_hashes(grid, place, "weave")[label] == adapter_sha256(universal)
        for domain in kept:
            own = target_merge(domain, experts[domain], adapters, factor)
            assert woven_hashes(grid, place, "weave")[domain][label] == adapter_sha256(own)


def test_targets_have_a_row_of_their_own_merge_and_others_the_universal_one(
    woven_bench: tuple[Grid, BenchTables],
) -> None:
    grid, tables = woven_bench
    for domain in TRAIN:
        found = scores(tables, domain=domain, left_out="")
        assert {"average", "weave", "weave: woven merge"} <= found.keys()
        choice = read_json(grid.merges(ALL, "weave") / f"choice-{domain}.json")
        assert choice["validation"][choice["chosen"]] == max(choice["validation"].values())
        assert chosen_factor(grid, ALL, "weave", domain) == choice["chosen"]
        labels = {
            row["label"]
            for row in tables.results
            if (row["domain"], row["strategy"], row["left_out"]) == (domain, "weave: woven merge", "")
        }
        assert labels == {choice["chosen"]}
    for unseen in ("camping", "books"):
        left_out = "" if unseen == "camping" else unseen
        assert "weave: woven merge" not in scores(tables, domain=unseen, left_out=left_out)
        assert "weave" in scores(tables, domain=unseen, left_out=left_out)
    assert chosen_variant(grid, WITHOUT_BOOKS, "weave") in ("weave factor 1", "weave factor 1.4")


def test_every_continued_adapter_is_counted_up_and_down(woven_bench: tuple[Grid, BenchTables]) -> None:
    grid, tables = woven_bench
    costs = {row["strategy"]: row for row in tables.costs if row["left_out"] == ""}
    woven = read_weave(grid.run(ALL, "weave"))
    assert woven is not None
    adapters = stored_woven(grid.run(ALL, "weave"), woven)
    continued = sum(adapter.size_bytes for adapter in adapters.values())
    assert costs["weave"]["bytes_up"] == costs["average"]["bytes_up"] + continued
    assert costs["weave: woven merge"]["bytes_up"] == costs["weave"]["bytes_up"]
    assert costs["weave"]["client_seconds"] > costs["average"]["client_seconds"]
    rank = costs["average"]["rank"] // 3
    assert costs["weave: woven merge"]["rank"] == 2 * rank
    experts = {*(read_sources(grid.run(ALL, "weave")) or {}).values()}
    assert costs["weave"]["rank"] == len(experts | {*woven.values()}) * rank  # no step was better: the same adapter


def test_a_gate_that_excludes_cannot_stand_behind_a_weaving(bench_place: Path) -> None:
    gated = f'{WEAVE}admission = {{ action = "exclude" }}\n'
    (bench_place / "gated.toml").write_text(FILE.replace("leave_one_out = true", "") + gated)
    with pytest.raises(ConfigError, match=r"strategy weave: with weave.schedule, admission.action = 'exclude'"):
        load_bench(bench_place / "gated.toml")
