"""Differential privacy within secure sums: the noise agreed on, and what privacy.json counts."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from flwr.app import Context, Message
from secure_runs import TRAIN, Killed, assert_close, domain_of, experiment, gone_at, merged, run_dir

from fedmerge.files import read_json
from fedmerge.privacy.dp.agreement import LARGEST_ENTRY, largest_entry
from sim.app.messages import secure_sum as secure_records
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secure")


NOISED: list[tuple[str, dict[str, Any]]] = [
    ("user", {"train__negatives": "catalog", "dp__clip": 1.0}),
    ("user", {"train__negatives": "catalog", "dp__clip": 1.0, "rounds__rule": "weighted-average", "rounds__number": 2}),
    ("domain-local", {"dp__clip": 0.05}),
]


@pytest.mark.parametrize(("mode", "changes"), NOISED, ids=["user", "user-rounds", "domain-local"])
def test_differential_privacy_gives_the_same_results_and_budget_with_secure_sums(
    place: Path, mode: str, changes: dict[str, Any]
) -> None:
    """Every client adds its own noise, seeded here; one server sees the adapters, the other does not."""
    noise = {"dp__mode": mode, "dp__noise_multiplier": 0.5, "dp__delta": 1e-3, "dp__randomness": "seeded"}
    noise |= {"dp__accountant": "rdp"}  # quicker
    name = f"{mode}-{len(changes)}"
    reported = {}
    for policy in ("adapter", "aggregate-only"):
        disk = {"cache_dir": str(place / f"cache-{name}-{policy}")}
        config = experiment(place, f"{name}-{policy}", privacy__policy=policy, **noise, **changes, **disk)
        run_in_process(config)
        reported[policy] = read_json(run_dir(config) / "privacy.json")
    if "rounds__rule" not in changes:  # whose second noise depends on the mean that it starts from, here a rounded one
        seen, hidden = (merged(experiment(place, f"{name}-{policy}"), "average") for policy in reported)
        assert_close(hidden, seen)
    assert reported["aggregate-only"] == reported["adapter"]
    assert reported["adapter"]["domains"].keys() == {*TRAIN}
    assert all(of["epsilon"] is not None and of["releases"] for of in reported["adapter"]["domains"].values())
    rows = pq.read_table(run_dir(experiment(place, f"{name}-aggregate-only")) / "exposure.parquet").to_pylist()
    noised = {row["message"] for row in rows if row["noise"] != "none"}
    assert noised == {secure_records.MASKED}


BY_DOMAIN = {"dp__mode": "domain-local", "dp__noise_multiplier": 0.5, "dp__delta": 1e-3, "dp__clip": 0.05}


@pytest.mark.parametrize(("step", "counted"), [("masked", False), ("unmask", True)])
def test_only_clients_in_the_sum_are_counted(place: Path, step: str, counted: bool) -> None:
    config = experiment(place, f"gone-{step}", cache_dir=str(place / f"cache-gone-{step}"), **BY_DOMAIN)
    run_in_process(config, gone_at(step, "books"))
    assert ("books" in read_json(run_dir(config) / "privacy.json")["domains"]) == counted
    assert "books" in read_json(run_dir(config) / "clients.json")["excluded"]


def test_a_sum_shown_to_the_server_and_lost_is_counted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the mean is on disk; on resume books is absent, and coffee lost its expert and retrains."""
    config = experiment(place, "shown", cache_dir=str(place / "cache-shown"), **BY_DOMAIN)

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("sim.app.server.phases.secure_sum.write_mean", killed)
        with pytest.raises(Killed):
            run_in_process(config)
    for folder in (place / "cache-shown" / "experts").glob("*"):
        shutil.rmtree(folder)  # otherwise the cached experts would be shown again in another sum
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


def test_the_range_of_a_sum_is_as_wide_as_the_noise(place: Path) -> None:
    noise: dict[str, Any] = {"dp__mode": "domain-local", "dp__epsilon": 8.0, "dp__delta": 1e-5}
    config = experiment(place, "wide", cache_dir=str(place / "cache-wide"), **noise)
    assert LARGEST_ENTRY == largest_entry(experiment(place, "narrow")) < largest_entry(config)
    assert largest_entry(config) < largest_entry(experiment(place, "one-is-wide", **noise, lora__ranks="books=64"))
    run_in_process(config)
    assert len(read_json(run_dir(config) / "secure-sum" / "sum.json")["clients"]) == len(TRAIN)


def test_a_client_with_another_noise_than_agreed_is_excluded_from_the_sum(place: Path) -> None:
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
