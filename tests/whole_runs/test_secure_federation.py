"""Secure sums through both Flower apps, in one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from flwr.app import Context, Message
from run_folders import unlisted_files
from secure_runs import (
    STEPS,
    TRAIN,
    Killed,
    assert_close,
    deltas,
    domain_of,
    experiment,
    gone_at,
    merged,
    own_disk,
    run_dir,
)

from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import AggregationError, ClientError
from fedmerge.files import read_json
from fedmerge.runs.folder import DONE
from fedmerge.runs.round_checkpoints import round_records
from sim.app.messages import records
from sim.app.messages import secure_sum as secure_records
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secure")


@pytest.fixture(scope="module")
def plain(place: Path) -> ExperimentConfig:
    """A plain run: the server receives four experts and averages them."""
    config = experiment(place, "plain", privacy__policy="adapter")
    run_in_process(config)
    return config


def test_the_average_equals_that_of_a_server_with_every_adapter(place: Path, plain: ExperimentConfig) -> None:
    asked: list[str] = []
    sent: list[tuple[str, Message]] = []

    def watched(message: Message, context: Context) -> Message | None:
        asked.append(message.metadata.message_type)
        reply = answer_honestly(message, context)
        if reply is not None:
            sent.append((message.metadata.message_type, reply))
        return reply

    config = experiment(place, "secure")
    run_in_process(config, watched)
    folder = run_dir(config)
    assert (folder / DONE).is_file()
    assert unlisted_files(folder) == []
    assert_close(merged(config, "average"), merged(plain, "average"))
    assert_close(merged(config, "task-arithmetic-0.5"), merged(plain, "average"), 4 * 0.5)
    for step in STEPS.values():
        assert asked.count(step) == len(TRAIN)

    made = read_json(folder / "secure-sum" / "sum.json")
    assert set(made["clients"]) == set(made["training"]) == {*TRAIN}
    assert made["threshold"] == 3
    assert made["tolerance"] <= 4 * 8.0 / (2 * (2**30 - 4)) * 1.001
    provenance = read_json(folder / "merged" / "average" / "provenance.json")
    assert provenance["coefficients"] == dict.fromkeys(TRAIN, 0.25)
    assert provenance["policy"] == "aggregate-only"

    # no single adapter, nor its hash, has reached the server
    assert not (folder / "adapters").exists()
    hashes = [read_json(path)["sha256"] for path in (run_dir(plain) / "adapters").glob("*/training.json")]
    assert len(hashes) == len(TRAIN)
    texts = [path.read_text() for path in folder.rglob("*.json")]
    assert not any(sha256 in text for sha256 in hashes for text in texts)
    rows = pq.read_table(folder / "exposure.parquet").to_pylist()
    assert not any("lora" in row["name"] or row["dtype"] == "float32" for row in rows)
    values = {row["size_bytes"] for row in rows if row["name"] == "masked.values"}
    assert len(values) == 1
    for kind, reply in sent:
        if kind == secure_records.MASKED:
            taken = secure_records.read_masked(reply.content)
            assert abs(float((taken / 2**32).mean()) - 0.5) < 6 / np.sqrt(12 * taken.size)
            assert 4 * taken.size + 128 == next(iter(values))
    methods = {row["method"] for row in pq.read_table(folder / "metrics.parquet").to_pylist()}
    assert {"expert", "average", "task-arithmetic 0.5"} <= methods  # every client still ranks with its own


@pytest.mark.parametrize("step", ["share", "masked"])  # all steps: test_secure_aggregation.py
def test_a_client_may_drop_out_at_each_step(place: Path, plain: ExperimentConfig, step: str) -> None:
    config = experiment(place, f"without-{step}", **own_disk(place, f"cache-{step}"))
    run_in_process(config, gone_at(step, "books"))
    experts = {name: deltas(read_adapter(run_dir(plain) / "adapters" / name)) for name in TRAIN}
    left = [name for name in TRAIN if name != "books"]
    expected = {module: torch.stack([experts[name][module] for name in left]).mean(0) for module in experts["beauty"]}
    assert_close(merged(config, "average"), expected)
    made = read_json(run_dir(config) / "secure-sum" / "sum.json")
    assert sorted(made["clients"]) == left
    clients = read_json(run_dir(config) / "clients.json")
    assert "gone" in clients["excluded"]["books"]


@pytest.mark.usefixtures("plain")
def test_too_few_clients_or_another_cohort_end_the_run(place: Path) -> None:
    """Three of four clients suffice, but an adapter summed among four is not revealed again among three."""
    disk = own_disk(place, "cache-two")
    config = experiment(place, "two-gone", **disk)

    def two_gone(message: Message, context: Context) -> Message | None:
        if domain_of(context) in TRAIN[:2] and message.metadata.message_type == secure_records.MASKED:
            return Message(records.error_record("gone"), reply_to=message)
        return answer_honestly(message, context)

    with pytest.raises(AggregationError, match=r"2 of 4 clients \(camping, coffee\)"):
        run_in_process(config, two_gone)
    resumed = config.model_copy(update={"resume": True})
    run_in_process(resumed)  # nothing was revealed, so the sum begins again
    assert (run_dir(config) / DONE).is_file()
    with pytest.raises(AggregationError, match=r"\b0 clients"):
        run_in_process(experiment(place, "again", **disk), gone_at("share", "books"))
    excluded = read_json(run_dir(experiment(place, "again")) / "clients.json")["excluded"]
    assert "PolicyError: " in excluded["beauty"]


@pytest.mark.usefixtures("plain")
def test_a_killed_sum_starts_again_with_fresh_keys(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment(place, "killed", **own_disk(place, "cache-killed"))
    keys: list[bytes] = []

    def watched(message: Message, context: Context) -> Message | None:
        reply = answer_honestly(message, context)
        if reply is not None and message.metadata.message_type == secure_records.ADVERTISE:
            keys.append(secure_records.read_advertisement(reply.content).mask_key)
        return reply

    def killed(*arguments: Any, **settings: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("sim.app.server.phases.secure_sum.write_mean", killed)  # after everything was revealed
        with pytest.raises(Killed):
            run_in_process(config, watched)
    run_in_process(config.model_copy(update={"resume": True}), watched)
    assert len(set(keys)) == 2 * len(TRAIN)
    before = merged(config, "average")
    monkeypatch.setattr("sim.app.server.phases.secure_sum.secure_mean", killed)  # what is on disk is not summed again
    (run_dir(config) / DONE).unlink()
    run_in_process(config.model_copy(update={"resume": True}))
    assert_close(merged(config, "average"), before)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("spoiled", "num_masked"), [({"identifier": bytes(32)}, 0), ({"value_range": 4.0}, 3)], ids=["accepted", "refused"]
)
def test_a_client_that_hears_another_session_is_in_no_sum(
    place: Path, spoiled: dict[str, Any], num_masked: int
) -> None:
    """A session that the client accepts makes all boxes useless; one that the run does not imply costs it alone."""
    masked: list[str] = []

    def lied_to(message: Message, context: Context) -> Message | None:
        if domain_of(context) == "books" and message.metadata.message_type == STEPS["advertise"]:
            facts = message.content.config_records["facts"]  # all clients get the same object here
            honest = dict(facts)
            facts.update(spoiled)
            reply = answer_honestly(message, context)
            facts.update(honest)
            return reply
        reply = answer_honestly(message, context)
        if reply and message.metadata.message_type == STEPS["masked"] and records.read_error(reply.content) is None:
            masked.append(domain_of(context))
        return reply

    config = experiment(place, f"lied-{num_masked}", **own_disk(place, f"cache-lied-{num_masked}"))
    if num_masked:
        run_in_process(config, lied_to)
        assert "PolicyError" in read_json(run_dir(config) / "clients.json")["excluded"]["books"]
    else:
        with pytest.raises(AggregationError, match=r"\b0 of 4 clients"):
            run_in_process(config, lied_to)
    assert len(masked) == num_masked
    assert "books" not in masked


@pytest.mark.parametrize("rule", ["weighted-average", "fedit", "ffa-lora"])  # others: test_federated_rules.py
def test_rounds_of_sums_match_plain_rounds(place: Path, rule: str) -> None:
    changes = {
        "rounds__rule": rule,
        "rounds__number": 2,
        "rounds__weights": "users",
    }
    seen = experiment(place, f"seen-{rule}", privacy__policy="adapter", **changes)
    run_in_process(seen)
    hidden = experiment(place, f"hidden-{rule}", **changes)
    run_in_process(hidden)
    assert unlisted_files(run_dir(hidden)) == []
    label = f"{rule}-2-rounds"
    found, expected = merged(hidden, label), merged(seen, label)
    for name, values in found.items():
        assert float((values - expected[name]).norm() / expected[name].norm()) < 1e-3, name  # trained on from there
    rounds = round_records(run_dir(hidden))
    assert [set(record["clients"]) for record in rounds] == [{*TRAIN}] * 2
    plain_rounds = round_records(run_dir(seen))
    for record, plain_record in zip(rounds, plain_rounds, strict=True):
        sent, plain_sent = (sum(each["aggregation"]["bytes_up"].values()) for each in (record, plain_record))
        assert sent == plain_sent if rule in ("fedit", "ffa-lora") else sent > plain_sent
        assert record["secure_sum"]["threshold"] == 3
        assert record["aggregation"]["error"] == (None if rule == "fedit" else 0.0)
        assert record["aggregation"]["client_weights"] == plain_record["aggregation"]["client_weights"]


def test_a_client_keeps_to_its_own_policy(place: Path) -> None:
    """The client refuses an adapter under aggregate-only and masked values under any other policy."""
    flat = experiment(place, "strict")

    def other_policy(policy: str) -> Callable[[Message, Context], Message | None]:
        def answer(message: Message, context: Context) -> Message | None:
            if message.metadata.message_type != records.DESCRIBE:
                context.run_config["privacy.policy"] = policy
            return answer_honestly(message, context)

        return answer

    with pytest.raises(ClientError, match="adapter"):
        run_in_process(flat.model_copy(update=_policy(flat, "adapter", "one")), other_policy("aggregate-only"))
    with pytest.raises((ClientError, AggregationError)):
        run_in_process(flat.model_copy(update=_policy(flat, "aggregate-only", "two")), other_policy("adapter"))
    excluded = read_json(Path(flat.output_dir) / "two" / "clients.json")["excluded"]
    assert "the policy 'adapter' keeps the masked update at the client" in excluded["books"]


def _policy(config: ExperimentConfig, policy: str, run_id: str) -> dict[str, Any]:
    return {"privacy": config.privacy.model_copy(update={"policy": policy}), "run_id": run_id}


@pytest.mark.parametrize("number", [0, 1], ids=["experts", "round"])
def test_an_expert_retrained_after_its_sum_is_excluded_from_a_second_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    rounds = {"rounds__rule": "weighted-average", "rounds__number": 2} if number else {}
    config = experiment(place, f"otherwise-{number}", cache_dir=str(place / f"cache-otherwise-{number}"), **rounds)

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(
            "sim.app.server.phases.rounds.one_by_one.write_state"
            if number
            else "sim.app.server.phases.secure_sum.write_mean",
            killed,
        )
        with pytest.raises(Killed):
            run_in_process(config)
    revealed = sorted((place / f"cache-otherwise-{number}" / "sums").glob("*/revealed/run-*.json"))
    assert len(revealed) == len(TRAIN)

    others = {"books", "camping"}  # beauty keeps what it began with, the same whatever it trains

    def otherwise(message: Message, context: Context) -> Message | None:
        if domain_of(context) in others:  # as another budget or version would
            context.run_config["train.learning_rate"] = config.train.learning_rate * 1.001
        return answer_honestly(message, context)

    resumed = config.model_copy(update={"resume": True})
    with pytest.raises((ClientError, AggregationError)):
        run_in_process(resumed, otherwise)
    excluded = read_json(run_dir(config) / "clients.json")["excluded"]
    assert {*excluded} == others
    assert all("PolicyError" in why and ".json" in why for why in excluded.values())
    run_in_process(resumed)  # trained as before, the same is shown again
    assert (run_dir(config) / DONE).is_file()
