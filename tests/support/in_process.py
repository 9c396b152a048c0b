"""A federation as Flower simulates it, with its own link state and grid, but in this process and without Ray."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

from backbones import tiny_bert
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce.vce_api import _register_nodes
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from fedmerge.bench.cells import Cell, Ended, work
from fedmerge.bench.grid import Grid
from fedmerge.bench.tables import bench_tables
from fedmerge.config import ExperimentConfig, from_flat, to_flat
from fedmerge.domain.demo import write_demo
from fedmerge.report.bench_tables import BenchTables, read_bench_tables, write_bench_tables
from sim.app.client.app import app as client_app
from sim.app.server.app import app as server_app

Answer = Callable[[Message, Context], Message | list[Message] | None]


def small_experiment(place: Path, **changes: object) -> ExperimentConfig:
    """Three domains that train and one unseen, a tiny backbone, a few steps; what is written lies in ``place``."""
    if not (place / "domains").exists():
        write_demo(place / "domains", num_domains=8, num_users=30, num_items=25)
        tiny_bert(place / "backbone")
    flat = {
        "name": "small",
        "run_id": "run",
        "output_dir": str(place / "runs"),
        "cache_dir": str(place / "cache"),
        "domains.root": str(place / "domains"),
        "domains.train": "beauty,books,coffee",
        "domains.unseen": "camping",
        "backbone.source": str(place / "backbone"),
        "text.max_attribute_tokens": 8,
        "text.max_items": 2,
        "text.max_tokens": 32,
        "lora.rank": 2,
        "lora.alpha": 4,
        "train.learning_rate": 0.03,
        "train.batch_size": 10,
        "train.max_steps": 4,
        "train.warmup_steps": 1,
        "train.validate_every_steps": 1,
        "merge.task_arithmetic_coefficients": "0.5",
        "mergerec.granularities": "domain,layer",
        "mergerec.steps": 2,
        "mergerec.batch_size": 4,
        "runtime.device": "cpu",
        "runtime.precision": "float32",
        "runtime.server_threads": 1,
    }
    return from_flat({**flat, **changes})


def answer_honestly(message: Message, context: Context) -> Message | None:
    """What every client does."""
    return client_app(message, context)


class _PartlyConnected(InMemoryGrid):
    """Flower's grid without the nodes that are away."""

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
) -> None:
    """One experiment to its end; raises what the server raises.

    Args:
        config: of the experiment.
        answer: what a node does with a message; None for no reply, several to give older ones, too.
        num_nodes: by default one a domain.
        away: the turns of nodes that are not connected, while they are in it; as on machines of their own, nobody knows
            how many nodes there are.
    """
    if num_nodes is None:
        num_nodes = len(config.domains.train) + len(config.domains.unseen)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = factory.state()
    run = Run.create_empty(run_id=1)
    run.primary_task_id, run.federation_id = 1, NOOP_FEDERATION_ID
    state.run_ids[1], state.task_store[1] = RunRecord(run=run), Task(task_id=1, run_id=1)  # type: ignore[attr-defined]  # in memory
    turns = _register_nodes(num_nodes, factory)
    grid = InMemoryGrid(factory) if away is None else _PartlyConnected(factory, turns, away)
    grid.set_run(run)
    run_config = to_flat(config)
    told = num_nodes if away is None else 0
    contexts = {
        node: Context(1, node, {"partition-id": turn, "num-partitions": told}, RecordDict(), dict(run_config))
        for node, turn in turns.items()
    }
    over = threading.Event()

    def serve_nodes() -> None:
        while not over.wait(0.01):
            for node, context in contexts.items():
                for message in state.get_message_ins(node_id=node, limit=1):
                    answers = answer(message, context) or []
                    for reply in [answers] if isinstance(answers, Message) else answers:
                        reply.metadata.__dict__["_message_id"] = str(uuid4())
                        state.store_message_res(reply)

    nodes = threading.Thread(target=serve_nodes, daemon=True)
    nodes.start()
    try:
        server_app(grid, Context(1, 0, {}, RecordDict(), dict(run_config)))
    finally:
        over.set()
        nodes.join()


def train(config: ExperimentConfig) -> None:
    run_in_process(config.model_copy(update={"resume": (Path(config.output_dir) / str(config.run_id)).exists()}))


def here(cells: Sequence[Cell]) -> Iterator[Ended]:
    return map(work, cells)


def tables_of(grid: Grid) -> BenchTables:
    write_bench_tables(grid.folder, bench_tables(grid))
    return read_bench_tables(grid.folder)
