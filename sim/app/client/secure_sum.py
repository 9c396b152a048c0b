"""Answer the messages of a secure sum; secrets stay in the node's memory, values on the node's disk."""

import logging
from pathlib import Path
from typing import NamedTuple

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedmerge.adapter import Adapter
from fedmerge.client.cache.secure_sums import (
    cache_values,
    check_same_as_revealed,
    read_cached_values,
    record_answered,
    record_revealed,
    sum_key,
)
from fedmerge.config import ExperimentConfig, from_flat
from fedmerge.errors import ClientError, PolicyError
from fedmerge.federated.rules import RULES
from fedmerge.federated.summed import summed_values
from fedmerge.privacy.policy import check_may_leave
from fedmerge.privacy.secagg.agreement import Summand, check_session
from fedmerge.privacy.secagg.client import advertise, mask_values, share, unmask
from fedmerge.privacy.secagg.identity import read_identity, read_registered
from fedmerge.privacy.secagg.session import num_outside
from fedmerge.privacy.secagg.state import ClientState, state_from_text, state_to_text
from sim.app.client.node import Client, check_own_policy, domain_name
from sim.app.messages import secure_sum as secure_records

_SECRETS = "secure sum"
_VALUES = "summed values"

logger = logging.getLogger("fedmerge.client")


class _Values(NamedTuple):
    """What this client trained last: hash; key and number of the sum, users of the domain, and what it is a sum of."""

    sha256: str
    key: str
    number: int
    num_users: int
    what: Summand


def secagg_advertise(message: Message, context: Context) -> RecordDict:
    """Answer with fresh keys for a secure sum."""
    domain, config = _in_sum(context)
    return answer_advertise(domain, config, message.content, context)


def secagg_share(message: Message, context: Context) -> RecordDict:
    """Answer with sealed shares of this client's secrets, one for every other client."""
    _in_sum(context)
    return answer_share(message.content, context)


def secagg_masked(message: Message, context: Context) -> RecordDict:
    """Answer with the masked values that this client trained."""
    domain, config = _in_sum(context)
    return answer_masked(domain, config, message.content, context)


def secagg_unmask(message: Message, context: Context) -> RecordDict:
    """Answer with the shares that remove the masks of the sum, and of nothing else."""
    domain, config = _in_sum(context)
    return answer_unmask(domain, config, message.content, context)


def _in_sum(context: Context) -> tuple[str, ExperimentConfig]:
    """Return domain and configuration of a client in a secure sum, without loading the backbone."""
    config, domain = from_flat(context.run_config), domain_name(context)
    check_own_policy(context, config, domain)
    check_may_leave(config.privacy.policy, "masked update", domain)
    return domain, config


def keep_for_sum(
    client: Client,
    context: Context,
    rule: str,
    adapter: Adapter,
    start: Adapter | None,
    number: int,
    what: Summand = "adapter",
) -> None:
    """Cache what this client adds to the next sum; nothing of it leaves yet.

    Args:
        client: this node.
        context: of the message.
        rule: of the rounds; weighted-average for experts.
        adapter: the trained adapter.
        start: that a round started from; None for experts.
        number: of the round; 0 outside of rounds.
        what: the sum is of.

    Raises:
        PolicyError: the rule needs single adapters, or a sum has revealed other values of the same training.
    """
    row, config, manifest = RULES[rule], client.config, client.domain.manifest
    if row.summed is None:
        raise PolicyError(
            f"{'head' if what == 'head' else 'rounds'}.rule is {rule}, which needs single adapters, but the policy "
            "keeps them at the client. Use a rule that sums are enough for."
        )
    values = summed_values(row.summed, adapter, start if row.of == "updates" else None)
    key = sum_key(config.dp, config.run_id, number, what)
    sha256 = cache_values(config.cache_dir, manifest.name, values)
    check_same_as_revealed(config.cache_dir, manifest.name, sha256, key)
    remember_values(context, sha256, key, number, manifest.num_users, what)


def remember_values(
    context: Context, sha256: str, key: str, number: int, num_users: int, what: Summand = "adapter"
) -> None:
    """Note the values and the key of the next sum; drop the secrets of a session that has not ended."""
    context.state[_VALUES] = ConfigRecord(_Values(sha256, key, number, num_users, what)._asdict())
    context.state.pop(_SECRETS, None)


def answer_advertise(domain: str, config: ExperimentConfig, content: RecordDict, context: Context) -> RecordDict:
    """Return fresh keys for a session as the run configuration implies; signed if the node has an ``identity-key``."""
    session, values = secure_records.read_session(content), _values(context)
    check_session(session, config, domain, values.number, values.num_users, values.what)
    path = context.node_config.get("identity-key")
    identity = None if path is None else read_identity(Path(str(path)).expanduser())
    state, advertisement = advertise(session, domain, identity)
    _remember(context, state)
    return secure_records.advertisement_record(advertisement)


def answer_share(content: RecordDict, context: Context) -> RecordDict:
    """Return sealed shares for every other client, after checking signatures where the node has ``peer-keys``."""
    folder = context.node_config.get("peer-keys")
    registered = None if folder is None else read_registered(Path(str(folder)).expanduser())
    state, boxes = share(_state(context), secure_records.read_advertisements(content), registered)
    _remember(context, state)
    return secure_records.boxes_record(boxes)


def answer_masked(domain: str, config: ExperimentConfig, content: RecordDict, context: Context) -> RecordDict:
    """Return the masked values, once a session."""
    values = read_cached_values(config.cache_dir, domain, _values(context).sha256)
    state, masked = mask_values(_state(context), secure_records.read_boxes(content), values)
    record_answered(config.cache_dir, domain, state.session.digest)
    if number := num_outside(state.session, values):
        logger.warning(
            "%s: %d of %d values lie outside ±%g and were cut to it; the server is not told. If the training "
            "diverged, agree on a lower train.learning_rate",
            domain,
            number,
            values.size,
            state.session.value_range,
        )
    _remember(context, state)
    return secure_records.masked_record(masked)


def answer_unmask(domain: str, config: ExperimentConfig, content: RecordDict, context: Context) -> RecordDict:
    """Return a share of one secret of each client, once; then forget all secrets of the session."""
    state = _state(context)
    survivors = secure_records.read_survivors(content)
    revealed = unmask(state, survivors)
    of_sum = {client: state.session.coefficients[client] for client in survivors}
    summed = sum(of_sum[client] for client in sorted(of_sum))
    parts = {client: part / summed for client, part in of_sum.items()}
    values = _values(context)
    record_revealed(config.cache_dir, domain, values.sha256, parts, state.session.value_range, values.key)
    context.state.pop(_SECRETS, None)
    return secure_records.revealed_record(revealed)


def _remember(context: Context, state: ClientState) -> None:
    context.state[_SECRETS] = ConfigRecord({"state": state_to_text(state)})


def _state(context: Context) -> ClientState:
    record = context.state.config_records.get(_SECRETS)
    if record is None:
        raise ClientError(
            "this client has no session of a secure sum: its node restarted, or the session has ended. Repeat the sum "
            "with fresh keys"
        )
    return state_from_text(str(record["state"]))


def _values(context: Context) -> _Values:
    record = context.state.config_records.get(_VALUES)
    if record is None:
        raise ClientError("this client has trained nothing in this run that could be summed; ask it to train first")
    number, num_users = (int(str(record[key])) for key in ("number", "num_users"))
    what: Summand = "head" if record["what"] == "head" else "adapter"
    return _Values(str(record["sha256"]), str(record["key"]), number, num_users, what)
