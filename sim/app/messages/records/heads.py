"""Requests to train a client's own heads, and the reports of their training; a head itself never travels."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from flwr.app import ConfigRecord, RecordDict

from fedmerge.adapter import Adapter
from fedmerge.config import HeadVectors
from fedmerge.errors import ClientError
from fedmerge.evaluation.sums import VARIANTS
from sim.app.messages.records.adapters import ModelRecords, read_models
from sim.app.messages.records.fields import FACTS, LONGEST_SHOWN, ONE_VERSION, read_config, read_dataclass
from sim.app.messages.records.training import is_count, is_number

TRAIN_HEAD = "train.head"
ROUND_HEAD = "train.head_round"  # its request and its reply are those of a round of adapters
FEDERATED = "federated"  # key of the report about the federated head's fusion, beside those of the vectors
LONGEST_REASON = 500  # characters
_HEADS = "heads"


@dataclass(frozen=True)
class HeadRequest:
    """A request to train heads.

    Attributes:
        served: label of the model of the request that the vectors ``merge`` mean.
        vectors: encoders of the item vectors, comma-separated, each for one head.
        expert_sha256: hash of the client's own expert, as in :class:`EvaluationRequest`; empty without ``expert``.
    """

    served: str
    vectors: str
    expert_sha256: str


def head_request_record(request: HeadRequest, models: ModelRecords) -> RecordDict:
    """Make a request to train heads over the models of :func:`model_records`."""
    return RecordDict({FACTS: ConfigRecord(asdict(request)), **models})


def read_head_request(content: RecordDict) -> tuple[HeadRequest, dict[str, Adapter]]:
    """Inverse of :func:`head_request_record`.

    Raises:
        ClientError, LayoutMismatchError: another form.
    """
    return read_dataclass(HeadRequest, dict(read_config(content, FACTS))), read_models(content)


def read_vectors(text: str) -> tuple[HeadVectors, ...]:
    """Read the comma-separated vectors of a request; an empty text names none.

    Raises:
        ClientError: an unknown name.
    """
    known: tuple[HeadVectors, ...] = get_args(HeadVectors)
    names = text.split(",") if text else []
    if strange := [name[:LONGEST_SHOWN] for name in names if name not in known]:
        raise ClientError(f"the request names the vectors {strange}, expected {', '.join(known)}; {ONE_VERSION}")
    return tuple(name for name in known if name in names)


def head_reports_record(reports: Mapping[str, Mapping[str, Any]]) -> RecordDict:
    """Make the record of the reports of trained heads; their fields are those of HEAD_REPORT_FIELDS."""
    return RecordDict({FACTS: ConfigRecord({_HEADS: json.dumps(reports)})})


def read_head_reports(content: RecordDict) -> dict[str, dict[str, Any]]:
    """Inverse of :func:`head_reports_record`.

    Returns:
        vectors -> report. A head was trained, or reused, where ``trained`` is true. If the request held the federated
        head, also FEDERATED -> report with the weights of its fusion.

    Raises:
        ClientError: another form.
    """
    try:
        reports = json.loads(str(read_config(content, FACTS).get(_HEADS)))
    except (ValueError, RecursionError) as error:
        raise ClientError(f"its reports of heads are not JSON; {ONE_VERSION}") from error
    known = (*get_args(HeadVectors), FEDERATED)
    if not isinstance(reports, dict) or not all(
        key in known and isinstance(report, dict) for key, report in reports.items()
    ):
        raise ClientError(
            f"its reports of heads are not a JSON object of reports for {', '.join(known)}; {ONE_VERSION}"
        )
    for vectors, report in reports.items():
        if not {"trained", "reason"} <= report.keys() <= HEAD_REPORT_FIELDS.keys():
            found = sorted(key[:LONGEST_SHOWN] for key in report)[:20]
            raise ClientError(f"its report of the head on {vectors} has the fields {found}; {ONE_VERSION}")
        for key, value in report.items():
            expected, fits = HEAD_REPORT_FIELDS[key]
            if not fits(value):
                raise ClientError(
                    f"its report of the head on {vectors} has {key} = {json.dumps(value)[:LONGEST_SHOWN]}, expected "
                    f"{expected}; {ONE_VERSION}"
                )
    return reports


def _are_weights(value: Any) -> bool:
    """Return True for variant -> source -> a weight from 0 to 1, which add up to 1."""
    if not isinstance(value, dict) or not value.keys() <= set(VARIANTS):
        return False
    return all(
        isinstance(weights, dict)
        and all(is_number(weight) and 0 <= weight <= 1 for weight in weights.values())
        and abs(sum(weights.values()) - 1) < 1e-6
        for weights in value.values()
    )


# Fields of the report of a head: what is expected, and its check.
HEAD_REPORT_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "trained": ("true or false", lambda value: isinstance(value, bool)),
    "reason": (
        f"a text of at most {LONGEST_REASON} characters",
        lambda value: isinstance(value, str) and len(value) <= LONGEST_REASON,
    ),
    "cached": ("true or false", lambda value: isinstance(value, bool)),
    **dict.fromkeys(("epochs", "best_epoch"), ("a count", is_count)),
    "seconds": ("a number", is_number),
    "stopped_by": (
        "max_epochs, max_minutes or patience",
        lambda value: value in ("max_epochs", "max_minutes", "patience"),
    ),
    "weights": ("variant -> source -> weight, which add up to 1", _are_weights),
}
