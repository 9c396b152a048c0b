"""What server and clients agree on about the federated head: its start, its fusion, its sums."""

import json

import numpy as np
import pytest
import torch

from fedmerge.adapter import adapter_sha256
from fedmerge.client.cache.secure_sums import sum_key
from fedmerge.config import DP, Head, from_flat
from fedmerge.errors import ClientError
from fedmerge.evaluation.sums import FEDERATED_SOURCES, VARIANTS
from fedmerge.federated.head import Weights, fresh_head, mean_weights
from fedmerge.privacy.secagg.agreement import agreement_of
from fedmerge.sequence.anchored import train_anchored
from sim.app.messages import records


def test_equal_seeds_give_equal_heads_which_no_training_leaves_as_they_are() -> None:
    first = fresh_head(8, Head(rank=3), seed=1)
    assert adapter_sha256(first) == adapter_sha256(fresh_head(8, Head(rank=3), seed=1))
    assert adapter_sha256(first) != adapter_sha256(fresh_head(8, Head(rank=3), seed=2))
    vectors = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    sequences = [np.array([0, 1, 2]), np.array([3, 4, 5])]
    no_steps, report = train_anchored(sequences, vectors, first, steps=0, seed=0)
    no_rate, _ = train_anchored(sequences, vectors, first, steps=2, learning_rate=0.0, seed=0)
    assert adapter_sha256(no_steps) == adapter_sha256(no_rate) == adapter_sha256(first)
    assert (report.steps, report.loss) == (0, None)


def test_a_domain_that_chooses_no_fusion_gets_the_mean_of_the_others() -> None:
    one: Weights = dict.fromkeys(VARIANTS, (1.0, 0.0, 0.0))
    two: Weights = {"unmasked": (0.0, 0.5, 0.5), "masked": (0.2, 0.2, 0.6)}
    mean = mean_weights([one, two])
    assert mean["unmasked"] == pytest.approx((0.5, 0.25, 0.25))
    assert mean["masked"] == pytest.approx((0.6, 0.1, 0.3))
    assert mean_weights([]) == dict.fromkeys(VARIANTS, (1 / 3,) * len(FEDERATED_SOURCES))


def test_a_fusion_travels_as_it_is() -> None:
    weights = mean_weights([{"unmasked": (0.1, 0.2, 0.7), "masked": (0.3, 0.3, 0.4)}])
    assert records.read_fusion(records.fusion_text(weights)) == weights


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"unmasked": [1, 0, 0]}',
        '{"unmasked": [1, 0, 0], "masked": [0.5, 0.5]}',
        '{"unmasked": [1, 0, 0], "masked": [2, -1, 0]}',
        '{"unmasked": [1, 0, 0], "masked": [NaN, 0, 0]}',
        '{"unmasked": [1, 0, 0], "masked": ["a", 0, 0]}',
        '{"unmasked": [1, 0, 0], "masked": 1}',
    ],
)
def test_a_malformed_fusion_is_refused(text: str) -> None:
    with pytest.raises(ClientError, match="expected 3 weights of sum 1 for unmasked and masked"):
        records.read_fusion(text)


def test_sums_of_adapters_and_of_heads_share_neither_agreement_nor_key() -> None:
    flat = {
        "run_id": "run",
        "rounds.rule": "weighted-average",
        "head.kind": "federated",
        "head.rule": "weighted-average",
    }
    config = from_flat(flat)
    adapters, heads = agreement_of(config, 1), agreement_of(config, 1, "head")
    assert adapters != heads
    assert json.loads(heads) == {**json.loads(adapters), "what": "head"}
    assert sum_key(DP(), "run", 1) != sum_key(DP(), "run", 1, "head")
    assert sum_key(DP(), "run", 1, "head") != sum_key(DP(), "run", 2, "head")
