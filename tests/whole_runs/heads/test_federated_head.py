"""Whole runs with a federated head: rounds, resume, secure sums, malformed heads, unseen domains, the ledger."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from in_process import small_experiment

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.lora import layout_of
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.errors import ClientError, RunDirError
from fedmerge.evaluation.sums import FEDERATED_FUSED, FEDERATED_HEAD, LAST_ITEM
from fedmerge.federated.head import fresh_head
from fedmerge.federated.rounds import fresh_seed
from fedmerge.federated.summed import adapter_of_mean
from fedmerge.files import read_json, read_lines, read_sealed
from fedmerge.runs.checkpoints import read_sums
from fedmerge.runs.federated_head import read_federated_head, read_fusion
from fedmerge.runs.folder import DONE
from fedmerge.runs.round_checkpoints import HEAD_ROUNDS, round_records, write_reply, write_state
from fedmerge.runs.secure_sums import REVEALED
from fedmerge.seeding import derive
from sim.app.messages import records, secure_sum
from sim.app.server.phases.rounds import one_by_one
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation

DOMAINS = ("beauty", "books", "coffee", "camping")
TRAIN = DOMAINS[:3]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains, backbone and cache of all runs here."""
    place = tmp_path_factory.mktemp("place")
    small_experiment(place)
    return place


def experiment(place: Path, name: str, **changes: object) -> ExperimentConfig:
    flat = {
        "run_id": name,
        "merge.methods": "average",
        "evaluation.baselines": "",
        "head.kind": "federated",
        "head.inputs": "text",
        "head.hidden_size": 4,
        "head.max_epochs": 1,
        "head.rounds": 2,
        "head.steps": 2,
        "head.rank": 2,
    }
    return small_experiment(place, **flat | {key.replace("__", "."): value for key, value in changes.items()})


def run_dir(config: ExperimentConfig) -> Path:
    return Path(config.output_dir) / str(config.run_id)


def head_of(config: ExperimentConfig) -> Adapter:
    head = read_federated_head(run_dir(config))
    assert head is not None
    return head


def deltas(head: Adapter) -> dict[str, torch.Tensor]:
    return {name: module.delta_weight() for name, module in head.modules.items()}


def assert_close(found: Adapter, expected: dict[str, torch.Tensor], atol: float) -> None:
    of_head = deltas(found)
    assert of_head.keys() == expected.keys()
    assert max(float(delta.abs().max()) for delta in expected.values()) > 100 * atol
    for name, delta in of_head.items():
        torch.testing.assert_close(delta, expected[name], rtol=0, atol=atol)


class Heard:
    """Answers honestly, and keeps what every client sent in the rounds of the head."""

    def __init__(self) -> None:
        self.heads: dict[tuple[str, int], Adapter] = {}
        self.asked: Counter[str] = Counter()
        self.fusions: dict[str, str] = {}

    def __call__(self, message: Message, context: Context) -> Message | None:
        what, domain = message.metadata.message_type, DOMAINS[int(context.node_config["partition-id"])]
        self.asked[what] += 1
        answer = answer_honestly(message, context)
        if what == records.ROUND_HEAD and answer is not None and "adapter" in answer.content:
            number = int(str(message.content.config_records["facts"]["number"]))
            self.heads[domain, number] = records.read_expert(answer.content)[0]
        if what == records.EVALUATE:
            self.fusions[domain] = records.read_evaluation_request(message.content)[0].fusion
        return answer


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[ExperimentConfig, Heard]:
    """An undisturbed run."""
    config, heard = experiment(place, "whole"), Heard()
    run_in_process(config, heard)
    return config, heard


