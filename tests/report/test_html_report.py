"""The page of a run and of a benchmark: its structure, its numbers, and what it refuses."""

import doctest
import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_folders import DOMAINS, STRATEGIES, make_reported_run, some_bench
from run_folders import Place, full_disk, make_place, make_run, output, refusal

from fedmerge.config import from_flat
from fedmerge.errors import RunDirError
from fedmerge.evaluation.sums import paired_difference_of_mean
from fedmerge.report import bench_tables, statistics
from fedmerge.report.bench import dataset
from fedmerge.report.bench.page import bench_page
from fedmerge.report.bench_tables import BenchTables, is_bench, read_bench_tables, write_bench_tables
from fedmerge.report.html import charts, page
from fedmerge.report.html.charts import Dot, Line, Point, dot_chart, line_chart, scatter_chart
from fedmerge.runs.metric_sums import read_metric_sums

Capsys = pytest.CaptureFixture[str]
VOID = {"meta", "link", "br"}
RUN_ID = "shops-20260102-030405-abcd"


@dataclass
class Page(HTMLParser):
    """What the tests look at: elements with attributes, the text of every table's cells, and whether tags match."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    text: str = ""
    problems: list[str] = field(default_factory=list)
    open_tags: list[str] = field(default_factory=list)
    table: str = ""
    cell: str | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open_tags.append(tag)
        if attributes.get("class") == "scroll":
            self.table = str(attributes["id"])
            self.tables[self.table] = []
        if tag == "tr":
            self.tables[self.table].append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag: str) -> None:
        if not self.open_tags or self.open_tags.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")
        if tag in ("td", "th"):
            self.tables[self.table][-1].append(str(self.cell))
            self.cell = None

    def handle_data(self, data: str) -> None:
        if "script" not in self.open_tags and "style" not in self.open_tags:
            self.text += data
        if self.cell is not None:
            self.cell += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def parsed(text: str) -> Page:
    found = Page()
    found.feed(text)
    assert found.problems == []
    assert found.open_tags == []
    return found


@pytest.fixture(scope="module")
def bench() -> BenchTables:
    return some_bench()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    return make_reported_run(place, RUN_ID)


@pytest.fixture
def folder(bench: BenchTables, tmp_path: Path) -> Path:
    """Of a benchmark."""
    write_bench_tables(tmp_path, bench)
    return tmp_path


# Tables on disk


def test_tables_come_back_as_they_were(bench: BenchTables, folder: Path) -> None:
    assert is_bench(folder)
    found = read_bench_tables(folder)
    assert json.dumps(found.__dict__, sort_keys=True, default=list) == json.dumps(
        bench.__dict__, sort_keys=True, default=list
    )
    assert pq.read_table(folder / "results.parquet").schema.field("num_users").type == pa.int64()


def test_empty_tables_and_numpys_numbers_are_written_too(tmp_path: Path) -> None:
    row: dict[str, Any] = dict.fromkeys(bench_tables.COLUMNS["costs"], "x")
    cost = {
        **row,
        "seed": np.int64(3),
        **dict.fromkeys(("bytes_up", "peak_bytes", "rank"), np.float32(0.5)),
        **dict.fromkeys(("error", "residual")),
        "bytes_down": None,
    }
    cost |= {"client_seconds": float("nan"), "server_seconds": float("inf")}
    write_bench_tables(tmp_path, BenchTables("t", False, costs=[cost]))
    found = read_bench_tables(tmp_path)
    assert (found.results, found.cells, found.references) == ((), (), ())
    assert found.costs[0]["seed"] == 3
    assert [found.costs[0][key] for key in ("bytes_up", "bytes_down", "client_seconds", "server_seconds")] == [
        0.5,
        None,
        None,
        None,
    ]
    assert parsed(bench_page(found)).text.count("Scores") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "seen"}, r"results.parquet, row 0: role is 'seen'; expected 'train' or 'unseen'"),
        ({"seed": 1.5}, r"row 0: seed is 1.5; expected a count"),
        ({"seed": True}, r"row 0: seed is True; expected a count"),
        ({"value": "high"}, r"row 0: value is 'high'; expected a number"),
        ({"domain": None}, r"row 0: domain is None; expected a text"),
        ({"more": 1}, r"row 0: found the columns \['dataset', .*'more'.*expected"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    bench: BenchTables, tmp_path: Path, change: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(RunDirError, match=message):
        write_bench_tables(tmp_path, replace(bench, results=[{**bench.results[0], **change}]))
    assert not is_bench(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "results.parquet",
            b"PAR1",
            r"results.parquet: damaged \(.*\). Run the benchmark again: finished cells are kept",
        ),
        ("costs.parquet", None, r"costs.parquet: not there. Run the benchmark again"),
        ("cells.json", b"{}", r"cells.json: found a JSON dict; expected a list of cells"),
        ("cells.json", b'[{"seed": 1}]', r"cells.json: cell 0 is without strategy, dataset, left_out"),
        ("cells.json", b"[", r"cells.json: damaged"),
        ("bench.json", b"[]", r"bench.json: found \[\]; expected a title and whether data are synthetic"),
    ],
)
def test_a_damaged_benchmark_is_named(
    folder: Path, capsys: Capsys, file: str, content: bytes | None, message: str
) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    assert re.search(message, refusal(capsys, "report", folder))
    assert not (folder / "report.html").exists()


def test_other_columns_and_cells_are_refused(folder: Path) -> None:
    pq.write_table(pq.read_table(folder / "ranks.parquet").drop(["num_blocks"]), folder / "ranks.parquet")
    with pytest.raises(
        RunDirError, match=r"ranks.parquet: found the columns dataset \(string\), .*; expected .*num_bloc"
    ):
        read_bench_tables(folder)
    with pytest.raises(RunDirError, match=r"bench.json: not there. Give the folder of a benchmark that has ended"):
        read_bench_tables(folder / "elsewhere")
    cells = [{**dict.fromkeys(bench_tables.CELL_KEYS, ""), "seconds": "long"}]
    with pytest.raises(RunDirError, match="cell 0 took 'long'; expected a number of seconds or null"):
        write_bench_tables(folder, BenchTables("t", False, cells=cells))


# Structure


@pytest.mark.parametrize("which", ["bench", "private", "run"])
def test_the_page_is_sound(
    bench: BenchTables, private_bench: BenchTables, run: Path, capsys: Capsys, tmp_path: Path, which: str
) -> None:
    if which != "run":
        text = bench_page(bench if which == "bench" else private_bench)
    else:
        out = tmp_path / "page.html"
        assert output(capsys, "report", run, "--out", out) == f"{out}\n"
        text = out.read_text(encoding="utf-8")
    found = parsed(text)
    ids = Counter(attributes["id"] for _, attributes in found.elements if "id" in attributes)
    assert max(ids.values()) == 1
    links = [str(attributes["href"]) for attributes in found.of("a")]
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    for _, attributes in found.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in ids
    # nothing is loaded from anywhere
    assert not {"img", "iframe", "object", "audio", "video"} & {tag for tag, _ in found.elements}
    assert [attributes.get("href") for attributes in found.of("link")] == ["data:,"]
    assert not re.search(r"""(src|href)=["']?(https?:|//)|url\(|@import|fetch\(|XMLHttp""", text)
    assert "default-src 'none'" in text
    # tables and pictures say what they are
    tables = found.of("table")
    assert len(tables) == len(found.of("caption")) > 5
    assert all(attributes["scope"] in ("row", "col") for attributes in found.of("th"))
    pictures = [attributes for attributes in found.of("svg") if "aria-hidden" not in attributes]
    assert len(pictures) > 5
    assert all(attributes["role"] == "img" and len(str(attributes["aria-label"])) > 20 for attributes in pictures)
    assert len(found.of("h1")) == 1
    assert "Synthetic data." in found.text
    # no number that is none
    assert not re.search(r"\b(nan|inf|None|NaN)\b", re.sub(r"<pre.*?</pre>|<style.*?</style>", "", text, flags=re.S))


