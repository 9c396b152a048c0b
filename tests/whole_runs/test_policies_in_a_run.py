"""Privacy policies in whole runs: refusals by a client's own policy, and their records in the run."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from in_process import small_experiment
from run_folders import unlisted_files

import sim.app.server.phases.coefficients
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import ClientError, PolicyError
from fedmerge.files import append_line, read_json, read_lines
from fedmerge.merging.stack import linear_merge, stack_adapters
from sim.app.messages import records
from sim.local.in_process import Answer, answer_honestly, run_in_process

pytestmark = pytest.mark.federation

DOMAINS = ("beauty", "books", "coffee", "camping")
STRICT = "coffee"
NOISE_BY_USER = {
    "dp.mode": "user",
    "dp.noise_multiplier": 2.0,
    "dp.delta": 1e-3,
    "train.negatives": "catalog",
    "privacy.min_users": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains, a backbone and the clients' disk: every client trains once for all tests here."""
    return tmp_path_factory.mktemp("place")


def experiment(place: Path, tmp_path: Path, **changes: object) -> ExperimentConfig:
    return small_experiment(place, **{"output_dir": str(tmp_path), "merge.methods": "average", **changes})


def with_own_policy(path: Path, text: str) -> Answer:
    """Give one client its own policy file."""
    path.write_text(text)

    def answer(message: Message, context: Context) -> Message | None:
        if DOMAINS[int(context.node_config["partition-id"])] == STRICT:
            context.node_config["policy-path"] = str(path)
        return answer_honestly(message, context)

    return answer


@pytest.mark.parametrize(
    ("text", "phase", "message"),
    [
        ('policies = "adapter"', "gather", "policies = 'adapter', the run has privacy.policy = 'adapter+catalog'"),
        ("min_users = 21", "gather", "min_users = 21, the run has privacy.min_users = 20"),
        ("mni_users = 1", "gather", "policy file …/policy.toml"),
    ],
)
def test_a_client_with_a_stricter_policy_refuses_and_is_reported(
    place: Path, tmp_path: Path, text: str, phase: str, message: str
) -> None:
    run_in_process(experiment(place, tmp_path), with_own_policy(tmp_path / "policy.toml", text))
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    ((name, reason),) = clients["excluded"].items()
    assert name.startswith(f"{STRICT} (node ")
    assert message in reason
    assert str(tmp_path) not in reason
    assert clients["excluded_in_phase"][name] == phase
    assert name in (tmp_path / "run" / "report.txt").read_text()


@pytest.mark.parametrize(("adjacency", "num_excluded"), [("add-remove", 0), ("replace", 1)])
def test_a_limit_on_epsilon_is_about_the_adjacency_of_the_policy(
    place: Path, tmp_path: Path, adjacency: str, num_excluded: int
) -> None:
    noise = {"dp.noise_multiplier": "none", "dp.epsilon": 2, "until": "train"}
    text = f'min_users = 2\nmetrics = "exact"\nmax_epsilon = 2\nadjacency = "{adjacency}"'
    config = experiment(place, tmp_path, **{**NOISE_BY_USER, **noise, "cache_dir": str(tmp_path / "cache")})
    run_in_process(config, with_own_policy(tmp_path / "policy.toml", text))
    excluded = read_json(tmp_path / "run" / "clients.json")["excluded"]
    assert len(excluded) == num_excluded
    for name, reason in excluded.items():
        assert name.startswith(f"{STRICT} (node ")
        assert "max_epsilon = 2 with adjacency = 'replace'" in reason