def test_every_domain_evaluates_the_head_and_unseen_domains_choose(whole: tuple[ExperimentConfig, Heard]) -> None:
    config, heard = whole
    run = run_dir(config)
    for domain, sums in read_sums(run, "test").items():
        assert {FEDERATED_HEAD, FEDERATED_FUSED, LAST_ITEM} <= {*sums["masked"].methods}, domain
    assert {*read_sums(run, "heads")} == {*DOMAINS}
    chosen = (read_sealed(run / "choice.json") or {})["per_domain"]
    assert {*chosen} == {*DOMAINS}
    scores = {key: value for key, value in chosen["camping"].items() if key != "serve"}
    assert {*scores} == {"merged", FEDERATED_HEAD, FEDERATED_FUSED, LAST_ITEM}
    above = [row for row in (FEDERATED_HEAD, FEDERATED_FUSED) if scores[row] > max(scores["merged"], scores[LAST_ITEM])]
    assert chosen["camping"]["serve"] in (above or ["merged"])

    # An unseen domain fuses by the mean of what the training domains chose; these choose by themselves.
    told = [json.loads((run / "heads" / f"{name}.json").read_text())["reports"]["federated"] for name in TRAIN]
    for variant, weights in records.read_fusion(heard.fusions["camping"]).items():
        mean = np.mean([list(report["weights"][variant].values()) for report in told], axis=0)
        np.testing.assert_allclose(weights, mean)
        assert (read_fusion(run) or {})[variant] == weights
    assert [heard.fusions[name] for name in TRAIN] == [""] * 3


def test_the_head_has_its_provenance(whole: tuple[ExperimentConfig, Heard]) -> None:
    config, heard = whole
    provenance = read_sealed(run_dir(config) / "head" / "provenance.json") or {}
    assert provenance["label"] == FEDERATED_HEAD
    assert provenance["sha256"] == adapter_sha256(head_of(config))
    assert {*provenance["domains"]} == {*TRAIN}
    assert provenance["parameters"]["rounds"] == len(provenance["rounds"]) == 2
    merge = read_sealed(run_dir(config) / "merged" / "average" / "provenance.json") or {}
    sent = heard.heads["beauty", 1].size_bytes + read_adapter(run_dir(config) / "merged" / "average").size_bytes
    for aggregation in provenance["rounds"]:
        assert aggregation["bytes_down"] == dict.fromkeys(TRAIN, sent)
    assert provenance["item_vectors"] == {"label": "average", "sha256": merge["sha256"]}
    assert max(module.rank for module in head_of(config).modules.values()) == config.head.rank


def test_the_ledger_holds_exactly_the_arrays_of_the_formula(whole: tuple[ExperimentConfig, Heard]) -> None:
    config, _ = whole
    rank = config.head.rank
    rows = [
        row
        for row in pq.read_table(run_dir(config) / "exposure.parquet").to_pylist()
        if row["message"] == records.ROUND_HEAD
    ]
    shapes = {}
    for name, module in head_of(config).modules.items():
        shapes[f"adapter.{name}.lora_A"] = (rank, module.lora_A.shape[1])
        shapes[f"adapter.{name}.lora_B"] = (len(module.lora_B), rank)
    arrays = [row for row in rows if row["name"].startswith("adapter.")]
    assert {(row["name"], row["shape"], row["dtype"]) for row in arrays} == {
        (name, "x".join(map(str, shape)), "float32") for name, shape in shapes.items()
    }
    assert len(arrays) == len(shapes) * len(TRAIN) * config.head.rounds
    for row in arrays:
        shape = shapes[row["name"]]
        assert 0 < row["size_bytes"] - 4 * shape[0] * shape[1] <= 256  # the header of its npy
    others = {row["name"] for row in rows} - shapes.keys()
    assert others == {"facts.report"} | {f"scalings.{name}" for name in head_of(config).modules}


@pytest.mark.parametrize("domains", [DOMAINS[:2], TRAIN])
def test_a_round_is_the_mean_of_the_clients_heads(place: Path, domains: tuple[str, ...]) -> None:
    flat = {"head__rounds": 1, "head__rank": 32}  # as wide as the backbone, so that nothing is cut
    train = {"domains__train": ",".join(domains), "domains__unseen": "", "server__min_train_clients": 2}
    config, heard = experiment(place, f"mean-{len(domains)}", **flat, **train), Heard()
    run_in_process(config, heard)
    assert {*heard.heads} == {(name, 1) for name in domains}
    of_clients = [deltas(head) for head in heard.heads.values()]
    mean = {name: torch.stack([each[name] for each in of_clients]).mean(dim=0) for name in of_clients[0]}
    assert_close(head_of(config), mean, 1e-6)