PRIVATE: dict[str, dict[str, Any]] = {
    "average": {"dp.noise_multiplier": 0.0},
    "some": {"dp.epsilon": 8.0},
    "much": {"dp.epsilon": 1.0},
    "summed": {"dp.epsilon": 1.0, "privacy.policy": "aggregate-only"},
    "only-noise": {"dp.noise_multiplier": 2.0},
    "open": {"dp.mode": "none", "dp.delta": "none", "train.negatives": "in-batch"},
}


@pytest.fixture(scope="module")
def private_bench() -> BenchTables:
    """Strategies with differential privacy, and one without."""
    tables = some_bench(tuple(PRIVATE), folds=False)
    flat = {"dp.mode": "user", "dp.delta": 1e-4, "train.negatives": "catalog", "merge.methods": "average"}
    configs = {name: from_flat(flat | changes).model_dump(mode="json") for name, changes in PRIVATE.items()}
    return replace(tables, cells=[{**cell, "config": configs[cell["strategy"]]} for cell in tables.cells])


def test_privacy_stands_beside_utility_and_bytes(private_bench: BenchTables, bench: BenchTables) -> None:
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
    assert "Utility, privacy and bytes" not in bench_page(bench)
    one = [cell for cell in private_bench.cells if cell["strategy"] in ("much", "summed", "open")]
    assert "Utility, privacy and bytes" not in bench_page(replace(private_bench, cells=one))


