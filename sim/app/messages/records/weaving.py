"""Requests to continue another domain's adapter, and the continued adapters, labelled by target and source."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedmerge.adapter import Adapter
from sim.app.messages.records.adapters import adapter_records, check_is_finite, read_adapter_records
from sim.app.messages.records.fields import FACTS, read_config, read_dataclass
from sim.app.messages.records.training import read_report, report_record

WEAVE = "train.weave"


@dataclass(frozen=True)
class WeaveRequest:
    """A request to continue an adapter.

    Attributes:
        number: of the pass, from 1.
        source: the domain whose expert the adapter was, or ``fedmerge.federated.weaving.MEAN``.
    """

    number: int
    source: str


def weave_request_record(request: WeaveRequest, start: Adapter) -> RecordDict:
    """Make a request to continue an adapter."""
    return RecordDict({FACTS: ConfigRecord(asdict(request)), **adapter_records(start, "start")})


def read_weave_request(content: RecordDict) -> tuple[WeaveRequest, Adapter]:
    """Inverse of :func:`weave_request_record`.

    Raises:
        ClientError, LayoutMismatchError: another form.
    """
    request = read_dataclass(WeaveRequest, dict(read_config(content, FACTS)))
    start = read_adapter_records(content, "start")
    check_is_finite(start, "the start")
    return request, start


def woven_record(source: str, adapter: Adapter, report: Mapping[str, Any]) -> RecordDict:
    """Make the record of a continued adapter; its source is in the names of its records, so the ledger has it."""
    return RecordDict({**adapter_records(adapter, _of(source)), **report_record(report)})


def read_woven(content: RecordDict, source: str) -> tuple[Adapter, dict[str, Any]]:
    """Inverse of :func:`woven_record`.

    Raises:
        ClientError, LayoutMismatchError: another form, or the adapter of another source.
    """
    return read_adapter_records(content, _of(source)), read_report(content)


def _of(source: str) -> str:
    return f" from {source}"
