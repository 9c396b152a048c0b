"""Signed answers: what is signed, whose signature counts, and what the ledger keeps of it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from in_process import small_experiment

from fedmerge.config import ExperimentConfig
from fedmerge.errors import ClientError, ConfigError
from fedmerge.privacy.signatures import (
    RegisteredKey,
    Signature,
    find_client_keys,
    fingerprint,
    key_comment,
    read_registered_keys,
    sign,
    signer,
    statement,
)
from sim.app.messages import records
from sim.local.in_process import Answer, answer_honestly, run_in_process

DOMAINS = ("beauty", "books", "coffee", "camping")
BAD = "coffee"
STATED = statement(7, "a-message", "ab" * 32)


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def public(key: Any) -> str:
    return str(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())


def test_a_signature_tells_who_signed(key: ec.EllipticCurvePrivateKey) -> None:
    signature = sign(key, STATED)
    assert signature.key == public(key)
    assert signer(signature, STATED) == fingerprint(key.public_key())


@pytest.mark.parametrize("other", [(8, "a-message", "ab" * 32), (7, "another", "ab" * 32), (7, "a-message", "cd" * 32)])
def test_a_signature_is_of_one_answer_in_one_run(key: ec.EllipticCurvePrivateKey, other: tuple[int, str, str]) -> None:
    with pytest.raises(ClientError, match=r"[0-9a-f]{64}"):
        signer(sign(key, STATED), statement(*other))


def test_what_is_no_signature_is_refused(key: ec.EllipticCurvePrivateKey) -> None:
    for data in (b"", b"garbage", b"\0" * 10_000):
        with pytest.raises(ClientError, match=r"[0-9a-f]{64}"):
            signer(Signature(public(key), data), STATED)
    edwards = ed25519.Ed25519PrivateKey.generate()
    for line in ("", "garbage", public(edwards), "x" * 10_000, "ecdsa-sha2-nistp384 AAAA"):
        with pytest.raises(ClientError, match="ECDSA"):
            signer(Signature(line, b""), STATED)


def test_registered_keys_are_read_by_name(key: ec.EllipticCurvePrivateKey, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server.client_keys = .*\*.pub"):
        read_registered_keys(tmp_path)
    (tmp_path / "north.pub").write_text(f"{public(key)} north\n")
    assert read_registered_keys(tmp_path) == {fingerprint(key.public_key()): RegisteredKey("north", None)}
    (tmp_path / "north.pub").write_text(f"{public(key)} {key_comment('north', 'books')}\n")
    assert read_registered_keys(tmp_path) == {fingerprint(key.public_key()): RegisteredKey("north", "books")}
    (tmp_path / "south.pub").write_text("garbage")
    with pytest.raises(ConfigError, match=r"south.pub"):
        read_registered_keys(tmp_path)


# The hash of what is sent


def content() -> RecordDict:
    return RecordDict(
        {
            "adapter": ArrayRecord({"a": Array(np.arange(6, dtype=np.float32).reshape(2, 3))}),
            "facts": ConfigRecord({"report": "{}", "n": 3, "x": 0.1, "flag": True, "raw": b"ab", "list": [1, 2]}),
        }
    )


def test_the_hash_survives_the_way_and_leaves_the_signature_out(key: ec.EllipticCurvePrivateKey) -> None:
    sent = content()
    sha256 = records.content_sha256(sent)
    signature = sign(key, STATED)
    records.add_signature(sent, signature)
    came = recorddict_from_proto(ProtoRecordDict.FromString(recorddict_to_proto(sent).SerializeToString()))
    assert records.content_sha256(came) == sha256
    assert records.read_signature(came) == signature
    assert records.read_signature(content()) is None


@pytest.mark.parametrize(
    ("record", "name", "value"),
    [
        ("facts", "n", 4),
        ("facts", "n", 3.0),
        ("facts", "flag", False),
        ("facts", "raw", b"ac"),
        ("facts", "more", 1),
        ("adapter", "a", Array(np.arange(1, 7, dtype=np.float32).reshape(2, 3))),
        ("adapter", "a", Array(np.arange(6, dtype=np.float32).reshape(3, 2))),
        ("adapter", "b", Array(np.zeros(1, np.float32))),
    ],
)
def test_every_change_changes_the_hash(record: str, name: str, value: Any) -> None:
    changed = content()
    changed[record][name] = value
    assert records.content_sha256(changed) != records.content_sha256(content())


# In a run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains, backbone, and a key for each client."""
    place = tmp_path_factory.mktemp("place")
    (place / "keys").mkdir()
    for name in (*DOMAINS, "stranger"):
        made = ec.generate_private_key(ec.SECP384R1())
        (place / name).touch(mode=0o600)
        (place / name).write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        if name != "stranger":
            (place / "keys" / f"org-{name}.pub").write_text(public(made))
    return place


def experiment(place: Path, tmp_path: Path, **changes: object) -> ExperimentConfig:
    return small_experiment(place, **{"output_dir": str(tmp_path), "merge.methods": "average", **changes})


