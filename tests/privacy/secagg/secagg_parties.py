"""All parties of a secure sum in one process, with a server that keeps a transcript."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.privacy.secagg.client import advertise, mask_values, share, unmask
from fedmerge.privacy.secagg.server import add_values, check_advertisement, check_boxes, check_revealed, weighted_mean
from fedmerge.privacy.secagg.session import Integers, Reals, Session
from fedmerge.privacy.secagg.state import Advertisement, ClientState, Revealed, state_from_text, state_to_text

ADVERTISE, SHARE, MASK, UNMASK = "advertise", "share", "mask", "unmask"


@dataclass
class Transcript:
    """All that a server sees, and (for tests that look behind) the clients' states."""

    advertisements: dict[str, Advertisement] = field(default_factory=dict)
    boxes: dict[str, dict[str, bytes]] = field(default_factory=dict)
    masked: dict[str, Integers] = field(default_factory=dict)
    revealed: dict[str, Revealed] = field(default_factory=dict)
    mean: Reals | None = None
    states: dict[str, ClientState] = field(default_factory=dict)


def run_session(
    session: Session,
    values: Mapping[str, NDArray[np.floating[Any]]],
    gone_before: Mapping[str, str] | None = None,
) -> Transcript:
    """One secure sum.

    Args:
        session: of the sum.
        values: client -> its values.
        gone_before: client -> the step that it does not answer any more.
    """
    order = (ADVERTISE, SHARE, MASK, UNMASK)
    gone = {client: order.index(step) for client, step in (gone_before or {}).items()}

    def there(step: str, among: Mapping[str, Any]) -> list[str]:
        return [client for client in among if order.index(step) < gone.get(client, len(order))]

    seen = Transcript()
    for client in there(ADVERTISE, session.coefficients):
        seen.states[client], seen.advertisements[client] = advertise(session, client)
        check_advertisement(client, seen.advertisements[client])
    for client in there(SHARE, seen.advertisements):
        seen.states[client], seen.boxes[client] = share(seen.states[client], seen.advertisements)
        check_boxes(client, seen.boxes[client], seen.advertisements)
    total = np.zeros(session.num_values, np.uint32)
    for client in there(MASK, seen.boxes):
        relayed = {peer: boxes[client] for peer, boxes in seen.boxes.items() if peer != client}
        state = state_from_text(state_to_text(seen.states[client]))  # as a node keeps it between two messages
        seen.states[client], seen.masked[client] = mask_values(state, relayed, values[client])
        total = add_values(session, client, total, seen.masked[client])
    survivors, shared = frozenset(seen.masked), frozenset(seen.boxes)
    for client in there(UNMASK, seen.masked):
        seen.revealed[client] = unmask(seen.states[client], sorted(survivors))
        check_revealed(client, seen.revealed[client], survivors, shared)
    seen.mean = weighted_mean(session, seen.advertisements, shared, survivors, total, seen.revealed)
    return seen