def test_an_expert_that_the_account_does_not_cover_is_not_evaluated(place: Path, tmp_path: Path) -> None:
    """Its training is done when the limit on all runs refuses it; a server could ask for its metric sums next."""
    text = "min_users = 2\nmax_delta = 1e-3\nmax_total_epsilon = 0.01"
    honest, found = with_own_policy(tmp_path / "policy.toml", text), list[str]()

    def answer(message: Message, context: Context) -> Message | None:
        reply = honest(message, context)
        strict = DOMAINS[int(context.node_config["partition-id"])] == STRICT
        if strict and message.metadata.message_type == records.TRAIN:
            request = records.EvaluationRequest("valid", False, records.OWN_EXPERT, False)
            content = records.evaluation_request_record(request, records.model_records({}))
            asked = honest(Message(content, dst_node_id=1, message_type=records.EVALUATE), context)
            assert isinstance(asked, Message)
            found.append(str(records.read_error(asked.content)))
        return reply if isinstance(reply, Message) else None

    noised = {"privacy.metrics": "noised", "privacy.metrics_noise": 1000.0, "cache_dir": str(tmp_path / "cache")}
    run_in_process(experiment(place, tmp_path, **{**NOISE_BY_USER, **noised}), answer)
    excluded = read_json(tmp_path / "run" / "clients.json")["excluded"]
    assert [name for name, reason in excluded.items() if "max_total_epsilon = 0.01" in reason] == [STRICT]
    (refusal,) = found
    assert "PolicyError" in refusal
    assert "never released" in refusal


def test_a_private_catalog_is_an_error_before_any_work(place: Path, tmp_path: Path) -> None:
    small_experiment(place)  # writes the domains
    shutil.copytree(place / "domains", tmp_path / "catalogs")
    manifest = tmp_path / "catalogs" / "books" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"public_catalog": true', '"public_catalog": false'))
    catalogs = {"privacy.policy": "adapter", "server.catalogs": str(tmp_path / "catalogs")}
    changes = {"merge.methods": "mergerec", **catalogs}
    with pytest.raises(PolicyError, match=r"books.*public_catalog = false.*catalog-private"):
        run_in_process(experiment(place, tmp_path, **changes))
    assert not (tmp_path / "run" / "adapters").exists()


def sent_lines(path: Path) -> list[Any]:
    """Return domain, message, size and values of every reply that :func:`seen_by_flower` wrote."""
    return [line["sent"] for line in read_lines(path)]


def seen_by_flower(path: Path) -> Answer:
    """Record what honest clients send, from the bytes that Flower makes of it."""

    def answer(message: Message, context: Context) -> Message | None:
        reply = answer_honestly(message, context)
        assert reply is not None
        wire = recorddict_to_proto(reply.content).SerializeToString()
        sent = recorddict_from_proto(ProtoRecordDict.FromString(wire))
        rows = []
        for key, arrays in sent.array_records.items():
            for name, array in arrays.items():
                values = array.numpy()
                rows.append([f"{key}.{name}", str(values.dtype), "x".join(map(str, values.shape)), values.nbytes])
        for key, facts in sent.config_records.items():
            rows += [[f"{key}.{name}", type(value).__name__, "", 0] for name, value in facts.items()]
        domain = DOMAINS[int(context.node_config["partition-id"])]
        append_line(path, {"sent": [domain, message.metadata.message_type, len(wire), rows]})
        return reply

    return answer


LEARNED = {
    "merge.methods": "mergerec,adamerging",
    "mergerec.steps": 4,
    "mergerec.learning_rate": 0.01,
    "adamerging.steps": 2,
    "adamerging.granularities": "domain",
}
LABELS = ("mergerec domain-wise", "mergerec layer-wise", "adamerging domain-wise")


def coefficients(run: Path, label: str) -> np.ndarray:
    provenance = json.loads((run / "merged" / label.replace(" ", "-") / "provenance.json").read_text())
    return np.array([provenance["coefficients"][domain] for domain in sorted(provenance["coefficients"])])


