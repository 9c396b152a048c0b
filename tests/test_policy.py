"""What may leave a client: every pair of policy and thing, and remedies that work."""

import re
from typing import get_args

import pytest

from fedmerge.config import ExperimentConfig, Privacy
from fedmerge.errors import FedMergeError, PolicyError
from fedmerge.privacy.policy import (
    ALLOWED,
    REMEDIES,
    Kind,
    Policy,
    check_catalog_is_public,
    check_enough_users,
    check_may_leave,
)

REFUSED: set[tuple[Policy, Kind]] = {
    ("adapter", "catalog"),
    ("aggregate-only", "catalog"),
    ("aggregate-only", "adapter"),
    ("adapter", "masked update"),
    ("adapter+catalog", "masked update"),
}


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_policy_and_thing(policy: Policy, kind: Kind) -> None:
    if (policy, kind) in REFUSED:
        with pytest.raises(
            PolicyError, match=re.escape(f"domain shop: the policy '{policy}' keeps the {kind} at the client")
        ) as caught:
            check_may_leave(policy, kind, "shop")
        assert str(caught.value).endswith(REMEDIES[kind])
    else:
        check_may_leave(policy, kind, "shop")


def test_no_policy_lets_interactions_out_and_every_policy_is_a_setting() -> None:
    assert set(ALLOWED) == set(get_args(Policy)) == set(get_args(Privacy.model_fields["policy"].annotation))
    assert set.union(*map(set, ALLOWED.values())) == set(get_args(Kind))
    assert not any("interaction" in kind or "user" in kind for kind in get_args(Kind))
    assert ExperimentConfig().privacy.policy in ALLOWED


def test_a_private_catalog_stays_whatever_the_policy() -> None:
    check_catalog_is_public("shop", True)
    with pytest.raises(PolicyError, match="domain shop: its manifest says public_catalog = false"):
        check_catalog_is_public("shop", False)


def test_sums_over_few_users_stay() -> None:
    check_enough_users("shop", 20, 20)
    with pytest.raises(PolicyError, match=r"domain shop: metric sums over 19 users .* privacy\.min_users is 20"):
        check_enough_users("shop", 19, 20)
    assert issubclass(PolicyError, FedMergeError)
