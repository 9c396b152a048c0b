"""The executor of an organisation's client: settings that a run cannot decide, and work in a separate process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

import sim.machines.executor
from fedmerge.config import ExperimentConfig, from_flat, to_flat
from fedmerge.domain.demo import write_demo
from fedmerge.organisation.folder import Client, init_client, read_client
from fedmerge.privacy.client_policy import read_client_policy
from sim.app.client.app import app as client_app
from sim.app.messages import records, secure_sum
from sim.flower_internals import Fab, TaskIdentity
from sim.machines.executor import (
    check_fork,
    override_run_config,
    owner_of,
    prepare,
    prepare_for,
    read_answer,
    request_of,
)
from sim.machines.worker import Workers


@pytest.fixture
def client(tmp_path: Path) -> Client:
    write_demo(tmp_path / "domains", num_domains=2, num_users=10, num_items=20)
    init_client(tmp_path / "north", "north", tmp_path / "domains" / "beauty", threads=2, backbone="own/encoder")
    return read_client(tmp_path / "north")


def test_settings_of_client_toml_override_those_of_a_run(client: Client, tmp_path: Path) -> None:
    wanted: dict[str, str | int | float | bool] = {
        "cache_dir": "/srv/elsewhere",
        "domains.root": "/srv/other",
        "backbone.source": "evil/encoder",
        "runtime.threads_per_client": 64,
        "seed": 3,
    }
    run_config: dict[str, str | int | float | bool] = {**to_flat(ExperimentConfig()), **wanted}
    context = Context(1, 2, {"domain-path": "/elsewhere", "more": 1}, RecordDict(), run_config)
    override_run_config(context, client)
    config = from_flat(context.run_config)
    assert config.cache_dir == str(client.cache_dir)
    assert config.domains.root == str(tmp_path / "domains")
    assert (config.backbone.source, config.runtime.threads_per_client, config.seed) == ("own/encoder", 2, 3)
    assert context.node_config == {
        "domain-path": str(tmp_path / "domains" / "beauty"),
        "policy-path": str(client.folder / "policy.toml"),
        "key-path": str(client.folder / "key"),
        "disclosed-path": str(client.disclosed),
    }
    named = replace(client, identity_key=tmp_path / "identity", peer_keys=tmp_path / "peers")
    override_run_config(context, named)
    assert context.node_config["identity-key"] == str(tmp_path / "identity")
    assert context.node_config["peer-keys"] == str(tmp_path / "peers")


@pytest.fixture
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def asked(client: Client, kind: str, **settings: str | int) -> tuple[Message, Context]:
    """Return a message of run 7, and the context to answer it in."""
    content = RecordDict({"request": ConfigRecord({"text": "é", "data": b"\0\xff"})})
    message = Message(content, dst_node_id=2, message_type=kind)
    run_config: dict[str, str | int | float | bool] = {**to_flat(ExperimentConfig()), **settings}
    context = Context(7, 2, {}, RecordDict({"kept": ConfigRecord({"secret": b"\0\xff"})}), run_config)
    override_run_config(context, client)
    return message, context


@pytest.mark.usefixtures("_task")
def test_a_process_stays_for_messages_of_one_run_app_and_policy(client: Client) -> None:
    fab, own = Fab("hash", b"app", {}), read_client_policy(client.policy)
    for kind in (records.DESCRIBE, records.TRAIN, records.EVALUATE, secure_sum.SHARE, secure_sum.UNMASK):
        assert owner_of(*asked(client, kind), fab, own) is None
    owner = owner_of(*asked(client, records.GRADIENT), fab, own)
    assert owner == owner_of(*asked(client, records.COHORT), fab, own)
    assert hash(owner) == hash(owner_of(*asked(client, records.LAYER_MAP), fab, own))
    message, context = asked(client, records.GRADIENT)
    context.run_id = 8
    others = [
        owner_of(message, context, fab, own),
        owner_of(*asked(client, records.GRADIENT), Fab("hash", b"other", {}), own),
        owner_of(*asked(client, records.GRADIENT, seed=5), fab, own),
        owner_of(*asked(replace(client, backbone="other"), records.GRADIENT), fab, own),
        owner_of(*asked(client, records.GRADIENT), fab, own.model_copy(update={"max_minutes": 3.0})),
    ]
    assert owner not in others


@pytest.mark.usefixtures("_task")
def test_the_answer_of_the_worker_is_that_of_the_app(client: Client) -> None:
    message, context = asked(client, records.DESCRIBE, **{"domains.train": "beauty", "domains.unseen": ""})
    workers = Workers(prepare_for)
    answers = [
        workers.once(lambda: prepare(message, context), lambda: True),
        workers.ask(request_of(message, context), "owner", lambda: True),
    ]
    workers.close()
    expected = client_app(message, context)
    for answer in answers:
        assert read_answer(answer) == (expected.content, context.state)
    content = expected.content
    assert records.read_error(content)  # there is no such backbone


def test_a_fork_that_could_not_use_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_fork()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(SystemExit, match="bitsandbytes"):
        check_fork()


def test_the_executor_takes_the_installed_code_only() -> None:
    """It imports nothing that could unpack or load an app."""
    text = Path(sim.machines.executor.__file__).read_text()
    assert "install_from_fab" not in text
    assert "load_client_app" not in text
