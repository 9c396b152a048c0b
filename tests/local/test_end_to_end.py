"""Whole experiments through the front door, with Flower and Ray. Five runs, each shared by what is asked of it.

first      two domains train, one is unseen, two clients at a time
alone      the same from scratch, one client at a time, domains named in another order
plain      the same as `flwr run .` does it by default: two supernodes, with the experts of the first run on disk
troubled   of five training domains one is damaged, one diverges and one sends NaN; an unseen one is too small
too_few    of two training domains one is damaged
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from backbones import tiny_bert
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.client.cache.experts import trained_expert
from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import open_domain
from fedmerge.config import ExperimentConfig, load_config, to_toml
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.demo import write_demo
from fedmerge.domain.interactions import INTERACTIONS_FILE
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.peft_folder import read_adapter, write_adapter
from fedmerge.evaluation.ranks import METRICS
from fedmerge.merging.stack import linear_merge, stack_adapters
from sim.local.launch import MARK, end_processes, flower_environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_USERS, NUM_ITEMS, NUM_FEW_USERS = 60, 40, 12  # the last is below privacy.min_users
VALIDATION_USERS = 40
CANDIDATES = ["average", "task-arithmetic 0.4", "task-arithmetic 1", "mergerec domain-wise", "mergerec layer-wise"]
LEARNED = [label.replace(" ", "-") for label in CANDIDATES if label.startswith("mergerec")]
DIVERGING, DIVERGING_WORD = "coffee", "coffee"

EXPERIMENT = f"""
name = "trial"

[backbone]
pooling = "mean"

[text]
max_attribute_tokens = 24
max_items = 3
max_tokens = 96

[lora]
rank = 2
alpha = 4

[train]
learning_rate = 0.03
batch_size = 16
max_steps = 8
warmup_steps = 1
validate_every_steps = 2

[merge]
task_arithmetic_coefficients = "0.4,1.0"

[mergerec]
granularities = "domain,layer"
steps = 3
batch_size = 8
learning_rate = 0.05

[evaluation]
validation_users = {VALIDATION_USERS}

[server]
wait_seconds = 5.0