@pytest.fixture(scope="module")
def at_the_server(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which the server has the catalogs."""
    folder = tmp_path_factory.mktemp("server")
    run_in_process(experiment(place, folder, **LEARNED))
    return folder / "run"


@pytest.fixture(scope="module")
def exact(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with catalogs that stay at the clients."""
    folder = tmp_path_factory.mktemp("exact")
    config = experiment(place, folder, **LEARNED, **{"privacy.policy": "catalog-private"})
    run_in_process(config, seen_by_flower(folder / "sent.jsonl"))
    assert unlisted_files(folder / "run") == []
    return folder / "run"


@pytest.mark.parametrize("label", LABELS)
def test_learning_through_the_clients_equals_learning_from_catalogs(
    at_the_server: Path, exact: Path, label: str
) -> None:
    through, before = coefficients(exact, label), coefficients(at_the_server, label)
    start = 1 / 3**0.5 if label.startswith("mergerec") else 0.3
    assert np.abs(before - start).max() > 1e-3
    assert np.abs(through - before).max() < 1e-5


def ledger_as_flower_sent(run: Path) -> list[dict[str, Any]]:
    """The ledger's rows, which hold every array and value of every message: names, types, shapes, bytes on the wire."""
    sent, wire_bytes = Counter[tuple[str, ...]](), 0
    value_bytes = Counter[tuple[str, ...]]()
    for domain, message, size, values in sent_lines(run.parent / "sent.jsonl"):
        wire_bytes += size
        for name, dtype, shape, nbytes in values:
            sent[domain, message, name, dtype, shape] += 1
            value_bytes[domain, message, name] += nbytes
    ledger, told_bytes = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    rows = pq.read_table(run / "exposure.parquet").to_pylist()
    for row in rows:
        ledger[row["domain"], row["message"], row["name"], row["dtype"], row["shape"]] += 1
        told_bytes[row["domain"], row["message"], row["name"]] += row["size_bytes"]
    assert ledger == sent
    for key, size in value_bytes.items():
        assert size <= told_bytes[key] <= size + 128 * sent_times(sent, key) or size == 0  # 128: NumPy's header
    assert 0.8 * wire_bytes < sum(told_bytes.values()) < wire_bytes
    return list(rows)


def test_the_ledger_matches_the_bytes_that_flower_sent(exact: Path) -> None:
    rows = ledger_as_flower_sent(exact)
    assert {row["noise"] for row in rows} == {"none"}
    assert sum(row["message"] == "query.gradient" for row in rows) == 3 * 10
    assert not any(row["message"] == "query.catalog" for row in rows)
    gradients = {(row["name"], row["shape"]) for row in rows if row["message"] == "query.gradient"}
    assert gradients == {("coefficients.answer", "3x1"), ("coefficients.answer", "3x2")}


@pytest.mark.parametrize(
    ("changes", "adapters", "noise"),
    [
        pytest.param({}, {"adapter float32"}, "none", id="adapters"),
        pytest.param({"privacy.transport": "int8"}, {"adapter int8", "adapter float32"}, "none", id="quantised"),
        pytest.param({"privacy.transport": "top-k"}, {"adapter float32", "adapter int32"}, "none", id="sparse"),
        pytest.param({"privacy.policy": "aggregate-only"}, {"masked uint32"}, "none", id="secure sum"),
        pytest.param(
            {"rounds.rule": "weighted-average", "rounds.number": 2, "privacy.policy": "aggregate-only"},
            {"masked uint32"},
            "none",
            id="secure rounds",
        ),
        pytest.param(NOISE_BY_USER, {"adapter float32"}, "Gaussian, by user", id="noise by user"),
    ],
)
def test_the_ledger_matches_the_bytes_that_flower_sent_for_every_message(
    place: Path, tmp_path: Path, changes: dict[str, object], adapters: set[str], noise: str
) -> None:
    run_in_process(experiment(place, tmp_path, **changes), seen_by_flower(tmp_path / "sent.jsonl"))
    arrays = [row for row in ledger_as_flower_sent(tmp_path / "run") if row["shape"]]
    assert {f"{row['name'].partition('.')[0]} {row['dtype']}" for row in arrays} == adapters
    assert {row["noise"] for row in arrays} == {noise}


def sent_times(sent: Counter[tuple[str, ...]], key: tuple[str, ...]) -> int:
    return sum(times for (domain, message, name, *_), times in sent.items() if (domain, message, name) == key)


def test_with_noise_at_the_server_clients_only_receive_noised_adapters(place: Path, tmp_path: Path) -> None:
    received: list[np.ndarray] = []

    def listening(message: Message, context: Context) -> Message | None:
        for record in message.content.array_records.values():
            received.extend(array.numpy() for name, array in record.items() if name.endswith("lora_B"))
        return answer_honestly(message, context)

    noise = {"dp.mode": "domain-central", "dp.noise_multiplier": 2.0, "dp.delta": 1e-3, "dp.clip": 0.5}
    run_in_process(experiment(place, tmp_path, **noise), listening)
    run = tmp_path / "run"
    experts = {name: read_adapter(run / "adapters" / name) for name in ("beauty", "books", "coffee")}
    merged = read_adapter(run / "merged" / "average")
    assert len(received) == 7 * len(merged.modules)  # three train and are asked twice, the unseen one once
    for number, name in enumerate(merged.modules):
        for array in received[number :: len(merged.modules)]:
            assert np.array_equal(array, merged.modules[name].lora_B.numpy())
            assert not any(np.array_equal(array, expert.modules[name].lora_B.numpy()) for expert in experts.values())
    exact = linear_merge(stack_adapters(experts), np.full(3, 1 / 3))
    products = [
        torch.cat([(module.scaling * module.lora_B @ module.lora_A).flatten() for module in adapter.modules.values()])
        for adapter in (merged, exact)
    ]
    assert float((products[0] - products[1]).norm()) > 10 * float(products[1].norm())
    (found,) = json.loads((run / "privacy.json").read_text())["domains"].values()
    assert [(release["unit"], release["noise_multiplier"]) for release in found["releases"]] == [("domain", 2.0)]


LITTLE = {
    "privacy.policy": "catalog-private",
    "merge.methods": "mergerec",
    "mergerec.granularities": "layer",
    "mergerec.steps": 4,
    "mergerec.learning_rate": 0.01,
}


def test_a_killed_run_replays_the_averages(
    place: Path, exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**LEARNED, **LITTLE}
    lines: list[object] = []

    def killed_after_two(path: Path, line: Mapping[str, Any]) -> None:
        append_line(path, line)
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sim.app.server.phases.coefficients, "append_line", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(experiment(place, tmp_path, **changes))
    run_in_process(experiment(place, tmp_path, **changes, resume=True), seen_by_flower(tmp_path / "sent.jsonl"))
    again = Counter((domain, message) for domain, message, _, _ in sent_lines(tmp_path / "sent.jsonl"))
    assert {again[domain, "query.gradient"] for domain in DOMAINS[:3]} == {2}
    assert np.array_equal(coefficients(tmp_path / "run", LABELS[1]), coefficients(exact, LABELS[1]))


def test_a_failing_client_is_reported_and_the_others_continue(place: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(message: Message, context: Context) -> Message | None:
        reply = answer_honestly(message, context)
        if message.metadata.message_type == records.GRADIENT:
            asked.append(DOMAINS[int(context.node_config["partition-id"])])
            if asked[-1] == STRICT and asked.count(STRICT) == 2 and reply is not None:
                reply.content = records.gradient_record(torch.full((3, 2), torch.nan))
        return reply

    run_in_process(experiment(place, tmp_path, **LITTLE), answer)
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    assert clients["excluded"].keys() == {STRICT}
    assert "its gradient is not finite or exceeds 1e+06" in clients["excluded"][STRICT]
    assert clients["excluded_in_phase"][STRICT] == "merge"
    assert {domain: asked.count(domain) for domain in set(asked)} == {"beauty": 4, "books": 4, STRICT: 2}
    (log,) = (tmp_path / "run" / "learning").glob("mergerec-layer-wise-*.jsonl")
    lines = list(read_lines(log))
    assert [line["answered"] for line in lines] == [["beauty", "books", STRICT], *[["beauty", "books"]] * 3]
    assert coefficients(tmp_path / "run", LABELS[1]).shape == (3, 2)


@pytest.mark.parametrize(
    ("changes", "label", "messages"),
    [
        ({"through_clients.mode": "local-steps", "through_clients.local_steps": 3}, LABELS[1], 2),
        ({"through_clients.users": "own-users", "through_clients.batch_size": 25}, f"{LABELS[1]} own-users", 4),
    ],
    ids=["local-steps", "own-users"],
)
def test_other_ways_through_the_clients(
    place: Path, tmp_path: Path, changes: dict[str, object], label: str, messages: int
) -> None:
    run_in_process(experiment(place, tmp_path, **LITTLE, **changes), seen_by_flower(tmp_path / "sent.jsonl"))
    sent = Counter((domain, message) for domain, message, _, _ in sent_lines(tmp_path / "sent.jsonl"))
    assert {sent[domain, "query.gradient"] for domain in DOMAINS[:3]} == {messages}
    found = coefficients(tmp_path / "run", label)
    assert 1e-4 < np.abs(found - 1 / 3**0.5).max() < 0.1
    provenance = json.loads((tmp_path / "run" / "merged" / label.replace(" ", "-") / "provenance.json").read_text())
    assert provenance["through_clients"].items() >= {key.split(".")[1]: value for key, value in changes.items()}.items()
    assert provenance["policy"] == "catalog-private"
    assert (tmp_path / "run" / "DONE").is_file()


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({}, 4),
        ({"through_clients.users": "own-users", "through_clients.batch_size": 25}, 4),
        ({"through_clients.mode": "local-steps", "through_clients.local_steps": 3}, 2),
    ],
    ids=["exact", "own-users", "local-steps"],
)
def test_with_noise_by_domain_every_answer_is_counted(
    place: Path, tmp_path: Path, changes: dict[str, object], messages: int
) -> None:
    private = {"dp.mode": "domain-local", "dp.epsilon": 8.0, "dp.delta": 1e-3, "dp.coefficient_clip": 0.01}
    config = experiment(place, tmp_path, **LITTLE, **private, **changes, cache_dir=str(tmp_path / "cache"))
    run_in_process(config)
    reported = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert reported["guarantee"]
    assert reported["domains"].keys() == {"beauty", "books", STRICT}
    for found in reported["domains"].values():
        update, answers = found["releases"]
        assert (update["steps"], answers["steps"], update["clip"], answers["clip"]) == (1, messages, 1.0, 0.01)
        assert update["noise_multiplier"] == answers["noise_multiplier"]
        assert 7.5 < found["epsilon"] <= 8.0
    rows = pq.read_table(tmp_path / "run" / "exposure.parquet").to_pylist()
    noised = {row["message"] for row in rows if row["noise"] == "Gaussian, by domain"}
    assert noised == {"train", "query.gradient"} == {row["message"] for row in rows if row["noise"] != "none"}
    own = " own-users" if config.through_clients.users == "own-users" else ""
    assert np.isfinite(coefficients(tmp_path / "run", LABELS[1] + own)).all()


