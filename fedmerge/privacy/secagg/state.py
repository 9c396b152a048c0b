"""A client's messages in a secure sum, and its state between two answers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedmerge.privacy.secagg.session import Session

Step = Literal["advertised", "shared", "masked"]


@dataclass(frozen=True)
class Advertisement:
    """A client's public keys, 32 bytes each, and its signature over them and the session; empty without one."""

    channel_key: bytes
    mask_key: bytes
    signature: bytes = b""


@dataclass(frozen=True)
class Shares:
    """One client's shares of another's secrets, 16 bytes each."""

    mask_key: bytes
    self_mask: bytes


@dataclass(frozen=True)
class Revealed:
    """Shares that a client reveals at the end: self masks of clients in the sum, mask keys of the others."""

    self_masks: Mapping[str, bytes]
    mask_keys: Mapping[str, bytes]


@dataclass(frozen=True)
class ClientState:
    """A client's state between two answers. It holds secrets and stays in the client's memory until the session ends.

    Attributes:
        session: session that the client has joined.
        client: name of the client.
        step: last answer.
        channel_secret, mask_secret, self_secret: secrets of its keys and its self mask.
        advertisements: keys of all participating clients, its own included.
        own: its shares of its own secrets.
        held: client -> shares of that client's secrets.
    """

    session: Session
    client: str
    step: Step
    channel_secret: bytes = field(repr=False)
    mask_secret: bytes = field(repr=False)
    self_secret: bytes = field(repr=False)
    advertisements: Mapping[str, Advertisement] = field(default_factory=dict)
    own: Shares | None = field(default=None, repr=False)
    held: Mapping[str, Shares] = field(default_factory=dict, repr=False)


def state_to_text(state: ClientState) -> str:
    """Return a state as JSON, for the memory of the node between two messages."""
    return json.dumps(_plain(state))


def state_from_text(text: str) -> ClientState:
    """Restore a state, the inverse of :func:`state_to_text`."""
    found: dict[str, Any] = json.loads(text)
    session = found["session"] | {"identifier": bytes.fromhex(found["session"]["identifier"])}
    return ClientState(
        session=Session(**session),
        client=found["client"],
        step=found["step"],
        channel_secret=bytes.fromhex(found["channel_secret"]),
        mask_secret=bytes.fromhex(found["mask_secret"]),
        self_secret=bytes.fromhex(found["self_secret"]),
        advertisements={peer: Advertisement(**_raw(each)) for peer, each in found["advertisements"].items()},
        own=None if found["own"] is None else Shares(**_raw(found["own"])),
        held={peer: Shares(**_raw(each)) for peer, each in found["held"].items()},
    )


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def _raw(found: Mapping[str, str]) -> dict[str, bytes]:
    return {key: bytes.fromhex(value) for key, value in found.items()}