[runtime]
device = "cpu"
precision = "float32"
threads_per_client = 1
server_threads = 1
"""

FACTS = ["domain", "role", "num_users", "num_items", "num_interactions", "synthetic", "policy"]
FACTS += ["catalog_sha256", "backbone_sha256", "precision", "fedmerge_version", "num_nodes", "layout_sha256"]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: its run folder.
        exit_code: of the command.
        output: what it printed on both streams.
        settings: key=value.
    """

    folder: Path
    exit_code: int
    output: str
    settings: list[str]

    @property
    def config(self) -> ExperimentConfig:
        """What was asked for."""
        return load_config(self.folder.parents[1] / "experiment.toml", self.settings)

    def json(self, name: str) -> Any:
        """A JSON file of the run folder."""
        return json.loads((self.folder / name).read_text())

    def table(self, name: str) -> list[dict[str, Any]]:
        """The rows of a Parquet file of the run folder."""
        rows: list[dict[str, Any]] = pq.read_table(self.folder / name).to_pylist()
        return rows

    def adapter_hashes(self) -> dict[str, str]:
        """Hash of every expert and merge."""
        folders = sorted(file.parent for file in self.folder.glob("*/*/adapter_config.json"))
        return {str(folder.relative_to(self.folder)): adapter_sha256(read_adapter(folder)) for folder in folders}

    def values(self) -> dict[tuple[str, ...], tuple[int, float]]:
        """(split, variant, domain, method, metric) -> users and sum."""
        return {
            (row["split"], row["variant"], row["domain"], row["method"], row["metric"]): (row["num_users"], row["sum"])
            for row in self.table("metrics.parquet")
        }

    def num_workers(self) -> int:
        """Client processes that said something."""
        return len(set(re.findall(r"ClientAppActor pid=(\d+)", self.output)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains, a backbone and the experiment file."""
    root = tmp_path_factory.mktemp("federation")
    write_demo(root / "domains", num_domains=8, num_users=NUM_USERS, num_items=NUM_ITEMS)
    tiny_bert(root / "backbone")
    (root / "experiment.toml").write_text(EXPERIMENT)
    return root


def run_experiment(
    place: Path, run_id: str, train: str, unseen: str, *, cache: str, domains: str, backbone: str, num_cpus: int = 2
) -> Run:
    """`fedmerge run` as a process of its own on so many CPUs."""
    settings = settings_of(place, run_id, train, unseen, cache, domains, backbone)
    cpus = sorted(os.sched_getaffinity(0))[:num_cpus]
    command = [sys.executable, "-m", "fedmerge.cli", "run", "experiment.toml", "--set", *settings]
    done = subprocess.run(
        command,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    return Run(place / "runs" / run_id, done.returncode, done.stdout, settings)


def settings_of(
    place: Path, run_id: str, train: str, unseen: str, cache: str, domains: str, backbone: str
) -> list[str]:
    """What one run has of its own, in the form of --set."""
    own = {
        "run_id": run_id,
        "output_dir": place / "runs",
        "cache_dir": place / cache,
        "backbone.source": place / backbone,
        "domains.root": place / domains,
        "domains.train": train,
        "domains.unseen": unseen,
    }
    return [f"{key}={value}" for key, value in own.items()]


@pytest.fixture(scope="module")
def first(place: Path) -> Run:
    """Two clients at a time, where there are two CPUs."""
    return run_experiment(
        place, "first", "beauty,books", "camping", cache="cache", domains="domains", backbone="backbone"
    )


@pytest.fixture(scope="module")
def alone(place: Path) -> Run:
    """One client at a time, and nothing on disk."""
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
    """`flwr run .` with nothing said about the number of supernodes; the disk is the first run's."""
    settings = settings_of(place, "plain", "beauty,books", "camping", "cache", "domains", "backbone")
    (place / "plain.toml").write_text(to_toml(load_config(place / "experiment.toml", settings)))
    scratch = Path(tempfile.mkdtemp(prefix="flwr-", dir="/tmp"))  # Ray's sockets want a short path
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


@pytest.fixture(scope="module")
def troubled(place: Path) -> Run:
    """Domains that fail in every phase, beside two that do not."""
    shutil.copytree(place / "domains", place / "troubled")
    damage(place / "troubled" / "camping" / INTERACTIONS_FILE)
    write_demo(place / "few", num_domains=8, num_users=NUM_FEW_USERS, num_items=NUM_ITEMS)
    shutil.rmtree(place / "troubled" / "toys")
    shutil.copytree(place / "few" / "toys", place / "troubled" / "toys")
    poison_word(tiny_bert(place / "poisoned-backbone"), DIVERGING_WORD)
    own = ("troubled", "beauty,books,camping,coffee,garden", "toys")
    poison_expert("garden", place, settings_of(place, *own, "cache-troubled", "troubled", "poisoned-backbone"))
    return run_experiment(place, *own, cache="cache-troubled", domains="troubled", backbone="poisoned-backbone")


@pytest.fixture(scope="module")
def too_few(place: Path) -> Run:
    """One healthy training domain, where two are asked for."""
    shutil.copytree(place / "domains", place / "halved")
    damage(place / "halved" / "camping" / INTERACTIONS_FILE)
    run = run_experiment(
        place, "too-few", "beauty,camping", "toys", cache="cache", domains="halved", backbone="backbone"
    )
    if kept := re.search(r"Flower's and Ray's logs in (/.+)$", run.output):
        shutil.rmtree(kept.group(1))
    return run


def damage(file: Path) -> None:
    """Lose the second half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def poison_word(backbone: Path, word: str) -> None:
    """Make the vector of one word NaN: whose texts hold it cannot train."""
    tensors = load_file(backbone / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][AutoTokenizer.from_pretrained(backbone).vocab[word]] = torch.nan
    save_file(tensors, backbone / "model.safetensors", metadata={"format": "pt"})


def poison_expert(name: str, place: Path, settings: list[str]) -> None:
    """Put an expert with a NaN on a client's disk, with the hash that says it is intact."""
    config = load_config(place / "experiment.toml", settings)
    domain = open_domain(Path(config.domains.root) / name, open_backbone(config), config.text)
    adapter, report = trained_expert(domain, config, lambda line: None)
    modules = dict(adapter.modules)
    broken = next(iter(modules))
    lora_B = modules[broken].lora_B.clone()
    lora_B[0, 0] = torch.nan
    modules[broken] = LoraModule(modules[broken].lora_A, lora_B, modules[broken].scaling)
    (folder,) = (Path(config.cache_dir) / "experts").glob(f"{name}-*")
    write_adapter(Adapter(modules), folder, "poisoned")
    (folder / "training.json").write_text(json.dumps({**report, "sha256": adapter_sha256(Adapter(modules))}))


def open_backbone(config: ExperimentConfig) -> Backbone:
    """The backbone of an experiment."""
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    return load_backbone(config.backbone.source, config.backbone.pooling, compute)


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


def test_a_run_ends_well_and_its_folder_is_complete(first: Run) -> None:
    assert first.exit_code == 0, first.output
    assert f"run folder: {first.folder}" in first.output.splitlines()
    files = {str(file.relative_to(first.folder)) for file in first.folder.rglob("*") if file.is_file()}
    peft = ("adapter_config.json", "adapter_model.safetensors")
    top = "config.toml environment.json lock experts.json admission.json choice.json clients.json"
    tables = "metrics.parquet products.parquet exposure.parquet"
    assert files == {
        *top.split(),
        *tables.split(),
        *("report.txt", "run.log", "DONE"),
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


def test_experts_and_merges_load_into_peft_and_say_where_they_come_from(first: Run) -> None:
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


def test_validation_chooses_and_test_is_read_for_the_chosen_only(first: Run) -> None:
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
        num_evaluations = 1 if name == "camping" else 2  # an unseen domain is asked on test only
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


def test_plain_flwr_run_says_who_is_missing_and_trains_nothing_twice(first: Run, plain: Run) -> None:
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


def test_clients_that_fail_are_left_out_by_name_and_the_others_go_on(place: Path, troubled: Run) -> None:
    holders = [
        name
        for name in ("beauty", "books", "camping", "coffee", "garden", "toys")
        if any(
            DIVERGING_WORD in re.findall(r"[a-z]+", text.lower())
            for column in load_catalog(place / "domains" / name).attributes.values()
            for text in column
        )
    ]
    assert holders == [DIVERGING]

    assert troubled.exit_code == 0, troubled.output
    clients, log = troubled.json("clients.json"), (troubled.folder / "run.log").read_text()
    assert set(clients["participants"]) == {"beauty", "books"}
    reasons = {
        "camping": r"query\.describe failed: DomainError: .*truncated or damaged",
        DIVERGING: r"train failed: DivergedError: .* NaN or infinite.*has diverged",
        "garden": r"lora_B .* 1 of \d+ values NaN or infinite, expected finite",
        "toys": rf"evaluate failed: PolicyError: .*over {NUM_FEW_USERS} users do not leave",
    }
    excluded = {key.partition(" (node ")[0]: why for key, why in clients["excluded"].items()}
    assert set(excluded) == set(reasons)
    for name, reason in reasons.items():
        assert re.search(reason, excluded[name]), excluded[name]
        assert re.search(rf"excluded: {name}( \(node \d+\))?: .*{reason}", log), log
    assert "not taking part: camping, coffee, garden, toys." in log

    assert {file.name for file in (troubled.folder / "adapters").iterdir()} == {"beauty", "books"}
    assert set(troubled.json("merged/average/provenance.json")["domains"]) == {"beauty", "books"}
    assert {key[2] for key in troubled.values()} == {"beauty", "books"}
    ledger = troubled.table("exposure.parquet")
    left = {name: {row["name"] for row in ledger if row["domain"].partition(" (node ")[0] == name} for name in reasons}
    assert left["camping"] == {"error.domain", "error.message"}
    assert left[DIVERGING] == {*(f"facts.{fact}" for fact in FACTS), "facts.catalog", "error.domain", "error.message"}
    assert left["toys"] == {*(f"facts.{fact}" for fact in FACTS), "error.domain", "error.message"}
    assert any(name.endswith("lora_B") for name in left["garden"])  # the server threw it away, but it did leave


def test_too_few_training_clients_fail_the_run_clearly(too_few: Run) -> None:
    assert too_few.exit_code == 1, too_few.output
    wanted = "1 training clients are left (beauty), server.min_train_clients is 2"
    assert wanted in too_few.output
    assert re.search(r"Excluded:\n  camping \(node \d+\): .*DomainError: .*truncated or damaged", too_few.output)
    assert f"partial results are in {too_few.folder}; resume with: " in too_few.output
    assert "run folder: " not in too_few.output.splitlines()[-1]
    assert not (too_few.folder / "DONE").exists()
    assert not (too_few.folder / "metrics.parquet").exists()
    (excluded,) = too_few.json("clients.json")["excluded"]
    assert re.fullmatch(r"camping \(node \d+\)", excluded)
    assert wanted in (too_few.folder / "run.log").read_text()
