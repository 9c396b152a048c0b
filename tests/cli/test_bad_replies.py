"""Bad replies of clients, as read by the server: every error names the values found and expected."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from adapters import random_adapter
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from messages_in_order import Parts, check_parts

from fedmerge.errors import FedMergeError
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import Variant, metric_sums
from sim.app.messages import records

Read = Callable[[RecordDict], object]
QUERY = "encoder.layer.0.attention.self.query"
GOOD = random_adapter({QUERY: (32, 32), "encoder.layer.1.attention.self.value": (32, 32)}, 2, 2.0, 0)


def facts(**values: Any) -> RecordDict:
    return RecordDict({"facts": ConfigRecord(values)})


def expert(report: str = "{}", **changes: Array) -> RecordDict:
    """Return an expert's reply with another report, or with other tensors of one module."""
    sent = records.expert_record(GOOD, {})
    sent["facts"] = ConfigRecord({"report": report})
    changed = {f"{QUERY}.{part}": array for part, array in changes.items()}
    sent["adapter"] = ArrayRecord({**sent.array_records["adapter"], **changed})
    return sent


def sums(**changes: Any) -> RecordDict:
    """Return metric sums over five users, with changes in the unmasked variant."""

    def of(variant: Variant) -> dict[str, Any]:
        return metric_sums({"average": np.full((5, len(METRICS)), 0.5)}, variant).to_dict()

    return facts(unmasked=json.dumps({**of("unmasked"), **changes}), masked=json.dumps(of("masked")))


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


REPLIES: dict[str, tuple[Read, RecordDict, Parts]] = {
    "an empty message": (records.read_description, RecordDict(), ["'facts'", "[]"]),
    "a description of another version": (
        records.read_description,
        facts(domain="toys", role="train"),
        ["['attributes', 'backbone_sha256', "],
    ),
    "a catalog as text": (records.read_catalog, facts(catalog="a,b"), ["str", "bytes"]),
    "an expert without tensors": (records.read_expert, facts(report="{}"), ["adapter"]),
    "a report that is not JSON": (records.read_expert, expert("{"), ["report", "JSON"]),
    "a report nested too deeply": (records.read_expert, expert("[" * 99999), ["report", "JSON"]),
    "a report that is a list": (records.read_expert, expert("[]"), ["report", "list"]),
    "a tensor of another type": (
        records.read_expert,
        expert(lora_A=Array(np.zeros((2, 32)))),
        [f"{QUERY}.lora_A", "float64", "(2, 32)", "float32"],
    ),
    "a tensor of another shape than announced": (
        records.read_expert,
        expert(lora_A=Array("float32", (2, 32), "numpy.ndarray", npy(np.zeros((3, 32), np.float32)))),
        [f"{QUERY}.lora_A", "float32 (2, 32)", "float32 (3, 32)", "384 bytes"],
    ),
    "a truncated tensor": (
        records.read_expert,
        expert(lora_A=Array("float32", (2, 32), "numpy.ndarray", npy(np.zeros((2, 32), np.float32))[:-1])),
        [f"{QUERY}.lora_A", "float32 (2, 32)", "255 bytes"],
    ),
    "a pickle": (
        records.read_expert,
        expert(lora_A=Array("float32", (2, 32), "numpy.ndarray", b"\x80\x04\x95garbage.")),
        [f"{QUERY}.lora_A"],
    ),
    "sums of other metrics": (
        records.read_metric_sums,
        sums(metrics=["hits"]),
        ["metric sums", "['hits']", "['recall@1', "],
    ),
    "sums over no users": (records.read_metric_sums, sums(num_users=0), ["metric sums", "0 users", "1"]),
    "sums that are NaN": (
        records.read_metric_sums,
        sums(sums=[[float("nan")] * len(METRICS)]),
        ["metric sums", "9 of 9"],
    ),
    "sums above the number of users": (
        records.read_metric_sums,
        sums(sums=[[1e6] * len(METRICS)]),
        ["metric sums", "1e+06 to 1e+06", "0 to 5"],
    ),
    "negative sums": (
        records.read_metric_sums,
        sums(sums=[[-1.0] * len(METRICS)]),
        ["metric sums", "-1 to -1", "0 to 5"],
    ),
    "sums of another shape": (
        records.read_metric_sums,
        sums(sums=[[1.0]]),
        ["metric sums", "float64", "(1, 1)", "float64", "(1, 9)", "1 methods", "9 metrics"],
    ),
    "sums nested too deeply": (
        records.read_metric_sums,
        facts(unmasked="[" * 99999, masked="{}"),
        ["metric sums", "RecursionError"],
    ),
    "a request without models": (
        records.read_evaluation_request,
        facts(split="test", backbone=True, baselines=True, expert_sha256=""),
        ["'models'", "['facts']"],
    ),
}


@pytest.mark.parametrize("wrong", REPLIES)
def test_bad_replies(wrong: str) -> None:
    read, reply, parts = REPLIES[wrong]
    with pytest.raises(FedMergeError) as caught:
        read(reply)
    check_parts(str(caught.value), parts)


def test_there_are_many_cases() -> None:
    assert len(REPLIES) >= 15
