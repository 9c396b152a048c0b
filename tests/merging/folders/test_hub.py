"""Adapters of the hub as sources: the hub's own client against a hub on the loopback, and its cache without one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapters import random_adapter
from hub_server import COMMIT, TOKEN, Hub, Repository, running_hub
from run_folders import output, refusal

from fedmerge.encoder.peft.folder import write_adapter

Capsys = pytest.CaptureFixture[str]
MERGE = ("merge", "--method", "average")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def local(tmp_path: Path) -> Path:
    for seed, name in enumerate(("law", "medicine")):
        write_adapter(random_adapter({"layers.0.q": (6, 5)}, 2, 1.5, seed), tmp_path / name, "base")
    return tmp_path


@pytest.fixture
def hub(local: Path) -> Iterator[Hub]:
    """A hub with the second adapter, beside files that nobody asks for."""
    with running_hub() as running:
        others = {"README.md": b"---\n---\n", "optimizer.pt": b"pickled", "adapter_model.bin": b"pickled"}
        running.repositories["org/medicine"] = Repository(False, {**files_of(local / "medicine"), **others})
        yield running


def ask(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Set what the hub's client reads from HF_ENDPOINT when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def cache(hub: Hub, local: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this process's client, which asks the hub."""
    ask(monkeypatch, hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(local / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return local / "cache"


@pytest.mark.long
def test_only_the_files_of_an_adapter_are_fetched_from_hf_endpoint(hub: Hub, local: Path) -> None:
    fetch = "from fedmerge.encoder.peft.hub import *; print(*fetch_adapter(hub_adapter('org/medicine@main')))"
    variables = {"HF_ENDPOINT": hub.address, "HF_HOME": str(local / "home"), "HF_HUB_DISABLE_XET": "1"}
    printed = subprocess.check_output([sys.executable, "-c", fetch], env={**os.environ, **variables}, text=True)
    folder, commit = printed.split()
    assert commit == COMMIT
    assert files_of(Path(folder)) == files_of(local / "medicine")


def test_an_adapter_of_the_hub_is_merged_as_a_folder_is(
    cache: Path, local: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(local)
    output(capsys, *MERGE, "--out", "expected", "law", "medicine")
    output(capsys, *MERGE, "--out", "found", "law", "org/medicine@main")
    found, expected = (files_of(local / name) for name in ("found", "expected"))
    made = json.loads(found.pop("provenance.json"))
    assert made.pop("hub") == {"medicine": {"repository": "org/medicine", "revision": "main", "commit": COMMIT}}
    assert made == json.loads(expected.pop("provenance.json"))
    assert found == expected


def test_what_was_fetched_is_found_without_the_hub(
    hub: Hub, cache: Path, local: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(local)
    output(capsys, *MERGE, "--out", "a", "law", "m=org/medicine@main")
    hub.repositories.clear()
    output(capsys, *MERGE, "--out", "b", "law", f"m=org/medicine@{COMMIT}")
    ask(monkeypatch, "http://127.0.0.1:9")  # nobody listens
    output(capsys, *MERGE, "--out", "c", "law", "m=org/medicine@main")
    hashes = [json.loads((local / out / "provenance.json").read_text())["sha256"] for out in "abc"]
    assert len({*hashes}) == 1
    refused = refusal(capsys, *MERGE, "--out", "no", "law", "org/history@main")
    assert "org/history@main: the hub cannot be reached" in refused


def test_what_the_hub_lacks_or_hides_is_refused_by_its_name(
    hub: Hub, cache: Path, local: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(local)
    hub.repositories["org/model"] = Repository(False, {"adapter_model.safetensors": b"", "config.json": b"{}"})
    files = hub.repositories["org/medicine"].files
    hub.repositories |= {"org/secret": Repository(True, files), "org/hidden": Repository(True, files)}
    hub.repositories["org/gated"] = Repository(False, files, gated=True)
    output(capsys, *MERGE, "--out", "private", "law", "org/secret@main")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    for source, said in {
        "org/nothing@main": "no such repository, or a private one",
        "org/hidden@main": "no such repository, or a private one",
        "org/medicine@v9": "no such revision",
        "org/gated@main": "gives it only to those whom its owner admits",
        "org/model@main": "no adapter_config.json there",
    }.items():
        refused = refusal(capsys, *MERGE, "--out", "no", "law", source)
        assert f"adapter {source}: " in refused
        assert said in refused
    assert not (local / "no").exists()
