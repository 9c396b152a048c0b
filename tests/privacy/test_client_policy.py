"""An organisation's own policy file: read, refused where wrong, and what it refuses."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedmerge.config import Head, Train, from_flat
from fedmerge.errors import ConfigError, PolicyError
from fedmerge.privacy.client_policy import (
    DEFAULT_POLICY_TOML,
    ClientPolicy,
    check_message_size,
    check_replacement_is_allowed,
    check_run_is_allowed,
    read_client_policy,
)

PRIVATE = {"privacy.policy": "catalog-private"}
SUMMED = {"privacy.policy": "aggregate-only", "merge.methods": "average", "privacy.metrics": "suppressed"}
SEARCHED = {**PRIVATE, "merge.methods": "rmm-style", "rmm.reward": "validation"}
SUPPRESSED = {"privacy.metrics": "suppressed"}
DP_RUN = {"dp.mode": "user", "dp.delta": 1e-6, "train.negatives": "catalog", "train.max_epochs": "none"}


def test_the_file_that_is_handed_out_names_every_key_with_its_default(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(DEFAULT_POLICY_TOML)
    assert tomllib.loads(DEFAULT_POLICY_TOML).keys() == ClientPolicy.model_fields.keys()
    assert read_client_policy(tmp_path / "policy.toml") == ClientPolicy()
    (tmp_path / "empty.toml").write_text("")
    assert read_client_policy(tmp_path / "empty.toml") == ClientPolicy()


def test_lists_may_be_written_either_way(tmp_path: Path) -> None:
    for text in ('policies = "adapter"', 'policies = ["adapter"]'):
        (tmp_path / "policy.toml").write_text(text)
        assert read_client_policy(tmp_path / "policy.toml").policies == ("adapter",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_users = 0\nmax_message_bytes = 12", "(?s)min_users: .*(found 0).*max_message_bytes: .*(found 12)"),
        ("min_user = 5", "policies, min_users, .*\n  min_user: "),
        ('policies = "everything"', "policies.0: .*(found 'everything')"),
        ("policies = ''", "policies: "),
        ("real_users = maybe", "TOML"),
        ("max_epsilon = 0", "max_epsilon: .* 0"),
    ],
)
def test_a_wrong_file_sends_nothing(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_client_policy(tmp_path / "policy.toml")
    assert str(caught.value).startswith(f"policy file {tmp_path / 'policy.toml'}: ")


def test_a_missing_file_sends_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy-path"):
        read_client_policy(tmp_path / "policy.toml")


@pytest.mark.parametrize(
    ("own", "run", "message"),
    [
        ({"policies": "adapter"}, {}, "policies = 'adapter'.*privacy.policy = 'adapter\\+catalog'"),
        ({"min_users": 50}, {}, "min_users = 50.*privacy.min_users = 20"),
        ({}, {}, "metrics = 'suppressed'.*privacy.metrics = 'exact'"),
        ({"metrics": "noised"}, SUPPRESSED, "metrics = 'noised'.*privacy.metrics = 'suppressed'"),
        ({}, {"privacy.metrics": "noised", "dp.randomness": "seeded"}, "dp.randomness = 'seeded'"),
        (
            {"max_epsilon": 1, "max_delta": 1e-6},
            DP_RUN | {"dp.epsilon": 1, "privacy.metrics": "noised", "privacy.metrics_noise": 0.5},
            "max_epsilon = 1, the metric sums .*privacy.metrics_noise = 0.5",
        ),
        ({"max_total_epsilon": 1, "max_delta": 1e-6}, DP_RUN | SUPPRESSED | {"dp.epsilon": 1}, "metrics = 'noised'"),
        ({"max_epsilon": 1}, DP_RUN | SUPPRESSED | {"dp.epsilon": 1}, "metrics = 'noised'.*'suppressed'"),
        (
            {"max_epsilon": 8},
            {},
            "max_epsilon = 8.*dp.mode = 'none'.*dp.randomness = 'system'",
        ),
        ({"max_epsilon": 8}, DP_RUN | {"dp.epsilon": 9}, "max_epsilon = 8.*dp.epsilon = 9"),
        ({"max_delta": 1e-9}, DP_RUN | {"dp.epsilon": 1}, "max_delta = 1e-09.*dp.delta = 1e-06"),
        ({"max_epsilon": 8}, DP_RUN | {"dp.noise_multiplier": 1}, "max_epsilon = 8.*dp.epsilon"),
        (
            {"max_epsilon": 8},
            DP_RUN | {"dp.epsilon": 1, "dp.randomness": "seeded"},
            "max_epsilon = 8.*dp.mode = 'user'.*dp.randomness = 'seeded'",
        ),
        (
            {"policies": "aggregate-only"},
            SUMMED,
            "require_peer_keys = true, .*'aggregate-only'.*identity_key and peer_keys",
        ),
        (
            {"policies": "catalog-private", "receive_adapters": True, "metrics": "exact"},
            SEARCHED,
            "max_models = 100, the run has rmm.budget = 150 with rmm-style",
        ),
        ({"policies": "catalog-private"}, PRIVATE, "receive_adapters = false.*privacy.policy = 'cat"),
        (
            {"policies": "catalog-private", "receive_adapters": True},
            {**PRIVATE, "through_clients.users": "own-users"},
            "real_users = false.*through_clients.users = 'own-users'",
        ),
        (
            {"policies": "catalog-private", "receive_adapters": True},
            {**PRIVATE, "personal.directions": "module", "personal.universal": True},
            "real_users = false, the run has personal.universal = true",
        ),
        (
            {"policies": "adapter", "min_users": 30},
            {"privacy.min_users": 3, "privacy.metrics": "suppressed"},
            "policies = .*; min_users = 30, .* = 3[.]",
        ),
    ],
)
def test_what_it_refuses(own: dict[str, Any], run: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=f"domain shop.*{message}"):
        check_run_is_allowed(ClientPolicy(**own), from_flat(run), "shop")


def test_a_run_that_says_it_takes_longer_is_refused_before_it_does() -> None:
    run = from_flat(SUPPRESSED).model_copy(update={"train": Train(max_minutes=30.5)})
    check_run_is_allowed(ClientPolicy(), run, "shop")
    check_run_is_allowed(ClientPolicy(max_minutes=None), run, "shop")
    with pytest.raises(PolicyError, match=r"max_minutes = 30.*train\.max_minutes = 30\.5"):
        check_run_is_allowed(ClientPolicy(max_minutes=30), run, "shop")


def test_the_minutes_of_all_heads_of_an_answer_add_up() -> None:
    head = Head(kind="local", vectors=("merge", "backbone"), max_minutes=16)
    run = from_flat(SUPPRESSED).model_copy(update={"head": head})
    check_run_is_allowed(ClientPolicy(max_minutes=32), run, "shop")
    with pytest.raises(PolicyError, match=r"max_minutes = 30, the run has head\.max_minutes = 16 for each of 2 heads"):
        check_run_is_allowed(ClientPolicy(max_minutes=30), run, "shop")
    unused, unstated = Head(max_minutes=90), head.model_copy(update={"max_minutes": None})
    for passes in (unused, unstated):  # as for train.max_minutes, `fedmerge client` ends the answer
        check_run_is_allowed(ClientPolicy(max_minutes=30), run.model_copy(update={"head": passes}), "shop")


def test_a_stricter_run_is_welcome() -> None:
    noised = from_flat(DP_RUN | {"dp.epsilon": 1, "privacy.metrics": "noised", "privacy.metrics_noise": 20})
    check_run_is_allowed(ClientPolicy(max_epsilon=1, max_delta=1e-6), noised, "shop")
    check_run_is_allowed(ClientPolicy(), noised, "shop")
    run = from_flat(SUPPRESSED | {"privacy.policy": "adapter", "privacy.min_users": 100, "merge.methods": "average"})
    check_run_is_allowed(ClientPolicy(), run, "shop")


def test_the_owner_may_allow_exact_sums_by_name() -> None:
    dp = from_flat(DP_RUN | {"dp.epsilon": 1})
    check_run_is_allowed(ClientPolicy(metrics="exact"), from_flat({}), "shop")
    check_run_is_allowed(ClientPolicy(metrics="exact", max_epsilon=1, max_delta=1e-6), dp, "shop")
    with pytest.raises(PolicyError, match="metrics = 'suppressed'"):  # validation means leave with the training report
        check_run_is_allowed(ClientPolicy(), from_flat({"until": "train"}), "shop")


def test_runs_are_added_up_at_a_given_delta_only(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("max_total_epsilon = 3.0")
    with pytest.raises(ConfigError, match="max_delta"):
        read_client_policy(tmp_path / "policy.toml")
    (tmp_path / "policy.toml").write_text("max_total_epsilon = 3.0\nmax_delta = 1e-6")
    assert read_client_policy(tmp_path / "policy.toml").max_total_epsilon == 3.0


def test_secure_sums_take_keys_or_the_owners_word() -> None:
    check_run_is_allowed(ClientPolicy(policies=("aggregate-only",)), from_flat(SUMMED), "shop", has_peer_keys=True)
    own = ClientPolicy(policies=("aggregate-only",), require_peer_keys=False)
    check_run_is_allowed(own, from_flat(SUMMED), "shop")
    check_run_is_allowed(None, from_flat(SUMMED), "shop", has_peer_keys=True)
    with pytest.raises(PolicyError, match=r"shop.*require_peer_keys"):
        check_run_is_allowed(None, from_flat(SUMMED), "shop")


def test_without_a_file_all_is_left_to_the_run_but_own_users_and_sums_without_keys() -> None:
    check_run_is_allowed(None, from_flat(PRIVATE), "shop")
    with pytest.raises(PolicyError, match=r"shop.*real_users"):
        check_run_is_allowed(None, from_flat({**PRIVATE, "through_clients.users": "own-users"}), "shop")


def test_large_messages_stay() -> None:
    check_message_size(ClientPolicy(), 10**9, "shop")
    own = ClientPolicy(max_message_bytes=100_000)
    check_message_size(own, 100_000, "shop")
    with pytest.raises(PolicyError, match=r"shop.*max_message_bytes = 100,000.*100,001"):
        check_message_size(own, 100_001, "shop")


@pytest.mark.parametrize("changes", [{}, {"privacy.metrics": "noised", "privacy.metrics_noise": 8.0}])
def test_max_epsilon_may_be_about_one_user_replaced(changes: dict[str, Any]) -> None:
    flat = DP_RUN | {"train.max_steps": 40, "train.batch_size": 107, "dp.epsilon": 8, "dp.delta": 1e-4}
    flat |= {"dp.accountant": "rdp", **changes}
    run = from_flat({"until": "train", **flat} if not changes else flat)
    limits = {"max_epsilon": 8, "max_delta": 1e-4}
    for allows in (None, ClientPolicy(**limits), ClientPolicy(**limits | {"max_epsilon": 13}, adjacency="replace")):
        check_replacement_is_allowed(allows, run, 1000, "shop")
    with pytest.raises(PolicyError, match=r"domain shop: .*max_epsilon = 8 .*'replace'.* 8\.[1-9]") as caught:
        check_replacement_is_allowed(ClientPolicy(**limits, adjacency="replace"), run, 1000, "shop")
    assert "dp.epsilon = 8" in str(caught.value)


def test_who_trains_nothing_is_charged_for_metric_sums_alone() -> None:
    run = from_flat(DP_RUN | {"train.max_steps": 40, "dp.epsilon": 8, "privacy.metrics": "noised"})
    own = ClientPolicy(max_epsilon=8, max_delta=1e-4, adjacency="replace")
    check_replacement_is_allowed(own, run, 0, "shop")
