"""Cost of Flower's deployment engine: seconds per phase of a federation of two clients, beside Flower's own floor.

One federation: an operator with nginx and TLS and two clients with registered keys, each on a machine of its own (a
network namespace) if that is permitted. First an app that the clients have not approved sends both a few requests,
which they refuse at once. That is the floor: the round trip, which consists of Flower's polls (3 s). Then a whole tiny
experiment runs.

    python benchmarks/federation/bench_deployment.py [--rounds 5]
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from deploy_federation import Federation
from deploy_hosts import has_nginx, network, why_no_namespaces

PYPROJECT = """
[project]
name = "floor"
version = "0.1.0"
description = "asks, and does nothing"
license = { text = "Apache-2.0" }
dependencies = []
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "floor.server_app:app"
clientapp = "floor.client_app:app"
[tool.flwr.app.config]
rounds = 5
"""
SERVER = """
import time
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    for number in range(context.run_config["rounds"]):
        started = time.monotonic()
        nodes = list(grid.get_node_ids())
        waiting = set(grid.push_messages([Message(RecordDict(), dst_node_id=n, message_type="train") for n in nodes]))
        while waiting:
            waiting -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(waiting)}
            time.sleep(0.2)
        print(f"floor: {time.monotonic() - started:.2f} s", flush=True)
"""
CLIENT = """
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    return Message(RecordDict(), reply_to=message)
"""
ANSWERED = re.compile(r"(query\.\w+|train|evaluate): 2 of 2 answered \(.*, (\d+) s\)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="requests of the app that does nothing (default: 5)")
    options = parser.parse_args()
    if not has_nginx():
        print("nothing is measured: nginx is not installed")
        return
    with tempfile.TemporaryDirectory(prefix="fedmerge-") as folder:
        in_namespaces = not why_no_namespaces()
        with network(Path(folder), ["operator", "north", "south"], in_namespaces) as machines:
            federation = Federation(machines)
            federation.prepare(steps=1)
            federation.start_operator()
            for domain in federation.domains:
                federation.start_client(domain)
            federation.wait_for_clients()
            print("machines: " + ("network namespaces" if in_namespaces else "the loopback"))
            floor = sorted(float(seconds) for seconds in _measure_floor(federation, Path(folder), options.rounds))
            print(f"floor: median {floor[len(floor) // 2]:.1f} s per phase ({floor[0]:.1f} to {floor[-1]:.1f})")
            output = federation.fedmerge("run", *federation.settings("measured"), "--federation", "prod")
            for phase, seconds in ANSWERED.findall(output):
                print(f"{phase}: {seconds} s, {float(seconds) - floor[len(floor) // 2]:.1f} s over the floor")


def _measure_floor(federation: Federation, folder: Path, rounds: int) -> list[str]:
    app = folder / "floor"
    (app / "floor").mkdir(parents=True)
    files = {"__init__.py": "", "server_app.py": SERVER, "client_app.py": CLIENT}
    for name, text in files.items():
        (app / "floor" / name).write_text(text)
    (app / "pyproject.toml").write_text(PYPROJECT)
    flwr = str(Path(sys.executable).parent / "flwr")
    command = [flwr, "run", str(app), "prod", "--run-config", f"rounds={rounds}", "--stream"]
    done = federation.network.run(federation.operator, *command, more=federation.operators_variables())
    return re.findall(r"floor: ([\d.]+) s", done.stdout)


if __name__ == "__main__":
    main()