def signing(
    place: Path,
    key_of: Callable[[str], str | None] = lambda domain: domain,
    change: Callable[[Message], object] = lambda reply: None,
) -> Answer:
    """Every client signs with its key; the bad one's trained adapter is changed afterwards."""

    def answer(message: Message, context: Context) -> Message | None:
        domain = DOMAINS[int(context.node_config["partition-id"])]
        context.node_config.pop("key-path", None)
        if key := key_of(f"{domain} {message.metadata.message_type}".removesuffix(" query.describe")):
            context.node_config["key-path"] = str(place / key.split()[0])
        reply = answer_honestly(message, context)
        assert reply is not None
        if domain == BAD and message.metadata.message_type == "train":
            change(reply)
        return reply

    return answer


def ledger(tmp_path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(tmp_path / "run" / "exposure.parquet").to_pylist())


def test_the_ledger_says_who_signed_what(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path, **{"server.client_keys": str(place / "keys")}), signing(place))
    rows = ledger(tmp_path)
    assert {(row["domain"], row["signed_by"]) for row in rows} == {(name, f"org-{name}") for name in DOMAINS}
    assert {len(row["sha256"]) for row in rows} == {64}
    assert all(len(bytes.fromhex(row["signature"])) > 90 for row in rows)
    of_message = {(row["domain"], row["message"], row["split"]): row["signature"] for row in rows}
    assert len(set(of_message.values())) == len(of_message)


def test_without_known_keys_the_ledger_has_their_fingerprints(place: Path, tmp_path: Path) -> None:
    run_in_process(
        experiment(place, tmp_path), signing(place, lambda result: result if result.startswith(BAD) else None)
    )
    signed = {(row["domain"], row["signed_by"]) for row in ledger(tmp_path)}
    known = {key.name: sha256 for sha256, key in read_registered_keys(place / "keys").items()}
    assert signed == {(name, known[f"org-{BAD}"] if name == BAD else "") for name in DOMAINS}


def changed_value(reply: Message) -> None:
    arrays = {name: array.numpy().copy() for name, array in reply.content.array_records["adapter"].items()}
    arrays[sorted(arrays)[0]][0, 0] += 1
    reply.content["adapter"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})


CASES: dict[str, tuple[Callable[[str], str | None], Callable[[Message], object], str, str]] = {
    "changed on the way": (
        lambda result: result,
        changed_value,
        "train",
        "the key [0-9a-f]{64} ",
    ),
    "not signed": (
        lambda result: None if result == f"{BAD} train" else result,
        lambda reply: None,
        "train",
        "it is not signed; expected one of the keys in server.client_keys",
    ),
    "never signed": (
        lambda result: None if result.startswith(BAD) else result,
        lambda reply: None,
        "gather",
        "it is not signed; expected one of the keys",
    ),
    "a stranger's key": (
        lambda result: "stranger" if result.startswith(BAD) else result,
        lambda reply: None,
        "gather",
        "it is signed by the key [0-9a-f]{64}, which is not in server.client_keys",
    ),
    "another's key": (
        lambda result: "books" if result == f"{BAD} train" else result,
        lambda reply: None,
        "train",
        "[0-9a-f]{64}.*[0-9a-f]{64}",
    ),
}


@pytest.mark.parametrize(
    ("of_coffee", "of_camping", "reason"),
    [
        ("toys", "camping", "(org-coffee) is registered for 'toys'"),
        (
            None,
            "coffee",
            "org-camping is registered for it",
        ),
    ],
)
def test_a_key_registered_for_one_domain_speaks_for_no_other(
    place: Path, tmp_path: Path, of_coffee: str | None, of_camping: str, reason: str
) -> None:
    (tmp_path / "keys").mkdir()
    for name, domain in zip(DOMAINS, ("beauty", "books", of_coffee, of_camping), strict=True):
        line = (place / "keys" / f"org-{name}.pub").read_text()
        (tmp_path / "keys" / f"org-{name}.pub").write_text(f"{line} {key_comment(f'org-{name}', domain)}\n")
    run_in_process(experiment(place, tmp_path, **{"server.client_keys": str(tmp_path / "keys")}), signing(place))
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    assert reason in next(found for name, found in clients["excluded"].items() if name.startswith(BAD))
    assert BAD not in clients["participants"]


@pytest.mark.parametrize("case", CASES)
def test_an_answer_that_its_client_has_not_signed_is_refused(place: Path, tmp_path: Path, case: str) -> None:
    key_of, change, phase, message = CASES[case]
    config = experiment(place, tmp_path, **{"server.client_keys": str(place / "keys")})
    run_in_process(config, signing(place, key_of, change))
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    ((name, reason),) = clients["excluded"].items()
    assert clients["excluded_in_phase"][name] == phase
    assert name == BAD or phase == "gather"
    assert BAD not in clients["participants"]
    assert re.search(message, reason), reason
    refused = [row for row in ledger(tmp_path) if row["domain"] == name and row["message"] != "query.describe"]
    assert {row["signed_by"] for row in refused} <= {""}


def test_between_machines_names_are_bound_to_keys_without_a_setting(tmp_path: Path) -> None:
    assert find_client_keys(None, True, tmp_path) is None
    assert find_client_keys("given", True, tmp_path) == find_client_keys("given", False, tmp_path) == Path("given")
    with pytest.raises(ConfigError) as caught:
        find_client_keys(None, False, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "server.client_keys" in str(caught.value)
    (tmp_path / "keys").mkdir()
    assert find_client_keys(None, False, tmp_path) == tmp_path / "keys"
