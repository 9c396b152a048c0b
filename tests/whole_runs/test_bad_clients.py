"""A misbehaving client is reported, recorded and excluded; the run continues with the others."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from bad_answers import BAD, DOMAINS, Change, bad_client, cut, experiment, garbage, of_adapter, too_much
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from fedmerge import __version__
from fedmerge.errors import ClientError
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation


def raises(question: Message, honest: Message) -> Message:
    return Message(Error(code=1, reason="ValueError: it raised"), reply_to=question)


def too_many_entries(question: Message, honest: Message) -> Message:
    honest.content["more"] = ConfigRecord({f"entry {i}": i for i in range(200_000)})
    return honest


def put(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        name = sorted(arrays)[0]
        arrays[name] = arrays[name].copy()
        arrays[name][0, 0] = value

    return change


def rename(arrays: dict[str, np.ndarray]) -> None:
    arrays["elsewhere.lora_A"] = arrays.pop(sorted(arrays)[0])


def in_float64(arrays: dict[str, np.ndarray]) -> None:
    name = sorted(arrays)[0]
    arrays[name] = arrays[name].astype(np.float64)


def none(values: Any) -> Any:
    return np.zeros_like(values).tolist()


def of_sums(change: Callable[[dict[str, Any]], Any]) -> Change:
    def changed(question: Message, honest: Message) -> Message:
        facts = honest.content.config_records["facts"]
        for variant in ("unmasked", "masked"):
            content = json.loads(str(facts[variant]))
            change(content)
            facts[variant] = json.dumps(content)
        return honest

    return changed


def of_description(**changes: Any) -> Change:
    def changed(question: Message, honest: Message) -> Message:
        facts = {**honest.content.config_records["facts"], **changes}
        return Message(RecordDict({"facts": ConfigRecord(facts)}), reply_to=question)

    return changed


CASES: dict[str, tuple[str, Change, str, str]] = {
    "raises": ("train", raises, "train", r"train failed: ValueError: it raised \(Flower error 1\)"),
    "garbage": ("train", garbage, "train", r"ClientError: its message has no record 'facts'"),
    "too much": ("train", too_much, "train", r"it takes 8,\d{3},\d{3} bytes, at most 1,\d{3},\d{3} are expected"),
    "too many entries": ("train", too_many_entries, "train", r"it takes \d,\d{3},\d{3} bytes, at most"),
    "NaN": ("train", of_adapter(put(np.nan)), "train", r"1 of 64 values NaN or infinite"),
    "infinite": ("train", of_adapter(put(-np.inf)), "train", r"1 of 64 values NaN or infinite"),
    "huge": ("train", of_adapter(put(1e30)), "train", r"holds a value of 1e\+30, expected at most 10000"),
    "names": ("train", of_adapter(rename), "train", r"tensors do not match its modules: .*elsewhere\.lora_A"),
    "shapes": ("train", of_adapter(cut), "train", r"LayoutMismatchError: domain coffee: module .* expected"),
    "dtypes": ("train", of_adapter(in_float64), "train", r"is float64 of shape \(2, 32\), expected a float32 matrix"),
    "garbage as a description": ("query.describe", garbage, "gather", r"has no record 'facts'"),
    "wrong domain": (
        "query.describe",
        of_description(domain="shoes"),
        "gather",
        r"'shoes' \(train\)",
    ),
    "a domain that is taken": (
        "query.describe",
        of_description(domain="beauty"),
        "gather",
        "already is beauty",
    ),
    "another backbone": (
        "query.describe",
        of_description(backbone_sha256="0" * 64),
        "gather",
        "backbone is 0{64}",
    ),
    "another version": (
        "query.describe",
        of_description(fedmerge_version="0.0.0"),
        "gather",
        rf"version is 0\.0\.0, .* {re.escape(__version__)};",
    ),
    "another precision": (
        "query.describe",
        of_description(precision="bfloat16"),
        "gather",
        r"precision is bfloat16, .* float32; .*runtime\.precision",
    ),
    "another layout": (
        "query.describe",
        of_description(layout_sha256="0" * 64),
        "gather",
        "LoRA layout is 0{64}, .* [0-9a-f]{64};",
    ),
    "other attributes": (
        "query.describe",
        of_description(attributes="title,colour=8"),
        "gather",
        r"template of item texts is title,colour=8, .* title,brand,category; .*domains\.attributes",
    ),
    "no users": (
        "query.describe",
        of_description(num_users=0),
        "gather",
        " 0 users",
    ),
    "another policy": (
        "query.describe",
        of_description(policy="adapter"),
        "gather",
        r"policy is adapter, .* adapter\+catalog; .*privacy\.policy",
    ),
    "sums of other models": (
        "evaluate",
        of_sums(lambda content: content.update(methods=["expert", "mine"])),
        "validation",
        r"domain coffee: its metric sums lack \['average'\]",
    ),
    "more than all users": (
        "evaluate",
        of_sums(lambda content: content.update(num_users=31)),
        "validation",
        r"domain coffee: .* 31 users, .* 30\.",
    ),
    "fewer than enough users": (
        "evaluate",
        of_sums(
            lambda content: content.update(num_users=19, **{name: none(content[name]) for name in ("sums", "products")})
        ),
        "validation",
        r"are over 19 users, fewer than privacy\.min_users \(20\)",
    ),
    "outcomes beyond 1": (
        "evaluate",
        of_sums(lambda content: content.update(sums=[[100.0] * len(row) for row in content["sums"]])),
        "validation",
        r"its metric sums run from 100 to 100, expected 0 to 30",
    ),
    "products beyond 1": (
        "evaluate",
        of_sums(lambda content: content.update(products=np.full_like(content["products"], 100.0).tolist())),
        "validation",
        r"domain coffee: its unmasked products of outcomes exceed 30",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_client_is_reported_recorded_and_excluded(
    place: Path, tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    message_type, change, phase, reason = CASES[case]
    run_in_process(experiment(place, tmp_path), bad_client(message_type, change))
    run = tmp_path / "run"
    clients = json.loads((run / "clients.json").read_text())
    ((name, content),) = clients["excluded"].items()
    assert BAD in name or phase == "gather"
    assert clients["excluded_in_phase"] == {name: phase}
    assert BAD not in clients["participants"]
    assert re.search(reason, content), content
    assert name in (run / "report.txt").read_text()
    assert f"excluded: {name}: " in (run / "run.log").read_text()
    merged = json.loads((run / "merged/average/provenance.json").read_text())["domains"]
    assert set(merged) == {"beauty", "books"} | ({BAD} if phase == "validation" else set())
    assert {row["domain"] for row in pq.read_table(run / "metrics.parquet").to_pylist()} == set(DOMAINS) - {BAD}
    assert (run / "DONE").exists()


def test_a_training_domain_that_fails_in_evaluation_stays_merged_and_is_reported(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path), bad_client("evaluate", raises, split="test"))
    run = tmp_path / "run"
    merged = json.loads((run / "merged/average/provenance.json").read_text())["domains"]
    assert set(merged) == {"beauty", "books", BAD}
    assert set(json.loads((run / "choice.json").read_text())["domains"]) == {
        "beauty",
        "books",
        BAD,
    }  # its answer counts
    assert f"excluded, but its expert is still merged: {BAD}: evaluate failed: " in (run / "report.txt").read_text()
    rows = pq.read_table(run / "metrics.parquet").to_pylist()
    assert {row["domain"] for row in rows if row["split"] == "test"} == set(DOMAINS) - {BAD}
    assert {row["domain"] for row in rows if row["split"] == "valid"} == {"beauty", "books", BAD}


def test_long_lists_are_shortened(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path), bad_client("train", too_many_entries))
    rows = pq.read_table(tmp_path / "run" / "exposure.parquet").to_pylist()
    (row,) = (row for row in rows if row["domain"] == BAD and row["message"] == "train")
    assert row["name"] == "(too much)"
    assert row["size_bytes"] > 1_000_000


def test_a_sent_error_never_names_a_folder_of_the_client(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "cache", tmp_path / "own cache")

    def answer(message: Message, context: Context) -> Message | list[Message] | None:
        if DOMAINS[int(context.node_config["partition-id"])] == BAD and message.metadata.message_type == "evaluate":
            shutil.rmtree(tmp_path / "own cache" / "experts")
        return answer_honestly(message, context)

    changes = {"cache_dir": str(tmp_path / "own cache"), "server.min_train_clients": 1}
    with pytest.raises(ClientError):  # no expert remains
        run_in_process(experiment(place, tmp_path, **changes), answer)
    content = (tmp_path / "run" / "clients.json").read_text()
    reason = json.loads(content)["excluded"][BAD]
    assert re.fullmatch(
        r"evaluate failed: ClientError: domain coffee: its expert [0-9a-f]{12} is not in …/coffee-[0-9a-f]{16}\. "
        "Keep cache_dir between training and evaluation\\.",
        reason,
    )
    assert "cache/" not in content
    assert str(tmp_path) not in content


def test_the_ledger_contains_the_split(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path))
    rows = pq.read_table(tmp_path / "run" / "exposure.parquet").to_pylist()
    found = {(row["domain"], row["message"], row["split"], row["late"]) for row in rows}
    trained = {(domain, "train", "", False) for domain in DOMAINS[:3]}
    described = {(domain, "query.describe", "", False) for domain in DOMAINS}
    validated = {(domain, "evaluate", "valid", False) for domain in DOMAINS[:3]}
    tested = {(domain, "evaluate", "test", False) for domain in DOMAINS}
    assert found == trained | described | validated | tested
