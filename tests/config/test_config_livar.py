"""Merges by training signals in a configuration: when signals are sent, and what they cannot go with."""

import pytest

from fedmerge.config import SIGNAL_METHODS, from_flat
from fedmerge.errors import ConfigError
from fedmerge.merging.methods import METHODS

WEIGHED = {"merge.methods": "livar-style"}


def test_signals_are_sent_for_their_merge_alone() -> None:
    assert {name for name, row in METHODS.items() if row.signals} == SIGNAL_METHODS
    assert not from_flat({}).sends_signals
    assert from_flat(WEIGHED).sends_signals
    assert from_flat({**WEIGHED, "until": "train"}).sends_signals
    assert not from_flat({**WEIGHED, "rounds.rule": "fedit"}).sends_signals


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"dp.mode": "user", "dp.epsilon": 8, "dp.delta": 1e-4, "train.negatives": "catalog"},
            "dp.mode = 'user' promises a bound; leave livar-style out",
        ),
        ({"dp.mode": "domain-local", "dp.noise_multiplier": 1, "dp.delta": 1e-5}, "leave livar-style out"),
        ({"privacy.metrics": "suppressed"}, "set privacy.metrics = 'exact'"),
        (
            {"privacy.policy": "aggregate-only", "domains.train": "beauty,books,coffee", "domains.unseen": ""},
            "needs every single adapter",
        ),
        ({"merge.methods": "average", "rounds.rule": "livar-style"}, "rounds.rule = 'none'"),
        ({"livar.forms": "per-step,per-step"}, "more than once"),
        ({"livar.coefficients": "1,1.0"}, "more than once"),
    ],
)
def test_what_they_cannot_go_with_is_refused_by_name(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        from_flat({**WEIGHED, **changes})
