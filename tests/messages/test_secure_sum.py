"""Messages of a secure sum, and the nodes that sign and check their keys."""

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from loopback import write_identity

from fedmerge.config import from_flat
from fedmerge.errors import AggregationError, ClientError, ConfigError
from fedmerge.privacy.secagg.agreement import agreement_of
from fedmerge.privacy.secagg.client import advertise
from fedmerge.privacy.secagg.identity import read_identity, read_registered
from fedmerge.privacy.secagg.server import new_session
from sim.app.client.secure_sum import answer_advertise, answer_share, remember_values
from sim.app.messages import secure_sum as secure_records

TRAIN = ("beauty", "books", "camping", "coffee")


def test_messages_of_another_form_are_refused() -> None:
    result = secure_records.boxes_record({"a": b"1", "b": b"2"})
    assert secure_records.read_boxes(result) == {"a": b"1", "b": b"2"}
    facts = result.config_records["facts"]
    for wrong in ({"clients": ["a"]}, {"clients": ["a", "a"]}, {"boxes": ["1", "2"]}, {"boxes": b"12"}):
        spoiled = secure_records.boxes_record({"a": b"1", "b": b"2"})
        spoiled.config_records["facts"].update(wrong)
        with pytest.raises(ClientError, match=r"clients|boxes"):
            secure_records.read_boxes(spoiled)
    assert json.dumps(list(facts)) == '["clients", "boxes"]'
    for read in (secure_records.read_session, secure_records.read_advertisement, secure_records.read_revealed):
        with pytest.raises(ClientError):
            read(result)
    with pytest.raises(ClientError, match=r"\['facts'\]"):
        secure_records.read_masked(result)
    with pytest.raises(ClientError, match=r"'facts'.*\['masked'\]"):
        secure_records.read_boxes(secure_records.masked_record(np.zeros(3, np.uint32)))


def test_nodes_with_registered_keys_refuse_keys_that_are_not_signed(tmp_path: Path) -> None:
    hidden = {"privacy.policy": "aggregate-only", "merge.methods": "average"}
    config = from_flat({**hidden, "domains.train": ",".join(TRAIN)})
    session = new_session(dict.fromkeys(TRAIN, 1.0), 4, 8.0, agreement=agreement_of(config, 0))
    (tmp_path / "peers").mkdir()
    contexts, keys = {}, {}
    for number, name in enumerate(TRAIN):
        write_identity(tmp_path / name, tmp_path / "peers" / f"{name}.pub")
        node: dict[str, bool | float | str] = {
            "identity-key": str(tmp_path / name),
            "peer-keys": str(tmp_path / "peers"),
        }
        contexts[name] = Context(1, number, node, RecordDict(), {})
        remember_values(contexts[name], "", "", 0, 20)
        answer = answer_advertise(name, config, secure_records.session_record(session), contexts[name])
        keys[name] = secure_records.read_advertisement(answer)
    result = secure_records.advertisements_record(keys)
    boxes = secure_records.read_boxes(answer_share(result, contexts["beauty"]))
    assert sorted(boxes) == ["books", "camping", "coffee"]
    forged = advertise(session, "coffee")[1]  # forged by a relaying server
    with pytest.raises(AggregationError, match="coffee"):
        answer_share(secure_records.advertisements_record({**keys, "coffee": forged}), contexts["books"])

    with pytest.raises(ClientError, match=r"nowhere: .*NAME\.pub"):
        read_registered(tmp_path / "nowhere")
    (tmp_path / "peers" / "toys.pub").write_text("ssh-rsa AAAA")
    with pytest.raises(ClientError, match=r"toys\.pub: .*ssh-keygen -t ed25519"):
        read_registered(tmp_path / "peers")
    with pytest.raises(ClientError, match=r"nowhere: .*Ed25519"):
        read_identity(tmp_path / "nowhere")
    (tmp_path / "peers" / "toys.pub").chmod(0o600)
    with pytest.raises(ClientError, match=r"toys\.pub: .*Ed25519"):
        read_identity(tmp_path / "peers" / "toys.pub")
    (tmp_path / "books").chmod(0o644)
    with pytest.raises(ConfigError, match=r"chmod 600 .*books$"):
        read_identity(tmp_path / "books")
    with pytest.raises(ClientError):
        answer_share(result, Context(1, 9, {}, RecordDict(), {}))