def test_what_leaks_stands_beside_what_was_promised(private_bench: BenchTables) -> None:
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
    assert ".5 is by chance" in found.text
    alone = [cell for cell in private_bench.cells if cell["strategy"] == "open"]
    heads, *rows = parsed(bench_page(replace(private_bench, leaks=leaks, cells=alone))).tables["d0-privacy-table"]
    assert [row[:3] for row in rows] == [["open", "adapter+catalog", "none: no guarantee"]]


def test_equal_tables_give_equal_bytes(bench: BenchTables, folder: Path, capsys: Capsys) -> None:
    assert bench_page(bench) == bench_page(read_bench_tables(folder))
    assert output(capsys, "report", folder) == f"{folder / 'report.html'}\n"
    first = (folder / "report.html").read_bytes()
    output(capsys, "report", folder, "--out", folder / "again.html")
    assert (folder / "again.html").read_bytes() == first


def test_what_comes_from_data_is_escaped() -> None:
    strategies = ("average", '<script>alert("s")</script>', "a & b")
    domains = ('"><img src=x onerror=alert(1)>', "toys' </title>")
    tables = replace(some_bench(strategies, domains, ("<b>bold</b>",), (0, 1)), title="</style><script>x</script>")
    text = bench_page(tables)
    found = parsed(text)
    assert len(found.of("script")) == 1
    assert not found.of("img")
    assert not found.of("b")
    assert not {name for _, attributes in found.elements for name in attributes if name.startswith("on")}
    for name in (*strategies, *domains, "<b>bold</b>"):
        assert name in found.text


def test_without_optional_tables_their_sections_are_absent(bench: BenchTables) -> None:
    bare = BenchTables("bare", False, results=bench.results)
    found = parsed(bench_page(bare))
    keys = [attributes["id"] for attributes in found.of("section")]
    assert keys == ["short", "d0-scores", "d0-domains", "d0-unseen"]
    assert "Synthetic" not in found.text
    assert parsed(bench_page(BenchTables("empty", False))).of("section")


def test_many_pictures_are_folded_and_many_datasets_named() -> None:
    domains = [f"d{number}" for number in range(14)]
    found = parsed(bench_page(some_bench(("average", "ties"), domains, ("one", "two"), (0,), folds=False)))
    assert "Pictures" in found.text
    assert "two: Scores" in found.text
    assert "all datasets" in found.text


# Numbers


def results_frame(folder: Path, **wanted: object) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "results.parquet").to_pylist()
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_the_main_table_says_what_the_parquet_tables_say(folder: Path, capsys: Capsys) -> None:
    output(capsys, "report", folder)
    table = parsed((folder / "report.html").read_text(encoding="utf-8")).tables["d0-scores-table"]
    assert table[0] == [
        "Strategy",
        "Recall@10, training domains",
        "NDCG@10, training domains",
        "Recall@10, unseen domains",
        "NDCG@10, unseen domains",
    ]
    comparisons = pq.read_table(folder / "comparisons.parquet").to_pylist()
    for row, strategy in zip(table[1:], STRATEGIES, strict=True):
        assert row[0].startswith(strategy)
        for cell, (role, metric) in zip(
            row[1:],
            [(role, metric) for role in ("train", "unseen") for metric in ("recall@10", "ndcg@10")],
            strict=True,
        ):
            rows = results_frame(folder, strategy=strategy, role=role, metric=metric, split="test", variant="unmasked")
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
                told = (
                    f"significantly {better} than average" if compared["significant"] else "not told apart from average"
                )
                assert told in cell
    assert "★" in table[3][1]  # mergerec; the backbone is for reference
    assert "chosen: 0.5, 0.6, 0.7" in table[3][0]
    assert ["reference" in row[0] for row in table[1:]] == [True, False, False]


