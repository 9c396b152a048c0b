"""Requests to fit a client's personal merge; its coefficients travel for a universal merge alone."""

from dataclasses import asdict, dataclass

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedmerge.errors import ClientError
from sim.app.messages.records.arrays import read_tensor
from sim.app.messages.records.fields import FACTS, ONE_VERSION, read_config, read_dataclass
from sim.app.messages.records.training import is_number

FIT_PERSONAL = "train.personal"
COEFFICIENTS = "coefficients"


@dataclass(frozen=True)
class PersonalRequest:
    """A request to fit a personal merge.

    Attributes:
        cohort_sha256: hash of the cohort that the client has received.
        expert_sha256: hash of the client's own expert, as in :class:`EvaluationRequest`.
    """

    cohort_sha256: str
    expert_sha256: str


def personal_request_record(request: PersonalRequest) -> RecordDict:
    """Make a request to fit a personal merge."""
    return RecordDict({FACTS: ConfigRecord(asdict(request))})


def read_personal_request(content: RecordDict) -> PersonalRequest:
    """Inverse of :func:`personal_request_record`.

    Raises:
        ClientError: another form.
    """
    return read_dataclass(PersonalRequest, dict(read_config(content, FACTS)))


def fitted_record(seconds: float, coefficients: torch.Tensor | None = None) -> RecordDict:
    """Make the reply of a client that has fitted its personal merge.

    Args:
        seconds: that it took.
        coefficients: (K, G) for the universal merge; None: nothing of the personal merge leaves.
    """
    content = RecordDict({FACTS: ConfigRecord({"seconds": seconds})})
    if coefficients is not None:
        content[COEFFICIENTS] = ArrayRecord({"fitted": Array(coefficients.float().numpy())})
    return content


def read_fitted_coefficients(
    content: RecordDict, shape: tuple[int, int], own: int, bound: float
) -> torch.Tensor | None:
    """Return the coefficients in the reply of a client, (K, G); None if it held them back.

    Args:
        content: of the message.
        shape: (K, G).
        own: row of the client's own update, which starts at 1; the others start at 0.
        bound: largest distance from the start.

    Raises:
        ClientError, LayoutMismatchError: another form, or coefficients that no fit can have.
    """
    if COEFFICIENTS not in content.array_records:
        return None
    arrays = content.array_records[COEFFICIENTS]
    if {*arrays} != {"fitted"}:
        raise ClientError(f"its coefficients are not one array; {ONE_VERSION}")
    found = read_tensor(arrays["fitted"], "coefficients.fitted")
    if tuple(found.shape) != shape:
        raise ClientError(f"its coefficients have shape {tuple(found.shape)}, expected {shape}; {ONE_VERSION}")
    moved = found.clone()
    moved[own] -= 1.0
    if not bool(moved.isfinite().all()) or float(moved.abs().max()) > bound:
        raise ClientError(
            f"its coefficients are not finite, or farther than {bound:g} from their start. Leave the domain out, or "
            "check its client."
        )
    return found


def read_fitted(content: RecordDict) -> float:
    """Inverse of :func:`fitted_record`.

    Raises:
        ClientError: another form.
    """
    facts = read_config(content, FACTS)
    seconds = facts.get("seconds")
    if {*facts} != {"seconds"} or not is_number(seconds) or not isinstance(seconds, float) or seconds < 0:
        raise ClientError(f"its report of a personal merge is not a number of seconds; {ONE_VERSION}")
    return seconds
