"""Whole experiments through `fedmerge run` and `flwr run`, with Flower and Ray. Tests share three runs.

first      two domains train, one is unseen, two clients at a time
alone      the same from scratch, one client at a time, domains named in another order
plain      `flwr run .` with its defaults: two supernodes; the experts of the first run are cached
"""

import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flower_runs import FACTS, NUM_USERS, VALIDATION_USERS, Run, open_backbone, run_experiment, settings_of, write_place
from peft import PeftModel
from transformers import AutoModel

from fedmerge.adapter import adapter_sha256
from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import open_domain
from fedmerge.config import load_config, to_toml
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.evaluation.ranks import METRICS
from fedmerge.merging.stack import linear_merge, stack_adapters
from sim.local.launch import MARK, end_processes, flower_environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).resolve().parents[2]
CANDIDATES = ["average", "task-arithmetic 0.4", "task-arithmetic 1", "mergerec domain-wise", "mergerec layer-wise"]
LEARNED = [label.replace(" ", "-") for label in CANDIDATES if label.startswith("mergerec")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="module")
def first(place: Path) -> Run:
    """Two clients at a time if there are two CPUs."""
    return run_experiment(
        place, "first", "beauty,books", "camping", cache="cache", domains="domains", backbone="backbone"
    )


@pytest.fixture(scope="module")
def alone(place: Path) -> Run:
    """One client at a time, nothing cached."""
    return run_experiment(
        place,
        "alone",
        "books,beauty",
        "camping",
        cache="cache-alone",
        domains="domains",
        backbone="backbone",
        num_cpus=1,
    )