def test_other_tables_say_what_the_parquet_tables_say(folder: Path, capsys: Capsys) -> None:
    output(capsys, "report", folder)
    tables = parsed((folder / "report.html").read_text(encoding="utf-8")).tables
    rows = results_frame(
        folder, strategy="mergerec", left_out="", domain="coffee", metric="recall@10", split="test", variant="unmasked"
    )
    head, *_, last = tables["d0-domains-table"]
    assert f"{np.mean([row['value'] for row in rows]):.4f}" in last[head.index("coffee")]
    costs = [
        row
        for row in pq.read_table(folder / "costs.parquet").to_pylist()
        if row["strategy"] == "mergerec" and not row["left_out"]
    ]
    assert f"{np.mean([row['bytes_up'] for row in costs]) / 1e6:.1f} MB" in tables["d0-costs-table"][3]
    assert f"{np.mean([row['client_seconds'] for row in costs]):.0f} s" in tables["d0-costs-table"][3]
    assert tables["d0-costs-table"][1][-1] == "–"  # the backbone's memory is not known
    coefficients = pq.read_table(folder / "coefficients.parquet").to_pylist()
    of_layer = [
        row["value"]
        for row in coefficients
        if (row["strategy"], row["left_out"], row["domain"], row["group"]) == ("mergerec", "", "toys", "layer 3")
    ]
    heat = next(table for key, table in tables.items() if key.startswith("d0-heat-"))
    assert heat[4][4] == f"{np.mean(of_layer):.2f}".replace("-", "−")
    differences = pq.read_table(folder / "comparisons.parquet").to_pylist()
    shown = [row for row in differences if row["variant"] == "unmasked" and row["metric"] in dataset.HEADLINE]
    assert len(tables["d0-differences-table"]) == 1 + len(shown)
    assert f"{shown[0]['difference']:+.4f}".replace("-", "−") in tables["d0-differences-table"][1][3]


def test_the_page_of_a_run_says_what_its_tables_say(run: Path, capsys: Capsys, tmp_path: Path) -> None:
    output(capsys, "report", run, "--out", tmp_path / "page.html")
    found = parsed((tmp_path / "page.html").read_text(encoding="utf-8"))
    sums = read_metric_sums(run, "test", "unmasked")
    train = [sums[name] for name in ("books", "coffee", "toys")]
    table = {row[0]: row for row in found.tables["d0-scores-table"][1:]}
    mean = np.mean([of_domain.mean("task-arithmetic 0.5", "recall@10") for of_domain in train])
    assert f"{mean:.4f}" in table["task-arithmetic 0.5"][1]
    assert "–" in table["expertreference"][3]  # nobody trained on the unseen domain
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
    for told in ("Excluded: garden (node 7)", "To be served: task-arithmetic 0.5", "their own expert", "Experts, loss"):
        assert told in found.text
    assert found.tables["exposure-table"][1] == ["books", "321 B", "1.2 MB", "1.2 MB"]
    assert "lora.rank = 8" in found.text


def test_absent_numbers_are_dashes_and_never_the_best(bench: BenchTables) -> None:
    def without(row: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**row, "value": None} if (row["strategy"], row["seed"]) in gone else row

    gone = {("mergerec", 0), ("mergerec", 1), ("mergerec", 2), ("backbone", 2)}
    table = parsed(bench_page(replace(bench, results=[without(row) for row in bench.results]))).tables[
        "d0-scores-table"
    ]
    assert table[3][1:] == ["–"] * 4
    assert "2 of 3 seeds" in table[1][1]
    assert not any("★" in cell for row in table for cell in row)  # one is left that competes


