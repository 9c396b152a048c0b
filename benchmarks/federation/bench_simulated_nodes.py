"""One look of Flower's simulation for the messages of all its nodes: Flower's own against that of skip_idle_nodes.

    python benchmarks/federation/bench_simulated_nodes.py --num-nodes 200 1000 4000 --num-messages 64

Flower makes a look ten times a second, in the process of the server. The messages are open, that is delivered and not
answered, as most are in a run. CPU seconds of a look, median and range of the repeats; both take turns.
"""

import argparse
import statistics
import time

from flwr.app import ConfigRecord, Message, RecordDict

from sim.app.server.simulated_nodes import skip_idle_nodes
from sim.local.in_process import grid_in_memory


def looks(num_nodes: int, num_messages: int, repeats: int, *, skip: bool) -> list[float]:
    """Return the CPU seconds of each look."""
    grid, nodes = grid_in_memory(num_nodes)
    if skip:
        skip_idle_nodes(grid)
    content = RecordDict({"facts": ConfigRecord({"number": 1})})
    for node in [*nodes][:num_messages]:
        grid.push_messages([Message(content, dst_node_id=node, message_type="query", ttl=3600)])
    seconds = []
    for _ in range(repeats + 1):  # the first delivers the messages
        started = time.process_time()
        for node in nodes:
            grid.state.get_message_ins(node_id=node, limit=1)
        seconds.append(time.process_time() - started)
    return seconds[1:]


def main() -> None:
    """Print a row for each number of nodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-nodes", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--num-messages", type=int, default=64, help="open messages: server.messages_at_once")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{'nodes':>8}{'Flower, ms':>28}{'skip_idle_nodes, ms':>28}{'ratio':>10}")
    for num_nodes in options.num_nodes:
        rows = [
            [1000 * second for second in looks(num_nodes, options.num_messages, options.repeats, skip=skip)]
            for skip in (False, True)
        ]
        (own, ours), texts = map(statistics.median, rows), [f"{min(row):.2f} to {max(row):.2f}" for row in rows]
        print(f"{num_nodes:>8}{f'{own:.2f} ({texts[0]})':>28}{f'{ours:.2f} ({texts[1]})':>28}{own / ours:>10.0f}")


if __name__ == "__main__":
    main()