def test_with_noise_by_user_every_answer_on_own_users_is_counted(place: Path, tmp_path: Path) -> None:
    private = {
        "dp.mode": "user",
        "dp.epsilon": 8.0,
        "dp.delta": 1e-3,
        "dp.coefficient_clip": 0.01,
        "dp.accountant": "rdp",
    }
    own = {"through_clients.users": "own-users", "through_clients.batch_size": 25, "train.negatives": "catalog"}
    config = experiment(place, tmp_path, **LITTLE, **private, **own, cache_dir=str(tmp_path / "cache"))
    run_in_process(config)
    reported = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert reported["guarantee"]
    assert not reported["guarantee_of_run"]  # sums of metrics are exact
    assert reported["domains"].keys() == {"beauty", "books", STRICT}
    for found in reported["domains"].values():
        training, answers = found["releases"]
        assert (training["steps"], training["clip"]) == (config.train.max_steps, 1.0)
        assert (answers["steps"], answers["clip"]) == (4, 0.01)
        assert answers["sample_rate"] == min(1.0, 25 / found["num_units"])
        assert 7.5 < found["epsilon"] <= 8.0
    for name, found in reported[
        "domains"
    ].items():  # what the client really drew with, and what it reported of its training
        (used,) = (tmp_path / "cache" / "released").glob(f"{name}-*/noise.json")
        assert json.loads(used.read_text())["noise_multiplier"] == found["releases"][0]["noise_multiplier"]
    rows = pq.read_table(tmp_path / "run" / "exposure.parquet").to_pylist()
    noised = {row["message"] for row in rows if row["noise"] == "Gaussian, by user"}
    assert noised == {"train", "query.gradient"} == {row["message"] for row in rows if row["noise"] != "none"}
    assert np.isfinite(coefficients(tmp_path / "run", f"{LABELS[1]} own-users")).all()
    pseudo = {**private, "train.negatives": "catalog", "run_id": "pseudo"}  # of pseudo-users nothing is to be protected
    run_in_process(experiment(place, tmp_path, **LITTLE, **pseudo, cache_dir=str(tmp_path / "cache")))
    reported = json.loads((tmp_path / "pseudo" / "privacy.json").read_text())
    assert {len(found["releases"]) for found in reported["domains"].values()} == {1}


