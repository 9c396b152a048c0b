"""The client app in its process: one backbone for all clients of a worker, and a log of the host's choice."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from in_process import expert_of

from fedmerge.config import from_flat, to_flat
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.demo_backbone import write_demo_backbone
from sim.app.client.app import make_client_app
from sim.app.client.node import cached_backbone, open_client
from sim.app.client.replies import log_to_stderr
from sim.app.messages import records
from sim.flower_internals import TaskIdentity


def test_the_clients_of_one_worker_share_one_backbone_that_no_training_changes(tmp_path: Path) -> None:
    names = write_demo(tmp_path / "domains", num_domains=6, num_users=20, num_items=20)
    flat = {
        "domains.root": str(tmp_path / "domains"),
        "domains.train": ",".join(names),
        "domains.unseen": "",
        "backbone.source": str(write_demo_backbone(tmp_path / "backbone")),
        "cache_dir": str(tmp_path / "cache"),
        "train.max_steps": 2,
        "train.batch_size": 8,
        "runtime.precision": "float32",
        "runtime.device": "cpu",
    }
    config = from_flat(flat)
    loads = cached_backbone.cache_info().misses
    clients = [
        open_client(Context(1, node, {"partition-id": node, "num-partitions": 6}, RecordDict(), to_flat(config)))
        for node in range(6)
    ]
    assert [client.domain.manifest.name for client in clients] == list(names)
    assert len({id(client.domain.backbone.model) for client in clients}) == 1
    assert cached_backbone.cache_info().misses == loads + 1
    model = clients[0].domain.backbone.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, report = expert_of(clients[0].domain, config, lambda line: None)
    assert report["steps"] == 2
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("console", [True, False])
def test_an_app_logs_to_stderr_only_where_its_host_has_no_log(console: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    log_to_stderr.cache_clear()
    app = make_client_app(console=console)
    message = Message(RecordDict(), dst_node_id=1, message_type=records.DESCRIBE)
    for _ in range(2):  # one handler, however many messages
        reply = app(message, Context(1, 1, {}, RecordDict(), dict(to_flat(from_flat({})))))
        assert "domain-path" in str(records.read_error(reply.content))
    library = logging.getLogger("fedmerge")
    assert (len(library.handlers), library.propagate) == ((1, False) if console else (0, True))
    log_to_stderr.cache_clear()


@pytest.mark.parametrize("more", [{}, {"partition-id": 0, "num-partitions": 6}])
@pytest.mark.parametrize("setting", [{"attacker": "beauty"}, {"canaries": 3}, {"held_out_users": 0.5}])
def test_a_node_with_a_domain_of_its_own_simulates_nothing(
    tmp_path: Path, setting: dict[str, Any], more: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run asks for a poisoned or audited training; every message is refused before the domain is opened."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    names = write_demo(tmp_path / "domains", num_domains=6, num_users=20, num_items=20)
    flat = {
        "domains.train": ",".join(names),
        "domains.unseen": "",
        "cache_dir": str(tmp_path / "cache"),
        **{f"simulation.{key}": value for key, value in setting.items()},
    }
    run_config = dict(to_flat(from_flat(flat)))
    app = make_client_app(console=False)
    own: dict[str, bool | float | int | str] = {"domain-path": str(tmp_path / "domains" / "beauty"), **more}
    kinds = [records.DESCRIBE, records.CATALOG, records.TRAIN, records.EVALUATE, records.COHORT, records.GRADIENT]
    for kind in kinds:
        reply = app(
            Message(RecordDict(), dst_node_id=1, message_type=kind), Context(1, 1, own, RecordDict(), run_config)
        )
        refused = str(records.read_error(reply.content))
        assert refused.startswith("ClientError: domain beauty: [simulation]"), (kind, refused)
    assert not (tmp_path / "cache").exists()
