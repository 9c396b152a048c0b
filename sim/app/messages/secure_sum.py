"""Messages of a secure sum as Flower records."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, RecordDict

from fedmerge.errors import ClientError
from fedmerge.privacy.secagg.session import Integers, Session
from fedmerge.privacy.secagg.state import Advertisement, Revealed
from sim.app.messages.records import array_values

ADVERTISE = "query.secagg_advertise"
SHARE = "query.secagg_share"
MASKED = "query.secagg_masked"
UNMASK = "query.secagg_unmask"

_FACTS = "facts"
_MASKED = "masked"


def session_record(session: Session) -> RecordDict:
    """Make the request to advertise keys."""
    return _record(
        identifier=session.identifier,
        clients=list(session.coefficients),
        coefficients=list(session.coefficients.values()),
        threshold=session.threshold,
        num_values=session.num_values,
        value_range=session.value_range,
        total_weight=session.total_weight,
        agreement=session.agreement,
    )


def read_session(content: RecordDict) -> Session:
    """Inverse of :func:`session_record`.

    Raises:
        ClientError: the message has another form.
        AggregationError: the session is unsafe to take part in.
    """
    kinds = {"threshold": int, "num_values": int, "value_range": float, "total_weight": float}
    facts = _facts(content, identifier=bytes, agreement=str, **kinds)
    coefficients = _by_name(content, "clients", coefficients=float)["coefficients"]
    return Session(coefficients=coefficients, **facts)


def advertisement_record(advertisement: Advertisement) -> RecordDict:
    """Make the record of a client's keys."""
    return _record(**vars(advertisement))


def read_advertisement(content: RecordDict) -> Advertisement:
    """Inverse of :func:`advertisement_record`."""
    return Advertisement(**_facts(content, channel_key=bytes, mask_key=bytes, signature=bytes))


def advertisements_record(advertisements: Mapping[str, Advertisement]) -> RecordDict:
    """Make the request to share secrets; it holds the keys of all clients."""
    each = advertisements.values()
    return _record(
        clients=list(advertisements),
        channel_keys=[one.channel_key for one in each],
        mask_keys=[one.mask_key for one in each],
        signatures=[one.signature for one in each],
    )


def read_advertisements(content: RecordDict) -> dict[str, Advertisement]:
    """Inverse of :func:`advertisements_record`."""
    columns = _by_name(content, "clients", channel_keys=bytes, mask_keys=bytes, signatures=bytes)
    return {name: Advertisement(*(column[name] for column in columns.values())) for name in columns["mask_keys"]}


def boxes_record(boxes: Mapping[str, bytes]) -> RecordDict:
    """Make the record of sealed shares: by receiver if a client sends it, by sender if it is sent to a client."""
    return _record(clients=list(boxes), boxes=list(boxes.values()))


def read_boxes(content: RecordDict) -> dict[str, bytes]:
    """Inverse of :func:`boxes_record`."""
    return _by_name(content, "clients", boxes=bytes)["boxes"]


def masked_record(values: Integers) -> RecordDict:
    """Make the record of a client's masked values, (N,) uint32."""
    return RecordDict({_MASKED: ArrayRecord({"values": Array(values)})})


def read_masked(content: RecordDict) -> Integers:
    """Inverse of :func:`masked_record`.

    Raises:
        ClientError, LayoutMismatchError: the message has another form.
    """
    arrays = content.array_records.get(_MASKED)
    if arrays is None or set(arrays) != {"values"}:
        raise ClientError(
            f"its message holds no masked values (records: {sorted(content)}); use one fedmerge version everywhere"
        )
    return array_values(arrays["values"], "the masked values", np.dtype(np.uint32), 1)


def survivors_record(survivors: list[str]) -> RecordDict:
    """Make the request to unmask; it names the clients whose values are in the sum."""
    return _record(clients=survivors)


def read_survivors(content: RecordDict) -> list[str]:
    """Inverse of :func:`survivors_record`."""
    found = _config(content).get("clients")
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ClientError("the request to unmask names no clients; use one fedmerge version everywhere")
    return [str(name) for name in found]


def revealed_record(revealed: Revealed) -> RecordDict:
    """Make the record of a client's shares of the secrets that unmask the sum."""
    return _record(
        summed=list(revealed.self_masks),
        self_masks=list(revealed.self_masks.values()),
        dropped=list(revealed.mask_keys),
        mask_keys=list(revealed.mask_keys.values()),
    )


def read_revealed(content: RecordDict) -> Revealed:
    """Inverse of :func:`revealed_record`."""
    return Revealed(
        _by_name(content, "summed", self_masks=bytes)["self_masks"],
        _by_name(content, "dropped", mask_keys=bytes)["mask_keys"],
    )


def _record(**facts: ConfigRecordValues) -> RecordDict:
    return RecordDict({_FACTS: ConfigRecord(facts)})


def _config(content: RecordDict) -> ConfigRecord:
    record = content.config_records.get(_FACTS)
    if record is None:
        raise ClientError(
            f"its message has no record {_FACTS!r} (records: {sorted(content)}); use one fedmerge version everywhere"
        )
    return record


def _facts(content: RecordDict, **kinds: type) -> dict[str, Any]:
    found = _config(content)
    wrong = sorted(key for key, kind in kinds.items() if type(found.get(key)) is not kind)
    if wrong:
        raise ClientError(f"its message has another form in {wrong}; use one fedmerge version everywhere")
    return {key: found[key] for key in kinds}


def _by_name(content: RecordDict, names: str, **kinds: type) -> dict[str, dict[str, Any]]:
    """Return lists of a message as mappings from its list of names, with names unique and values of their type."""
    found = _facts(content, **dict.fromkeys([names, *kinds], list))
    clients = found[names]
    for key, kind in {names: str, **kinds}.items():
        wrong = [type(each).__name__ for each in found[key] if type(each) is not kind]
        if wrong or len(found[key]) != len(clients) or len(set(clients)) != len(clients):
            raise ClientError(
                f"its message has {len(found[key])} {key} for {len(clients)} {names}, {len(wrong)} of another type; "
                "use one fedmerge version everywhere"
            )
    return {key: dict(zip(clients, found[key], strict=True)) for key in kinds}