@pytest.fixture(scope="module")
def plain(place: Path, first: Run) -> Iterator[Run]:
    """`flwr run .` with its default number of supernodes and the experts that the first run cached."""
    settings = settings_of(place, "plain", "beauty,books", "camping", "cache", "domains", "backbone")
    (place / "plain.toml").write_text(to_toml(load_config(place / "experiment.toml", settings)))
    scratch = Path(tempfile.mkdtemp(prefix="flwr-", dir="/tmp"))  # Ray's sockets need a short path
    mark = secrets.token_hex(16)
    variables = flower_environment(scratch / "home", 20000 + secrets.randbelow(12000))
    try:
        done = subprocess.run(
            ["flwr", "run", ".", "--run-config", str(place / "plain.toml"), "--stream"],
            cwd=REPOSITORY,
            env=variables | {"RAY_TMPDIR": str(scratch), MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        yield Run(place / "runs" / "plain", done.returncode, done.stdout, settings)
    finally:
        end_processes(mark)
        shutil.rmtree(scratch, ignore_errors=True)


def report_cells(report: str, variant: str) -> dict[str, dict[str, list[str]]]:
    """Metric -> row of its table -> cells, from the printed results of one variant."""
    (page,) = (page for page in report.split("variant: ") if page.startswith(variant) and "difference to" not in page)
    tables: dict[str, dict[str, list[str]]] = {}
    for block in page.split("\n\n"):
        label, *_ = re.split(r"\s{2,}", block.splitlines()[0])
        if label in METRICS:
            rows = (re.split(r"\*?\s{2,}", line.rstrip("* ")) for line in block.splitlines())
            tables[label] = {row[0]: row[1:] for row in rows}
    return tables


def test_a_run_succeeds_and_its_folder_is_complete(first: Run) -> None:
    assert first.exit_code == 0, first.output
    assert f"run folder: {first.folder}" in first.output.splitlines()
    files = {str(file.relative_to(first.folder)) for file in first.folder.rglob("*") if file.is_file()}
    peft = ("adapter_config.json", "adapter_model.safetensors")
    top = "config.toml environment.json lock experts.json admission.json choice.json clients.json"
    tables = "metrics.parquet products.parquet exposure.parquet"
    assert files == {
        *top.split(),
        *tables.split(),
        *("report.txt", "report.html", "run.log", "attempts.jsonl", "DONE"),
        *(f"adapters/{domain}/{file}" for domain in ("beauty", "books") for file in (*peft, "training.json")),
        *(f"merged/{label.replace(' ', '-')}/{file}" for label in CANDIDATES for file in (*peft, "provenance.json")),
        *(f"merged/{name}/{picture}.png" for name in LEARNED for picture in ("coefficients", "losses")),
        *(f"validation/{domain}.json" for domain in ("beauty", "books")),
        *(f"test/{domain}.json" for domain in ("beauty", "books", "camping")),
    }
    assert load_config(first.folder / "config.toml") == first.config
    environment = first.json("environment.json")
    assert environment["packages"]["torch"] == torch.__version__
    assert "not installed" not in environment["packages"].values()
    clients = first.json("clients.json")
    assert {name: client["role"] for name, client in clients["participants"].items()} == {
        "beauty": "train",
        "books": "train",
        "camping": "unseen",
    }
    assert clients["excluded"] == {}


def test_experts_and_merges_load_into_peft_and_have_provenance(first: Run) -> None:
    backbone = open_backbone(first.config)
    hashes = first.adapter_hashes()
    experts = {name: read_adapter(first.folder / "adapters" / name) for name in ("beauty", "books")}
    assert all(bool(module.lora_B.any()) for expert in experts.values() for module in expert.modules.values())
    assert len(set(hashes.values())) == len(experts) + len(CANDIDATES)
    for name in experts:
        training = first.json(f"adapters/{name}/training.json")
        assert training["sha256"] == hashes[f"adapters/{name}"]
        assert not training["cached"]
        assert training["steps"] == 8
    for label in CANDIDATES:
        place = f"merged/{label.replace(' ', '-')}"
        provenance = first.json(f"{place}/provenance.json")
        assert provenance["sha256"] == hashes[place]
        assert provenance["domains"] == {name: hashes[f"adapters/{name}"] for name in experts}
        assert provenance["backbone"]["sha256"] == backbone.sha256
        coefficients = np.array([provenance["coefficients"][name] for name in sorted(experts)])
        assert adapter_sha256(linear_merge(stack_adapters(experts), coefficients)) == hashes[place]

    ids = torch.tensor([[2, 7, 8, 9, 3]])
    source = first.config.backbone.source
    for folder in (first.folder / "adapters" / "books", first.folder / "merged" / "task-arithmetic-1"):
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(source, add_pooling_layer=False), folder).eval()
        with torch.no_grad():
            found = model(input_ids=ids).last_hidden_state
            with model.disable_adapter():
                before = model(input_ids=ids).last_hidden_state
        layers = dict(AutoModel.from_pretrained(source, add_pooling_layer=False).named_modules())
        adapter = read_adapter(folder)
        merged = AutoModel.from_pretrained(source, add_pooling_layer=False).eval()
        for name, module in adapter.modules.items():
            weight = layers[name].weight + module.scaling * module.lora_B @ module.lora_A
            merged.get_submodule(name).weight.data = weight.detach()
        with torch.no_grad():
            torch.testing.assert_close(found, merged(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, before, atol=1e-5)


def test_metrics_are_those_of_the_users_and_the_report_shows_them(first: Run) -> None:
    values = first.values()
    best = first.json("choice.json")["best_variants"]
    assert list(best) == ["average", "task-arithmetic", "mergerec"]
    rows = ["backbone", "expert", *best.values(), "popularity", "last item"]
    methods = {
        "valid": {"beauty": ["expert", *CANDIDATES], "books": ["expert", *CANDIDATES]},
        "test": {"beauty": rows, "books": rows, "camping": [row for row in rows if row != "expert"]},
    }
    assert values.keys() == {
        (split, variant, domain, method, metric)
        for split, domains in methods.items()
        for domain, of_domain in domains.items()
        for variant in ("unmasked", "masked")
        for method in of_domain
        for metric in METRICS
    }
    assert {(key[0], num_users) for key, (num_users, _) in values.items()} == {
        ("valid", VALIDATION_USERS),
        ("test", NUM_USERS),
    }

    config = first.config
    domain = open_domain(Path(config.domains.root) / "camping", open_backbone(config), config.text)
    merged = read_adapter(first.folder / "merged" / best["task-arithmetic"].replace(" ", "-"))
    own = evaluate(domain, {"backbone": None, "merged": merged}, "test", None, config.seed)
    for variant, sums in own.items():
        for row, label in enumerate(("backbone", best["task-arithmetic"])):
            found = [values["test", variant, "camping", label, metric][1] for metric in METRICS]
            np.testing.assert_allclose(found, sums.sums[row], rtol=1e-9)

    for product in first.table("products.parquet"):
        if product["method"] == product["other"] and product["metric"].startswith("recall"):  # hits are 0 or 1
            key = (product["split"], product["variant"], product["domain"], product["method"], product["metric"])
            assert product["sum_of_products"] == values[key][1]

    report = (first.folder / "report.txt").read_text()
    assert "SYNTHETIC" in report
    for variant in ("unmasked", "masked"):
        tables = report_cells(report, variant)
        assert list(tables) == ["recall@10", "ndcg@10"]
        for metric, table in tables.items():
            assert table[metric] == [
                *("beauty", "books", "camping (unseen)", "mean of training (2)", "mean of unseen (1)")
            ]
            assert set(rows) <= set(table)
            for method in rows:
                means = [
                    total / num_users
                    for name in ("beauty", "books", "camping")
                    for num_users, total in [values.get(("test", variant, name, method, metric), (1, np.nan))]
                ]
                means += [(means[0] + means[1]) / 2, means[2]]
                assert table[method] == ["-" if np.isnan(mean) else f"{mean:.4f}" for mean in means]
    printed = first.output.splitlines()
    for line in filter(None, report.splitlines()):
        assert any(found.endswith(line) for found in printed), line


def test_validation_selects_and_only_selected_merges_are_evaluated_on_test(first: Run) -> None:
    choice, values = first.json("choice.json"), first.values()
    for label, score in choice["validation"].items():
        means = [values["valid", "unmasked", name, label, "ndcg@10"] for name in ("beauty", "books")]
        assert score == pytest.approx(np.mean([total / num_users for num_users, total in means]), rel=1e-12)
    scores = choice["validation"]
    assert list(scores) == CANDIDATES
    assert scores[choice["served"]] == max(scores.values())
    assert {key[3] for key in values if key[0] == "test"} & set(CANDIDATES) == set(choice["best_variants"].values())


def test_the_ledger_holds_everything_that_left_each_client_and_nothing_else(first: Run) -> None:
    ledger = first.table("exposure.parquet")
    modules = sorted(read_adapter(first.folder / "adapters" / "books").modules)
    description = {("query.describe", f"facts.{fact}") for fact in FACTS}
    sums = {("evaluate", f"facts.{variant}") for variant in ("unmasked", "masked")}
    trained = {
        ("query.catalog", "facts.catalog"),
        ("train", "facts.report"),
        *(("train", f"scalings.{module}") for module in modules),
        *(("train", f"adapter.{module}.{part}") for module in modules for part in ("lora_A", "lora_B")),
    }
    expected = {
        "beauty": description | trained | sums,
        "books": description | trained | sums,
        "camping": description | sums,
    }
    assert {row["domain"] for row in ledger} == set(expected)
    for name, entries in expected.items():
        rows = [row for row in ledger if row["domain"] == name]
        assert {(row["message"], row["name"]) for row in rows} == entries
        num_evaluations = 1 if name == "camping" else 2  # an unseen domain is evaluated on test only
        assert len(rows) == len(entries) + (num_evaluations - 1) * len(sums)

    arrays = [row for row in ledger if row["shape"]]
    assert {(row["name"].rpartition(".")[2], row["dtype"], row["shape"]) for row in arrays} == {
        ("lora_A", "float32", "2x32"),
        ("lora_B", "float32", "32x2"),
    }
    assert all(row["size_bytes"] > 0 for row in ledger if row["name"] != "facts.synthetic")
    # No value is as long as one number a user would be, catalog and sums aside.
    rest = [row for row in ledger if row["name"] not in ("facts.catalog", "facts.unmasked", "facts.masked")]
    assert all(row["size_bytes"] < 8 * NUM_USERS for row in rest if not row["shape"] and row["name"] != "facts.report")


def test_workers_and_order_change_nothing(first: Run, alone: Run) -> None:
    assert alone.exit_code == 0, alone.output
    assert alone.num_workers() == 1
    if len(os.sched_getaffinity(0)) > 1:
        assert first.num_workers() == 2
    assert alone.adapter_hashes() == first.adapter_hashes()
    assert alone.values() == first.values()
    assert sorted(map(str, alone.table("products.parquet"))) == sorted(map(str, first.table("products.parquet")))
    assert alone.json("choice.json") == first.json("choice.json")
    assert (alone.folder / "report.txt").read_text() == (first.folder / "report.txt").read_text()
    assert not any(alone.json(f"adapters/{name}/training.json")["cached"] for name in ("beauty", "books"))


def test_plain_flwr_run_names_missing_domains_and_trains_nothing_again(first: Run, plain: Run) -> None:
    assert (plain.folder / "DONE").is_file(), plain.output
    log = (plain.folder / "run.log").read_text()
    assert "2 nodes are connected, 3 domains are expected" in log
    assert "taking part: beauty, books\n" in log
    remedy = "flwr run . --federation-config 'num-supernodes=3 client-resources-num-cpus=1'"
    assert f"not taking part: camping. For all 3 domains: fedmerge run CONFIG, or {remedy}" in log
    assert set(plain.json("clients.json")["participants"]) == {"beauty", "books"}

    assert all(plain.json(f"adapters/{name}/training.json")["cached"] for name in ("beauty", "books"))
    assert plain.adapter_hashes() == first.adapter_hashes()
    assert plain.values() == {key: value for key, value in first.values().items() if key[2] != "camping"}