def test_cells_that_did_not_finish_are_counted(bench: BenchTables) -> None:
    cells = [{**bench.cells[0], "status": "failed", "seconds": None, "why": "out of memory"}, *bench.cells[1:]]
    found = parsed(bench_page(replace(bench, cells=cells)))
    assert "1 did not finish" in found.text
    assert "14 of 15 cells finished" in found.text
    assert "why = out of memory" in found.text
    assert "lora.target_modules = query,value" in found.text
    assert len(found.of("details")) > len(cells)


# Pictures


def test_pictures_of_odd_data() -> None:
    assert dot_chart("t", []) == scatter_chart("t", "x", "y", []) == line_chart("t", "x", []) == ""
    assert dot_chart("t", [Dot("a", 0, None)]) == ""
    same = parsed(dot_chart("t", [Dot("a", 0, 0.5), Dot("b", 1, 0.5)], reference=0.5))
    assert all("nan" not in str(attributes) for _, attributes in same.elements)
    far = [Dot("a", 0, 0.5, 0.49, 0.51), Dot("b", 1, 0.52), Dot("popularity", 2, -40.0, -41.0, -39.0, minor=True)]
    arrows = [attributes for attributes in parsed(dot_chart("t", far)).of("path") if attributes["class"] == "arrow"]
    assert len(arrows) == 1
    for attributes in parsed(scatter_chart("t", "x", "y", [Point("a", 8, 0.0, 0.0, 0.0, None)])).of("path"):
        assert "nan" not in str(attributes)
    long = [(float(x), 1.0, 1.0, 1.0) for x in range(1000)]
    (path,) = (a for a in parsed(line_chart("t", "x", [Line("a", 1, long)])).of("path") if "line" in str(a["class"]))
    assert str(path["d"]).count("L") < charts.MOST_POINTS
    assert charts.ticks(0.0, 0.0004)[-1] == pytest.approx(0.0004)


def test_every_series_of_a_page_has_its_own_symbol() -> None:
    symbols = [str(charts.symbol(number)) for number in range(35)]
    assert len(set(symbols)) == 35
    lines = [str(charts.symbol(number, with_line=True)) for number in range(28)]
    assert len(set(lines)) == 28


def test_examples_in_docstrings() -> None:
    for module in (page, charts, statistics, bench_tables):
        assert doctest.testmod(module).failed == 0


# The command


def test_a_run_that_is_not_done_is_refused(run: Path, tmp_path: Path, capsys: Capsys) -> None:
    shutil.copytree(run, tmp_path / "runs" / RUN_ID)
    (tmp_path / "runs" / RUN_ID / "DONE").unlink()
    told = refusal(capsys, "report", RUN_ID[:6], "--dir", tmp_path / "runs")
    assert "the run is incomplete, and a report needs one that is done. Go on with it: fedmerge run --resume" in told
    assert "neither a run folder nor a run in" in refusal(capsys, "report", "nothing", "--dir", tmp_path / "runs")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("metrics.parquet", "metrics.parquet: cannot be read"),
        ("products.parquet", "products.parquet: cannot be read as a table of metrics"),
        ("exposure.parquet", "exposure.parquet: cannot be read"),
        ("adapters/toys/training.json", "training.json: damaged"),
        ("merged/average/provenance.json", "provenance.json: damaged"),
        ("environment.json", "environment.json: damaged"),
    ],
)
def test_a_damaged_run_is_refused_by_name(run: Path, tmp_path: Path, capsys: Capsys, file: str, message: str) -> None:
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / file).write_bytes(b"PAR1{")
    assert message in refusal(capsys, "report", tmp_path / "copy")
    assert not (tmp_path / "copy" / "report.html").exists()


def test_a_run_without_its_tables_is_refused(place: Place, capsys: Capsys) -> None:
    folder = make_run(place, "bare-run")  # has no products.parquet
    assert "products.parquet: not there. Give the folder of a finished run" in refusal(capsys, "report", folder)


def test_the_file_is_written_whole_or_not_at_all(folder: Path, capsys: Capsys) -> None:
    output(capsys, "report", folder)
    before = (folder / "report.html").read_bytes()
    with full_disk(10_000):
        assert "report.html cannot be written" in refusal(capsys, "report", folder)
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob(".*"))
    for out in (folder / "gone" / "x.html", folder):
        told = refusal(capsys, "report", folder, "--out", out)
        assert "expected the name of a file in a folder that is there. Give another --out." in told
