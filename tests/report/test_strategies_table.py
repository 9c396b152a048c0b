"""The table of strategies: complete, and its settings are what experiments accept."""

import re
from pathlib import Path
from typing import get_args

import pytest

from fedmerge.config import MergeMethod, RoundRule
from fedmerge.report.docs.strategies import BY_USER, Strategy, is_allowed, policies_of, strategies

MESSAGES = Path(__file__).resolve().parents[2] / "docs" / "messages.md"


def named(name: str) -> Strategy:
    return next(strategy for strategy in strategies() if strategy.name == name)


def test_every_method_and_every_rule_is_a_strategy() -> None:
    names = [strategy.name for strategy in strategies()]
    assert len({*names}) == len(names)
    assert {*get_args(MergeMethod), *(f"rounds: {rule}" for rule in get_args(RoundRule))} <= {*names}


@pytest.mark.parametrize("strategy", strategies(), ids=lambda strategy: strategy.name)
def test_a_strategy_runs_under_some_policy_and_names_known_messages(strategy: Strategy) -> None:
    assert [*policies_of(strategy)]
    known = {*re.findall(r"^\| `([a-z._]+)`", MESSAGES.read_text(encoding="utf-8"), re.MULTILINE)}
    assert {*strategy.messages} <= known


@pytest.mark.parametrize(
    ("name", "policies", "by_user"),
    [
        ("average", ["adapter+catalog", "adapter", "catalog-private", "aggregate-only"], True),
        ("ties", ["adapter+catalog", "adapter", "catalog-private"], True),
        ("slerp", ["adapter+catalog", "adapter", "catalog-private"], True),  # of two domains
        ("mergerec", ["adapter+catalog", "catalog-private"], True),
        ("contrastive teacher", ["adapter+catalog", "catalog-private"], True),
        ("union similarity", ["adapter+catalog"], True),
        ("personal merges", ["catalog-private"], True),
        ("weaving: all", ["catalog-private"], True),
        ("federated head", ["adapter+catalog", "adapter", "catalog-private", "aggregate-only"], False),
        ("next titles", ["adapter+catalog", "adapter", "catalog-private", "aggregate-only"], False),
        ("next titles, then titles on the server", ["adapter+catalog"], False),
        ("rounds: multi-krum", ["adapter+catalog", "adapter", "catalog-private"], True),
    ],
)
def test_policies(name: str, policies: list[str], by_user: bool) -> None:
    assert [*policies_of(named(name))] == policies
    assert is_allowed(named(name), BY_USER) == by_user
