"""Requests to continue an adapter, and the continued adapters, labelled by target and source; similarity factors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedmerge.adapter import Adapter
from fedmerge.errors import ClientError
from fedmerge.federated.shared_items import MeanSimilarity, Numbers
from sim.app.messages.records.adapters import adapter_records, check_is_finite, read_adapter_records
from sim.app.messages.records.arrays import array_values
from sim.app.messages.records.fields import FACTS, ONE_VERSION, read_config, read_dataclass
from sim.app.messages.records.training import read_report, report_record

WEAVE = "train.weave"
SIMILARITY = "query.similarity"
_SIMILARITY = "similarity"
_LONGEST = 1.01  # of a row of factors: item vectors have length 1, and float16 rounds


@dataclass(frozen=True)
class WeaveRequest:
    """A request to continue an adapter.

    Attributes:
        number: of the pass, from 1.
        source: the domain whose expert the adapter was, or MEAN or SHARED of ``fedmerge.federated.weaving``.
    """

    number: int
    source: str


@dataclass(frozen=True)
class SimilarityRequest:
    """A request for the similarity factors of shared items.

    Attributes:
        expert_sha256: hash of the client's own expert, as in :class:`EvaluationRequest`.
        rank: largest number of columns.
    """

    expert_sha256: str
    rank: int


def weave_request_record(request: WeaveRequest, start: Adapter, similarity: MeanSimilarity | None = None) -> RecordDict:
    """Make a request to continue an adapter, under schedule ``similarity`` with the mean that it is pulled to."""
    content = RecordDict({FACTS: ConfigRecord(asdict(request)), **adapter_records(start, "start")})
    if similarity is not None:
        content[_SIMILARITY] = ArrayRecord(
            {
                "items": Array(similarity.items),
                "factors": Array(similarity.factors.numpy()),
                "present": Array(similarity.present.numpy()),
            }
        )
    return content


def read_weave_request(content: RecordDict) -> tuple[WeaveRequest, Adapter]:
    """Inverse of :func:`weave_request_record`, without the similarity.

    Raises:
        ClientError, LayoutMismatchError: another form.
    """
    request = read_dataclass(WeaveRequest, dict(read_config(content, FACTS)))
    start = read_adapter_records(content, "start")
    check_is_finite(start, "the start")
    return request, start


def read_mean_similarity(content: RecordDict, num_items: int) -> MeanSimilarity | None:
    """Return the mean similarity in a request to continue an adapter; None without one.

    Args:
        content: of the message.
        num_items: of the client's catalog.

    Raises:
        ClientError, LayoutMismatchError: another form, or items that the catalog lacks.
    """
    if _SIMILARITY not in content.array_records:
        return None
    arrays = _arrays(content, {"items", "factors", "present"})
    items = _items(arrays["items"], num_items)
    factors = torch.from_numpy(array_values(arrays["factors"], "similarity.factors", np.dtype(np.float16), 2))
    present = torch.from_numpy(array_values(arrays["present"], "similarity.present", np.dtype(np.uint8), 2))
    if not len(items) == len(factors) == len(present) or not bool(factors.isfinite().all()):
        raise ClientError(f"the mean similarity is not finite, or its arrays differ in length; {ONE_VERSION}")
    if not present.numel() or int(present.max()) > 1 or not bool(present.any(dim=1).all()):
        raise ClientError(f"the mean similarity has items that nobody has; {ONE_VERSION}")
    return MeanSimilarity(items, factors, present)


def woven_record(source: str, adapter: Adapter, report: Mapping[str, Any]) -> RecordDict:
    """Make the record of a continued adapter; its source is in the names of its records, so the ledger has it."""
    return RecordDict({**adapter_records(adapter, _of(source)), **report_record(report)})


def read_woven(content: RecordDict, source: str) -> tuple[Adapter, dict[str, Any]]:
    """Inverse of :func:`woven_record`.

    Raises:
        ClientError, LayoutMismatchError: another form, or the adapter of another source.
    """
    return read_adapter_records(content, _of(source)), read_report(content)


def similarity_request_record(request: SimilarityRequest, items: Numbers) -> RecordDict:
    """Make a request for the similarity factors of these items, positions in the client's catalog."""
    content = RecordDict({FACTS: ConfigRecord(asdict(request))})
    content[_SIMILARITY] = ArrayRecord({"items": Array(items)})
    return content


def read_similarity_request(content: RecordDict, num_items: int) -> tuple[SimilarityRequest, Numbers]:
    """Inverse of :func:`similarity_request_record`.

    Raises:
        ClientError, LayoutMismatchError: another form, or items that the catalog lacks.
    """
    request = read_dataclass(SimilarityRequest, dict(read_config(content, FACTS)))
    return request, _items(_arrays(content, {"items"})["items"], num_items)


def similarity_record(factors: torch.Tensor) -> RecordDict:
    """Make the record of a client's similarity factors, (n, q) float16."""
    return RecordDict({_SIMILARITY: ArrayRecord({"factors": Array(factors.numpy())})})


def read_similarity(content: RecordDict, shape: tuple[int, int]) -> torch.Tensor:
    """Inverse of :func:`similarity_record`.

    Raises:
        ClientError, LayoutMismatchError: another form, or rows that no vectors of length 1 have.
    """
    values = array_values(_arrays(content, {"factors"})["factors"], "similarity.factors", np.dtype(np.float16), 2)
    factors = torch.from_numpy(values)
    if tuple(factors.shape) != shape:
        raise ClientError(f"its similarity factors have shape {tuple(factors.shape)}, expected {shape}; {ONE_VERSION}")
    if not bool(factors.isfinite().all()) or float(factors.float().norm(dim=1).max()) > _LONGEST:
        raise ClientError(
            "its similarity factors are not finite, or have rows longer than 1, the length of an item vector. Leave "
            "the domain out, or check its client."
        )
    return factors


def _arrays(content: RecordDict, names: set[str]) -> ArrayRecord:
    record = content.array_records.get(_SIMILARITY)
    if record is None or {*record} != names:
        raise ClientError(f"its record {_SIMILARITY!r} has not the arrays {', '.join(sorted(names))}; {ONE_VERSION}")
    return record


def _items(array: Array, num_items: int) -> Numbers:
    items = array_values(array, "similarity.items", np.dtype(np.int64), 1)
    if not len(items) or items[0] < 0 or items[-1] >= num_items or not bool((np.diff(items) > 0).all()):
        raise ClientError(f"the shared items are not increasing positions in a catalog of {num_items}; {ONE_VERSION}")
    return items


def _of(source: str) -> str:
    return f" from {source}"
