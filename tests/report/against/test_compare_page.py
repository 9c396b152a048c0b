"""``fedmerge report A B``: what differs, what cannot be compared, what is refused."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from report_folders import Page, parsed, some_sums
from run_folders import NUM_USERS, TRAIN, UNSEEN, output, refusal

from fedmerge.config import Split
from fedmerge.evaluation.sums import VARIANTS
from fedmerge.files import read_json, write_json, write_table
from fedmerge.report.against.difference import difference_across, difference_of_mean
from fedmerge.report.run.final_report import SumsByDomain, metric_rows, product_rows
from fedmerge.report.tables import Role
from fedmerge.runs.metric_sums import read_metric_sums

Capsys = pytest.CaptureFixture[str]
METHODS = ("popularity", "last item", "backbone", "expert", "average", "task-arithmetic 0.5")


@pytest.fixture
def runs(reported_run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that share rows without a model; in the second, merges have other outcomes and settings."""
    first, other = (tmp_path / name for name in ("first-20260102-030405-aaaa", "other-20260103-030405-bbbb"))
    for folder in (first, other):
        shutil.copytree(reported_run, folder)
    evaluate_again(other)
    config = (other / "config.toml").read_text(encoding="utf-8")
    (other / "config.toml").write_text(config.replace("rank = 8", "rank = 4", 1), encoding="utf-8")
    return first, other


def evaluate_again(run: Path, methods: Sequence[str] = METHODS, seed: int = 1) -> None:
    """Draw other outcomes of the trained models; a seed of 0 draws those of ``reported_run``."""
    roles: dict[str, Role] = {**dict.fromkeys(TRAIN, "train"), UNSEEN: "unseen"}
    trained = [method for method in methods if method not in METHODS[:3]]
    splits: dict[Split, SumsByDomain] = {
        split: {
            name: {
                v: some_sums(methods, 0, name, split, v, NUM_USERS * 10, dict.fromkeys(trained, seed)) for v in VARIANTS
            }
            for name in roles
        }
        for split in ("valid", "test")
    }
    write_table(run / "metrics.parquet", metric_rows(splits, roles))
    write_table(run / "products.parquet", product_rows(splits))


def change_participant(run: Path, domain: str, **changes: Any) -> None:
    clients: Mapping[str, Any] = read_json(run / "clients.json")
    clients["participants"][domain].update(changes)
    write_json(run / "clients.json", clients)


def page_of(path: Path) -> tuple[Page, str]:
    text = path.read_text(encoding="utf-8")
    body = text[text.index("<body>") : text.index("<script>")]
    return parsed(text), re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_scores_side_by_side_with_their_differences(runs: tuple[Path, Path], capsys: Capsys) -> None:
    first, other = runs
    assert output(capsys, "report", first, other) == f"{other / 'compared.html'}\n"
    found, words = page_of(other / "compared.html")
    rows = {row[0]: row[1:] for row in found.tables["domains-unmasked"][1:]}
    assert list(rows) == sorted([*TRAIN, UNSEEN])
    left, right = (read_metric_sums(run, "test", "unmasked") for run in runs)
    differences = {}
    for domain in (*TRAIN, UNSEEN):
        model = "expert" if domain == "toys" else "task-arithmetic 0.5"
        difference = differences[domain] = difference_across(left[domain], right[domain], model, model, "ndcg@10")
        assert rows[domain][1] == f"{left[domain].mean(model, 'ndcg@10'):.4f}"
        assert rows[domain][3] == f"{right[domain].mean(model, 'ndcg@10'):.4f}"
        text = f"{difference.mean:+.4f} ± {difference.high - difference.mean:.4f}".replace("-", "−")
        assert text in rows[domain][4]
    mean = difference_of_mean([differences[domain] for domain in TRAIN])
    text = f"{mean.mean:+.4f} ± {mean.high - mean.mean:.4f}".replace("-", "−")
    assert f"What B serves scores {text} NDCG@10 against A, mean over 3 training domains" in words
    assert "these 95 % intervals are not paired" in words
    methods = {row[0]: row[1:] for row in found.tables["methods-table"][1:]}
    assert methods["popularity"][0] == methods["popularity"][1]
    assert methods["average"][0] != methods["average"][1]
    links = [str(attributes["href"]) for attributes in found.of("a")]
    assert all(link[1:] in {attributes.get("id") for _, attributes in found.elements} for link in links)


def test_settings_costs_privacy_and_missing_are_side_by_side(runs: tuple[Path, Path], capsys: Capsys) -> None:
    first, other = runs
    (first / "DONE").write_text("finished after 60 s\n")
    output(capsys, "report", first, other, "--out", other / "page.html")
    found, words = page_of(other / "page.html")
    assert found.tables["settings-table"][1:] == [["lora.rank", "8", "4"]]
    costs = {row[0]: row[1:] for row in found.tables["costs-table"][1:]}
    assert costs["The run, from start to end"] == ["60.0 s", "90.0 s"]
    assert costs["Bytes from all clients to the server"] == ["3.7 MB", "3.7 MB"]
    assert words.count("No differential privacy") == 2
    assert "A: garden (node 7). excluded: query.describe failed" in words


def test_domains_on_other_data_are_marked_and_not_compared(runs: tuple[Path, Path], capsys: Capsys) -> None:
    first, other = runs
    change_participant(other, "books", catalog_sha256="0" * 64)
    output(capsys, "report", first, other)
    found, words = page_of(other / "compared.html")
    rows = {row[0]: row[1:] for row in found.tables["domains-unmasked"][1:]}
    assert rows["books"][4] == "not compared: other data: catalog"
    assert "mean over 2 training domains" in words
    assert "B, books: other data: catalog. Not compared." in words
    # the same description, but the row that depends on data alone has other outcomes: other interactions
    shutil.copy(first / "clients.json", other)
    evaluate_again(other, ("last item", "popularity", *METHODS[2:]))
    assert "other interactions or test users: popularity scores differently" in refusal(capsys, "report", first, other)


def test_what_cannot_be_compared_is_refused(runs: tuple[Path, Path], bench_folder: Path, capsys: Capsys) -> None:
    first, other = runs
    assert "each once" in refusal(capsys, "report", first, first)
    assert "one benchmark" in refusal(capsys, "report", first, bench_folder)
    for domain in (*TRAIN, UNSEEN):
        change_participant(other, domain, num_interactions=7)
    told = refusal(capsys, "report", first, other)
    assert "no domain was evaluated on the same data" in told
    assert "number of interactions" in told
    config = (other / "config.toml").read_text(encoding="utf-8")
    (other / "config.toml").write_text(config.replace('until = "report"', 'until = "train"'), encoding="utf-8")
    assert "ends with its experts" in refusal(capsys, "report", first, other)
    (other / "DONE").unlink()
    assert "--resume" in refusal(capsys, "report", first, other)


def test_three_runs_are_compared_with_the_first(runs: tuple[Path, Path], capsys: Capsys) -> None:
    first, other = runs
    third = Path(shutil.copytree(first, first.with_name("third-20260104-030405-cccc")))
    output(capsys, "report", first, other, third)
    found, words = page_of(third / "compared.html")
    assert found.tables["domains-unmasked"][0][1:] == [
        *("A serves", "A, NDCG@10", "B serves", "B, NDCG@10", "B − A", "C serves", "C, NDCG@10", "C − A")
    ]
    assert all("+0.0000 ± 0.0000" in row[-1] for row in found.tables["domains-unmasked"][1:])  # a copy of the first
    assert "What C serves scores +0.0000 ± 0.0000" in words
