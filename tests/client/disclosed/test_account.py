"""The account of ε over all runs, and noised metric sums that are released once."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedmerge.client.disclosed.account import ACCOUNT_FILE, Entry, charge, entries_of, read_account, total_epsilon
from fedmerge.client.disclosed.sums import Sums, count_models, release_sums_once
from fedmerge.errors import PolicyError
from fedmerge.evaluation.ranks import per_user_metrics
from fedmerge.privacy.dp.accountant import spent_epsilon
from fedmerge.privacy.dp.randomness import source
from fedmerge.privacy.dp.releases import Release
from fedmerge.privacy.dp.replacement import replaced_epsilon
from fedmerge.privacy.metric_sums import disclose

TRAINING = Entry("a1", "monday", "expert", "user", Release(1.1, 0.05, 200))
DELTA = 1e-5


def test_the_total_is_that_of_all_releases_together(tmp_path: Path) -> None:
    other = replace(TRAINING, key="b2", run="tuesday")
    sums = Entry("monday: sums", "monday", "metric sums on test", "user", Release(4.0, 1.0, 1, replaced=1.0))
    whole = replace(TRAINING, key="c3", unit="domain", release=Release(6.0, 1.0, 1, replaced=1.0))
    for entry in (TRAINING, other, sums, whole):
        charge(tmp_path, [entry], None, None)
    account = read_account(tmp_path)
    assert account == [TRAINING, other, sums, whole]
    total = total_epsilon(account, DELTA)
    together = [Release(1.1, 0.05, 400), Release(4.0, 1.0, 1)]
    about_users = [*together, Release(6.0, 1.0, 1)]  # a release about the whole domain is about each of its users
    assert total["user"] == pytest.approx(spent_epsilon(about_users, DELTA, "rdp"))
    assert (
        total["user"]
        > spent_epsilon(together[:1], DELTA, "rdp")
        > spent_epsilon([Release(1.1, 0.05, 200)], DELTA, "rdp")
    )
    assert total["domain"] == pytest.approx(spent_epsilon([Release(6.0, 1.0, 1)], DELTA, "rdp"))


def test_the_same_release_costs_once_and_the_limit_holds_over_runs(tmp_path: Path) -> None:
    """The auditor's four runs with max_epsilon = 1 each."""
    one = total_epsilon([TRAINING], DELTA)["user"]
    for _ in range(3):
        charge(tmp_path, [TRAINING], 1.5 * one, DELTA)
    assert len(read_account(tmp_path)) == 1
    charge(tmp_path, [replace(TRAINING, key="b2", run="tuesday")], 1.5 * one, DELTA)
    many = [replace(TRAINING, key=f"run {number}", run=f"run {number}") for number in range(10)]
    with pytest.raises(PolicyError) as caught:
        charge(tmp_path, many, 1.5 * one, DELTA)
    assert f"{1.5 * one:g}" in str(caught.value)
    assert total_epsilon(read_account(tmp_path), DELTA)["user"] <= 1.5 * one


def test_an_account_that_is_damaged_or_cannot_be_written_releases_nothing(tmp_path: Path) -> None:
    charge(tmp_path, [TRAINING], None, None)
    with (tmp_path / ACCOUNT_FILE).open("a") as file:
        file.write('\n{"key": "torn')  # by a kill: it was not sent
    assert read_account(tmp_path) == [TRAINING]
    with (tmp_path / ACCOUNT_FILE).open("a") as file:
        file.write('\n{"key": "x"}\n')
    with pytest.raises(PolicyError):
        charge(tmp_path, [replace(TRAINING, key="b2")], None, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyError):
        charge(tmp_path / "file" / "folder", [TRAINING], None, None)


def test_a_limit_may_be_about_one_user_replaced(tmp_path: Path) -> None:
    sums = Entry("monday: sums", "monday", "metric sums on test", "user", Release(4.0, 1.0, 1, replaced=1.0))
    releases = [Release(1.1, 0.05, 200), Release(4.0, 1.0, 1, replaced=1.0)]
    total = total_epsilon([TRAINING, sums], DELTA, "replace")["user"]
    assert total == pytest.approx(replaced_epsilon(releases, DELTA))
    added = total_epsilon([TRAINING, sums], DELTA)["user"]
    assert total > added
    limit = (total + added) / 2
    charge(tmp_path / "added", [TRAINING, sums], limit, DELTA)
    with pytest.raises(PolicyError, match=r"replace"):
        charge(tmp_path / "replaced", [TRAINING, sums], limit, DELTA, "replace")
    assert read_account(tmp_path / "replaced") == []


def test_entries_of_a_training_report() -> None:
    told = {"unit": "user", "noise_multiplier": 1.1, "sample_rate": 0.05, "steps": 200, "clip": 1.0, "num_units": 9}
    assert list(entries_of(told, "a1", "monday", "expert")) == [TRAINING]
    assert list(entries_of(None, "a1", "monday", "expert")) == []


def noised(seed: int = 0) -> Sums:
    ranks = per_user_metrics(np.arange(1, 41))
    found = {"average": ranks, "expert": ranks[::-1].copy()}
    return disclose({"unmasked": found, "masked": found}, "noised", 20, 4.0, source("seeded", seed, "test"))


def test_the_same_question_is_answered_with_the_same_noise(tmp_path: Path) -> None:
    charged: list[str] = []
    first = release_sums_once(tmp_path, "monday", {"split": "test"}, 2, charged.append, lambda: noised(0))
    again = release_sums_once(tmp_path, "monday", {"split": "test"}, 2, charged.append, lambda: noised(1))
    assert len(charged) == 1
    for variant in first:
        assert np.array_equal(first[variant].sums, again[variant].sums, equal_nan=True)
    release_sums_once(tmp_path, "monday", {"split": "valid"}, 2, charged.append, lambda: noised(2))
    with pytest.raises(PolicyError) as caught:
        release_sums_once(tmp_path, "monday", {"split": "test", "more": 1}, 2, charged.append, lambda: noised(3))
    assert "2 answers" in str(caught.value)
    release_sums_once(tmp_path, "tuesday", {"split": "test"}, 2, charged.append, lambda: noised(4))
    assert len(charged) == len(set(charged)) == 3


def test_nothing_is_drawn_before_it_is_charged(tmp_path: Path) -> None:
    def refuse(key: str) -> None:
        raise PolicyError("no budget")

    with pytest.raises(PolicyError):
        release_sums_once(tmp_path, "monday", {}, 2, refuse, lambda: pytest.fail("drawn without being charged"))
    assert not list(tmp_path.rglob("*.json"))


def test_damaged_sums_are_never_sent(tmp_path: Path) -> None:
    release_sums_once(tmp_path, "monday", {}, 2, lambda key: None, noised)
    (path,) = tmp_path.rglob("*.json")
    record = json.loads(path.read_text())
    record["unmasked"]["sums"][0][2] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(PolicyError):
        release_sums_once(tmp_path, "monday", {}, 2, lambda key: None, noised)


def test_the_models_of_a_run_are_bounded(tmp_path: Path) -> None:
    count_models(tmp_path, "monday", {"a", "b"}, 3)
    count_models(tmp_path, "monday", {"b", "c"}, 3)
    with pytest.raises(PolicyError) as caught:
        count_models(tmp_path, "monday", {"d"}, 3)
    assert "max_models = 3" in str(caught.value)
    assert "4 models" in str(caught.value)
    count_models(tmp_path, "monday", {"a", "b", "c"}, 3)
    count_models(tmp_path, "tuesday", {"d", "e", "f"}, 3)
