"""Training signals in whole runs: they leave for the merge that needs them, and for no other."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from bad_answers import BAD, Change, bad_client
from flwr.app import Array, ArrayRecord, Message
from in_process import small_experiment

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.files import read_json, seal, write_json
from fedmerge.merging.signals import read_signals
from fedmerge.merging.training_free import merge_adapters
from sim.app.messages import records
from sim.local.in_process import run_in_process

pytestmark = pytest.mark.federation

TRAINED = ("beauty", "books", "coffee")
NUM_MODULES = 4
WEIGHED = {"merge.methods": "average,livar-style", "livar.forms": "per-step,published", "privacy.min_users": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


def experiment(place: Path, tmp_path: Path, **changes: object) -> ExperimentConfig:
    return small_experiment(place, **{"output_dir": str(tmp_path), "domains.unseen": "", **WEIGHED, **changes})


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_in_process(experiment(place, folder))
    return folder / "run"


def sent(run: Path) -> list[tuple[str, str, str]]:
    """Return the rows of the ledger about signals: name, type, shape."""
    rows = pq.read_table(run / "exposure.parquet").to_pylist()
    return [(row["name"], row["dtype"], row["shape"]) for row in rows if row["name"].startswith("signals")]


def experts_of(run: Path) -> dict[str, Adapter]:
    return {domain: read_adapter(run / "adapters" / domain) for domain in TRAINED}


def provenance(run: Path, label: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "merged" / label / "provenance.json").read_text())
    return found


def test_two_numbers_a_module_leave(whole: Path) -> None:
    experts = experts_of(whole)
    assert {len(expert.modules) for expert in experts.values()} == {NUM_MODULES}
    assert sent(whole) == [("signals.modules", "float32", f"{NUM_MODULES}x2")] * len(TRAINED)
    rows = pq.read_table(whole / "exposure.parquet").to_pylist()
    header = len(Array(np.zeros((NUM_MODULES, 2), dtype=np.float32)).data) - 8 * NUM_MODULES
    sizes = {row["size_bytes"] for row in rows if row["name"] == "signals.modules"}
    assert sizes == {8 * NUM_MODULES + header}


def test_the_server_has_what_the_clients_measured(place: Path, whole: Path) -> None:
    for domain in TRAINED:
        (cached,) = (place / "cache" / "experts").glob(f"{domain}-*")
        here, there = (read_json(folder / "training.json") for folder in (cached, whole / "adapters" / domain))
        assert here["signals"] == there["signals"]
        assert np.array(list(there["signals"].values())).min() > 0


def test_the_merges_are_those_of_the_signals(whole: Path) -> None:
    experts = experts_of(whole)
    signals = {domain: read_signals(whole / "adapters" / domain, expert) for domain, expert in experts.items()}
    published: dict[str, Any] = {"per_step": False, "per_entry": False}
    for coefficient in (1.0, 1.8):
        for form, parameters in (("", {}), ("-per_step-0-per_entry-0", published)):
            label = f"livar-style-{coefficient:g}{form}"
            wanted = merge_adapters(experts, "livar-style", signals=signals, coefficient=coefficient, **parameters)
            assert adapter_sha256(read_adapter(whole / "merged" / label)) == adapter_sha256(wanted.adapter)
            record = provenance(whole, label)
            assert record["coefficient_groups"] == sorted(experts["books"].modules)
            sums = np.array(list(record["coefficients"].values())).sum(0)
            assert sums == pytest.approx(coefficient)
            assert "without_signals" not in record


def test_without_the_merge_nothing_more_leaves_and_the_experts_are_the_same(
    place: Path, whole: Path, tmp_path: Path
) -> None:
    run_in_process(experiment(place, tmp_path, **{"merge.methods": "average", "cache_dir": str(tmp_path / "cache")}))
    assert sent(tmp_path / "run") == []
    for domain, expert in experts_of(tmp_path / "run").items():
        assert adapter_sha256(expert) == adapter_sha256(experts_of(whole)[domain])
        report = read_json(tmp_path / "run" / "adapters" / domain / "training.json")
        assert not {"signals", "spread"} & report.keys()
        (cached,) = (tmp_path / "cache" / "experts").glob(f"{domain}-*")  # measured all the same
        assert read_json(cached / "training.json")["signals"]


def test_the_spread_is_one_more_number(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path, **{"livar.spread": True}))
    assert sorted(set(sent(tmp_path / "run"))) == [
        ("signals.modules", "float32", f"{NUM_MODULES}x2"),
        ("signals.spread", "float32", "1"),
    ]
    assert provenance(tmp_path / "run", "livar-style-1-spread-1")["parameters"]["spread"] is True


def test_signals_over_few_users_stay_and_the_client_weighs_as_one_of_equals(place: Path, tmp_path: Path) -> None:
    run_in_process(experiment(place, tmp_path, **{"privacy.min_users": 31, "until": "train"}))
    assert sent(tmp_path / "run") == []
    for domain in TRAINED:
        assert "signals" not in read_json(tmp_path / "run" / "adapters" / domain / "training.json")


def test_an_expert_of_an_earlier_version_is_accepted(place: Path, whole: Path, tmp_path: Path) -> None:
    (cached,) = (place / "cache" / "experts").glob("coffee-*")
    report = read_json(cached / "training.json")
    write_json(cached / "training.json", seal({key: value for key, value in report.items() if key != "signals"}))
    try:
        run_in_process(experiment(place, tmp_path))
    finally:
        write_json(cached / "training.json", seal(report))
    experts = experts_of(tmp_path / "run")
    assert adapter_sha256(experts["coffee"]) == adapter_sha256(experts_of(whole)["coffee"])
    record = provenance(tmp_path / "run", "livar-style-1")
    assert record["without_signals"] == ["coffee"]
    assert record["coefficients"]["coffee"] == pytest.approx([1 / 3] * NUM_MODULES)


def of_signals(values: np.ndarray, name: str = "modules") -> Change:
    def changed(question: Message, honest: Message) -> Message:
        honest.content[records.SIGNALS] = ArrayRecord({name: Array(values)})
        return honest

    return changed


@pytest.mark.parametrize(
    ("values", "name", "reason"),
    [
        (np.ones((NUM_MODULES + 1, 2), np.float32), "modules", r"shape \(5, 2\), expected \(4, 2\)"),
        (np.full((NUM_MODULES, 2), np.nan, np.float32), "modules", "finite and not negative"),
        (-np.ones((NUM_MODULES, 2), np.float32), "modules", "finite and not negative"),
        (np.ones((NUM_MODULES, 2)), "modules", "float64 of shape"),
        (np.ones((NUM_MODULES, 2), np.float32), "users", r"hold \['users'\]"),
    ],
)
def test_malformed_signals_exclude_their_client(
    place: Path, tmp_path: Path, values: np.ndarray, name: str, reason: str
) -> None:
    run_in_process(experiment(place, tmp_path, until="train"), bad_client(records.TRAIN, of_signals(values, name)))
    excluded = read_json(tmp_path / "run" / "clients.json")["excluded"]
    assert excluded.keys() == {BAD}
    assert re.search(reason, str(excluded[BAD]))


def test_signals_inside_the_report_are_not_believed(place: Path, tmp_path: Path) -> None:
    def forged(question: Message, honest: Message) -> Message:
        facts = honest.content.config_records["facts"]
        facts["report"] = json.dumps({**json.loads(str(facts["report"])), "signals": {"x": [1e30, "a"]}, "spread": 7})
        del honest.content[records.SIGNALS]
        return honest

    run_in_process(experiment(place, tmp_path, until="train"), bad_client(records.TRAIN, forged))
    assert not {"signals", "spread"} & read_json(tmp_path / "run" / "adapters" / BAD / "training.json").keys()
