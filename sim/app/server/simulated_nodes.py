"""Many simulated nodes: where Flower's simulation looks for messages."""

from typing import Any

from sim.app.flower_internals import InMemoryGrid


def skip_idle_nodes(grid: InMemoryGrid) -> None:
    """Let Flower's simulation search the open messages only for nodes that were sent one.

    Ten times a second it asks for the messages of each node in turn, and each time Flower reads all open messages:
    K nodes and M messages cost 4 µs · K · M, so that from some hundred nodes on the server's process does little else.
    A node without a message gets the same answer, at once. See docs/scaling.md for the change that Flower needs.

    Args:
        grid: of this run; its state is that of the simulation, in the same process.
    """
    state: Any = grid.state
    store_message, get_messages = state.store_message_ins, state.get_message_ins
    sent: set[int] = set()  # nodes that may have a message

    def store_message_ins(message: Any) -> Any:
        message_id = store_message(message)
        sent.add(message.metadata.dst_node_id)  # after it is stored: see below
        return message_id

    def get_message_ins(node_id: int, *arguments: Any, **keywords: Any) -> Any:
        if node_id not in sent:
            return []
        # Forgotten before the search, so that a message that is stored meanwhile is found by the next one.
        sent.discard(node_id)
        found = get_messages(node_id, *arguments, **keywords)
        if found:
            sent.add(node_id)
        return found

    state.store_message_ins, state.get_message_ins = store_message_ins, get_message_ins
