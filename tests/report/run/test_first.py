"""The first section of a run's page, against the run's tables."""

import re
import shutil
from pathlib import Path

import pytest
from report_folders import Page, parsed, some_sums
from run_folders import NUM_USERS, TRAIN, UNSEEN, output, refusal

from fedmerge.config import DP, Split
from fedmerge.evaluation.sums import VARIANTS, paired_difference
from fedmerge.files import read_json, write_json, write_table
from fedmerge.privacy.dp.statement import privacy_statement
from fedmerge.report.run.final_report import SumsByDomain, metric_rows, product_rows
from fedmerge.report.tables import Role
from fedmerge.runs.metric_sums import read_metric_sums

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def run(reported_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reported_run, tmp_path / reported_run.name))


def page_of(run: Path, capsys: Capsys) -> tuple[Page, str]:
    """Return the parsed page and its words."""
    output(capsys, "report", run)
    text = (run / "report.html").read_text(encoding="utf-8")
    body = text[text.index("<body>") : text.index("<script>")]
    return parsed(text), re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_it_says_what_each_domain_is_served_against_what(run: Path, capsys: Capsys) -> None:
    found, words = page_of(run, capsys)
    heads, *rows = found.tables["served-table"]
    assert heads == ["Domain", "Served", "NDCG@10", "Against alone", "Against popularity", "Against last item"]
    assert [row[0] for row in rows] == [*TRAIN, f"{UNSEEN}unseen"]
    assert [row[1].split()[0] for row in rows] == ["task-arithmetic", "task-arithmetic", "expert", "task-arithmetic"]
    sums = read_metric_sums(run, "test", "unmasked")
    for row, domain in zip(rows, (*TRAIN, UNSEEN), strict=True):
        model = "expert" if domain == "toys" else "task-arithmetic 0.5"
        assert row[2] == f"{sums[domain].mean(model, 'ndcg@10'):.4f}"
        for cell, other in zip(row[4:], ("popularity", "last item"), strict=True):
            difference = paired_difference(sums[domain], model, other, "ndcg@10")
            assert f"{difference.mean:+.4f} ± {difference.high - difference.mean:.4f}".replace("-", "−") in cell
            meaning = "not significantly different" if difference.low <= 0 <= difference.high else "significantly"
            assert meaning in cell
    assert rows[2][3] == "the same model"
    assert "task-arithmetic 0.5 in 3 of 4 domains their own expert in 1 of 4 domains" in words
    assert rows[3][3] == "–"  # the unseen domain has no model of its own


def test_the_first_sentence_says_that_popularity_is_better(run: Path, capsys: Capsys) -> None:
    _, words = page_of(run, capsys)
    assert "What is served ranks above popularity and the last item: NDCG@10" in words[:400]
    methods = (
        "backbone",
        "expert",
        "average",
        "task-arithmetic 0.5",
        "last item",
        "popularity",
    )  # later is better
    roles: dict[str, Role] = {**dict.fromkeys(TRAIN, "train"), UNSEEN: "unseen"}
    splits: dict[Split, SumsByDomain] = {
        split: {name: {v: some_sums(methods, 0, name, split, v, NUM_USERS * 10) for v in VARIANTS} for name in roles}
        for split in ("valid", "test")
    }
    write_table(run / "metrics.parquet", metric_rows(splits, roles))
    write_table(run / "products.parquet", product_rows(splits))
    found, words = page_of(run, capsys)
    assert f"{run.name} What is served ranks below popularity and the last item: NDCG@10" in words[:300]
    assert next(attributes["class"] for attributes in found.of("p") if attributes.get("role") == "note") == "warning"
    # wherever the page says that the merge is served, it says what is better
    served = next(row[0] for row in found.tables["choice-table"] if "served" in row[0])
    assert served == "task-arithmetic 0.5servedon test not above popularityon test not above last item"
    assert "not above popularity and last item" in words


def test_it_says_who_was_missing_and_why(run: Path, capsys: Capsys) -> None:
    _, words = page_of(run, capsys)
    assert "Missing 1 garden (node 7): excluded: query.describe failed: DomainError: damaged" in words
    clients = read_json(run / "clients.json")
    write_json(run / "clients.json", {**clients, "absent": {"toys": "no client came within 60 s"}})
    _, words = page_of(run, capsys)
    assert "Missing 2 toys: absent: no client came within 60 s" in words
    write_json(run / "clients.json", {**clients, "excluded": {}})
    _, words = page_of(run, capsys)
    assert "Missing Nobody" in words


def test_it_says_what_is_promised_about_privacy(run: Path, capsys: Capsys) -> None:
    _, words = page_of(run, capsys)
    assert "Privacy No differential privacy No (ε, δ) is promised" in words
    assert "adapters, catalogs, descriptions, metric sums and training reports may leave a client" in words
    release = {"what": "expert", "noise_multiplier": 1.1, "sample_rate": 0.1, "clip": 1.0, "num_units": 99}
    dp = DP(mode="user", delta=1e-5, noise_multiplier=1.1, accountant="rdp")
    spent = {name: [{**release, "steps": steps}] for name, steps in zip(TRAIN, (30, 60, 90), strict=True)}
    statement = privacy_statement(dp, spent, evaluated=True)
    write_json(run / "privacy.json", statement)
    found, words = page_of(run, capsys)
    worst = statement["domains"][TRAIN[-1]]
    assert f"Privacy at most ε = {worst['epsilon']:.3g}, δ = 1e-05 for one user added or removed" in words
    assert "It does not hold for the run as a whole." in words
    assert "Not covered: counts of users; metric sums on validation and test; the time that anything took." in words
    rows = {row[0]: row[1:] for row in found.tables["promise-table"][1:]}
    assert rows[TRAIN[-1]] == [f"{worst['epsilon']:.3g}", f"{worst['epsilon_replaced']:.3g}", "1"]
    assert all(said in found.text for said in (*statement["not_covered"], *statement["assumptions"]))


def test_a_promise_that_guarantees_nothing_is_named_and_a_damaged_one_refused(run: Path, capsys: Capsys) -> None:
    dp = DP(mode="user", delta=1e-5, noise_multiplier=1.1, accountant="rdp", randomness="seeded")
    release = {"noise_multiplier": 1.1, "sample_rate": 0.1, "steps": 9, "clip": 1.0, "num_units": 99}
    write_json(run / "privacy.json", privacy_statement(dp, {"toys": [release]}, evaluated=True))
    _, words = page_of(run, capsys)
    assert "Privacy Guarantees nothing ε = " in words
    write_json(run / "privacy.json", {"mode": "user"})
    assert "privacy.json" in refusal(capsys, "report", run)
