"""The section [head]: file forms, and contradictions with other sections."""

from typing import Any

import pytest

from fedmerge.config import from_flat, to_flat
from fedmerge.errors import ConfigError

LOCAL, FEDERATED = {"head.kind": "local"}, {"head.kind": "federated"}


def test_without_heads_the_other_keys_contradict_nothing() -> None:
    flat = {"head.vectors": "expert", "rounds.rule": "fedit", "until": "train", "privacy.metrics": "noised"}
    assert from_flat(flat).head.kind is None


def test_a_softmax_over_all_items_is_in_no_key_of_a_cache() -> None:
    assert "sampled_items" not in from_flat(LOCAL).head.cache_inputs()
    sampled = from_flat({**LOCAL, "head.sampled_items": 20}).head
    assert sampled.cache_inputs()["sampled_items"] == 20
    assert (sampled.scored(10), sampled.scored(30), from_flat(LOCAL).head.scored(30)) == (10, 20, 30)


def test_the_section_survives_its_file_form() -> None:
    none = {"head.max_minutes": "none", "head.sampled_items": "none"}
    flat = {**FEDERATED, **none, "head.vectors": "merge,backbone", "head.rule": "fedadam"}
    config = from_flat(flat)
    assert config.head.vectors == ("merge", "backbone")
    assert config.head.max_minutes is None
    assert config.head.sampled_items is None
    assert from_flat(to_flat(config)) == config


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({**LOCAL, "head.vectors": "merge,expert,merge"}, "vectors names merge more than once"),
        ({**LOCAL, "head.vectors": ""}, "head.vectors"),
        ({**LOCAL, "head.hidden_size": 63}, "head.hidden_size"),
        ({**LOCAL, "head.sampled_items": 1}, "head.sampled_items"),
        ({**FEDERATED, "head.inputs": "ids"}, "ids never leave a client, so nothing could be shared"),
        ({**LOCAL, "until": "train"}, "heads are trained after the merge; set until = 'report'"),
        (
            {**LOCAL, "head.vectors": "merge,expert", "rounds.rule": "weighted-average"},
            "with rounds.rule = 'weighted-average' no client has an expert; name merge or backbone",
        ),
        ({**LOCAL, "privacy.metrics": "noised"}, "one user changes the outcomes of all others, which the noise does"),
        ({**FEDERATED, "privacy.metrics": "noised"}, "set head.kind = 'none', or privacy.metrics = 'suppressed'"),
        (
            {
                **FEDERATED,
                "dp.mode": "user",
                "dp.epsilon": 8,
                "dp.delta": 1e-6,
                "train.negatives": "catalog",
            },
            "dp.mode = 'user' with head.kind = 'federated': the rounds of the head get no noise",
        ),
        (
            {
                **FEDERATED,
                "head.rule": "median",
                "privacy.policy": "aggregate-only",
                "merge.methods": "average",
                "admission.action": "none",
            },
            "head.rule is median, which needs every single head",
        ),
        (
            {**FEDERATED, "dp.mode": "domain-local", "dp.epsilon": 8, "dp.delta": 1e-6},
            "dp.mode = 'domain-local' with head.kind = 'federated': the rounds of the head get no noise",
        ),
        ({**FEDERATED, "head.rule": "ffa-lora"}, "head.rule is ffa-lora, which freezes A, but clients train all"),
        ({**FEDERATED, "head.rule": "flora"}, "which freezes the global head and adds a fresh one"),
        ({**FEDERATED, "head.rule": "krum", "domains.train": "a,b,c,d"}, "4 clients take part in a round; it needs 5"),
        ({**FEDERATED, "head.rule": "trimmed-mean", "domains.train": "a,b,c"}, "it needs 5. Name more domains"),
        (
            {
                **FEDERATED,
                "privacy.policy": "aggregate-only",
                "merge.methods": "average",
                "admission.action": "none",
                "domains.train": "a,b,c,d",
                "rounds.fraction": 0.5,
            },
            "sums the heads of 2 clients with rounds.weights = 'equal'",
        ),
        (
            {
                **FEDERATED,
                "privacy.policy": "aggregate-only",
                "merge.methods": "average",
                "admission.action": "none",
                "domains.train": "a,b,c",
                "rounds.weights": "users",
            },
            "or 3 of unequal weight, one client reads another's head off the sum",
        ),
    ],
)
def test_a_contradiction_is_one_line_with_its_remedy(flat: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_flat(flat)
    (problem,) = str(caught.value).splitlines()[1:]
    assert expected in problem


@pytest.mark.parametrize(
    "flat",
    [
        {**LOCAL, "head.inputs": "ids"},
        {**LOCAL, "privacy.metrics": "suppressed"},
        {**LOCAL, "dp.mode": "user", "dp.epsilon": 8, "dp.delta": 1e-6, "train.negatives": "catalog"},
        {**LOCAL, "rounds.rule": "weighted-average"},
        {**FEDERATED, "privacy.policy": "aggregate-only", "merge.methods": "average", "admission.action": "none"},
    ],
)
def test_heads_that_hold_what_a_run_promises_are_allowed(flat: dict[str, Any]) -> None:
    assert from_flat(flat).head.kind is not None
