"""Personal merges in a configuration: what they need, and what is refused by name."""

import pytest

from fedmerge.config import from_flat
from fedmerge.errors import ConfigError

ALLOWED = {"personal.directions": "module", "privacy.policy": "catalog-private"}


def test_personal_merges_are_off_unless_asked_for() -> None:
    assert from_flat({}).personal.directions is None
    assert from_flat(ALLOWED).personal.fit_on == "held-out"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"privacy.policy": "adapter"}, "set privacy.policy = 'catalog-private'"),
        ({"domains.train": "beauty", "server.min_train_clients": 1}, "name at least two domains"),
        ({"rounds.rule": "fedit"}, "set rounds.rule = 'none'"),
        ({"privacy.metrics": "noised"}, "set privacy.metrics = 'suppressed'"),
        (
            {"dp.mode": "domain-central", "dp.noise_multiplier": 1, "dp.delta": 1e-5, "merge.methods": "average"},
            "single adapters without noise",
        ),
        ({"personal.directions": "layer"}, "personal.directions"),
        ({"personal.directions": "none", "personal.universal": True}, "no coefficients to send"),
        ({"personal.universal": True, "privacy.metrics": "suppressed"}, "set personal.universal = false, or privacy"),
        (
            {"personal.universal": True, "dp.mode": "domain-local", "dp.noise_multiplier": 1, "dp.delta": 1e-5},
            "'domain-local' promises a bound",
        ),
    ],
)
def test_what_personal_merges_cannot_go_with_is_refused_by_name(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        from_flat({**ALLOWED, **changes})


@pytest.mark.parametrize(
    ("changes", "learns_on"),
    [
        ({}, "pseudo-users"),
        ({"merge.methods": "average"}, "own-users"),
        ({"through_clients.users": "own-users"}, "own-users"),
    ],
)
def test_a_cohort_makes_pseudo_users_only_for_learned_merges(changes: dict[str, object], learns_on: str) -> None:
    assert from_flat({**ALLOWED, **changes}).cohort_learns_on == learns_on
