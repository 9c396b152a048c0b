"""Exports are uploaded by the hub's own client to a hub on the loopback; what must stay is refused before anything."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hub_server import TOKEN, Hub, Repository, running_hub
from report_folders import make_reported_run
from run_folders import UNSEEN, Place, contents, make_place, make_run, output, refusal
from runs_with_heads import DOMAIN, make_run_with_heads, serve, train_head

Capsys = pytest.CaptureFixture[str]
NAME = "shops/tents"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    return make_run(place, "trial", ["merge.methods=average"])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, which the client of this process asks, with a login."""
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)  # read from HF_ENDPOINT on import
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_a_merge_is_private_by_default_and_the_repository_becomes_the_folder(
    run: Path, hub: Hub, tmp_path: Path, capsys: Capsys
) -> None:
    merge = run / "merged" / "average"
    said = output(capsys, "export", merge, tmp_path / "a", "--push", NAME)
    assert f"Uploaded to {hub.address}/{NAME}, which is private." in said
    repository = hub.repositories[NAME]
    assert repository.private
    assert files_of(tmp_path / "a") == repository.files
    assert repository.messages[0].startswith("fedmerge ")
    card = repository.files["README.md"].decode()
    assert "license:" not in card
    assert "licence: none stated" in card

    repository.files |= {"model-00001.safetensors": b"of an earlier export", ".gitattributes": b"the hub's own"}
    output(capsys, "export", merge, tmp_path / "b", "--push", NAME, "--license", "apache-2.0")
    assert repository.files.pop(".gitattributes") == b"the hub's own"
    assert files_of(tmp_path / "b") == repository.files
    assert 'license: "apache-2.0"' in repository.files["README.md"].decode()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_the_card_says_what_the_data_the_privacy_and_the_scores_are(
    place: Place, run: Path, tmp_path: Path, capsys: Capsys
) -> None:
    output(capsys, "export", run / "merged" / "average", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for wanted in (
        "All data are **generated**",
        "| books | train | about 12 | about 20 | about 1,200 |",
        f"| {UNSEEN} | unseen |",
        "The policy was `adapter+catalog`",
        "There is no differential privacy",
        "| coffee | 0.5000 |",
    ):
        assert wanted in card, wanted
    output(capsys, "export", run / "adapters" / "books", tmp_path / "expert")
    card = (tmp_path / "expert" / "README.md").read_text()
    assert "| books | 0.0250 |" in card
    assert "| coffee | 0." not in card  # the expert of coffee is another model
    reported = make_reported_run(place, "reported")
    output(capsys, "export", reported / "merged" / "average", tmp_path / "reported")
    card = (tmp_path / "reported" / "README.md").read_text()
    assert "| domain | this model | backbone | popularity | last item |" in card
    table = {row["domain"]: row["sum"] / row["num_users"] for row in measured(reported, "average")}
    better = {row["domain"]: row["sum"] / row["num_users"] for row in measured(reported, "popularity")}
    assert all(f"| {name} | {value:.4f} |" in card for name, value in table.items())
    below = [name for name, value in table.items() if value < better[name]]
    assert ("Popularity ranks better than this model in " + ", ".join(below) in card) == bool(below)
    (run / "privacy.json").write_text(json.dumps(STATEMENT))
    output(capsys, "export", run, tmp_path / "served", "--domain", run.parents[1] / "domains" / "coffee")
    (run / "privacy.json").unlink()
    card = (tmp_path / "served" / "README.md").read_text()
    assert "- books: ε = 3, δ = 1e-05 for one user added or removed, ε = 6 for one user replaced by another." in card
    assert "- Not covered: the metric sums." in card


def measured(run: Path, method: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(run / "metrics.parquet").to_pylist()
    wanted = {"split": "test", "variant": "unmasked", "metric": "ndcg@10", "method": method}
    return [row for row in rows if row.items() >= wanted.items()]


STATEMENT = {
    "unit": "user",
    "adjacency": "add-remove",
    "delta": 1e-5,
    "guarantee": True,
    "guarantee_of_run": False,
    "covers": "the adapters",
    "domains": {"books": {"epsilon": 3.0, "epsilon_replaced": 6.0}},
    "not_covered": ["the metric sums"],
}


def test_what_must_stay_is_private_only_if_that_is_said(place: Place, hub: Hub, tmp_path: Path, capsys: Capsys) -> None:
    run = make_run_with_heads(place)
    train_head(place, run)
    arguments = ("export", run, tmp_path / "out", "--domain", place.domains / DOMAIN, "--push", NAME)
    for model, why in (("head on the merge", "its head was trained on the users"), ("expert", "it is the expert of")):
        serve(run, model)
        assert f"{why} {'of ' * (model != 'expert')}{DOMAIN}" in refusal(capsys, *arguments)
        assert "It cannot be public" in refusal(capsys, *arguments, "--public", "--license", "mit")
        assert not (tmp_path / "out").exists()
    assert hub.changes == []
    said = output(capsys, *arguments, "--private")
    assert "keep the folder within the organisation" in said
    assert hub.repositories[NAME].private
    expert = ("export", run / "adapters" / DOMAIN, tmp_path / "expert", "--push", NAME, "--public", "--license", "mit")
    assert f"it is the expert of {DOMAIN} alone" in refusal(capsys, *expert)


def test_item_texts_of_a_catalog_that_is_not_public_stay(
    place: Place, hub: Hub, tmp_path: Path, capsys: Capsys
) -> None:
    run = make_run_with_heads(place, "shared", "federated")
    serve(run, "federated head")
    manifest = place.domains / DOMAIN / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(before), "public_catalog": False}))
    try:
        arguments = ("export", run, tmp_path / "out", "--domain", place.domains / DOMAIN, "--push", NAME)
        assert "catalog is not public" in refusal(capsys, *arguments)
    finally:
        manifest.write_text(before)
    output(capsys, *arguments, "--public", "--license", "mit")
    assert not hub.repositories[NAME].private


def test_refusals_come_before_anything_is_written(
    run: Path, hub: Hub, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories |= {
        "shops/open": Repository(False),
        "shops/other": Repository(True, {"config.json": b"{}"}),
        "shops/closed": Repository(True, {"provenance.json": b"{}"}),
    }

    def refused(*more: str) -> str:
        message = refusal(capsys, "export", run / "merged" / "average", tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()
        return message

    assert "exists and is public" in refused("--push", "shops/open")
    assert "something other than an export" in refused("--push", "shops/other")
    assert "exists and is private" in refused("--push", "shops/closed", "--public", "--license", "mit")
    assert "--public without a licence" in refused("--push", NAME, "--public")
    assert "without --push" in refused("--private")
    assert "Check the name" in refused("--push", "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert "the hub does not know you" in refused("--push", NAME)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "hf auth login" in refused("--push", NAME)
    assert hub.changes == []


def test_a_failing_upload_leaves_the_folder_and_names_the_command(
    run: Path, hub: Hub, tmp_path: Path, capsys: Capsys
) -> None:
    hub.refuse_commits = True
    from fedmerge.cli import main  # noqa: PLC0415

    assert main(["export", str(run / "merged" / "average"), str(tmp_path / "out"), "--push", NAME]) == 1
    assert f"hf upload {NAME} {tmp_path / 'out'}" in capsys.readouterr().err
    assert "README.md" in contents(tmp_path / "out")
