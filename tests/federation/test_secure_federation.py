"""Secure sums through both Flower apps, in one process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flwr.app import Context, Message, RecordDict
from in_process import small_experiment

from fedmerge.adapter import Adapter
from fedmerge.client.cache.secure_sums import check_not_shown, keep_values, kept_values, note_revealed, sum_of_run
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft_folder import read_adapter
from fedmerge.errors import AggregationError, ClientError, ConfigError, PolicyError
from fedmerge.files import read_json
from fedmerge.privacy.secagg.client import advertise
from fedmerge.privacy.secagg.identity import read_identity, read_registered
from fedmerge.privacy.secagg.server import new_session
from fedmerge.runs.folder import DONE
from fedmerge.runs.round_checkpoints import round_records
from sim.app.client.secure_sum import answer_advertise, answer_share
from sim.app.messages import records
from sim.app.messages import secure_sum as secure_records
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation

TRAIN = ("beauty", "books", "camping", "coffee")
STEPS = {
    "advertise": secure_records.ADVERTISE,
    "share": secure_records.SHARE,
    "masked": secure_records.MASKED,
    "unmask": secure_records.UNMASK,
}


def experiment(place: Path, name: str, **changes: object) -> ExperimentConfig:
    flat = {
        "run_id": name,
        "domains.train": ",".join(TRAIN),
        "domains.unseen": "",
        "merge.methods": "average,task-arithmetic",
        "privacy.policy": "aggregate-only",
        "privacy.min_users": 2,
        "evaluation.test_users": 5,
        "evaluation.validation_users": 5,
        "evaluation.baselines": "",
    }
    return small_experiment(place, **flat | {key.replace("__", "."): value for key, value in changes.items()})


def own_disk(place: Path, name: str) -> dict[str, Any]:
    """Clients with a disk of their own, which has the experts of the plain run and nothing revealed yet."""
    shutil.copytree(place / "cache" / "experts", place / name / "experts")
    return {"cache_dir": str(place / name)}


def run_dir(config: ExperimentConfig) -> Path:
    return Path(config.output_dir) / str(config.run_id)


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: module.delta_weight() for name, module in adapter.modules.items()}


def merged(config: ExperimentConfig, label: str) -> dict[str, torch.Tensor]:
    return deltas(read_adapter(run_dir(config) / "merged" / label))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert float(values.abs().max()) > 0
        torch.testing.assert_close(values, factor * expected[name], rtol=0, atol=1e-6)


def domain_of(context: Context) -> str:
    return TRAIN[int(context.node_config["partition-id"])]


def gone_at(step: str, domain: str) -> Callable[[Message, Context], Message | None]:
    """A client that fails at a step."""

    def answer(message: Message, context: Context) -> Message | None:
        if domain_of(context) == domain and message.metadata.message_type == STEPS[step]:
            return Message(records.error_record("gone", domain), reply_to=message)
        return answer_honestly(message, context)

    return answer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secure")


@pytest.fixture(scope="module")
def plain(place: Path) -> ExperimentConfig:
    """Seen by the server: four experts, and their average."""
    config = experiment(place, "plain", privacy__policy="adapter")
    run_in_process(config)
    return config


def test_the_average_is_that_of_a_server_that_sees_every_adapter(place: Path, plain: ExperimentConfig) -> None:
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
def test_too_few_clients_end_the_run_and_so_does_a_second_company(place: Path) -> None:
    """Three of four is enough; but who was summed with four does not reveal the same adapter among three."""
    disk = own_disk(place, "cache-two")
    config = experiment(place, "two-gone", **disk)

    def two_gone(message: Message, context: Context) -> Message | None:
        if domain_of(context) in TRAIN[:2] and message.metadata.message_type == secure_records.MASKED:
            return Message(records.error_record("gone"), reply_to=message)
        return answer_honestly(message, context)

    with pytest.raises(AggregationError, match=r"masked values: found 2 of 4 clients \(camping, coffee\), expected at"):
        run_in_process(config, two_gone)
    resumed = config.model_copy(update={"resume": True})
    run_in_process(resumed)  # nothing was revealed, so the sum begins again
    assert (run_dir(config) / DONE).is_file()
    with pytest.raises(AggregationError, match="unmasking: found answers of 0 clients"):
        run_in_process(experiment(place, "again", **disk), gone_at("share", "books"))
    excluded = read_json(run_dir(experiment(place, "again")) / "clients.json")["excluded"]
    assert "the same adapter was summed before" in excluded["beauty"]


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("plain")
def test_a_killed_sum_begins_again_with_fresh_keys(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        patched.setattr("sim.app.server.phases.secure_sum.keep_mean", killed)  # after everything was revealed
        with pytest.raises(Killed):
            run_in_process(config, watched)
    run_in_process(config.model_copy(update={"resume": True}), watched)
    assert len(set(keys)) == 2 * len(TRAIN)
    before = merged(config, "average")
    monkeypatch.setattr("sim.app.server.phases.secure_sum.secure_mean", killed)  # what is on disk is not summed again
    (run_dir(config) / DONE).unlink()
    run_in_process(config.model_copy(update={"resume": True}))
    assert_close(merged(config, "average"), before)


@pytest.mark.parametrize("rule", ["weighted-average", "fedit", "ffa-lora"])  # others: test_federated_rules.py
def test_rounds_of_sums_are_rounds(place: Path, rule: str) -> None:
    changes = {
        "rounds__rule": rule,
        "rounds__number": 2,
        "rounds__weights": "users",
        "domains__train": "beauty,books,coffee",
    }
    seen = experiment(place, f"seen-{rule}", privacy__policy="adapter", **changes)
    run_in_process(seen)
    hidden = experiment(place, f"hidden-{rule}", **changes)
    run_in_process(hidden)
    label = f"{rule}-2-rounds"
    found, expected = merged(hidden, label), merged(seen, label)
    for name, values in found.items():
        assert float((values - expected[name]).norm() / expected[name].norm()) < 1e-3, name  # trained on from there
    rounds = round_records(run_dir(hidden))
    assert [set(record["clients"]) for record in rounds] == [{"beauty", "books", "coffee"}] * 2
    plain_rounds = round_records(run_dir(seen))
    for record, plain_record in zip(rounds, plain_rounds, strict=True):
        sent, plain_sent = (sum(each["aggregation"]["bytes_up"].values()) for each in (record, plain_record))
        assert sent == plain_sent if rule in ("fedit", "ffa-lora") else sent > plain_sent
        assert record["secure_sum"]["threshold"] == 2
        assert record["aggregation"]["error"] == (None if rule == "fedit" else 0.0)
        assert record["aggregation"]["client_weights"] == plain_record["aggregation"]["client_weights"]


NOISED: list[tuple[str, dict[str, Any]]] = [
    ("user", {"train__negatives": "catalog", "dp__clip": 1.0}),
    ("user", {"train__negatives": "catalog", "dp__clip": 1.0, "rounds__rule": "weighted-average", "rounds__number": 2}),
    ("domain-local", {"dp__clip": 0.05}),
]


@pytest.mark.parametrize(("mode", "changes"), NOISED, ids=["user", "user-rounds", "domain-local"])
def test_differential_privacy_is_summed_securely_and_counted_as_without_the_sum(
    place: Path, mode: str, changes: dict[str, Any]
) -> None:
    """The noise is each client's own, seeded here: one server sees the adapters, the other does not."""
    noise = {"dp__mode": mode, "dp__noise_multiplier": 0.5, "dp__delta": 1e-3, "dp__randomness": "seeded"}
    noise |= {"dp__accountant": "rdp"}  # quicker
    name = f"{mode}-{len(changes)}"
    told = {}
    for policy in ("adapter", "aggregate-only"):
        disk = {"cache_dir": str(place / f"cache-{name}-{policy}")}
        config = experiment(place, f"{name}-{policy}", privacy__policy=policy, **noise, **changes, **disk)
        run_in_process(config)
        told[policy] = read_json(run_dir(config) / "privacy.json")
    if "rounds__rule" not in changes:  # whose second noise depends on the mean that it starts from, here a rounded one
        seen, hidden = (merged(experiment(place, f"{name}-{policy}"), "average") for policy in told)
        assert_close(hidden, seen)
    assert told["aggregate-only"] == told["adapter"]
    assert told["adapter"]["domains"].keys() == {*TRAIN}
    assert all(of["epsilon"] is not None and of["releases"] for of in told["adapter"]["domains"].values())
    rows = pq.read_table(run_dir(experiment(place, f"{name}-aggregate-only")) / "exposure.parquet").to_pylist()
    noised = {row["message"] for row in rows if row["noise"] != "none"}
    assert noised == {secure_records.MASKED}


