"""Contradictions of the losses and contrasts of learned merges: who can compute them, and with how many domains."""

from typing import Any

import pytest

from fedmerge.config import from_flat
from fedmerge.errors import ConfigError

CATALOG_PRIVATE = {"privacy.policy": "catalog-private"}
OWN_USERS = {**CATALOG_PRIVATE, "through_clients.users": "own-users"}
ALONE = {"domains.train": "a", "server.min_train_clients": 1}


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        (
            {**CATALOG_PRIVATE, "mergerec.loss": "similarity+kd"},
            ["'catalog-private'", "mergerec.loss = 'similarity+kd'", "'adapter+catalog'", "mergerec.loss = 'kd'"],
        ),
        (
            {**OWN_USERS, "mergerec.teacher": "contrastive"},
            ["'own-users'", "mergerec.teacher = 'contrastive'", "mergerec.teacher = 'expert'"],
        ),
        (
            {"mergerec.teacher": "contrastive", "mergerec.loss": "rec"},
            ["mergerec: ", "teacher = 'contrastive'", "loss = 'rec'", "a loss with kd"],
        ),
        (
            {**ALONE, "mergerec.teacher": "contrastive"},
            ["mergerec.teacher = 'contrastive'", "at least two domains", "mergerec.teacher = 'expert'"],
        ),
        (
            {**ALONE, "mergerec.pseudo_users": "contrastive-adaptive"},
            [
                "mergerec.pseudo_users = 'contrastive-adaptive'",
                "at least two domains",
                "mergerec.pseudo_users = 'chain'",
            ],
        ),
    ],
)
def test_what_nobody_can_compute_is_refused_with_a_remedy(flat: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_flat(flat)
    _, problem = str(caught.value).splitlines()
    assert all(part in problem for part in expected), problem


@pytest.mark.parametrize(
    "flat",
    [
        {"mergerec.loss": "similarity"},
        {**CATALOG_PRIVATE, "mergerec.teacher": "contrastive", "mergerec.pseudo_users": "contrastive-adaptive"},
        {**CATALOG_PRIVATE, "merge.methods": "adamerging", "mergerec.loss": "similarity"},  # which is not used
        {**ALONE, "merge.methods": "average", "mergerec.teacher": "contrastive"},  # nor is this
        {**ALONE, "mergerec.loss": "similarity+kd"},
    ],
)
def test_what_can_be_computed_is_not_refused(flat: dict[str, Any]) -> None:
    assert from_flat(flat)
