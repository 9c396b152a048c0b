"""Evaluation of a client's users against a loop that ranks one user at a time, and what of it leaves."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter
from backbones import tiny_bert

from fedmerge.adapter import Adapter
from fedmerge.client.baselines.rankers import BASELINE_LABELS, Ranker, baseline_rankers
from fedmerge.client.evaluate import evaluate
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import ExperimentConfig, Text
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import make_interactions
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.encode import embed_batch
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import pack_sequences
from fedmerge.errors import ConfigError, FedMergeError
from fedmerge.evaluation.ranks import CUTOFFS, METRICS
from fedmerge.evaluation.sums import BACKBONE, MetricSums

TEXT = Text(max_attribute_tokens=40, max_items=2, max_tokens=128)
NUM_USERS, NUM_ITEMS = 24, 30
POPULARITY, LAST_ITEM = BASELINE_LABELS["popularity"], BASELINE_LABELS["last-item"]


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> LocalDomain:
    """A demo domain with users of one and two items added, who are not evaluated, and one who comes back to an item."""
    folder = tmp_path_factory.mktemp("evaluate")
    backbone = load_backbone(str(tiny_bert(folder / "bert")), "mean", resolve_compute("cpu", "float32"))
    demo = generate_domain("coffee", num_users=NUM_USERS, num_items=NUM_ITEMS)
    sequences = [demo.interactions.sequence(user).tolist() for user in range(NUM_USERS)]
    sequences = [[4], *sequences, [7, 9], [3, 5, 3, 3]]
    interactions = make_interactions([f"private-{number}" for number in range(len(sequences))], sequences)
    write_domain(folder / "coffee", demo.catalog, interactions, public_catalog=True, synthetic=True, source="test")
    return open_domain(folder / "coffee", backbone, TEXT)


@pytest.fixture(scope="module")
def adapters(domain: LocalDomain) -> dict[str, Adapter | None]:
    layout = layout_of(domain.backbone)
    return {BACKBONE: None, "one": random_adapter(layout, 2, 0.7, 1), "two": random_adapter(layout, 3, 0.7, 2)}


@pytest.fixture(scope="module")
def baselines(domain: LocalDomain) -> dict[str, Ranker]:
    """The baselines of the default configuration."""
    config = ExperimentConfig()
    return baseline_rankers(domain, config.evaluation.baselines, config.evaluation, config.seed, config.cache_dir)


def outcome(rank: int) -> list[float]:
    gains = [1 / math.log2(rank + 1) if rank <= k else 0.0 for k in CUTOFFS]
    return [*(float(rank <= k) for k in CUTOFFS), *gains, 1 / rank]


def rank_of(scores: list[float], target: int, removed: set[int]) -> int:
    candidates = [item for item in range(len(scores)) if item not in removed or item == target]
    return 1 + sum(scores[item] >= scores[target] for item in candidates if item != target)


def oracle(domain: LocalDomain, split: str, adapters: dict[str, Adapter | None]) -> dict[str, dict[str, np.ndarray]]:
    """variant -> method -> (users, metrics), one user at a time, cosines in float64."""
    held_out = {"valid": 2, "test": 1}[split]
    sequences = [domain.interactions.sequence(user).tolist() for user in range(domain.interactions.num_users)]
    questions = [(s[:-held_out], s[-held_out]) for s in sequences if len(s) >= 3]
    bought = [item for s in sequences for item in (s[:-2] if len(s) >= 3 else s)]
    popularity = [float(bought.count(item)) for item in range(NUM_ITEMS)]
    rows: dict[str, dict[str, list[list[float]]]] = {"unmasked": {}, "masked": {}}

    def add(method: str, scores: list[float], history: list[int], target: int) -> None:
        if method != POPULARITY:  # nothing that rounding could decide
            assert min(abs(score - scores[target]) for item, score in enumerate(scores) if item != target) > 1e-6
        for variant, removed in (("unmasked", set[int]()), ("masked", set(history))):
            rows[variant].setdefault(method, []).append(outcome(rank_of(scores, target, removed)))

    for label, adapter in adapters.items():
        with applied(domain.backbone, adapter), torch.no_grad():
            items = [embed_batch(domain.backbone, [tokens])[0].double() for tokens in domain.item_sequences]
            for history, target in questions:
                packed = pack_sequences(
                    domain.table, [history], domain.backbone.special, TEXT.max_items, TEXT.max_tokens
                )
                user = embed_batch(domain.backbone, packed)[0].double()
                scores = [float(torch.cosine_similarity(user, item, dim=0)) for item in items]
                add(label, scores, history, target)
                if adapter is None:
                    last = [float(torch.cosine_similarity(items[history[-1]], item, dim=0)) for item in items]
                    add(LAST_ITEM, last, history, target)
                    add(POPULARITY, popularity, history, target)
    return {variant: {method: np.array(x) for method, x in methods.items()} for variant, methods in rows.items()}


@pytest.mark.parametrize("split", ["valid", "test"])
def test_every_model_and_baseline_is_ranked_as_one_user_at_a_time(
    domain: LocalDomain, adapters: dict[str, Adapter | None], baselines: dict[str, Ranker], split: str
) -> None:
    expected = oracle(domain, split, adapters)
    found = evaluate(domain, adapters, "valid" if split == "valid" else "test", None, seed=0, baselines=baselines)
    assert list(found) == ["unmasked", "masked"]
    for variant, sums in found.items():
        assert sums.variant == variant
        assert set(sums.methods) == {BACKBONE, "one", "two", POPULARITY, LAST_ITEM}
        assert sums.num_users == NUM_USERS + 1  # the users of one and two items are left out
        for p, method in enumerate(sums.methods):
            users = expected[variant][method]
            np.testing.assert_allclose(sums.sums[p], users.sum(axis=0), atol=1e-9)
            for q, other in enumerate(sums.methods):
                products = (users * expected[variant][other]).sum(axis=0)
                np.testing.assert_allclose(sums.products[:, p, q], products, atol=1e-9)
    assert not np.array_equal(found["unmasked"].sums, found["masked"].sums)
    assert len({tuple(row) for row in found["masked"].sums.tolist()}) == 5  # every model ranks in its own way


def test_baselines_are_the_same_without_the_backbone_among_the_models(
    domain: LocalDomain, adapters: dict[str, Adapter | None], baselines: dict[str, Ranker]
) -> None:
    alone = evaluate(domain, {"one": adapters["one"]}, "test", None, seed=0, baselines=baselines)["masked"]
    together = evaluate(domain, adapters, "test", None, seed=0, baselines=baselines)["masked"]
    assert set(alone.methods) == {"one", POPULARITY, LAST_ITEM}
    for method in alone.methods:
        assert alone.metrics_by_method()[method] == together.metrics_by_method()[method]


def test_without_baselines_there_are_none(domain: LocalDomain, adapters: dict[str, Adapter | None]) -> None:
    assert evaluate(domain, adapters, "valid", None, seed=0)["unmasked"].methods == tuple(adapters)


def test_a_draw_of_users_is_the_same_for_every_call(domain: LocalDomain, adapters: dict[str, Adapter | None]) -> None:
    both = evaluate(domain, adapters, "test", 9, seed=3)["unmasked"]
    single = evaluate(domain, {"two": adapters["two"]}, "test", 9, seed=3)["unmasked"]
    other = evaluate(domain, {"two": adapters["two"]}, "test", 9, seed=4)["unmasked"]
    assert both.num_users == single.num_users == 9
    assert both.metrics_by_method()["two"] == single.metrics_by_method()["two"] != other.metrics_by_method()["two"]
    everyone = evaluate(domain, {"two": adapters["two"]}, "test", 10_000, seed=3)["unmasked"]
    assert everyone.num_users == NUM_USERS + 1


def test_zero_users_are_refused(domain: LocalDomain, adapters: dict[str, Adapter | None]) -> None:
    with pytest.raises(ConfigError, match=r"max_users.* 0"):
        evaluate(domain, adapters, "test", 0, seed=0)


def test_only_sums_leave(
    domain: LocalDomain, adapters: dict[str, Adapter | None], baselines: dict[str, Ranker]
) -> None:
    def shape_of(value: object) -> object:
        if isinstance(value, dict):
            return {key: shape_of(item) for key, item in value.items()}
        return [shape_of(item) for item in value] if isinstance(value, list) else type(value).__name__

    few, many = (evaluate(domain, adapters, "test", users, seed=0, baselines=baselines) for users in (5, 20))
    for variant, sums in few.items():
        assert type(sums) is MetricSums
        text = json.dumps(sums.to_dict())
        assert "private-" not in text
        assert "coffee-i" not in text
        # What is told has the same form and size for any number of users: nothing in it has a row a user.
        assert shape_of(sums.to_dict()) == shape_of(many[variant].to_dict())
        assert sums.sums.size + sums.products.size == 5 * len(METRICS) + len(METRICS) * 5 * 5


def test_evaluation_leaves_the_backbone_as_it_was(
    domain: LocalDomain, adapters: dict[str, Adapter | None], baselines: dict[str, Ranker]
) -> None:
    before = {name: tensor.clone() for name, tensor in domain.backbone.model.state_dict().items()}
    lines: list[str] = []
    evaluate(domain, adapters, "test", 4, seed=0, baselines=baselines, progress=lines.append)
    after = domain.backbone.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert len(lines) == len(adapters)
    assert all("private-" not in line for line in lines)


def test_models_that_are_not_finite_are_refused(domain: LocalDomain, tmp_path: Path) -> None:
    broken = random_adapter(layout_of(domain.backbone), 1, math.inf, 0)
    with pytest.raises(FedMergeError):
        evaluate(domain, {"broken": broken}, "test", None, seed=0)
