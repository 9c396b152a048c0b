"""Content that may leave a client: every pair of policy and kind, and valid remedies."""

from typing import get_args

import pytest

from fedmerge.config import ExperimentConfig, Privacy
from fedmerge.config.privacy import ALLOWED, Kind, Policy
from fedmerge.domain.manifest import check_catalog_is_public
from fedmerge.errors import FedMergeError, PolicyError
from fedmerge.privacy.policy import REMEDIES, check_enough_users, check_may_leave

KEPT: dict[Policy, set[Kind]] = {
    "adapter+catalog": {"pseudo-user count", "coefficient gradient", "masked update"},
    "adapter": {"catalog", "pseudo-user count", "coefficient gradient", "masked update"},
    "catalog-private": {"catalog", "masked update", "similarity factors"},
    "aggregate-only": {"adapter", "catalog", "pseudo-user count", "coefficient gradient", "similarity factors"},
}


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_policy_and_thing(policy: Policy, kind: Kind) -> None:
    if kind in KEPT[policy]:
        with pytest.raises(PolicyError) as caught:
            check_may_leave(policy, kind, "shop")
        assert all(part in str(caught.value) for part in ("domain shop", f"'{policy}'", kind, REMEDIES[kind]))
    else:
        check_may_leave(policy, kind, "shop")


def test_no_policy_lets_interactions_out_and_every_policy_is_a_setting() -> None:
    assert set(ALLOWED) == set(get_args(Policy)) == set(get_args(Privacy.model_fields["policy"].annotation))
    assert set.union(*map(set, ALLOWED.values())) == set(get_args(Kind))
    assert not any("interaction" in kind for kind in get_args(Kind))
    assert {*REMEDIES} == {*get_args(Kind)}
    assert ExperimentConfig().privacy.policy in ALLOWED


def test_a_policy_acts_through_its_row() -> None:
    rows = {policy: Privacy(policy=policy) for policy in get_args(Policy)}
    assert [policy for policy, row in rows.items() if row.sends_catalogs] == ["adapter+catalog"]
    assert [policy for policy, row in rows.items() if row.learns_through_clients] == ["catalog-private"]
    assert [policy for policy, row in rows.items() if row.hides_adapters] == ["aggregate-only"]


def test_a_private_catalog_stays_whatever_the_policy() -> None:
    check_catalog_is_public("shop", True)
    with pytest.raises(PolicyError, match=r"shop.*public_catalog = false"):
        check_catalog_is_public("shop", False)


def test_sums_over_few_users_stay() -> None:
    check_enough_users("shop", 20, 20)
    with pytest.raises(PolicyError, match=r"shop: .*a gradient.* 3 users"):
        check_enough_users("shop", 3, 20, "a gradient")
    with pytest.raises(PolicyError, match=r"shop: .* 19 users.*privacy\.min_users = 20"):
        check_enough_users("shop", 19, 20)
    assert issubclass(PolicyError, FedMergeError)
