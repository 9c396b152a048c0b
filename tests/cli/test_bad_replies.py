"""Bad replies of clients, as the server reads them: each is refused with what was found and expected."""

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
    """A trained adapter with another report, or other tensors of one module."""
    sent = records.expert_record(GOOD, {})
    sent["facts"] = ConfigRecord({"report": report})
    changed = {f"{QUERY}.{part}": array for part, array in changes.items()}
    sent["adapter"] = ArrayRecord({**sent.array_records["adapter"], **changed})
    return sent


def sums(**changes: Any) -> RecordDict:
    """Metric sums over five users with other values in the unmasked variant."""

    def of(variant: Variant) -> dict[str, Any]:
        return metric_sums({"average": np.full((5, len(METRICS)), 0.5)}, variant).to_dict()

    return facts(unmasked=json.dumps({**of("unmasked"), **changes}), masked=json.dumps(of("masked")))


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


REPLIES: dict[str, tuple[Read, RecordDict, Parts]] = {
    "nothing": (records.read_description, RecordDict(), ["its message has no record 'facts' (records: [])"]),
    "a description of another version": (
        records.read_description,
        facts(domain="toys", role="train"),
        ["its Description has another form in ['backbone_sha256', ", "use one fedmerge version everywhere"],
    ),
    "a catalog as text": (records.read_catalog, facts(catalog="a,b"), ["its catalog came as str, expected bytes"]),
    "an expert without tensors": (records.read_expert, facts(report="{}"), ["the message holds no adapter (records: "]),
    "a report that is no JSON": (records.read_expert, expert("{"), ["its training report is not JSON; use one fedmer"]),
    "a report nested without end": (records.read_expert, expert("[" * 99999), ["its training report is not JSON"]),
    "a report that is a list": (records.read_expert, expert("[]"), ["its training report is a list, expected an obj"]),
    "a tensor of another type": (
        records.read_expert,
        expert(lora_A=Array(np.zeros((2, 32)))),
        [f"{QUERY}.lora_A is float64 of shape (2, 32), expected a float32 matrix"],
    ),
    "a tensor of another shape than announced": (
        records.read_expert,
        expert(lora_A=Array("float32", (2, 32), "numpy.ndarray", npy(np.zeros((3, 32), np.float32)))),
        [f"{QUERY}.lora_A announces float32 (2, 32) but holds float32 (3, 32) in 384 bytes"],
    ),
    "a tensor cut short": (
        records.read_expert,
        expert(lora_A=Array("float32", (2, 32), "numpy.ndarray", npy(np.zeros((2, 32), np.float32))[:-1])),
        [f"{QUERY}.lora_A announces float32 (2, 32) but holds float32 (2, 32) in 255 bytes"],
    ),
    "a pickle": (
        records.read_expert,
        expert(lora_A=Array("float32", (2, 32), "numpy.ndarray", b"\x80\x04\x95garbage.")),
        [f"{QUERY}.lora_A cannot be read ("],
    ),
    "sums of other metrics": (
        records.read_metric_sums,
        sums(metrics=["hits"]),
        ["metric sums: found the metrics ['hits']; expected ['recall@1', ", "use one version on both ends"],
    ),
    "sums over nobody": (
        records.read_metric_sums,
        sums(num_users=0),
        ["metric sums over 0 users; expected at least 1"],
    ),
    "sums that are NaN": (
        records.read_metric_sums,
        sums(sums=[[float("nan")] * len(METRICS)]),
        ["metric sums: 9 of 9 sums are not finite; exclude this client"],
    ),
    "sums beyond the users": (
        records.read_metric_sums,
        sums(sums=[[1e6] * len(METRICS)]),
        ["its metric sums run from 1e+06 to 1e+06, expected 0 to 5: the outcome of a user is between 0 and 1"],
    ),
    "sums below nothing": (
        records.read_metric_sums,
        sums(sums=[[-1.0] * len(METRICS)]),
        ["its metric sums run from -1 to -1, expected 0 to 5"],
    ),
    "sums of another shape": (
        records.read_metric_sums,
        sums(sums=[[1.0]]),
        ["metric sums: sums are float64 of shape (1, 1); expected float64 of shape (1, 9) for 1 methods and 9 metrics"],
    ),
    "sums nested without end": (
        records.read_metric_sums,
        facts(unmasked="[" * 99999, masked="{}"),
        ["its metric sums are malformed (RecursionError"],
    ),
    "a request without models": (
        records.read_evaluation_request,
        facts(split="test", backbone=True, baselines=True, expert_sha256=""),
        ["its message has no record 'models' (records: ['facts'])"],
    ),
}


@pytest.mark.parametrize("wrong", REPLIES)
def test_bad_replies(wrong: str) -> None:
    read, reply, parts = REPLIES[wrong]
    with pytest.raises(FedMergeError) as caught:
        read(reply)
    check_parts(str(caught.value), parts)


def test_there_are_many() -> None:
    assert len(REPLIES) >= 15
