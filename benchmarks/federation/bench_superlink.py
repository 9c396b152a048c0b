"""What waiting clients cost a SuperLink: CPU of a registration, a look for messages, a heartbeat, by number of clients.

    python benchmarks/federation/bench_superlink.py --num-nodes 10 100 1000

A real `flower-superlink` on this machine, with its state in a database file as `fedmerge deploy` starts it, and in
memory, which is the named alternative. Clients are Flower's own HTTP clients with keys of their own; they speak as a
SuperNode does, but run in threads of this process. Without TLS, which is nginx's part. A SuperNode looks for messages
every 3 s and sends a heartbeat every 30 s, so the last column is how many of them fill one core.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from bench_scaling import sample
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import generate_key_pairs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from deploy_hosts import free_port, wait_for

from sim.flower_internals import ActivateNodeRequest, FleetHttpClient, NodeAuthHttpInterceptor, public_key_to_bytes

LOOK_SECONDS = 3.0  # between two looks of a SuperNode, flwr.supernode.start_client_internal
STATES = ("database", "memory")


def main() -> None:
    """Print a row for each number of clients and each kind of state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-nodes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--repeats", type=int, default=3, help="looks and heartbeats of every client")
    parser.add_argument("--threads", type=int, default=8, help="requests at once")
    options = parser.parse_args()
    print(f"CPU ms of the SuperLink a request, medians of {options.repeats}; range of the looks in brackets")
    print(f"{'nodes':>7}{'state':>10}{'register':>10}{'look':>22}{'heartbeat':>11}{'MB':>6}{'nodes a core':>14}")
    for num_nodes in options.num_nodes:
        for state in STATES:
            print(_row(num_nodes, state, options.repeats, options.threads), flush=True)


def _row(num_nodes: int, state: str, repeats: int, threads: int) -> str:
    with tempfile.TemporaryDirectory(prefix="fedmerge-") as folder, _superlink(Path(folder), state) as link:
        pid, address = link
        clients = [_client(address) for _ in range(num_nodes)]
        with ThreadPoolExecutor(threads) as pool:

            def cost(request: Callable[[int], object]) -> float:
                before = sample(pid)[1]["cpu"]
                list(pool.map(request, range(num_nodes)))
                return 1000 * (sample(pid)[1]["cpu"] - before) / num_nodes

            nodes: list[Node] = [Node()] * num_nodes

            def register(number: int) -> None:
                client, key = clients[number]
                client.RegisterNode(RegisterNodeFleetRequest(public_key=key))
                activated = client.ActivateNode(
                    ActivateNodeRequest(public_key=key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
                )
                nodes[number] = Node(node_id=activated.node_id)

            def look(number: int) -> None:
                found = clients[number][0].PullMessages(PullMessagesRequest(node=nodes[number]))
                assert not found.messages_list

            def beat(number: int) -> None:
                request = SendNodeHeartbeatRequest(node=nodes[number], heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
                assert clients[number][0].SendNodeHeartbeat(request).success

            registered = cost(register)
            looks, beats = zip(*((cost(look), cost(beat)) for _ in range(repeats)), strict=True)
        size = sample(pid)[1]["rss"]
        for client, _ in clients:
            client.close()
    busy = statistics.median(looks) / LOOK_SECONDS + statistics.median(beats) / HEARTBEAT_DEFAULT_INTERVAL
    spread = f"{statistics.median(looks):.1f} ({min(looks):.1f} to {max(looks):.1f})"
    return (
        f"{num_nodes:>7}{state:>10}{registered:>10.1f}{spread:>22}{statistics.median(beats):>11.1f}{size:>6.0f}"
        f"{1000 / busy:>14,.0f}"
    )


def _client(address: str) -> tuple[FleetHttpClient, bytes]:
    private, public = generate_key_pairs()
    client = FleetHttpClient.from_server_address(
        address, True, None, interceptors=[NodeAuthHttpInterceptor(private, public)]
    )
    return client, public_key_to_bytes(public)


@contextmanager
def _superlink(folder: Path, state: str) -> Iterator[tuple[int, str]]:
    port = free_port()
    command = [str(Path(sys.executable).parent / "flower-superlink"), "--insecure", "--isolation", "process"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--database", str(folder / "superlink.db")] if state == "database" else []
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        wait_for("flower-superlink answers", lambda: _answers(process, port, folder / "log"))
        yield process.pid, f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _answers(process: "subprocess.Popen[bytes]", port: int, log: Path) -> bool:
    if process.poll() is not None:
        raise SystemExit(f"flower-superlink ended:\n{log.read_text()[-2000:]}")
    try:
        httpx.get(f"http://127.0.0.1:{port}/health", timeout=1)
    except httpx.TransportError:
        return False
    return True


if __name__ == "__main__":
    main()