def test_without_rounds_the_start_is_served_and_nobody_is_asked_to_train_it(place: Path) -> None:
    config, heard = experiment(place, "untrained", head__rounds=0), Heard()
    run_in_process(config, heard)
    assert not heard.asked[records.ROUND_HEAD]
    assert all(not delta.any() for delta in deltas(head_of(config)).values())  # as of a fresh head, whose B are 0
    for domain, sums in read_sums(run_dir(config), "test").items():
        assert {FEDERATED_HEAD, FEDERATED_FUSED} <= {*sums["masked"].methods}, domain
    sent = {row["message"] for row in pq.read_table(run_dir(config) / "exposure.parquet").to_pylist()}
    assert records.ROUND_HEAD not in sent
    assert read_json(run_dir(config) / "head" / "provenance.json")["rounds"] == []


class Killed(BaseException):
    pass


def test_a_run_killed_in_a_round_ends_with_the_same_bytes(
    place: Path, whole: tuple[ExperimentConfig, Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, undisturbed = whole
    killed, heard = config.model_copy(update={"run_id": "killed"}), Heard()
    own: dict[str, Callable[..., None]] = {"write_reply": write_reply, "write_state": write_state}
    for name in ("write_reply", "write_state", "write_reply"):
        with monkeypatch.context() as patched:

            def dying(*arguments: Any, keep: Callable[..., None] = own[name]) -> None:
                keep(*arguments)
                raise Killed

            patched.setattr(one_by_one, name, dying)
            with pytest.raises(Killed):
                run_in_process(killed.model_copy(update={"resume": run_dir(killed).exists()}), heard)
    run_in_process(killed.model_copy(update={"resume": True}), heard)
    assert heard.asked[records.TRAIN_HEAD] == len(TRAIN)
    # A client whose answer had arrived but was not handled when the server died is asked again.
    assert heard.asked[records.ROUND_HEAD] <= undisturbed.asked[records.ROUND_HEAD] + 2 * len(TRAIN)
    for file in ("head/adapter_model.safetensors", "choice.json", "metrics.parquet"):
        assert (run_dir(killed) / file).read_bytes() == (run_dir(config) / file).read_bytes(), file


def test_a_run_resumed_without_a_client_keeps_its_reply(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment(place, "without", server__min_train_clients=2, server__wait_seconds=0.5)

    def dying(run: Path, number: int, domain: str, *arguments: Any) -> None:
        write_reply(run, number, domain, *arguments)
        if domain == "coffee":
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(one_by_one, "write_reply", dying)
        with pytest.raises(Killed):
            run_in_process(config)
    run_in_process(config.model_copy(update={"resume": True}), away={DOMAINS.index("coffee")})
    first, second = ({*record["clients"]} for record in round_records(run_dir(config), HEAD_ROUNDS))
    assert first == {*TRAIN}
    assert second == {"beauty", "books"}


@pytest.mark.parametrize(
    ("lost", "remedy"), [("head/adapter_model.safetensors", "head from"), ("heads/books.json", "heads/books.json from")]
)
def test_what_a_final_choice_was_made_with_is_not_made_again(
    place: Path, whole: tuple[ExperimentConfig, Heard], lost: str, remedy: str
) -> None:
    place = place / lost.partition("/")[0]
    config = whole[0].model_copy(update={"output_dir": str(place), "resume": True})
    shutil.copytree(run_dir(whole[0]), run_dir(config))
    (run_dir(config) / DONE).unlink()
    (run_dir(config) / lost).unlink()
    heard = Heard()
    with pytest.raises(RunDirError, match=rf"Restore {run_dir(config)}/{remedy}"):
        run_in_process(config, heard)
    assert not {records.ROUND_HEAD, records.TRAIN_HEAD, records.EVALUATE} & {*heard.asked}


def test_the_order_of_the_clients_changes_nothing(place: Path, whole: tuple[ExperimentConfig, Heard]) -> None:
    config = experiment(place, "permuted", domains__train="coffee,beauty,books")
    run_in_process(config)
    assert_close(head_of(config), deltas(head_of(whole[0])), 1e-5)


def cut(content: RecordDict) -> None:
    change_one(content, lambda array: array[:1])


def nan(content: RecordDict) -> None:
    change_one(content, lambda array: np.full_like(array, np.nan))


def change_one(content: RecordDict, change: Callable[[Any], Any]) -> None:
    arrays = {name: array.numpy() for name, array in content.array_records["adapter"].items()}
    arrays[min(arrays)] = change(arrays[min(arrays)])
    content["adapter"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})


def garbage(content: RecordDict) -> None:
    content["facts"] = ConfigRecord({"report": "no JSON"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [(cut, "has (lora_A, lora_B, scaling)"), (nan, "NaN or infinite"), (garbage, "its training report is not JSON")],
    ids=["cut", "nan", "garbage"],
)
def test_a_client_with_a_malformed_head_is_excluded_by_name(place: Path, change: Any, reason: str) -> None:
    config = experiment(place, "malformed", server__min_train_clients=2, output_dir=str(place / reason[:3]))

    def answer(message: Message, context: Context) -> Message | None:
        honest = answer_honestly(message, context)
        bad = DOMAINS[int(context.node_config["partition-id"])] == "coffee"
        if honest is not None and bad and message.metadata.message_type == records.ROUND_HEAD:
            change(honest.content)
        return honest

    run_in_process(config, answer)
    excluded = read_json(run_dir(config) / "clients.json")["excluded"]
    assert {*excluded} == {"coffee"}
    assert reason in excluded["coffee"]
    assert [{*record["clients"]} for record in round_records(run_dir(config), HEAD_ROUNDS)] == [{*TRAIN[:2]}] * 2


def test_sums_of_heads_give_the_plain_mean_and_hide_every_head(place: Path) -> None:
    agreements: set[str] = set()

    def listening(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == secure_sum.ADVERTISE:
            agreements.add(secure_sum.read_session(message.content).agreement)
        return answer_honestly(message, context)

    flat = {"domains__train": ",".join(DOMAINS), "domains__unseen": "", "head__rounds": 1, "head__rank": 32}
    own = {"privacy__policy": "aggregate-only", "cache_dir": str(place / "hidden-cache")}
    hidden = experiment(place, "hidden", **flat, **own)
    run_in_process(hidden, listening)
    assert (run_dir(hidden) / DONE).is_file()
    head = head_of(hidden)
    on_disk = [np.load(place / "hidden-cache" / "sums" / name / "values.npy") for name in DOMAINS]
    mean = adapter_of_mean("updates", np.mean(on_disk, axis=0), head, None)
    assert_close(head, deltas(mean), 1e-6)
    facts = [json.loads(text) for text in agreements]
    assert sorted((each.get("what", "adapter"), each["round"]) for each in facts) == [("adapter", 0), ("head", 1)]
    rows = pq.read_table(run_dir(hidden) / "exposure.parquet").to_pylist()
    assert {row["name"] for row in rows if row["message"] == records.ROUND_HEAD} == {"facts.report"}
    assert not any("lora" in row["name"] for row in rows)
    revealed = read_lines(run_dir(hidden) / REVEALED)
    assert [(line.get("what", "adapter"), line["round"]) for line in revealed] == [("adapter", 0), ("head", 1)]
    for name in DOMAINS:
        kept = sorted(file.stem for file in place.glob(f"hidden-cache/sums/{name}/revealed/run-*.json"))
        assert [stem.endswith("-head-1") for stem in kept] == [False, True]


def test_a_client_asked_for_a_head_that_the_run_does_not_name_refuses(place: Path) -> None:
    def other_run(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == records.ROUND_HEAD:
            context.run_config["head.kind"] = "local"
        return answer_honestly(message, context)

    config = experiment(place, "unnamed")
    with pytest.raises(ClientError, match=r"but the run has head\.kind = 'local'"):
        run_in_process(config, other_run)


def test_the_first_head_comes_from_a_seed_and_does_not_travel(whole: tuple[ExperimentConfig, Heard]) -> None:
    config, heard = whole
    seed = fresh_seed(derive(config.seed, "federated head"), 0)
    width = next(iter(head_of(config).modules.values())).lora_A.shape[1]
    first = fresh_head(width, config.head, seed)
    assert all(not module.lora_B.any() for module in first.modules.values())
    assert all(layout_of(head) == layout_of(first) for head in heard.heads.values())
