"""The page of a run with more domains than its tables show."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_folders import give_many_domains, make_reported_run, parsed
from run_folders import Place, make_place

from fedmerge.evaluation.sums import paired_difference_of_mean
from fedmerge.report.run.many import MOST_DOMAINS, WORST, mean_rows
from fedmerge.report.run.page import run_page
from fedmerge.report.tables import Role
from fedmerge.runs.metric_sums import read_metric_sums

NUM_DOMAINS = 300
ROWS = ("popularity", "last item", "backbone", "expert", "average", "task-arithmetic 0.5")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    folder = make_reported_run(place, "shops-20260102-030405-abcd")
    give_many_domains(folder, NUM_DOMAINS)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return run_page(run)


def served(number: int) -> str:
    return "expert" if number % 10 == 5 else "task-arithmetic 0.5"


def test_means_and_differences_are_those_over_all_domains(run: Path, page: str) -> None:
    tables = parsed(page).tables
    sums = read_metric_sums(run, "test", "unmasked")
    found = {re.sub(r"(reference|baseline)*$", "", row[0]): row for row in tables["d0-scores-table"][1:]}
    for row in ROWS:
        for column, metric in enumerate(("recall@10", "ndcg@10"), start=1):
            mean = math.fsum(of_domain.mean(row, metric) for of_domain in sums.values()) / NUM_DOMAINS
            assert f"{mean:.4f}" in found[row][column]
    (compared,) = (
        row
        for row in tables["d0-differences-table"][1:]
        if row[0].startswith("task-arithmetic 0.5") and row[2] == "NDCG@10"
    )
    difference = paired_difference_of_mean([*sums.values()], "task-arithmetic 0.5", "average", "ndcg@10")
    assert f"{difference.mean:+.4f} ± {difference.high - difference.mean:.4f}".replace("-", "\u2212") in compared[3]
    assert {row[1] for row in tables["d0-differences-table"][1:]} == {"mean of training domains"}


def test_a_domain_that_withholds_its_scores_is_left_out_of_the_means(run: Path) -> None:
    sums = dict(list(read_metric_sums(run, "test", "unmasked").items())[:3])
    roles: dict[str, Role] = dict.fromkeys(sums, "train")
    first, *others = sums
    nothing = np.full_like(sums[first].sums, np.nan), np.full_like(sums[first].products, np.nan)
    withheld = {**sums, first: replace(sums[first], sums=nothing[0], products=nothing[1], noise=1.0)}
    assert [*mean_rows(withheld, roles)] == [*mean_rows({name: sums[name] for name in others}, roles)]


def test_percentiles_are_those_over_domains(run: Path, page: str) -> None:
    scores: dict[str, list[float]] = {row: [] for row in ROWS}
    for of_domain in read_metric_sums(run, "test", "unmasked").values():
        for row, values in scores.items():
            values.append(of_domain.mean(row, "ndcg@10"))
    head, *body = parsed(page).tables["percentiles"]
    assert head == ["Row", "Role", "Domains", "lowest", "5 %", "25 %", "median", "75 %", "95 %", "highest"]
    assert [row[:3] for row in body] == [[row, "train", str(NUM_DOMAINS)] for row in ROWS]
    for name, _, _, *shown in body:
        expected = np.quantile(scores[name], [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
        assert shown == [f"{value:.4f}" for value in expected]


def test_tables_by_domain_have_the_worst_first(run: Path, page: str) -> None:
    found = parsed(page)
    margins = {}
    for number, (domain, sums) in enumerate(read_metric_sums(run, "test", "unmasked").items()):
        without = max(sums.mean(row, "ndcg@10") for row in ("popularity", "last item"))
        margins[domain] = sums.mean(served(number), "ndcg@10") - without
    worst = sorted(margins, key=lambda domain: (margins[domain], domain))[:WORST]
    assert [row[0] for row in found.tables["served-table"][1:]] == worst
    assert [row[0] for row in found.tables["clients-table"][1:]] == worst
    assert [row[0] for row in found.tables["exposure-table"][1:]] == [*worst, "All domains"]
    assert found.tables["exposure-table"][-1][-1] == f"{3 * NUM_DOMAINS:.1f} kB"
    alone = found.tables["alone-table"][1:]
    assert [row[0] for row in alone if row[1] == "unmasked"] == [*worst, "mean"]
    assert f"Tables by domain show {WORST} of {NUM_DOMAINS} domains" in found.text


def test_the_search_knows_every_domain_and_markup_in_names_stays_text(page: str) -> None:
    (data,) = re.findall(r'<script type="application/json" id="find-data">(.*?)</script>', page, re.DOTALL)
    rows = json.loads(data)
    assert [row[0] for row in rows] == sorted(["</script><b>shop", *(f"shop-{i}" for i in range(1, NUM_DOMAINS))])
    assert {(row[0], row[2]) for row in rows} == {
        (f"shop-{i}" if i else "</script><b>shop", served(i)) for i in range(NUM_DOMAINS)
    }
    assert "<b>shop" not in page


def test_the_page_hardly_grows_with_domains(place: Place, page: str) -> None:
    folder = make_reported_run(place, "shops-20260103-030405-abcd")
    give_many_domains(folder, 2 * NUM_DOMAINS)
    assert (len(run_page(folder)) - len(page)) / NUM_DOMAINS < 120  # bytes a domain: its line of the search


def test_a_run_that_ends_with_the_experts_shows_the_first_by_name_and_says_so(place: Place) -> None:
    folder = make_reported_run(place, "shops-20260105-030405-abcd", ["until=train"])
    names = give_many_domains(folder, NUM_DOMAINS)
    found = parsed(run_page(folder))
    first = sorted(names)[:WORST]
    assert [row[0] for row in found.tables["clients-table"][1:]] == first
    assert f"Tables by domain show {WORST} of {NUM_DOMAINS} domains: the first by name." in found.text


def test_few_domains_are_all_shown(place: Place) -> None:
    folder = make_reported_run(place, "shops-20260104-030405-abcd")
    give_many_domains(folder, MOST_DOMAINS)
    tables = parsed(run_page(folder)).tables
    assert "percentiles" not in tables
    assert len(tables["served-table"]) == len(tables["clients-table"]) == MOST_DOMAINS + 1
    shutil.rmtree(folder)
