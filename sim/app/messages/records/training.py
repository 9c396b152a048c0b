"""Requests to train, trained adapters, and the reports of their training."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedmerge.adapter import Adapter
from fedmerge.errors import ClientError
from fedmerge.escaping import one_line
from fedmerge.privacy.transport import Coding
from sim.app.messages.records.adapters import (
    ADAPTER,
    FLOAT32,
    ModelRecords,
    adapter_records,
    check_is_finite,
    read_adapter_records,
)
from sim.app.messages.records.arrays import array_values
from sim.app.messages.records.fields import FACTS, LONGEST_SHOWN, ONE_VERSION, read_config, read_dataclass

TRAIN = "train"
SIGNALS = "signals"
NOT_FRESH = -1  # the start of a round travels whole
LARGEST_COUNT, LARGEST_NUMBER = 2**53, 1e30  # in a report


@dataclass(frozen=True)
class RoundRequest:
    """A request to train in a round.

    Attributes:
        number: of the round, from 1.
        num_rounds: in all.
        trained: ``A and B`` or ``B``.
        fresh_seed: seed of a fresh adapter to start from; seed of the start's lora_A if its lora_B travels alone;
            NOT_FRESH if the whole start travels.
    """

    number: int
    num_rounds: int
    trained: Literal["A and B", "B"]
    fresh_seed: int


def expert_record(
    adapter: Adapter,
    report: Mapping[str, Any],
    coding: Coding = FLOAT32,
    only_B: bool = False,
    signals: ArrayRecord | None = None,
) -> RecordDict:
    """Make the record of a trained adapter with its report.

    Args:
        adapter: the adapter.
        report: of its training.
        coding: how the adapter is sent.
        only_B: True leaves out a lora_A that was not trained.
        signals: training signals, from :func:`signals_record`; None: they stay.
    """
    arrays = adapter_records(adapter, "", coding, only_B)
    more = {} if signals is None else {SIGNALS: signals}
    return RecordDict({**arrays, **more, FACTS: ConfigRecord({"report": json.dumps(report)})})


def signals_record(signals: Mapping[str, Sequence[float]], spread: float | None) -> ArrayRecord:
    """Make the record of training signals: two float32 a module, by name, and one for the spread if it is asked for."""
    values = np.array([signals[name] for name in sorted(signals)], dtype=np.float32)
    arrays = {"modules": Array(values)}
    if spread is not None:
        arrays["spread"] = Array(np.array([spread], dtype=np.float32))
    return ArrayRecord(arrays)


def read_signals(content: RecordDict, modules: Iterable[str], with_spread: bool) -> dict[str, Any]:
    """Return the training signals beside an expert as entries of its report; empty if the client held them back.

    Args:
        content: of the message.
        modules: names of the adapter's modules.
        with_spread: True if the spread of the users was asked for.

    Raises:
        ClientError, LayoutMismatchError: another form, or a value that no training can have.
    """
    if SIGNALS not in content.array_records:
        return {}
    arrays, names = content.array_records[SIGNALS], sorted(modules)
    expected = {"modules", "spread"} if with_spread else {"modules"}
    if set(arrays) != expected:
        raise ClientError(
            f"its training signals hold {one_line(str(sorted(arrays)), LONGEST_SHOWN)}, expected {sorted(expected)}; "
            f"{ONE_VERSION}"
        )
    values = array_values(arrays["modules"], "training signals", np.dtype(np.float32), 2)
    if values.shape != (len(names), 2) or not (np.isfinite(values) & (values >= 0)).all():
        raise ClientError(
            f"its training signals are of shape {values.shape}, expected ({len(names)}, 2), finite and not negative; "
            f"{ONE_VERSION}"
        )
    found: dict[str, Any] = {"signals": dict(zip(names, values.tolist(), strict=True))}
    if with_spread:
        spread = array_values(arrays["spread"], "spread of users", np.dtype(np.float32), 1)
        if spread.shape != (1,) or not 0 <= spread[0] <= 1:
            raise ClientError(f"its spread of users is of shape {spread.shape}, expected one number in [0, 1]")
        found["spread"] = float(spread[0])
    return found


def read_expert(
    content: RecordDict, coding: Coding = FLOAT32, like: Adapter | None = None, frozen: Adapter | None = None
) -> tuple[Adapter, dict[str, Any]]:
    """Inverse of :func:`expert_record`.

    Args:
        content: of the message.
        coding: how it was sent.
        like: adapter of the expected layout, needed if it was not sent as float32.
        frozen: adapter whose lora_A goes with a lora_B that was sent alone; None if both were sent.

    Raises:
        ClientError, LayoutMismatchError: another form.
    """
    report = read_report(content)
    return read_adapter_records(content, "", coding, like, frozen), report


def read_report(content: RecordDict) -> dict[str, Any]:
    """Read the report of a training, with its adapter or without.

    Raises:
        ClientError: another form.
    """
    try:
        report = json.loads(str(read_config(content, FACTS).get("report")))
    except (ValueError, RecursionError) as error:
        raise ClientError(f"its training report is not JSON; {ONE_VERSION}") from error
    if not isinstance(report, dict):
        raise ClientError(f"its training report is a {type(report).__name__}, expected an object; {ONE_VERSION}")
    for key, (expected, fits) in REPORT_FIELDS.items():
        if key in report and not fits(report[key]):
            raise ClientError(
                f"its training report has {key} = {json.dumps(report[key])[:80]}, expected {expected}; {ONE_VERSION}"
            )
    return report


def report_record(report: Mapping[str, Any]) -> RecordDict:
    """Make the record of a training whose adapter stays at the client."""
    return RecordDict({FACTS: ConfigRecord({"report": json.dumps(report)})})


def round_request_record(request: RoundRequest, start: Adapter | None, base: Adapter | None) -> RecordDict:
    """Make the request of a round.

    Args:
        request: the round.
        start: adapter to start from; None for a fresh one.
        base: adapter that is applied to the backbone meanwhile; None for none.
    """
    adapters: ModelRecords = {}
    if start is not None:
        adapters |= adapter_records(start, "start", only_B=request.trained == "B")
    if base is not None:
        adapters |= adapter_records(base, "base")
    return RecordDict({FACTS: ConfigRecord(asdict(request)), **adapters})


def read_round_request(
    content: RecordDict, fresh: Callable[[int], Adapter]
) -> tuple[RoundRequest, Adapter, Adapter | None]:
    """Inverse of :func:`round_request_record`.

    Args:
        content: of the message.
        fresh: seed -> fresh adapter.

    Raises:
        ClientError, LayoutMismatchError: another form.
    """
    request = read_dataclass(RoundRequest, dict(read_config(content, FACTS)))
    made = None if request.fresh_seed == NOT_FRESH else fresh(request.fresh_seed)
    frozen = made if request.trained == "B" else None
    start = read_adapter_records(content, "start", frozen=frozen) if f"{ADAPTER}start" in content else made
    if start is None:
        raise ClientError(f"the request holds neither an adapter to start from nor the seed of one; {ONE_VERSION}")
    base = read_adapter_records(content, "base") if f"{ADAPTER}base" in content else None
    check_is_finite(start, "the start")
    if base is not None:
        check_is_finite(base, "the base")
    return request, start, base


def is_count(value: Any) -> bool:
    """Return True for a count that a report may have."""
    return type(value) is int and 0 <= value < LARGEST_COUNT


def is_number(value: Any) -> bool:
    """Return True for a finite number that a report may have."""
    return type(value) in (int, float) and abs(value) < LARGEST_NUMBER  # NaN is not


def _is_validation(value: Any) -> bool:
    if not isinstance(value, dict) or not is_count(value.get("step")):
        return False
    return all(value.get(key) is None or is_number(value[key]) for key in ("loss", "ndcg"))


# Fields of a training report: what is expected, and its check.
REPORT_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("steps", "best_step", "validation_users"), ("a count", is_count)),
    "seconds": ("a number", is_number),
    "loss": ("a number, or null", lambda value: value is None or is_number(value)),
    **dict.fromkeys(("stopped_by", "sha256"), ("a text", lambda value: isinstance(value, str))),
    "cached": ("true or false", lambda value: isinstance(value, bool)),
    "privacy": ("an object, or null", lambda value: value is None or isinstance(value, dict)),
    "transport": ("an object", lambda value: isinstance(value, dict)),
    "validations": (
        "a list of objects with step, loss and ndcg",
        lambda value: isinstance(value, list) and all(map(_is_validation, value)),
    ),
}
