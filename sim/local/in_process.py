"""Flower's simulation with its own link state and grid, but in one process and without Ray."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from uuid import uuid4

import torch
from flwr.app import Context, Message, RecordDict

from fedmerge.config import ExperimentConfig, from_flat, to_flat
from sim.app.client.app import make_client_app
from sim.app.server.app import run_server
from sim.flower_internals import (
    FLWR_IN_MEMORY_DB_NAME,
    NOOP_FEDERATION_ID,
    SUPERLINK_NODE_ID,
    InMemoryGrid,
    LinkStateFactory,
    NoOpFederationManager,
    ObjectStoreFactory,
    Run,
    RunRecord,
    Task,
    TaskIdentity,
    register_nodes,
)

CLIENT_APP = make_client_app(console=False)  # the server's log has the clients' lines, too

Answer = Callable[[Message, Context], Message | list[Message] | None]


def answer_honestly(message: Message, context: Context) -> Message | None:
    """Return the reply of an ordinary client."""
    return CLIENT_APP(message, context)


class _PartlyConnected(InMemoryGrid):
    """Flower's grid without the nodes that are not connected."""

    def __init__(self, factory: LinkStateFactory, turns: Mapping[int, int], away: set[int]) -> None:
        super().__init__(factory)
        self.turns, self.away = turns, away

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if self.turns[node] not in self.away]


def run_in_process(
    config: ExperimentConfig,
    answer: Answer = answer_honestly,
    num_nodes: int | None = None,
    away: set[int] | None = None,
    console: bool = True,
) -> None:
    """Run one experiment to its end, the clients one after the other in a second thread.

    The number of torch threads and the handlers of the library's logger are restored afterwards.

    Args:
        config: the experiment.
        answer: maps a message to a node's reply; None sends no reply, a list sends several.
        num_nodes: number of nodes; None is one per domain.
        away: turns of nodes that are not connected while they are in this set; with a set, clients do not get the
            number of nodes, as on separate machines.
        console: log to stderr, as the app does; otherwise lines go where the caller sends those of the logger
            ``fedmerge``.

    Raises:
        FedMergeError: whatever the server raises.
    """
    if num_nodes is None:
        num_nodes = len(config.domains.train) + len(config.domains.unseen)
    grid, turns = grid_in_memory(num_nodes, away)
    run_config = to_flat(config)
    announced = num_nodes if away is None else 0
    contexts = {
        node: Context(1, node, {"partition-id": turn, "num-partitions": announced}, RecordDict(), dict(run_config))
        for node, turn in turns.items()
    }
    over = threading.Event()

    def serve_nodes() -> None:
        while not over.wait(0.01):
            for node, context in contexts.items():
                for message in grid.state.get_message_ins(node_id=node, limit=1):
                    answers = answer(message, context) or []
                    for reply in [answers] if isinstance(answers, Message) else answers:
                        reply.metadata.__dict__["_message_id"] = str(uuid4())
                        grid.state.store_message_res(reply)

    nodes = threading.Thread(target=serve_nodes, daemon=True)
    with _process_settings_restored():
        nodes.start()
        try:
            run_server(grid, from_flat(run_config), console=console)
        finally:
            over.set()
            nodes.join()


def grid_in_memory(num_nodes: int, away: set[int] | None = None) -> tuple[InMemoryGrid, dict[int, int]]:
    """Make Flower's grid of a simulation, without Ray.

    Args:
        num_nodes: number of nodes.
        away: turns of nodes that are not connected while they are in this set; None: all are connected.

    Returns:
        The grid of run 1, and node -> its turn, from 0.
    """
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = factory.state()
    run = Run.create_empty(run_id=1)
    run.primary_task_id, run.federation_id = 1, NOOP_FEDERATION_ID
    state.run_ids[1], state.task_store[1] = RunRecord(run=run), Task(task_id=1, run_id=1)  # type: ignore[attr-defined]  # in memory
    turns = register_nodes(num_nodes, factory)
    grid = InMemoryGrid(factory) if away is None else _PartlyConnected(factory, turns, away)
    grid.set_run(run)
    return grid, turns


@contextmanager
def _process_settings_restored() -> Iterator[None]:
    """Restore what server and clients set for their whole process: threads and logging."""
    library, threads = logging.getLogger("fedmerge"), torch.get_num_threads()
    handlers, level, propagate = list(library.handlers), library.level, library.propagate
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for handler in library.handlers:
            if handler not in handlers:
                with suppress(OSError):  # a full disk, which has ended the run already
                    handler.close()
        library.handlers[:], library.propagate = handlers, propagate
        library.setLevel(level)
