"""Requests to fit a client's personal merge; the merge and its coefficients never travel."""

from dataclasses import asdict, dataclass

from flwr.app import ConfigRecord, RecordDict

from fedmerge.errors import ClientError
from sim.app.messages.records.fields import FACTS, ONE_VERSION, read_config, read_dataclass
from sim.app.messages.records.training import is_number

FIT_PERSONAL = "train.personal"


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


def fitted_record(seconds: float) -> RecordDict:
    """Make the reply of a client that has fitted its personal merge: the seconds that it took, and nothing of it."""
    return RecordDict({FACTS: ConfigRecord({"seconds": seconds})})


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