def test_a_domain_without_a_possible_guarantee_by_user_is_excluded_before_training(place: Path, tmp_path: Path) -> None:
    private = {
        "dp.mode": "user",
        "dp.epsilon": 8.0,
        "dp.delta": 0.1,
        "dp.accountant": "rdp",
        "train.negatives": "catalog",
    }
    with pytest.raises(ClientError, match=r"DomainError: domain \w+: dp\.delta = 0\.1\b"):
        run_in_process(experiment(place, tmp_path, **{"merge.methods": "average", **private}))
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    assert set(clients["excluded_in_phase"].values()) == {"gather"}
    ledger = read_lines(tmp_path / "run" / "exposure.jsonl")
    assert {reply["message"] for reply in ledger} == {"query.describe"}


def test_stopping_points_chosen_by_few_users_are_not_reported(place: Path, tmp_path: Path) -> None:
    few = {"merge.methods": "average", "until": "train", "privacy.min_users": 10**6}
    run_in_process(experiment(place, tmp_path, **few))
    reported = json.loads((tmp_path / "run" / "adapters" / "books" / "training.json").read_text())
    assert reported["validations"] == []
    assert reported.keys().isdisjoint({"best_step", "stopped_by"})


@pytest.mark.parametrize("transport", ["int8", "top-k"])
def test_experts_travel_in_fewer_bytes(place: Path, tmp_path: Path, transport: str) -> None:
    changes = {"merge.methods": "average", "privacy.transport": transport}

    def garbled(message: Message, context: Context) -> Message | None:
        reply = answer_honestly(message, context)
        if message.metadata.message_type == "train" and DOMAINS[int(context.node_config["partition-id"])] == STRICT:
            assert reply is not None
            arrays = {name: array.numpy() for name, array in reply.content.array_records["adapter"].items()}
            name = next(name for name in arrays if name.endswith((".levels", ".positions")))
            arrays[name] = arrays[name].astype(np.int64)
            reply.content["adapter"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        return reply

    run_in_process(experiment(place, tmp_path, **changes), garbled)
    run = tmp_path / "run"
    clients = json.loads((run / "clients.json").read_text())
    assert list(clients["excluded"]) == [STRICT]
    assert "is int64 of shape" in clients["excluded"][STRICT]
    sent = json.loads((run / "adapters" / "books" / "training.json").read_text())["transport"]
    assert sent["kind"] == transport
    assert 0 < sent["residual"] < 1
    rows = [row for row in pq.read_table(run / "exposure.parquet").to_pylist() if row["domain"] == "books"]
    shapes = {row["name"].rpartition(".")[2] for row in rows if row["name"].startswith("adapter.")}
    assert shapes == ({"levels", "scales"} if transport == "int8" else {"values", "positions"})
    assert (run / "DONE").is_file()  # clients still find their experts, by the hash of what arrived


def test_a_client_with_invalid_pseudo_users_is_excluded(place: Path, tmp_path: Path) -> None:
    def answer(message: Message, context: Context) -> Message | None:
        reply = answer_honestly(message, context)
        cohort = message.metadata.message_type == records.COHORT
        if cohort and DOMAINS[int(context.node_config["partition-id"])] == STRICT and reply is not None:
            reply.content = records.pseudo_users_record(0)
        return reply

    run_in_process(experiment(place, tmp_path, **{**LITTLE, "mergerec.steps": 1}), answer)
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    assert "it makes 0 pseudo-users. Use the same settings" in clients["excluded"][STRICT]
    (cohort,) = (tmp_path / "run" / "learning").glob("cohort-*.json")
    assert read_json(cohort) == {"beauty": 25, "books": 25}
