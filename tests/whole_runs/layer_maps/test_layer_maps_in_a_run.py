"""rmm-style through whole runs: what travels, what is read again, resuming, and refusals at the client."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from flwr.app import Context, Message, RecordDict
from in_process import finish, grid_in, small_experiment, tables_of
from run_folders import unlisted_files

from fedmerge.adapter import adapter_sha256
from fedmerge.bench.grid import Place
from fedmerge.client.coefficients.layer_maps import ndcg_of, validation_readers
from fedmerge.client.evaluate import outcomes
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import ExperimentConfig, to_toml
from fedmerge.device import resolve_compute
from fedmerge.domain.splits import evaluation_examples, examples_of
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.evaluation.ranks import METRICS
from fedmerge.files import read_json, read_lines
from fedmerge.mergerec.cohort import cohort_of
from fedmerge.mergerec.layer_maps.candidates import assemble, layer_candidates
from fedmerge.mergerec.layer_maps.episodes import OTHERS
from fedmerge.runs.checkpoints import merge_folder
from fedmerge.runs.folder import DONE
from sim.app.messages import records
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation

DOMAINS = ("beauty", "books", "coffee")
SEARCH = {
    "merge.methods": "average,rmm-style",
    "privacy.policy": "catalog-private",
    "privacy.min_users": 5,
    "evaluation.validation_users": 12,
    "rmm.reward": "validation",
    "rmm.candidates": "experts,coefficients",
    "rmm.coefficients": "0.3,0.6",
    "rmm.users": 11,
    "rmm.shards": 2,
    "rmm.budget": 15,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


def experiment(place: Path, tmp_path: Path, **changes: object) -> ExperimentConfig:
    return small_experiment(place, **{"output_dir": str(tmp_path), **SEARCH, **changes})


class Asked:
    """An honest client that keeps what it is asked about maps."""

    def __init__(self) -> None:
        self.counts = Counter[tuple[int, str]]()
        self.maps: list[tuple[int, tuple[int, ...], int]] = []

    def __call__(self, message: Message, context: Context) -> Message | None:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == records.LAYER_MAP:
            request, layer_map = records.read_layer_map_request(message.content)
            self.maps.append((client, tuple(layer_map), request.shard))
        self.counts[client, message.metadata.message_type] += 1
        return answer_honestly(message, context)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Asked]:
    folder, asked = tmp_path_factory.mktemp("whole"), Asked()
    run_in_process(experiment(place, folder), asked)
    return folder / "run", asked


def provenance(run: Path) -> dict[str, object]:
    found: dict[str, object] = read_json(merge_folder(run, "rmm-style") / "provenance.json")
    return found


def test_the_cohort_travels_once_and_every_reading_once(whole: tuple[Path, Asked]) -> None:
    run, asked = whole
    assert (run / DONE).is_file()
    assert unlisted_files(run) == []
    assert [asked.counts[client, records.COHORT] for client in range(4)] == [1, 1, 1, 0]
    assert len(asked.maps) == len({*asked.maps})
    search = provenance(run)["search"]
    assert isinstance(search, dict)
    assert len(asked.maps) == 3 * search["readings"]
    assert search["episodes"] == 15
    assert search["start"] == "task-arithmetic 0.6"
    assert len(search["map"]) == 2
    assert 2 <= len(search["read_again"]) <= 11


def test_nothing_leaves_but_numbers_and_sums(whole: tuple[Path, Asked]) -> None:
    run, asked = whole
    rows = [row for row in pq.read_table(run / "exposure.parquet").to_pylist() if row["message"] == records.LAYER_MAP]
    assert {(row["name"], row["dtype"], row["shape"]) for row in rows} == {
        ("facts.ndcg", "float", ""),
        ("facts.num_users", "int", ""),
    }
    assert len(rows) == 2 * len(asked.maps)
    assert {(row["split"], row["noise"]) for row in rows} == {("valid", "none")}
    assert max(row["size_bytes"] for row in rows) <= 24  # the digits of one number


def opened(place: Path, name: str, config: ExperimentConfig) -> LocalDomain:
    backbone = load_backbone(str(place / "backbone"), config.backbone.pooling, resolve_compute("cpu", "float32"))
    return open_domain(place / "domains" / name, backbone, config.text)


def test_the_readings_on_disk_equal_full_ranking_by_the_same_users(place: Path, whole: tuple[Path, Asked]) -> None:
    run, _ = whole
    config = experiment(place, run.parent)
    experts = {name: read_adapter(run / "adapters" / name) for name in DOMAINS}
    candidates = layer_candidates(experts, config.rmm.candidates, config.rmm.coefficients, config.seed)
    (log,) = (run / "learning").glob("rmm-style-*.jsonl")
    lines = list(read_lines(log))
    assert {line["shard"] for line in lines} == {0, 1, OTHERS}
    for name in DOMAINS:
        domain = opened(place, name, config)
        validated = evaluation_examples(domain.interactions, "valid", 12, config.seed)
        readers = validation_readers(domain, validated, 11, 2, config.seed)
        assert [len(readers.at(shard)) for shard in (0, 1, OTHERS)] == [6, 5, 11]
        for line in lines[::4]:
            examples = examples_of(domain.interactions, "valid", readers.at(line["shard"]))
            found = outcomes(domain, {"map": assemble(candidates, line["map"])}, examples)["unmasked"]["map"]
            assert line["sums"][name] == [len(examples), pytest.approx(100 * found[:, METRICS.index("ndcg@10")].sum())]


def test_the_running_mean_after_all_shards_is_the_reward_on_all_users(place: Path, whole: tuple[Path, Asked]) -> None:
    run, _ = whole
    (log,) = (run / "learning").glob("rmm-style-*.jsonl")
    config = experiment(place, run.parent)
    by_map: dict[tuple[int, ...], dict[int, dict[str, list[float]]]] = {}
    for line in read_lines(log):
        by_map.setdefault(tuple(line["map"]), {})[line["shard"]] = line["sums"]
    final = [of_map for of_map in by_map.values() if {0, 1} <= of_map.keys()]
    assert final
    domain = opened(place, "books", config)
    experts = {name: read_adapter(run / "adapters" / name) for name in DOMAINS}
    candidates = layer_candidates(experts, config.rmm.candidates, config.rmm.coefficients, config.seed)
    validated = evaluation_examples(domain.interactions, "valid", 12, config.seed)
    everyone = np.sort(np.concatenate(validation_readers(domain, validated, 11, 2, config.seed).shards))
    start = candidates.start
    number, total = ndcg_of(domain, assemble(candidates, start), everyone, config.seed)
    shards = [by_map[start][shard]["books"] for shard in (0, 1)]
    assert sum(count for count, _ in shards) == number == 11
    assert sum(of_shard for _, of_shard in shards) == pytest.approx(100 * total, abs=1e-12)


def test_the_users_of_the_runs_validation_search_last(place: Path, whole: tuple[Path, Asked]) -> None:
    config = experiment(place, whole[0].parent)
    domain = opened(place, "books", config)
    validated = evaluation_examples(domain.interactions, "valid", 12, config.seed)
    readers = validation_readers(domain, validated, 8, 2, config.seed)
    assert not {*np.concatenate([*readers.shards, readers.others])} & {*validated.users}
    more = validation_readers(domain, validated, 500, 1, config.seed)
    assert not {*more.shards[0]} & {*more.others}
    assert len(more.shards[0]) == len(more.others) == 15


def test_a_killed_run_asks_for_no_reading_twice(
    place: Path, whole: tuple[Path, Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = whole
    config, read, replies = experiment(place, tmp_path), records.read_layer_map, list[int]()

    def killed_at_the_twentieth(content: RecordDict) -> tuple[int, float]:
        replies.append(1)
        if len(replies) == 20:  # in the middle of a reading, of which one client has answered
            raise KeyboardInterrupt
        return read(content)

    monkeypatch.setattr(records, "read_layer_map", killed_at_the_twentieth)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(config)
    (log,) = (tmp_path / "run" / "learning").glob("rmm-style-*.jsonl")
    kept = {(tuple(line["map"]), line["shard"]) for line in read_lines(log)}
    assert len(kept) == 20 // 3
    second = Asked()
    run_in_process(config.model_copy(update={"resume": True}), second)
    assert not kept & {(layer_map, shard) for _, layer_map, shard in second.maps}
    assert len(second.maps) + 3 * len(kept) == len(asked.maps)
    assert provenance(tmp_path / "run") == provenance(run)


def test_a_client_that_answers_nonsense_is_excluded_and_the_search_continues(place: Path, tmp_path: Path) -> None:
    answers = Counter[int]()

    def lying(message: Message, context: Context) -> Message | None:
        client = int(context.node_config["partition-id"])
        answer = answer_honestly(message, context)
        if client == 2 and message.metadata.message_type == records.LAYER_MAP:
            answers[client] += 1
            if answers[client] == 9 and answer is not None:
                return Message(records.layer_map_record(6, 6.5), reply_to=message)
        return answer

    run_in_process(experiment(place, tmp_path, **{"server.min_train_clients": 2}), lying)
    assert "sum of 6.5 over 6 users" in json.dumps(read_json(tmp_path / "run" / "clients.json"))
    (log,) = (tmp_path / "run" / "learning").glob("rmm-style-*.jsonl")
    domains = [sorted(line["sums"]) for line in read_lines(log)]
    assert domains[0] == list(DOMAINS)
    assert domains[-1] == ["beauty", "books"]
    assert (tmp_path / "run" / DONE).is_file()


def refusal(config: ExperimentConfig, content: RecordDict, at: str = records.LAYER_MAP) -> str:
    """Answer an honest run, and ask every client once for a map before the message ``at``; the last refusal."""
    refusals = [""]

    def asked_too_much(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == at:
            wrong = answer_honestly(Message(content, dst_node_id=1, message_type=records.LAYER_MAP), context)
            assert isinstance(wrong, Message)
            refusals.append(str(records.read_error(wrong.content)))
        return answer_honestly(message, context)

    run_in_process(config, asked_too_much)
    return refusals[-1]


def test_the_client_refuses_what_the_run_does_not_ask(place: Path, whole: tuple[Path, Asked], tmp_path: Path) -> None:
    run, _ = whole
    sha256 = cohort_of({name: adapter_sha256(read_adapter(run / "adapters" / name)) for name in DOMAINS})
    few = {"rmm.budget": 1, "rmm.shards": 1}

    def asking(name: str, layer_map: list[int], shard: int = 0, of: str = sha256, changes: Any = None) -> str:
        content = records.layer_map_request_record(records.LayerMapRequest(of, shard), layer_map)
        at = records.TRAIN if changes else records.LAYER_MAP
        return refusal(experiment(place, tmp_path / name, **{**few, **(changes or {})}), content, at)

    assert "unknown candidate 5" in asking("unknown", [0, 5])
    assert "expected 2 numbers from 0 to 4" in asking("short", [0])
    assert "asks for shard 1, expected -1 to 0" in asking("shard", [0, 0], shard=1)
    assert "found no complete cohort" in asking("cohort", [0, 0], of="0" * 64)
    without = {"merge.methods": "average", "until": "train"}
    assert "has no rmm-style with rmm.reward" in asking("none", [0, 0], changes=without)


def test_sums_over_too_few_users_stay(place: Path, tmp_path: Path) -> None:
    """Half of 30 users is fewer than min_users, which only the clients know."""
    config = experiment(place, tmp_path, **{"privacy.min_users": 16, "rmm.users": 40, "rmm.shards": 1})
    with pytest.raises(Exception, match=r"clients|domains"):
        run_in_process(config)
    assert "metric sums over 15 users do not leave" in json.dumps(read_json(tmp_path / "run" / "clients.json"))


def test_a_benchmark_finds_the_same_in_one_process(place: Path, whole: tuple[Path, Asked]) -> None:
    run, asked = whole
    (place / "experiment.toml").write_text(to_toml(experiment(place, place / "runs", **{"merge.methods": "rmm-style"})))
    (place / "bench.toml").write_text(
        'title = "A search"\nexperiment = "experiment.toml"\nseeds = [0]\nbaseline = "rmm-style"\n[[strategy]]\n'
        'name = "rmm-style"\nset = {}\n'
    )
    grid = grid_in(place, "bench")
    finish(grid)
    found = read_json(merge_folder(grid.merges(Place("main", 0, ""), "rmm-style"), "rmm-style") / "provenance.json")
    assert found["search"] == provenance(run)["search"]
    assert found["sha256"] == provenance(run)["sha256"]
    (costs,) = [row for row in tables_of(grid).costs if row["strategy"] == "rmm-style"]
    cohort = sum((run / "adapters" / name / "adapter_model.safetensors").stat().st_size for name in DOMAINS)
    assert costs["bytes_down"] >= 3 * cohort + 4 * 2 * len(asked.maps)
