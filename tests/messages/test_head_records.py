"""Messages of heads: records survive a round trip, malformed reports are refused, and other requests stay the same."""

from typing import Any

import pytest
from adapters import random_adapter
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedmerge.errors import ClientError
from sim.app.messages import records

ADAPTER = random_adapter({"encoder.query": (8, 8)}, 2, 0.5, 0)


def travelled(content: RecordDict) -> RecordDict:
    """Return the received record, serialised and parsed by Flower."""
    data = recorddict_to_proto(content).SerializeToString()
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


HEAD_REPORT: dict[str, Any] = {
    "trained": True,
    "reason": "",
    "cached": False,
    "epochs": 9,
    "best_epoch": 4,
    "seconds": 2.5,
    "stopped_by": "patience",
    "weights": {"masked": {"head": 0.5, "text": 0.3, "recent items": 0.2}, "unmasked": {"head": 1, "text": 0}},
}


def test_requests_and_reports_of_heads_arrive_as_they_were_sent() -> None:
    request = records.HeadRequest("average", "merge,expert", "e" * 64)
    sent = records.head_request_record(request, records.model_records({"average": ADAPTER}))
    read, models = records.read_head_request(travelled(sent))
    assert read == request
    assert list(models) == ["average"]
    assert records.read_vectors(read.vectors) == ("merge", "expert")
    assert records.read_vectors("") == ()
    reports: dict[str, dict[str, Any]] = {
        "merge": HEAD_REPORT,
        "expert": {"trained": False, "reason": "too few users"},
        records.FEDERATED: {"trained": True, "reason": "", "weights": HEAD_REPORT["weights"]},
    }
    assert records.read_head_reports(travelled(records.head_reports_record(reports))) == reports


def test_unknown_vectors_of_a_head_are_refused() -> None:
    with pytest.raises(ClientError, match=r"vectors \['catalog'\], expected merge, expert, backbone"):
        records.read_vectors("merge,catalog")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trained": 1}, "trained = 1, expected true or false"),
        ({"reason": "x" * 501}, "expected a text of at most 500 characters"),
        ({"epochs": -1}, "expected a count"),
        ({"seconds": float("nan")}, "expected a number"),
        ({"stopped_by": ["patience"]}, "expected max_epochs, max_minutes or patience"),
        ({"weights": {"masked": {"head": 0.5}}}, "which add up to 1"),
        ({"weights": {"masked": {"head": 2, "text": -1}}}, "which add up to 1"),
        ({"weights": {"all": {"head": 1}}}, "which add up to 1"),
        ({"weights": [1]}, "which add up to 1"),
        ({"sequence": [3, 5]}, "has the fields"),
    ],
)
def test_malformed_reports_of_heads_are_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ClientError, match=expected):
        records.read_head_reports(records.head_reports_record({"merge": {**HEAD_REPORT, **change}}))


@pytest.mark.parametrize("heads", ["[]", '{"merge": 1}', '{"catalog": {}}', '{"merge": {"trained": true}}', "{"])
def test_reports_of_heads_of_another_form_are_refused(heads: str) -> None:
    with pytest.raises(ClientError, match="use one fedmerge version"):
        records.read_head_reports(RecordDict({"facts": ConfigRecord({"heads": heads})}))


def test_without_heads_the_request_to_evaluate_is_that_of_before() -> None:
    request = records.EvaluationRequest("test", True, "", False)
    content = records.evaluation_request_record(request, records.model_records({}))
    assert set(content["facts"]) == {"split", "backbone", "expert_sha256", "baselines"}
    assert records.read_evaluation_request(travelled(content))[0] == request
    with_heads = records.EvaluationRequest("test", True, "", False, heads="merge", served="average")
    content = records.evaluation_request_record(with_heads, records.model_records({}))
    assert records.read_evaluation_request(travelled(content))[0] == with_heads