BY_DOMAIN = {"dp__mode": "domain-local", "dp__noise_multiplier": 0.5, "dp__delta": 1e-3, "dp__clip": 0.05}


@pytest.mark.parametrize(("step", "counted"), [("masked", False), ("unmask", True)])
def test_only_whose_values_were_in_the_sum_are_counted(place: Path, step: str, counted: bool) -> None:
    config = experiment(place, f"gone-{step}", cache_dir=str(place / f"cache-gone-{step}"), **BY_DOMAIN)
    run_in_process(config, gone_at(step, "books"))
    assert ("books" in read_json(run_dir(config) / "privacy.json")["domains"]) == counted
    assert "books" in read_json(run_dir(config) / "clients.json")["excluded"]


def test_a_sum_that_was_shown_and_lost_is_counted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the mean is on disk; books is away on the resume, coffee has lost its expert and trains anew."""
    config = experiment(place, "shown", cache_dir=str(place / "cache-shown"), **BY_DOMAIN)

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("sim.app.server.phases.secure_sum.keep_mean", killed)
        with pytest.raises(Killed):
            run_in_process(config)
    for folder in (place / "cache-shown" / "experts").glob("*"):
        shutil.rmtree(folder)  # else nobody would show the same again in other company
    resumed = config.model_copy(update={"resume": True})
    run_in_process(resumed, gone_at("advertise", "books"))
    domains = read_json(run_dir(config) / "privacy.json")["domains"]
    assert {name: len(of["releases"]) for name, of in domains.items()} == {
        "beauty": 2,
        "books": 1,
        "camping": 2,
        "coffee": 2,
    }
    assert domains["books"]["epsilon"] < domains["beauty"]["epsilon"]


def test_a_range_that_the_noise_is_sure_to_leave_is_refused_before_any_training(place: Path) -> None:
    noise = {"dp__mode": "domain-local", "dp__epsilon": 8.0, "dp__delta": 1e-5}
    asked: list[str] = []

    def answer(message: Message, context: Context) -> Message | None:
        asked.append(message.metadata.message_type)
        return answer_honestly(message, context)

    told = r"privacy.value_range = 8 .* noise of deviation 1\.\d+ on A and B .* Set privacy.value_range to \d+ or more"
    with pytest.raises(ConfigError, match=told) as refused:
        run_in_process(experiment(place, "narrow", **noise), answer)
    assert not asked
    wide = {**noise, "privacy__value_range": float(str(refused.value).partition("value_range to ")[2].split()[0])}
    with pytest.raises(ConfigError, match=r"privacy\.value_range = 80"):  # of one domain's higher rank, too
        run_in_process(experiment(place, "one-is-wide", **wide, lora__ranks="books=64"), answer)
    assert not asked
    config = experiment(place, "wide", cache_dir=str(place / "cache-wide"), **wide)
    run_in_process(config)
    assert len(read_json(run_dir(config) / "secure-sum" / "sum.json")["clients"]) == len(TRAIN)


def test_who_tells_another_noise_than_agreed_is_not_in_the_sum(place: Path) -> None:
    noise = {"dp__mode": "domain-local", "dp__noise_multiplier": 0.5, "dp__delta": 1e-3, "dp__randomness": "seeded"}
    config = experiment(place, "less-noise", cache_dir=str(place / "cache-less"), **noise, dp__clip=0.05)

    def answer(message: Message, context: Context) -> Message | None:
        if domain_of(context) == "books":
            context.run_config["dp.noise_multiplier"] = 0.25
        return answer_honestly(message, context)

    run_in_process(config, answer)
    assert sorted(read_json(run_dir(config) / "secure-sum" / "sum.json")["clients"]) == ["beauty", "camping", "coffee"]
    assert {*read_json(run_dir(config) / "privacy.json")["domains"]} == {"beauty", "camping", "coffee"}
    excluded = read_json(run_dir(config) / "clients.json")["excluded"]
    assert "noise_multiplier 0.25 instead of 0.5" in excluded["books"]


def test_a_client_keeps_to_its_own_policy(place: Path) -> None:
    """Whatever the server asks: no adapter under aggregate-only, no masked values under another policy."""
    flat = experiment(place, "strict")

    def other_policy(policy: str) -> Callable[[Message, Context], Message | None]:
        def answer(message: Message, context: Context) -> Message | None:
            if message.metadata.message_type != records.DESCRIBE:
                context.run_config["privacy.policy"] = policy
            return answer_honestly(message, context)

        return answer

    with pytest.raises(ClientError, match="the message holds no adapter"):
        run_in_process(flat.model_copy(update=_policy(flat, "adapter", "one")), other_policy("aggregate-only"))
    with pytest.raises((ClientError, AggregationError)):
        run_in_process(flat.model_copy(update=_policy(flat, "aggregate-only", "two")), other_policy("adapter"))
    excluded = read_json(Path(flat.output_dir) / "two" / "clients.json")["excluded"]
    assert "the policy 'adapter' keeps the masked update at the client" in excluded["books"]


def _policy(config: ExperimentConfig, policy: str, run_id: str) -> dict[str, Any]:
    return {"privacy": config.privacy.model_copy(update={"policy": policy}), "run_id": run_id}


def test_what_a_client_keeps_for_sums(tmp_path: Path) -> None:
    values = np.arange(5, dtype=np.float32)
    sha256 = keep_values(str(tmp_path), "books", values)
    assert np.array_equal(kept_values(str(tmp_path), "books", sha256), values)
    keep_values(str(tmp_path), "books", values + 1)
    with pytest.raises(ClientError, match=r"holds other values than this run trained. Another run of this client"):
        kept_values(str(tmp_path), "books", sha256)
    with pytest.raises(ClientError, match=r"domain toys: .*values\.npy, what it adds to the sum, cannot be read"):
        kept_values(str(tmp_path), "toys", sha256)
    note_revealed(str(tmp_path), "books", sha256, {"a": 0.5, "b": 0.25, "books": 0.25})
    note_revealed(str(tmp_path), "books", sha256, {"books": 0.25, "b": 0.25, "a": 0.5})  # a sum that was killed
    note_revealed(
        str(tmp_path), "books", sha256, {"books": 0.25, "b": 0.25, "a": 0.5 * (1 + 1e-15)}
    )  # rounded otherwise
    note_revealed(str(tmp_path), "books", "other", {"a": 0.5, "c": 0.25, "books": 0.25})
    for company in ({"a": 0.5, "c": 0.25, "books": 0.25}, {"a": 0.25, "b": 0.5, "books": 0.25}):
        with pytest.raises(PolicyError, match=r"summed before, with a 0\.5, b 0\.25, books 0\.25, and now with a"):
            note_revealed(str(tmp_path), "books", sha256, company)


def test_of_a_run_a_client_shows_one_training(tmp_path: Path) -> None:
    company = {"a": 0.5, "b": 0.25, "books": 0.25}
    config = small_experiment(tmp_path, run_id="run")
    of = [sum_of_run(config, number) for number in (1, 2)]
    of.append(sum_of_run(config.model_copy(update={"run_id": "other"}), 1))
    assert len({*of}) == 3
    note_revealed(str(tmp_path), "books", "first", company, of[0])
    note_revealed(str(tmp_path), "books", "first", company, of[0])  # a sum that was killed
    for other in (*of[1:], ""):
        check_not_shown(str(tmp_path), "books", "second", other)
    check_not_shown(str(tmp_path), "toys", "second", of[0])
    for other_company in (company, {"a": 0.5, "c": 0.25, "books": 0.25}):
        with pytest.raises(PolicyError, match=r"domain books: its training came out otherwise than .* remove /"):
            note_revealed(str(tmp_path), "books", "second", other_company, of[0])
    assert sum_of_run(config.model_copy(update={"run_id": None}), 1) == ""
    for mode in ("user", "domain-local"):  # each release is counted
        noised = config.model_copy(update={"dp": config.dp.model_copy(update={"mode": mode})})
        assert sum_of_run(noised, 1) == ""


@pytest.mark.parametrize("number", [0, 1], ids=["experts", "round"])
def test_what_is_trained_otherwise_after_a_sum_was_shown_is_in_no_second_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    rounds = {"rounds__rule": "weighted-average", "rounds__number": 2} if number else {}
    config = experiment(place, f"otherwise-{number}", cache_dir=str(place / f"cache-otherwise-{number}"), **rounds)

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(
            "sim.app.server.phases.rounds.keep_state" if number else "sim.app.server.phases.secure_sum.keep_mean",
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
    assert all("its training came out otherwise than the one that a sum of this" in why for why in excluded.values())
    run_in_process(resumed)  # trained as before, the same is shown again
    assert (run_dir(config) / DONE).is_file()


def test_messages_of_another_form_are_refused() -> None:
    told = secure_records.boxes_record({"a": b"1", "b": b"2"})
    assert secure_records.read_boxes(told) == {"a": b"1", "b": b"2"}
    facts = told.config_records["facts"]
    for wrong in ({"clients": ["a"]}, {"clients": ["a", "a"]}, {"boxes": ["1", "2"]}, {"boxes": b"12"}):
        spoiled = secure_records.boxes_record({"a": b"1", "b": b"2"})
        spoiled.config_records["facts"].update(wrong)
        with pytest.raises(ClientError, match="use one fedmerge version everywhere"):
            secure_records.read_boxes(spoiled)
    assert json.dumps(list(facts)) == '["clients", "boxes"]'
    for read in (secure_records.read_session, secure_records.read_advertisement, secure_records.read_revealed):
        with pytest.raises(ClientError, match="use one fedmerge version everywhere"):
            read(told)
    with pytest.raises(ClientError, match="its message holds no masked values"):
        secure_records.read_masked(told)
    with pytest.raises(ClientError, match="its message has no record 'facts'"):
        secure_records.read_boxes(secure_records.masked_record(np.zeros(3, np.uint32)))


def test_nodes_with_registered_keys_refuse_keys_that_are_not_signed(tmp_path: Path) -> None:
    session = new_session(dict.fromkeys(TRAIN, 1.0), 4, 1.0)
    (tmp_path / "peers").mkdir()
    contexts, keys = {}, {}
    for number, name in enumerate(TRAIN):
        private = Ed25519PrivateKey.generate()
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        public = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        (tmp_path / "peers" / f"{name}.pub").write_bytes(public + b" someone@example.org\n")
        node: dict[str, bool | float | str] = {
            "identity-key": str(tmp_path / name),
            "peer-keys": str(tmp_path / "peers"),
        }
        contexts[name] = Context(1, number, node, RecordDict(), {})
        answer = answer_advertise(name, secure_records.session_record(session), contexts[name])
        keys[name] = secure_records.read_advertisement(answer)
    told = secure_records.advertisements_record(keys)
    boxes = secure_records.read_boxes(answer_share(told, contexts["beauty"]))
    assert sorted(boxes) == ["books", "camping", "coffee"]
    forged = advertise(session, "coffee")[1]  # by whoever relays
    with pytest.raises(AggregationError, match="found keys that coffee has not signed for this session"):
        answer_share(secure_records.advertisements_record({**keys, "coffee": forged}), contexts["books"])

    with pytest.raises(ClientError, match=r"holds no file NAME\.pub"):
        read_registered(tmp_path / "nowhere")
    (tmp_path / "peers" / "toys.pub").write_text("ssh-rsa AAAA")
    with pytest.raises(ClientError, match=r"toys\.pub: cannot be read as an Ed25519 key .*ssh-keygen -t ed25519"):
        read_registered(tmp_path / "peers")
    with pytest.raises(ClientError, match="nowhere: cannot be read as an Ed25519 key"):
        read_identity(tmp_path / "nowhere")
    (tmp_path / "peers" / "toys.pub").chmod(0o600)
    with pytest.raises(ClientError, match="cannot be read as an Ed25519 key"):
        read_identity(tmp_path / "peers" / "toys.pub")
    (tmp_path / "books").chmod(0o644)
    with pytest.raises(ConfigError, match=r"chmod 600 .*books$"):
        read_identity(tmp_path / "books")
    with pytest.raises(ClientError, match="it has no session of a secure sum: its node was started again"):
        answer_share(told, Context(1, 9, {}, RecordDict(), {}))
