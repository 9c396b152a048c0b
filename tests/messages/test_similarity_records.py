"""Messages of similarity factors: a round trip, and everything malformed is refused by name."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from adapters import random_adapter
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedmerge.errors import ClientError, LayoutMismatchError
from fedmerge.federated.shared_items import MeanSimilarity
from sim.app.messages import records

ADAPTER = random_adapter({"encoder.query": (8, 8)}, 2, 0.5, 0)
ITEMS = np.array([0, 3, 4])
FACTORS = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]], dtype=torch.float16)
MEAN = MeanSimilarity(ITEMS, FACTORS, torch.tensor([[1, 1], [1, 0], [0, 1]], dtype=torch.uint8))
REFUSED = (ClientError, LayoutMismatchError)


def travelled(content: RecordDict) -> RecordDict:
    data = recorddict_to_proto(content).SerializeToString()
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


def test_requests_factors_and_means_arrive_as_they_were_sent() -> None:
    request = records.SimilarityRequest("e" * 64, 2)
    read, items = records.read_similarity_request(travelled(records.similarity_request_record(request, ITEMS)), 5)
    assert read == request
    assert items.tolist() == ITEMS.tolist()
    assert torch.equal(records.read_similarity(travelled(records.similarity_record(FACTORS)), (3, 2)), FACTORS)
    asked = records.WeaveRequest(1, "shared items")
    sent = travelled(records.weave_request_record(asked, ADAPTER, MEAN))
    assert records.read_weave_request(sent)[0] == asked
    found = records.read_mean_similarity(sent, 5)
    assert found is not None
    assert found.items.tolist() == ITEMS.tolist()
    assert torch.equal(found.factors, MEAN.factors)
    assert torch.equal(found.present, MEAN.present)
    assert records.read_mean_similarity(travelled(records.weave_request_record(asked, ADAPTER)), 5) is None


@pytest.mark.parametrize(
    ("factors", "problem"),
    [
        (FACTORS[:2], r"have shape \(2, 2\), expected \(3, 2\)"),
        (FACTORS.float(), "float32 of shape"),
        (torch.full((3, 2), torch.nan, dtype=torch.float16), "not finite"),
        (2 * FACTORS, "rows longer than 1"),
    ],
    ids=["few", "type", "nan", "long"],
)
def test_factors_that_no_expert_has_are_refused(factors: torch.Tensor, problem: str) -> None:
    with pytest.raises(REFUSED, match=problem):
        records.read_similarity(travelled(records.similarity_record(factors)), (3, 2))


@pytest.mark.parametrize("items", [[], [-1, 2], [0, 5], [2, 1], [1, 1]], ids=str)
def test_items_that_a_catalog_lacks_are_refused(items: list[int]) -> None:
    wrong = np.array(items, dtype=np.int64)
    request = records.similarity_request_record(records.SimilarityRequest("e", 2), wrong)
    with pytest.raises(ClientError, match="not increasing positions in a catalog of 5"):
        records.read_similarity_request(travelled(request), 5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"factors": FACTORS[:2]}, "differ in length"),
        ({"factors": torch.full((3, 2), torch.inf, dtype=torch.float16)}, "not finite"),
        ({"present": torch.zeros(3, 2, dtype=torch.uint8)}, "items that nobody has"),
        ({"present": torch.full((3, 2), 2, dtype=torch.uint8)}, "items that nobody has"),
        ({"present": torch.ones(3, 2)}, "float32"),
        ({"items": np.array([0, 3, 9])}, "catalog of 5"),
    ],
    ids=str,
)
def test_a_mean_of_another_form_is_refused(changes: dict[str, Any], problem: str) -> None:
    sent = records.weave_request_record(records.WeaveRequest(1, "shared items"), ADAPTER, replace(MEAN, **changes))
    with pytest.raises(REFUSED, match=problem):
        records.read_mean_similarity(travelled(sent), 5)


def test_a_record_without_its_arrays_is_refused() -> None:
    with pytest.raises(ClientError, match="has not the arrays factors"):
        records.read_similarity(RecordDict(), (3, 2))
    with pytest.raises(ClientError, match="has not the arrays factors"):
        records.read_similarity(RecordDict({"similarity": ArrayRecord({"other": Array(np.zeros(3))})}), (3, 2))
