"""Weaving in a configuration: what it needs, and what is refused by name."""

import pytest

from fedmerge.config import Weave, WeaveSchedule, from_flat
from fedmerge.errors import ConfigError

ALLOWED = {"weave.schedule": "all", "privacy.policy": "catalog-private"}
BY_USER = {"dp.mode": "user", "dp.epsilon": 8, "dp.delta": 1e-5, "train.negatives": "catalog"}


def test_nothing_is_woven_unless_asked_for() -> None:
    assert from_flat({}).weave.schedule is None
    assert from_flat(ALLOWED).weave.factors == (1.0, 1.4, 1.8)
    assert from_flat({**ALLOWED, **BY_USER}).weave.steps == 200


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [(None, 0), ("all", 3), ("relay", 3), ("sampled", 2), ("ring", 2), ("mean", 1), ("similarity", 1)],
)
def test_trainings_are_counted_before_anything_is_trained(schedule: WeaveSchedule | None, expected: int) -> None:
    weave = Weave(schedule=schedule, sources=2)
    assert weave.trainings(4) == expected
    assert weave.trainings(1) == 0
    assert weave.trainings(2) == min(expected, 1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"privacy.policy": "adapter"}, "set privacy.policy = 'catalog-private'"),
        ({"privacy.policy": "aggregate-only", "merge.methods": "average"}, "set privacy.policy = 'catalog-private'"),
        ({"domains.train": "beauty", "server.min_train_clients": 1}, "name at least two domains"),
        ({"rounds.rule": "fedit"}, "set rounds.rule = 'none'"),
        ({"privacy.transport": "int8"}, "Set privacy.transport = 'float32'"),
        (
            {"dp.mode": "domain-central", "dp.noise_multiplier": 1, "dp.delta": 1e-5, "merge.methods": "average"},
            "Set dp.mode = 'user'",
        ),
        ({"dp.mode": "domain-local", "dp.noise_multiplier": 1, "dp.delta": 1e-5}, "Set dp.mode = 'user'"),
        ({**BY_USER, "weave.steps": 0}, "raise weave.steps"),
        ({"weave.factors": "1.0,1.0000001"}, "give each once"),
        ({"weave.schedule": "star"}, "weave.schedule"),
    ],
)
def test_what_weaving_cannot_go_with_is_refused_by_name(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        from_flat({**ALLOWED, **changes})


def test_similarities_need_the_catalogs_at_the_server() -> None:
    similarity = {"weave.schedule": "similarity", "merge.methods": "average"}
    allowed: list[dict[str, object]] = [{}, {"privacy.policy": "adapter", "server.catalogs": "catalogs"}, BY_USER]
    assert all(from_flat({**similarity, **changes}).shares_similarity for changes in allowed)
    assert not from_flat(ALLOWED).shares_similarity
    refused: list[tuple[dict[str, object], str]] = [
        ({"privacy.policy": "catalog-private"}, "set privacy.policy = 'adapter\\+catalog'"),
        ({"privacy.policy": "aggregate-only"}, "does not allow; set privacy.policy = 'adapter\\+catalog'"),
        ({"privacy.policy": "adapter"}, "give server.catalogs a folder"),
        ({"privacy.transport": "int8"}, "Set privacy.transport = 'float32'"),
        ({"dp.mode": "domain-local", "dp.noise_multiplier": 1, "dp.delta": 1e-5}, "Set dp.mode = 'user'"),
        ({"weave.similarity_rank": 65}, "weave.similarity_rank"),
    ]
    for changes, problem in refused:
        with pytest.raises(ConfigError, match=problem):
            from_flat({**similarity, **changes})
