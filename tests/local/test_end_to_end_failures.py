"""Whole experiments in which clients fail, with Flower and Ray.

troubled   of five training domains one is damaged, one diverges and one sends NaN; an unseen one is too small
too_few    of two training domains one is damaged
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from backbones import tiny_bert
from flower_runs import (
    FACTS,
    NUM_ITEMS,
    Run,
    open_backbone,
    run_experiment,
    settings_of,
    write_place,
)
from in_process import expert_of
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.client.local_domain import open_domain
from fedmerge.config import load_config
from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.demo import write_demo
from fedmerge.domain.interactions import INTERACTIONS_FILE
from fedmerge.encoder.peft.folder import write_adapter

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NUM_FEW_USERS = 12  # below privacy.min_users
DIVERGING, DIVERGING_WORD = "coffee", "coffee"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="module")
def troubled(place: Path) -> Run:
    """Two healthy domains, and others that fail in each phase."""
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
    """One healthy training domain where two are required."""
    shutil.copytree(place / "domains", place / "halved")
    damage(place / "halved" / "camping" / INTERACTIONS_FILE)
    run = run_experiment(
        place, "too-few", "beauty,camping", "toys", cache="cache", domains="halved", backbone="backbone"
    )
    if kept := re.search(r"Ray's logs are in (/.+)$", run.output, re.MULTILINE):
        shutil.rmtree(kept.group(1))
    return run


def damage(file: Path) -> None:
    """Cut off the second half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def poison_word(backbone: Path, word: str) -> None:
    """Make the vector of one word NaN, so that domains with this word cannot train."""
    tensors = load_file(backbone / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][AutoTokenizer.from_pretrained(backbone).vocab[word]] = torch.nan
    save_file(tensors, backbone / "model.safetensors", metadata={"format": "pt"})


def poison_expert(name: str, place: Path, settings: list[str]) -> None:
    """Put an expert with a NaN into a client's cache, with a matching hash."""
    config = load_config(place / "experiment.toml", settings)
    domain = open_domain(Path(config.domains.root) / name, open_backbone(config), config.text)
    adapter, report = expert_of(domain, config, lambda line: None)
    modules = dict(adapter.modules)
    broken = next(iter(modules))
    lora_B = modules[broken].lora_B.clone()
    lora_B[0, 0] = torch.nan
    modules[broken] = LoraModule(modules[broken].lora_A, lora_B, modules[broken].scaling)
    (folder,) = (Path(config.cache_dir) / "experts").glob(f"{name}-*")
    write_adapter(Adapter(modules), folder, "poisoned")
    (folder / "training.json").write_text(json.dumps({**report, "sha256": adapter_sha256(Adapter(modules))}))


def test_clients_that_fail_are_excluded_by_name_and_the_run_continues(place: Path, troubled: Run) -> None:
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
    assert any(name.endswith("lora_B") for name in left["garden"])  # the server discarded it, but it left the client


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
