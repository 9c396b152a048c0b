"""Strategies with different rounds, policies, audits and attacks."""

import shutil
from pathlib import Path

import pytest
from in_process import finish, grid_in, here, tables_of, train
from small_bench import FILE, POLICIES, STRATEGIES, TRAIN, scores

from fedmerge.bench.grid import Grid, Place
from fedmerge.bench.outcomes import merge_hashes
from fedmerge.bench.ranking import domain_of
from fedmerge.bench.stages import run_grid
from fedmerge.bench.tables import WEIGHTS
from fedmerge.client.audit.attacks import Audited, audit_domain
from fedmerge.client.training.settings import training_settings
from fedmerge.config import ExperimentConfig, load_config
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import ClientError
from fedmerge.files import read_json, seal, write_json
from fedmerge.report.bench.page import bench_page
from fedmerge.report.bench_tables import NOTHING_LEARNED, BenchTables
from fedmerge.runs.checkpoints import merge_folder, read_sources
from fedmerge.runs.round_checkpoints import round_records

pytestmark = pytest.mark.federation


def test_rounds_are_compared_like_other_strategies(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    text = FILE.replace("[0, 1]", "[1]").replace("leave_one_out = true", "")
    for rule in ("flora", "ffa-lora"):
        text += f'\n[[strategy]]\nname = "{rule}"\nset = {{ "rounds.rule" = "{rule}", "rounds.number" = 2 }}\n'
    (bench_place / "rounds.toml").write_text(text)
    grid = grid_in(bench_place, "rounds", "rounds.toml")
    shutil.copytree(finished_bench[0].folder / "training", grid.folder / "training")
    lines = finish(grid)
    assert sum(line.startswith("training") for line in lines) == 2
    tables = tables_of(grid)
    shared = scores(finished_bench[1], domain="books", seed=1, left_out="")
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


def test_experts_send_their_signals_for_the_strategy_that_weighs_by_them(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    text = FILE.replace("[0, 1]", "[1]").replace("leave_one_out = true", "")
    text += '\n[[strategy]]\nname = "livar"\nset = { "merge.methods" = "livar-style", "livar.coefficients" = "1" }\n'
    (bench_place / "signals.toml").write_text(text)
    grid = grid_in(bench_place, "signals", "signals.toml")
    shutil.copytree(finished_bench[0].folder / "training", grid.folder / "training")
    lines = finish(grid)
    assert sum(line.startswith("training") for line in lines) == 1  # the cached experts, with their signals
    place = Place("main", 1, "")
    assert read_sources(grid.run(place, "livar")) == read_sources(grid.run(place, "average"))
    provenance = read_json(merge_folder(grid.merges(place, "livar"), "livar-style 1") / "provenance.json")
    assert "without_signals" not in provenance
    assert sum(map(len, provenance["coefficients"].values())) == len(TRAIN) * len(provenance["coefficient_groups"])
    assert "livar" in scores(tables_of(grid), domain="camping")


def test_a_failed_or_incomplete_training_is_reported_and_the_others_are_compared(
    bench_place: Path, finished_bench: tuple[Grid, BenchTables, list[str]]
) -> None:
    text = FILE.replace("[0, 1]", "[1]").replace("leave_one_out = true", "")
    for rule in ("fedit", "weighted-average"):
        text += f'\n[[strategy]]\nname = "{rule}"\nset = {{ "rounds.rule" = "{rule}", "rounds.number" = 2 }}\n'
    (bench_place / "lost.toml").write_text(text)
    grid = grid_in(bench_place, "lost", "lost.toml")
    shutil.copytree(finished_bench[0].folder / "training", grid.folder / "training")

    def unlucky(config: ExperimentConfig) -> None:
        if config.rounds.rule == "fedit":
            raise ClientError("the experts could not be trained")
        train(config)
        (record,) = (grid.folder / "training" / str(config.run_id) / "rounds").glob("2.json")
        result = read_json(record)
        del result["aggregation"]["client_weights"]["books"]  # as if the client had diverged
        write_json(record, seal(result))

    for _ in range(2):  # a second call fails in the same way
        failed = run_grid(grid, unlucky, here, lambda line: None)
        assert [line.partition(": ")[0] for line in failed] == ["training", "training"]
        assert "the experts could not be trained" in failed[0]
        assert "books" in failed[1]
    tables = tables_of(grid)
    assert scores(tables, domain="books") == scores(finished_bench[1], domain="books", seed=1, left_out="")
    status = {cell["strategy"]: cell["status"] for cell in tables.cells}
    assert status == {**dict.fromkeys(STRATEGIES, "done"), "fedit": "failed", "weighted-average": "failed"}


def test_experts_that_learned_nothing_are_named_on_the_page(bench_place: Path) -> None:
    text = FILE.replace("[0, 1]", "[1]").replace("leave_one_out = true", "")
    void = '\n[[dataset]]\nname = "void"\nset = { "train.learning_rate" = 1e-20 }\n'
    (bench_place / "void.toml").write_text(text[: text.index('\n[[strategy]]\nname = "mergerec"')] + void)
    grid = grid_in(bench_place, "void", "void.toml")
    finish(grid)
    tables = tables_of(grid)
    assert [cell[NOTHING_LEARNED] for cell in tables.cells] == [[*TRAIN]] * 2
    page = bench_page(tables)
    where = "void, seed 1: in beauty, books, coffee no validation beat the backbone"
    assert f"Nothing was learned.</strong> {where}, so the expert is zero in average, task-arithmetic." in page


def test_the_policy_changes_bytes_but_not_merges(bench_place: Path) -> None:
    (bench_place / "policies.toml").write_text(POLICIES)
    overrides = ["merge.methods=average", "mergerec.granularities=layer", "dp.accountant=rdp"]
    grid = grid_in(bench_place, "policies", "policies.toml", overrides)
    lines = finish(grid)
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
    steps = grid.experiment(at, "catalog-private").mergerec.steps
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


def test_audit_results_are_reported_with_scores(bench_place: Path) -> None:
    audited = '"simulation.held_out_users" = 0.5, "simulation.canaries" = 4'
    text = POLICIES.replace('"dp.mode" = "user", "dp.delta" = 1e-3, "dp.noise_multiplier" = 0.0', audited)
    (bench_place / "audited.toml").write_text(text.partition('[[strategy]]\nname = "noised"')[0])
    grid = grid_in(bench_place, "audited", "audited.toml", ["merge.methods=average"])
    lines = finish(grid)
    audits = [line for line in lines if line.startswith("audit ")]
    assert len(audits) == len(TRAIN)  # one for both policies, whose merges are equal
    tables = tables_of(grid)
    at = Place("dp", 0, "")
    config, run = grid.experiment(at, "adapter"), grid.run(at, "adapter")
    (label,) = merge_hashes(grid, at, "adapter")
    merged = read_adapter(merge_folder(grid.merges(at, "adapter"), label))
    expert = read_adapter(run / "adapters" / "books")
    found = audit_domain(
        Audited(domain_of(config, "books"), training_settings(config), expert, merged, {}, None), num_shadows=0
    )
    assert found["members"] > 0 < found["non_members"]

    def leaks(**wanted: object) -> dict[tuple[str, str, str], float]:
        rows = [row for row in tables.leaks if all(row[key] == value for key, value in wanted.items())]
        return {(row["model"], row["attack"], row["metric"]): row["value"] for row in rows}

    reported = leaks(domain="books", strategy="adapter")
    for row in found["membership"]:
        assert reported[row["model"], row["attack"], "auc"] == row["auc"]
    for row in found["canaries"]:
        assert reported[row["model"], "canaries", "mean_exposure"] == row["mean_exposure"]
    for row in found["recovery"]["rows"]:
        assert reported[row["from"], "pairs", "precision@50"] == row["precision_at"]["50"]
    assert reported["expert", "loss", "tpr_at_fpr_0.001"] is None  # needs more users
    hidden = leaks(domain="books", strategy="aggregate-only")
    assert hidden == {key: value for key, value in reported.items() if not key[0].startswith("expert")}
    assert "Membership AUC, merge" in bench_page(tables)
    assert f"audit: {len(TRAIN)} of {len(TRAIN)} cells are done" in finish(grid)


AUDITED = """
title = "Audited"
experiment = "experiment.toml"
seeds = [0]
leave_one_out = true
baseline = "average"
[[dataset]]
name = "poisoned"
[dataset.set]
simulation = { held_out_users = 0.5, attacker = "coffee", attack = "scaled-update", attack_strength = 100.0 }
[[strategy]]
name = "average"
set = { "merge.methods" = "average" }
[[strategy]]
name = "rounds"
set = { "rounds.rule" = "fedit", "rounds.number" = 2 }
"""


def test_audits_and_an_attack_with_folds_and_rounds(bench_place: Path) -> None:
    (bench_place / "audited.toml").write_text(AUDITED)
    grid = grid_in(bench_place, "audited-more", "audited.toml")
    finish(grid)
    tables = tables_of(grid)
    assert {row["left_out"] for row in tables.results} == {"", *TRAIN}
    assert {row["left_out"] for row in tables.leaks} == {""}  # the experts of a fold are already audited
    of_average, of_rounds = (
        {(row["domain"], row["model"]) for row in tables.leaks if row["strategy"] == name and row["metric"] == "auc"}
        for name in ("average", "rounds")
    )
    assert of_average == {(domain, model) for domain in TRAIN for model in ("expert", "merged", "backbone")}
    assert of_rounds == {(domain, model) for domain, model in of_average if model != "expert"}
    trained = [load_config(run / "config.toml") for run in grid.folder.glob("training/*")]
    assert [config.simulation.attacker for config in trained if "coffee" in config.domains.train] == ["coffee"] * 4
    assert [config.simulation.attacker for config in trained if "coffee" not in config.domains.train] == [None]


def test_a_private_catalog_is_only_used_at_its_client(bench_place: Path) -> None:
    text = FILE[: FILE.index("[[strategy]]")].replace("[0, 1]", "[0]").replace("leave_one_out = true", "")
    for policy in ("adapter+catalog", "catalog-private"):
        text += f'[[strategy]]\nname = "{policy}"\nset = {{ "privacy.policy" = "{policy}" }}\n'
    (bench_place / "private.toml").write_text(text.replace('baseline = "average"', 'baseline = "backbone"'))
    shutil.copytree(bench_place / "domains", bench_place / "private-domains")
    for domain in TRAIN:
        manifest = bench_place / "private-domains" / domain / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"public_catalog": true', '"public_catalog": false'))
    wanted = [
        f"domains.root={bench_place / 'private-domains'}",
        "merge.methods=mergerec",
        "mergerec.granularities=layer",
    ]
    grid = grid_in(bench_place, "private", "private.toml", wanted)
    (failed,) = run_grid(grid, train, here, lambda line: None)
    assert "merging: adapter+catalog" in failed
    assert "public_catalog = false" in failed
    at = Place("main", 0, "")
    (label,) = merge_hashes(grid, at, "catalog-private")
    made = read_json(merge_folder(grid.merges(at, "catalog-private"), label) / "provenance.json")
    assert made["policy"] == "catalog-private"
    (cost,) = [row for row in tables_of(grid).costs if row["strategy"] == "catalog-private"]
    assert cost["bytes_up"] > 0
