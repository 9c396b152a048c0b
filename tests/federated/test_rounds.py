"""Federations of several rounds through both Flower apps, in one process."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from flwr.app import Context, Message
from in_process import small_experiment

import sim.app.server.phases.rounds.one_by_one
from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.cli import main
from fedmerge.client.local_domain import open_domain
from fedmerge.client.training.expert import train_expert
from fedmerge.client.training.round import RoundTask, settings_of_round, train_round
from fedmerge.config import ExperimentConfig, MergeMethod, RoundRule, Train
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import ClientError, ConfigError
from fedmerge.federated.rounds import aggregate, fresh_seed, initial_state
from fedmerge.federated.rules import RULES, check_rounds
from fedmerge.files import read_json
from fedmerge.runs.folder import DONE
from fedmerge.runs.round_checkpoints import round_records, write_reply, write_state
from sim.app.client.node import cached_backbone
from sim.app.messages import records
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation

TRAIN = ("beauty", "books", "coffee")
NPY_HEADER = 128  # bytes of it before the values of an array that travels


def rounds_experiment(place: Path, name: str, rule: str, **changes: object) -> ExperimentConfig:
    flat = {"run_id": name, "rounds.rule": rule, "rounds.number": 2, "privacy.min_users": 2}
    return small_experiment(place, **flat | {key.replace("__", "."): value for key, value in changes.items()})


def run_dir(config: ExperimentConfig) -> Path:
    return Path(config.output_dir) / str(config.run_id)


def final(config: ExperimentConfig) -> Adapter:
    (folder,) = (run_dir(config) / "merged").iterdir()
    return read_adapter(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rounds")


def test_the_rules_of_the_configuration_are_those_of_the_library() -> None:
    assert set(get_args(RoundRule)) == set(RULES)
    assert not set(get_args(RoundRule)) & set(get_args(MergeMethod))


@pytest.mark.parametrize("rule", ["fedit", "hetlora", "fedadam", "ties", "mergerec"])  # others: below
def test_rounds_run_to_their_end(place: Path, rule: str) -> None:
    config = rounds_experiment(place, rule, rule)
    run_in_process(config)
    folder = run_dir(config)
    assert (folder / DONE).is_file()
    made = round_records(folder)
    assert [record["aggregation"]["rule"] for record in made] == [rule, rule]
    assert all(set(record["clients"]) == {*TRAIN} for record in made)
    assert sum(record["clients"]["books"]["steps"] for record in made) == config.train.max_steps
    assert not list((folder / "rounds").glob("[0-9]/"))
    report = (folder / "report.txt").read_text()
    assert f"{rule} 2 rounds" in report
    assert read_json(folder / "choice.json")["served"] == f"{rule} 2 rounds"
    assert any(module.lora_B.abs().max() > 0 for module in final(config).modules.values())


def test_a_run_of_rounds_is_shown_and_reported(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = rounds_experiment(place, "shown", "flora", rounds__number=1)
    run_in_process(config)
    assert main(["show", str(run_dir(config))]) == 0
    assert "flora 1 round" in capsys.readouterr().out
    assert main(["report", str(run_dir(config))]) == 0
    page = (run_dir(config) / "report.html").read_text()
    assert "flora 1 round" in page
    assert "Rounds, loss of the clients" in page
    assert main(["merge", str(run_dir(config))]) == 1
    assert "no adapter in" in capsys.readouterr().err


def test_a_run_that_ends_with_its_experts_can_be_merged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_experiment(place, **{"run_id": "experts", "until": "train"})
    run_in_process(config)
    assert (run_dir(config) / DONE).is_file()
    assert not (run_dir(config) / "merged").exists()
    assert main(["show", str(run_dir(config))]) == 0
    assert main(["merge", str(run_dir(config)), "--set", "merge.methods=average"]) == 0
    page = (run_dir(config) / "report.html").read_text(encoding="utf-8")
    assert "The experts are trained; nothing was merged or evaluated" in page
    assert "Experts, loss" in page
    assert main(["report", str(run_dir(config))]) == 0
    assert (run_dir(config) / "report.html").read_text(encoding="utf-8") == page


def test_one_round_of_flora_is_what_its_clients_trained_averaged(place: Path) -> None:
    config = rounds_experiment(place, "one", "flora", rounds__number=1)
    run_in_process(config)
    deltas = {}
    for name in TRAIN:
        backbone = cached_backbone(config.backbone, "cpu", "float32")
        domain = open_domain(Path(config.domains.root) / name, backbone, config.text)
        task = RoundTask(1, 1, fresh_adapter(backbone, config.lora, fresh_seed(config.seed, 0)))
        adapter, _ = train_round(domain, config.lora, config.train, config.seed, task)
        deltas[name] = {key: module.delta_weight() for key, module in adapter.modules.items()}
    for key, module in final(config).modules.items():
        mean = sum(deltas[name][key] for name in TRAIN) / 3
        torch.testing.assert_close(module.delta_weight(), mean, rtol=1e-4, atol=1e-6)


class Killed(BaseException):
    pass


def test_a_killed_federation_goes_on_and_ends_as_one_that_was_not(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rounds_experiment(place, "whole", "flexlora", lora__ranks="books=1,coffee=3")
    run_in_process(whole)
    asked: list[str] = []

    def counting(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == "train":
            asked.append(str(context.node_config["partition-id"]))
        return answer_honestly(message, context)

    killed = whole.model_copy(update={"run_id": "killed"})
    own = {"write_reply": write_reply, "write_state": write_state}
    for name, call in (("write_reply", 2), ("write_state", 1), ("write_reply", 2), ("write_state", 1)):
        with monkeypatch.context() as patched:
            calls = iter(range(1, 9))

            def dying(*arguments: Any, keep: Any = own[name], call: int = call, calls: Any = calls) -> None:
                keep(*arguments)
                if next(calls) == call:
                    raise Killed

            patched.setattr(sim.app.server.phases.rounds.one_by_one, name, dying)
            with pytest.raises(Killed):
                run_in_process(killed.model_copy(update={"resume": run_dir(killed).exists()}), counting)
    run_in_process(killed.model_copy(update={"resume": True}), counting)
    assert adapter_sha256(final(killed)) == adapter_sha256(final(whole))
    assert (run_dir(killed) / "metrics.parquet").read_bytes() == (run_dir(whole) / "metrics.parquet").read_bytes()
    assert len(asked) <= 2 * 3 + 2  # a client that was asked when the server died is asked again
    sizes = {name: round_records(run_dir(whole))[0]["aggregation"]["bytes_up"][name] for name in TRAIN}
    assert sizes["coffee"] == 3 * sizes["books"] == 1.5 * sizes["beauty"]


def test_a_client_that_fails_is_left_out_and_a_fraction_is_drawn(place: Path) -> None:
    def failing(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            return Message(records.error_record("ValueError: broken", "beauty"), reply_to=message)
        return answer_honestly(message, context)

    config = rounds_experiment(place, "failing", "weighted-average")
    run_in_process(config, failing)
    assert [set(record["clients"]) for record in round_records(run_dir(config))] == [{"books", "coffee"}] * 2
    excluded = read_json(run_dir(config) / "clients.json")["excluded"]
    assert list(excluded) == ["beauty"]

    config = rounds_experiment(place, "part", "weighted-average", rounds__number=4, rounds__fraction=0.5)
    run_in_process(config)
    drawn = [tuple(record["clients"]) for record in round_records(run_dir(config))]
    assert all(len(each) == 2 for each in drawn)
    assert len(set(drawn)) > 1

    config = rounds_experiment(place, "drawn", "weighted-average", seed=2, rounds__number=3, rounds__fraction=0.3)
    run_in_process(config, failing)
    drawn = [tuple(record["clients"]) for record in round_records(run_dir(config))]
    assert len(drawn) == 3
    assert {*drawn} <= {("books",), ("coffee",)}  # beauty was drawn first: another in its place
    assert list(read_json(run_dir(config) / "clients.json")["excluded"]) == ["beauty"]


@pytest.mark.parametrize("policy", ["adapter+catalog", "aggregate-only"])
def test_where_who_was_drawn_does_not_come_back_others_are_drawn(
    place: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    flat: dict[str, object] = {
        "server__wait_seconds": 0.5,
        "seed": 2,
        "rounds__number": 3,
        "rounds__fraction": 0.3,
        "privacy__policy": policy,
    }
    if policy == "aggregate-only":
        flat |= {"rounds__fraction": 0.99, "domains__train": "beauty,books,coffee,camping", "domains__unseen": ""}
    config = rounds_experiment(place, f"gone-{policy.partition('+')[0]}", "weighted-average", **flat)

    def die(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(sim.app.server.phases.rounds.one_by_one, "ask", die)
        with pytest.raises(Killed):
            run_in_process(config)
    assert "beauty" in read_json(run_dir(config) / "rounds" / "drawn.json")["domains"]

    run_in_process(config.model_copy(update={"resume": True}), away={0})
    trained = [set(record["clients"]) for record in round_records(run_dir(config))]
    assert len(trained) == 3
    assert "beauty" not in set.union(*trained)


@pytest.mark.parametrize(("rule", "joins"), [("flora", True), ("weighted-average", True), ("mergerec", False)])
def test_who_comes_late_takes_part_from_the_next_round(place: Path, rule: str, joins: bool) -> None:
    away = {TRAIN.index("coffee")}

    def answer(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == "train":
            away.clear()
        return answer_honestly(message, context)

    config = rounds_experiment(place, f"late-{rule}", rule, server__wait_seconds=0.5)
    run_in_process(config, answer, away=away)
    first, second = ({*record["clients"]} for record in round_records(run_dir(config)))
    assert first == {"beauty", "books"}
    assert second == ({*TRAIN} if joins else first)
    told = (run_dir(config) / "run.log").read_text()
    assert ("take part from this round on: coffee" in told) == joins
    assert ("evaluated as unseen: coffee" in told) != joins
    rows = pq.read_table(run_dir(config) / "metrics.parquet").to_pylist()
    roles = {(row["split"], row["role"]) for row in rows if row["domain"] == "coffee"}
    assert roles == ({("valid", "train"), ("test", "train")} if joins else {("test", "unseen")})


def first_start(config: ExperimentConfig) -> Adapter:
    """Return the common start of all clients."""
    backbone = cached_backbone(config.backbone, "cpu", "float32")
    return fresh_adapter(backbone, config.lora, fresh_seed(config.seed, 0))


def test_of_ffa_b_alone_travels_both_ways(place: Path) -> None:
    asked: dict[int, list[dict[str, Any]]] = {1: [], 2: []}

    def listening(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == "train":
            request, _, base = records.read_round_request(message.content, lambda seed: first_start(config))
            assert (request.fresh_seed, base) == (fresh_seed(config.seed, 0), None)
            asked[request.number] += [row for row in records.contents(message.content) if "lora" in row["name"]]
        return answer_honestly(message, context)

    config = rounds_experiment(place, "ffa", "ffa-lora")
    run_in_process(config, listening)
    made = round_records(run_dir(config))
    for record in made:
        assert record["aggregation"]["error"] == 0
        assert record["aggregation"]["bytes_up"]["books"] < final(config).size_bytes

    def sizes(rows: list[dict[str, Any]]) -> int:
        assert all(row["name"].endswith(".lora_B") for row in rows)
        return sum(row["size_bytes"] - NPY_HEADER for row in rows)

    assert asked[1] == []
    assert sizes(asked[2]) == sum(made[0]["aggregation"]["bytes_down"].values())
    ledger = pq.read_table(run_dir(config) / "exposure.parquet").to_pylist()
    for name in TRAIN:
        arrays = [row for row in ledger if row["domain"] == name and row["dtype"] == "float32"]
        assert {row["message"] for row in arrays} == {"train"}
        assert len(arrays) == 2 * len(first_start(config).modules)
        assert sizes(arrays) == sum(record["aggregation"]["bytes_up"][name] for record in made)
    assert not any("lora_A" in row["name"] for row in ledger)


def test_rounds_of_ffa_are_those_of_whole_adapters(place: Path) -> None:
    config = rounds_experiment(place, "whole-ffa", "ffa-lora")
    run_in_process(config)
    start = first_start(config)
    state = initial_state(dict.fromkeys(TRAIN, start))
    for number in (1, 2):
        local = {}
        for name in TRAIN:
            backbone = cached_backbone(config.backbone, "cpu", "float32")
            domain = open_domain(Path(config.domains.root) / name, backbone, config.text)
            task = RoundTask(number, 2, state.starts[name], trained="B")
            local[name], _ = train_round(domain, config.lora, config.train, config.seed, task)
        state = aggregate("ffa-lora", state, local)
    for key, module in final(config).modules.items():
        assert torch.equal(module.lora_A, start.modules[key].lora_A)
        torch.testing.assert_close(module.lora_B, state.adapter.modules[key].lora_B, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stubborn", ["too-much", "too-little"])
def test_who_does_not_send_b_alone_is_left_out_by_name(place: Path, stubborn: str) -> None:
    def answer(message: Message, context: Context) -> Message | None:
        answer = answer_honestly(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            assert answer is not None
            adapter, report = records.read_expert(answer.content, frozen=first_start(config))
            if stubborn == "too-much":
                return Message(records.expert_record(adapter, report), reply_to=message)
            less = Adapter(dict(list(adapter.modules.items())[1:]))
            return Message(records.expert_record(less, report, only_B=True), reply_to=message)
        return answer

    config = rounds_experiment(place, stubborn, "ffa-lora")
    run_in_process(config, answer)
    excluded = read_json(run_dir(config) / "clients.json")["excluded"]
    assert set(excluded) == {"books"}
    assert "LayoutMismatchError: the adapter's lora_B was to travel alone, since lora_A is frozen" in excluded["books"]
    first = min(first_start(config).modules)
    found = f"unexpected ['{first}.lora_A'" if stubborn == "too-much" else f"lacks ['{first}.lora_B'"
    assert found in excluded["books"]
    assert [set(record["clients"]) for record in round_records(run_dir(config))] == [{"beauty", "coffee"}] * 2


def test_a_noised_b_is_released_once_though_the_server_died(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes: dict[tuple[int, str], list[str]] = {}

    def listening(message: Message, context: Context) -> Message | None:
        answer = answer_honestly(message, context)
        if message.metadata.message_type == "train" and answer is not None:
            request, *_ = records.read_round_request(message.content, lambda seed: first_start(config))
            key = (request.number, TRAIN[int(context.node_config["partition-id"])])
            adapter, _ = records.read_expert(answer.content, frozen=first_start(config))
            hashes.setdefault(key, []).append(adapter_sha256(adapter))
        return answer

    noise: dict[str, object] = {"dp__mode": "user", "dp__noise_multiplier": 2.0, "dp__delta": 1e-3}
    noise |= {"dp__accountant": "rdp", "train__negatives": "catalog"}
    config = rounds_experiment(place, "noised-ffa", "ffa-lora", **noise)
    assert config.dp.randomness == "system"  # trained anew it would differ

    def dying(run_dir: Path, number: int, *arguments: Any) -> None:
        if number == 2:
            raise Killed
        write_reply(run_dir, number, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(sim.app.server.phases.rounds.one_by_one, "write_reply", dying)
        with pytest.raises(Killed):
            run_in_process(config, listening)
    run_in_process(config.model_copy(update={"resume": True}), listening)
    assert (run_dir(config) / DONE).is_file()
    assert [set(record["clients"]) for record in round_records(run_dir(config))] == [{*TRAIN}] * 2
    assert {*hashes} == {(number, name) for number in (1, 2) for name in TRAIN}
    assert max(map(len, hashes.values())) == 2
    assert all(len(set(each)) == 1 for each in hashes.values())
    assert len(set.union(*map(set, hashes.values()))) == 2 * len(TRAIN)
    ledger = pq.read_table(run_dir(config) / "exposure.parquet").to_pylist()
    assert any("lora_B" in row["name"] for row in ledger)
    assert not any("lora_A" in row["name"] for row in ledger)


def test_few_users_tell_no_loss_and_weigh_by_their_number(place: Path) -> None:
    sent: list[float | None] = []

    def listening(message: Message, context: Context) -> Message | None:
        answer = answer_honestly(message, context)
        if message.metadata.message_type == "train" and answer is not None:
            sent.append(records.read_expert(answer.content)[1]["loss"])
        return answer

    config = rounds_experiment(place, "few", "weighted-average", rounds__weights="users", privacy__min_users=30)
    run_in_process(config, listening)
    assert len(sent) == 6
    assert None not in sent
    (first, _) = round_records(run_dir(config))
    assert first["aggregation"]["client_weights"] == pytest.approx(dict.fromkeys(TRAIN, 1 / 3))
    sent.clear()
    with pytest.raises(ClientError):  # nobody's metric sums may leave either
        run_in_process(rounds_experiment(place, "fewer", "weighted-average", privacy__min_users=31), listening)
    assert sent == [None] * 6


def test_the_steps_of_all_rounds_are_those_of_one_training(place: Path) -> None:
    task = RoundTask(1, 3, Adapter({}))
    settings = Train(max_steps=10, max_epochs=6)
    shares = [settings_of_round(settings, RoundTask(number, 3, task.start)) for number in (1, 2, 3)]
    assert [share.max_steps for share in shares] == [3, 3, 4]
    assert [share.max_epochs for share in shares] == [2, 2, 2]
    assert [settings_of_round(Train(max_steps=2), RoundTask(n, 3, task.start)).max_steps for n in (1, 2, 3)] == [1] * 3


def test_proximal_training_stays_nearer_to_where_it_began(place: Path) -> None:

    config = rounds_experiment(place, "unused", "fedit")
    backbone = cached_backbone(config.backbone, "cpu", "float32")
    domain = open_domain(Path(config.domains.root) / "books", backbone, config.text)
    start = fresh_adapter(backbone, config.lora, 3)

    def distance(proximal: float) -> float:
        task = RoundTask(1, 1, start, proximal=proximal)
        trained, _ = train_round(domain, config.lora, config.train, 0, task)
        return sum(
            float(
                (module.lora_B - start.modules[name].lora_B).square().sum()
                + (module.lora_A - start.modules[name].lora_A).square().sum()
            )
            for name, module in trained.modules.items()
        )

    assert distance(1000.0) < distance(0.0)


def test_one_round_from_a_fresh_adapter_trains_what_an_expert_trains_apart_from_its_draws(place: Path) -> None:

    config = rounds_experiment(place, "unused", "fedit", train__samples="last", train__batch_size=30)
    backbone = cached_backbone(config.backbone, "cpu", "float32")
    domain = open_domain(Path(config.domains.root) / "books", backbone, config.text)
    settings = config.train.model_copy(update={"validate_every_steps": 4})
    task = RoundTask(1, 1, fresh_adapter(backbone, config.lora, 0))
    trained, report = train_round(domain, config.lora, settings, 0, task)
    assert report.loss is not None
    _, expert = train_expert(domain, config.lora, settings, 0)
    assert report.steps == expert.steps
    assert report.loss == pytest.approx(expert.validations[-1].loss, rel=0.2)
    assert np.isfinite(report.loss)
    assert set(trained.modules) == set(task.start.modules)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds__parameters": "num_malicious=1"}, r"'fedit'.*num_malicious"),
        ({"rounds__rule": "krum", "rounds__parameters": "num_malicious=-1"}, r"'krum': num_malicious"),
        ({"rounds__rule": "trimmed-mean"}, r"trim = 0\.2.* 3 clients"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_starts(
    place: Path, changes: dict[str, str], message: str
) -> None:
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    config = small_experiment(place, **{"rounds.rule": "fedit", **flat})
    with pytest.raises(ConfigError, match=message):
        check_rounds(config.rounds, len(config.domains.train))
    with pytest.raises(ConfigError, match=message):  # plain Flower
        run_in_process(config.model_copy(update={"run_id": f"refused-{config.rounds.rule}"}))


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"rounds.rule": "fedavg"}, r"rounds.rule"),
        ({"rounds.parameters": "trim=0.1,trim=0.2"}, r"rounds\b.*parameters.*trim"),
        ({"rounds.parameters": "trim"}, r"rounds.parameters"),
        ({"lora.ranks": "books=4,books=5"}, r"ranks.*books"),
        ({"lora.ranks": "bokks=4"}, r"lora\.ranks.*bokks.*domains\.train"),
        ({"rounds.rule": "mergerec", "privacy.policy": "adapter"}, r"rounds\.rule.*mergerec"),
    ],
)
def test_wrong_settings_are_refused(place: Path, flat: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_experiment(place, **flat)
