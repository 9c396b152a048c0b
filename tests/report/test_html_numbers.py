"""The numbers of a page equal those of its tables."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from report_folders import DOMAINS, STRATEGIES, parsed
from run_folders import output

from fedmerge.evaluation.sums import paired_difference_of_mean
from fedmerge.report.bench import dataset
from fedmerge.report.bench.page import bench_page
from fedmerge.report.bench_tables import BenchTables
from fedmerge.runs.metric_sums import read_metric_sums

Capsys = pytest.CaptureFixture[str]


def results_frame(folder: Path, **wanted: object) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "results.parquet").to_pylist()
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_the_main_table_equals_the_parquet_tables(bench_folder: Path, capsys: Capsys) -> None:
    output(capsys, "report", bench_folder)
    table = parsed((bench_folder / "report.html").read_text(encoding="utf-8")).tables["d0-scores-table"]
    assert table[0] == [
        "Strategy",
        "Recall@10, training domains",
        "NDCG@10, training domains",
        "Recall@10, unseen domains",
        "NDCG@10, unseen domains",
    ]
    comparisons = pq.read_table(bench_folder / "comparisons.parquet").to_pylist()
    for row, strategy in zip(table[1:], STRATEGIES, strict=True):
        assert row[0].startswith(strategy)
        for cell, (role, metric) in zip(
            row[1:],
            [(role, metric) for role in ("train", "unseen") for metric in ("recall@10", "ndcg@10")],
            strict=True,
        ):
            rows = results_frame(
                bench_folder, strategy=strategy, role=role, metric=metric, split="test", variant="unmasked"
            )
            rows = [row for row in rows if row["left_out"] == ("" if role == "train" else row["domain"])]
            means = [np.mean([row["value"] for row in rows if row["seed"] == seed]) for seed in range(3)]
            assert f"{np.mean(means):.4f} ± {np.std(means, ddof=1):.4f}" in cell
            if strategy != "average":
                (compared,) = (
                    row
                    for row in comparisons
                    if (row["strategy"], row["domain"], row["role"], row["metric"], row["variant"])
                    == (strategy, "mean", role, metric, "unmasked")
                )
                better = "better" if compared["difference"] > 0 else "worse"
                verdict = f"significantly {better}" if compared["significant"] else "not significantly different"
                assert re.search(rf"{verdict} (than|from) average", cell)
    assert "★" in table[3][1]  # only mergerec: the backbone is a reference
    assert "selected: 0.5, 0.6, 0.7" in table[3][0]
    assert ["reference" in row[0] for row in table[1:]] == [True, False, False]


def test_other_tables_equal_the_parquet_tables(bench_folder: Path, capsys: Capsys) -> None:
    output(capsys, "report", bench_folder)
    tables = parsed((bench_folder / "report.html").read_text(encoding="utf-8")).tables
    rows = results_frame(
        bench_folder,
        strategy="mergerec",
        left_out="",
        domain="coffee",
        metric="recall@10",
        split="test",
        variant="unmasked",
    )
    head, *_, last = tables["d0-domains-table"]
    assert f"{np.mean([row['value'] for row in rows]):.4f}" in last[head.index("coffee")]
    costs = [
        row
        for row in pq.read_table(bench_folder / "costs.parquet").to_pylist()
        if row["strategy"] == "mergerec" and not row["left_out"]
    ]
    assert f"{np.mean([row['bytes_up'] for row in costs]) / 1e6:.1f} MB" in tables["d0-costs-table"][3]
    assert f"{np.mean([row['client_seconds'] for row in costs]):.0f} s" in tables["d0-costs-table"][3]
    assert tables["d0-costs-table"][1][-1] == "–"  # the backbone's memory is unknown
    coefficients = pq.read_table(bench_folder / "coefficients.parquet").to_pylist()
    of_layer = [
        row["value"]
        for row in coefficients
        if (row["strategy"], row["left_out"], row["domain"], row["group"]) == ("mergerec", "", "toys", "layer 3")
    ]
    heat = next(table for key, table in tables.items() if key.startswith("d0-heat-"))
    assert heat[4][4] == f"{np.mean(of_layer):.2f}".replace("-", "−")
    differences = pq.read_table(bench_folder / "comparisons.parquet").to_pylist()
    shown = [row for row in differences if row["variant"] == "unmasked" and row["metric"] in dataset.HEADLINE]
    assert len(tables["d0-differences-table"]) == 1 + len(shown)
    assert f"{shown[0]['difference']:+.4f}".replace("-", "−") in tables["d0-differences-table"][1][3]


def test_the_page_of_a_run_equals_its_tables(reported_run: Path, capsys: Capsys, tmp_path: Path) -> None:
    output(capsys, "report", reported_run, "--out", tmp_path / "page.html")
    found = parsed((tmp_path / "page.html").read_text(encoding="utf-8"))
    sums = read_metric_sums(reported_run, "test", "unmasked")
    train = [sums[name] for name in ("books", "coffee", "toys")]
    table = {row[0]: row for row in found.tables["d0-scores-table"][1:]}
    mean = np.mean([of_domain.mean("task-arithmetic 0.5", "recall@10") for of_domain in train])
    assert f"{mean:.4f}" in table["task-arithmetic 0.5"][1]
    assert "–" in table["expertreference"][3]  # no client trained on the unseen domain
    difference = paired_difference_of_mean(train, "task-arithmetic 0.5", "average", "recall@10")
    shown = f"{difference.mean:+.4f} ± {difference.high - difference.mean:.4f}".replace("-", "−")
    assert any(shown in row[3] for row in found.tables["d0-differences-table"][1:])
    served = np.mean(
        [
            sums[name].mean("expert" if name == "toys" else "task-arithmetic 0.5", "recall@10")
            for name in DOMAINS
            if name != "camping"
        ]
    )
    assert f"{served:.4f}" in table["served (with fallback)reference"][1]
    for told in ("Missing: garden (node 7)", "their own expert in 1 of 4 domains", "Experts, loss"):
        assert told in found.text
    assert found.tables["exposure-table"][1] == ["books", "321 B", "1.2 MB", "1.2 MB"]
    assert "lora.rank = 8" in found.text


def test_privacy_is_shown_with_utility_and_bytes(private_bench: BenchTables, reported_bench: BenchTables) -> None:
    text = bench_page(private_bench)
    found = parsed(text)
    heads, *rows = found.tables["d0-privacy-table"]
    assert heads == ["Strategy", "What travels", "Unit", "ε", "δ", "Recall@10", "NDCG@10", "Up", "Down"]
    shown = {row[0]: row[1:5] for row in rows}
    assert shown == {
        "average": ["adapter+catalog", "user", "∞", "0.0001"],
        "some": ["adapter+catalog", "user", "8", "0.0001"],
        "much": ["adapter+catalog", "user", "1", "0.0001"],
        "summed": ["aggregate-only", "user", "1", "0.0001"],
        "only-noise": ["adapter+catalog", "user", "–", "0.0001"],
    }
    scores = {row[0]: row[5] for row in rows}
    main = {row[0].removesuffix("baseline"): row[1] for row in found.tables["d0-scores-table"][1:]}
    assert all(scores[name] in main[name] for name in scores)
    (picture,) = [
        str(attributes["aria-label"])
        for attributes in found.of("svg")
        if "over 1/ε" in str(attributes.get("aria-label")) and "Recall" in str(attributes.get("aria-label"))
    ]
    assert f"adapter+catalog: average, by user; 12.0 MB ends at {scores['much']}" in picture
    assert f"aggregate-only: average, by user; 12.0 MB ends at {scores['summed']}" in picture
    assert "Utility, privacy and bytes" not in bench_page(reported_bench)
    one = [cell for cell in private_bench.cells if cell["strategy"] in ("much", "summed", "open")]
    assert "Utility, privacy and bytes" not in bench_page(replace(private_bench, cells=one))


def test_audit_results_are_shown_with_the_guarantees(private_bench: BenchTables) -> None:
    (dataset,) = {row["dataset"] for row in private_bench.results}
    aucs = {"open": (0.9, 0.7), "much": (0.52, 0.5), "some": (0.6, 0.5)}
    leaks = [
        {
            "dataset": dataset,
            "strategy": strategy,
            "seed": seed,
            "left_out": "",
            "domain": domain,
            "model": "expert",
            "attack": attack,
            "metric": "auc",
            "value": value,
            "error": 0.05,
        }
        for strategy, of_domain in aucs.items()
        for domain, mean in zip(("a", "b"), of_domain, strict=True)
        for attack, shift in (("loss", 0.08), ("loss against the backbone's", 0.0))
        for seed, value in ((0, mean - 0.01 + shift), (1, mean + 0.01 + shift))
    ]
    found = parsed(bench_page(replace(private_bench, leaks=leaks)))
    heads, *rows = found.tables["d0-privacy-table"]
    column = heads.index("Membership AUC, expert")
    shown = {row[0]: (row[2], row[3], row[4], row[column]) for row in rows}
    assert shown["open"] == ("none: no guarantee", "∞", "–", "0.8000")
    assert shown["much"] == ("user", "1", "0.0001", "0.5100")
    assert shown["average"][3] == "–"
    assert any("Membership AUC, expert over 1/ε" in str(attributes.get("aria-label")) for attributes in found.of("svg"))
    alone = [cell for cell in private_bench.cells if cell["strategy"] == "open"]
    heads, *rows = parsed(bench_page(replace(private_bench, leaks=leaks, cells=alone))).tables["d0-privacy-table"]
    assert [row[:3] for row in rows] == [["open", "adapter+catalog", "none: no guarantee"]]
