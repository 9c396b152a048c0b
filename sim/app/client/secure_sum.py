"""A client's answers in a secure sum: its secrets lie in the node's memory, its values on the node's disk."""

from pathlib import Path

from flwr.app import ConfigRecord, Context, RecordDict

from fedmerge.client.cache.secure_sums import kept_values, note_revealed
from fedmerge.config import ExperimentConfig
from fedmerge.errors import ClientError
from fedmerge.privacy.secagg.client import advertise, mask_values, share, unmask
from fedmerge.privacy.secagg.identity import read_identity, read_registered
from fedmerge.privacy.secagg.state import ClientState, state_from_text, state_to_text
from sim.app.messages import secure_sum as secure_records

_SECRETS = "secure sum"
_VALUES = "summed values"


def remember_values(context: Context, sha256: str, of: str) -> None:
    """Which values the next sum is of, and of which training; an earlier session that has not ended is over."""
    context.state[_VALUES] = ConfigRecord({"sha256": sha256, "of": of})
    context.state.pop(_SECRETS, None)


def answer_advertise(domain: str, content: RecordDict, context: Context) -> RecordDict:
    """Fresh keys, signed where the node has an ``identity-key``."""
    path = context.node_config.get("identity-key")
    identity = None if path is None else read_identity(Path(str(path)).expanduser())
    state, advertisement = advertise(secure_records.read_session(content), domain, identity)
    _remember(context, state)
    return secure_records.advertisement_record(advertisement)


def answer_share(content: RecordDict, context: Context) -> RecordDict:
    """Sealed shares for every other client, whose signatures are checked where the node has ``peer-keys``."""
    folder = context.node_config.get("peer-keys")
    registered = None if folder is None else read_registered(Path(str(folder)).expanduser())
    state, boxes = share(_state(context), secure_records.read_advertisements(content), registered)
    _remember(context, state)
    return secure_records.boxes_record(boxes)


def answer_masked(domain: str, config: ExperimentConfig, content: RecordDict, context: Context) -> RecordDict:
    """The masked values."""
    values = kept_values(config.cache_dir, domain, _values(context)[0])
    state, masked = mask_values(_state(context), secure_records.read_boxes(content), values)
    _remember(context, state)
    return secure_records.masked_record(masked)


def answer_unmask(domain: str, config: ExperimentConfig, content: RecordDict, context: Context) -> RecordDict:
    """A share of one secret of each, once; all secrets of the session are forgotten."""
    state = _state(context)
    survivors = secure_records.read_survivors(content)
    revealed = unmask(state, survivors)
    of_sum = {client: state.session.coefficients[client] for client in survivors}
    summed = sum(of_sum[client] for client in sorted(of_sum))
    parts = {client: part / summed for client, part in of_sum.items()}
    sha256, of = _values(context)
    note_revealed(config.cache_dir, domain, sha256, parts, of)
    context.state.pop(_SECRETS, None)
    return secure_records.revealed_record(revealed)


def _remember(context: Context, state: ClientState) -> None:
    context.state[_SECRETS] = ConfigRecord({"state": state_to_text(state)})


def _state(context: Context) -> ClientState:
    record = context.state.config_records.get(_SECRETS)
    if record is None:
        raise ClientError(
            "it has no session of a secure sum: its node was started again since, or has answered all it will. The sum "
            "has to begin anew, with fresh keys"
        )
    return state_from_text(str(record["state"]))


def _values(context: Context) -> tuple[str, str]:
    record = context.state.config_records.get(_VALUES)
    if record is None:
        raise ClientError("it has trained nothing in this run that could be summed; ask it to train first")
    return str(record["sha256"]), str(record["of"])
