"""`fedmerge privacy plan` and `fedmerge privacy ledger`, and ε on the page of a run."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from run_folders import output, refusal

from fedmerge.cli import main
from fedmerge.config import DP
from fedmerge.files import append_line, write_json, write_table
from fedmerge.privacy.dp.accountant import calibrate_noise, spent_epsilon
from fedmerge.privacy.dp.releases import METRIC_SUMS, Release
from fedmerge.privacy.dp.replacement import replaced_epsilon
from fedmerge.privacy.dp.statement import privacy_statement
from fedmerge.report.run.promise import PRIVACY_SECTION

Capsys = pytest.CaptureFixture[str]
TRAINING = ("--users", "1200", "--batch", "128", "--steps", "40", "--delta", "1e-4", "--accountant", "rdp")
RATE = 128 / 1200
RECORD = {"noise_multiplier": 1.0, "clip": 1.0, "sample_rate": 0.1, "num_units": 600, "steps": 10}


def plan(capsys: Capsys, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output(capsys, "privacy", "plan", *TRAINING, *arguments, "--json"))
    return found


def test_a_plan_is_the_noise_of_the_run_it_plans(capsys: Capsys) -> None:
    found = plan(capsys, "--epsilon", "8")
    assert found["noise_multiplier"] == calibrate_noise(8.0, 1e-4, ((RATE, 40),), "rdp")
    assert 7.9 < found["epsilon"] <= 8
    assert found["epsilon_replaced"] == replaced_epsilon([Release(found["noise_multiplier"], RATE, 40)], 1e-4)
    text = output(capsys, "privacy", "plan", *TRAINING, "--epsilon", "8")
    for number in (found["noise_multiplier"], found["epsilon"], found["epsilon_replaced"]):
        assert f"{number:.4g}" in text
    assert "replaced" in text


def test_the_other_way_round_gives_the_epsilon_back(capsys: Capsys) -> None:
    noise = plan(capsys, "--epsilon", "3")["noise_multiplier"]
    found = plan(capsys, "--noise-multiplier", str(noise))
    assert found["epsilon"] == spent_epsilon([Release(noise, RATE, 40)], 1e-4, "rdp")
    assert 2.95 < found["epsilon"] <= 3


def test_noised_metric_sums_take_their_part_of_the_budget(capsys: Capsys) -> None:
    sums = ("--metric-sums", "2", "--metrics-noise", "6")
    found, without = plan(capsys, "--epsilon", "4", *sums), plan(capsys, "--epsilon", "4")
    assert found["noise_multiplier"] > without["noise_multiplier"]
    together = [Release(found["noise_multiplier"], RATE, 40), Release(6.0, 1.0, 2)]
    assert found["epsilon"] == spent_epsilon(together, 1e-4, "rdp")
    assert found["metric_sums"] == 2


def test_a_plan_without_a_guarantee_is_refused(capsys: Capsys) -> None:
    told = refusal(
        capsys, "privacy", "plan", *TRAINING[:6], "--delta", "0.001", "--epsilon", "8", "--accountant", "rdp"
    )
    assert "0.001" in told
    assert "1,200" in told
    for wrong in (
        [],
        ["--epsilon", "8", "--noise-multiplier", "1"],
        ["--epsilon", "0"],
        ["--epsilon", "nan"],
        ["--epsilon", "8", "--users", "0"],
        ["--epsilon", "8", "--metric-sums", "-1"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(["privacy", "plan", *TRAINING, *wrong])
        assert caught.value.code == 2


# The ledger


@pytest.fixture
def run(reported_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(reported_run, tmp_path / "shops-copy"))


def test_the_ledger_adds_up_what_left_each_client(run: Path, capsys: Capsys) -> None:
    lines = output(capsys, "privacy", "ledger", run).splitlines()
    assert ["books", "train", "1", "1,234,567"] in [line.split() for line in lines]
    assert "No differential privacy" in lines[-1]
    found = json.loads(output(capsys, "privacy", "ledger", run.name, "--dir", str(run.parent), "--json"))
    table = pq.read_table(run / "exposure.parquet").to_pylist()
    assert sum(of["size_bytes"] for of in found["replies"]) == sum(row["size_bytes"] for row in table)
    assert found["privacy"] is None


def test_replies_are_counted_while_a_run_goes_on_and_after(run: Path, capsys: Capsys) -> None:
    (run / "exposure.parquet").unlink()
    assert "exposure.jsonl" in refusal(capsys, "privacy", "ledger", run)
    contents = [{"name": "facts.steps", "size_bytes": 8}, {"name": "adapter.x", "size_bytes": 100}]
    for reply in (contents, contents, [{"name": "error", "size_bytes": 30}]):
        append_line(run / "exposure.jsonl", {"domain": "books", "message": "train", "contents": reply})
    lines = [line.split() for line in output(capsys, "privacy", "ledger", run).splitlines()]
    assert ["books", "train", "3", "246"] in lines
    rows = [{"domain": "books", "message": "train", **row} for row in [*contents, *contents]]
    rows.append({"domain": "books", "message": "train", "name": "error", "size_bytes": 30})
    write_table(run / "exposure.parquet", rows)
    lines = [line.split() for line in output(capsys, "privacy", "ledger", run).splitlines()]
    assert ["books", "train", "3", "246"] in lines


@pytest.mark.parametrize("file", ["exposure.parquet", "privacy.json"])
def test_a_damaged_ledger_is_an_error_with_its_path(run: Path, capsys: Capsys, file: str) -> None:
    (run / file).write_bytes(b"PAR1{")
    assert f"{file}:" in refusal(capsys, "privacy", "ledger", run)
    (run / file).write_text("{}" if file == "exposure.parquet" else '{"mode": "user"}')
    assert f"{file}:" in refusal(capsys, "privacy", "ledger", run)


@pytest.mark.parametrize(
    ("dp", "records", "wanted"),
    [
        (
            DP(mode="user", noise_multiplier=1.0, delta=1e-5, accountant="rdp"),
            [RECORD, {**RECORD, "what": METRIC_SUMS, "noise_multiplier": 4.0, "sample_rate": 1.0, "steps": 2}],
            ["added or removed", "replaced", "one user", "time"],
        ),
        (
            DP(mode="domain-local", noise_multiplier=2.0, delta=1e-5, accountant="rdp"),
            [{**RECORD, "noise_multiplier": 2.0, "sample_rate": 1.0, "steps": 1}],
            ["one domain", "replaced", "does not hold for the run as a whole"],
        ),
        (
            DP(mode="user", noise_multiplier=1.0, delta=1e-5, accountant="rdp", randomness="seeded"),
            [RECORD],
            ["guarantees nothing", "seed"],
        ),
    ],
)
def test_the_ledger_and_the_page_say_what_is_bounded_and_what_is_not(
    run: Path, capsys: Capsys, dp: DP, records: list[dict[str, Any]], wanted: list[str]
) -> None:
    by_domain = dp.mode == "domain-local"
    statement = privacy_statement(dp, {"books": records}, evaluated=by_domain, noised_metrics=not by_domain)
    write_json(run / "privacy.json", statement)
    found = statement["domains"]["books"]
    numbers = [f"{found['epsilon']:.3g}", "1e-05", f"{found['epsilon_replaced']:.3g}"]
    text = output(capsys, "privacy", "ledger", run)
    output(capsys, "report", run, "--out", run / "page.html")
    page = (run / "page.html").read_text(encoding="utf-8")
    sections = re.findall(r"<section.*?</section>", page, flags=re.DOTALL)
    first, promise = (
        html.unescape(re.sub("<[^>]*>", "", section))
        for section in sections
        if "In short" in section or f'id="{PRIVACY_SECTION}"' in section
    )
    assert f"ε = {found['epsilon']:.3g}, δ = 1e-05" in first
    assert "Not covered" in first
    for told in (text, first + promise):
        for word in (*numbers, *statement["not_covered"]):
            assert word in told
        for word in wanted:
            assert word in told.lower()
