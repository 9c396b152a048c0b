"""Cost of a secure sum for a client and the server, beside plain aggregation.

    python benchmarks/privacy/bench_secure_aggregation.py --clients 3 10 50

Adapters have rank 8 on query and value of an encoder of MiniLM's size: twelve modules of 384 × 384. Every client of a
sum does its whole part, in turn, in this process. Bytes are those of its messages, including keys, shares and names:
"up" from the client, "down" to it for the sum, without the adapter that it trained or will train on. Plain aggregation
sends A and B (or B), and the server sums them exactly. One client in ten drops out before it sends its masked values
(with three clients, none may). Seconds are CPU seconds of one thread; nothing is sent over a network.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.federated.product_space import weighted_sum
from fedmerge.federated.summed import Summed, adapter_of_mean, num_summed, summed_rank, summed_values
from fedmerge.privacy.secagg.client import advertise, mask_values, share, unmask
from fedmerge.privacy.secagg.server import add_values, new_session, weighted_mean
from fedmerge.privacy.secagg.state import Advertisement, ClientState, Revealed
from sim.app.messages import records
from sim.app.messages import secure_sum as secure_records

RANK, WIDTH, NUM_MODULES = 8, 384, 12
VARIANTS: tuple[Summed, ...] = ("updates", "A and B", "B")

T = TypeVar("T")


@dataclass
class Cost:
    """Seconds of every client and of the server, and bytes of a client."""

    clients: dict[str, float] = field(default_factory=dict)
    server: float = 0.0
    up: int = 0
    down: int = 0

    def timed(self, client: str | None, call: Callable[[], T]) -> T:
        """Make the call, and charge the client, or the server if ``client`` is None."""
        started = time.process_time()
        done = call()
        spent = time.process_time() - started
        if client is None:
            self.server += spent
        else:
            self.clients[client] = self.clients.get(client, 0.0) + spent
        return done


def random_adapter(seed: int, shared_A: bool) -> Adapter:  # A of LoRA
    """Return normal factors; a shared A is the same for every seed."""
    rng_A, rng_B = (torch.Generator().manual_seed(number) for number in (0 if shared_A else seed, 1000 + seed))
    return Adapter(
        {
            f"layer.{number}.query": LoraModule(
                torch.randn(RANK, WIDTH, generator=rng_A) / WIDTH**0.5,
                0.02 * torch.randn(WIDTH, RANK, generator=rng_B),
                2.0,
            )
            for number in range(NUM_MODULES)
        }
    )


def secure(adapters: dict[str, Adapter], summed: Summed, dropped: set[str]) -> tuple[Cost, float]:
    """Return the cost and the largest error of the mean."""
    cost = Cost()
    first = next(iter(adapters.values()))
    session = cost.timed(None, lambda: new_session(dict.fromkeys(adapters, 1.0), num_summed(summed, first), 8.0))
    cost.down += records.size_bytes(secure_records.session_record(session))
    states: dict[str, ClientState] = {}
    keys: dict[str, Advertisement] = {}
    boxes: dict[str, dict[str, bytes]] = {}
    revealed: dict[str, Revealed] = {}
    for client in adapters:
        states[client], keys[client] = cost.timed(client, lambda client=client: advertise(session, client))  # type: ignore[misc]  # a default binds the loop's variable
    for client in adapters:
        states[client], boxes[client] = cost.timed(client, lambda client=client: share(states[client], keys))  # type: ignore[misc]
    cost.up += records.size_bytes(secure_records.advertisement_record(keys[min(keys)]))
    cost.up += records.size_bytes(secure_records.boxes_record(boxes[min(keys)]))
    cost.down += records.size_bytes(secure_records.advertisements_record(keys))
    total = np.zeros(session.num_values, np.uint32)
    exact = np.zeros(session.num_values)
    survivors = frozenset(adapters.keys() - dropped)
    for client in sorted(survivors):
        relayed = {peer: boxes[peer][client] for peer in adapters if peer != client}

        def masked(client: str = client, relayed: dict[str, bytes] = relayed) -> tuple[ClientState, np.ndarray]:
            return mask_values(states[client], relayed, summed_values(summed, adapters[client], None))

        states[client], sent = cost.timed(client, masked)
        total = cost.timed(None, lambda client=client, sent=sent, total=total: add_values(session, client, total, sent))  # type: ignore[misc]
        exact += summed_values(summed, adapters[client], None) / len(survivors)
        if client == min(survivors):
            cost.up += records.size_bytes(secure_records.masked_record(sent))
            cost.down += records.size_bytes(secure_records.boxes_record(relayed))
    for client in sorted(survivors)[: session.threshold]:
        revealed[client] = cost.timed(client, lambda client=client: unmask(states[client], sorted(survivors)))  # type: ignore[misc]
    cost.up += records.size_bytes(secure_records.revealed_record(revealed[min(revealed)]))
    cost.down += records.size_bytes(secure_records.survivors_record(sorted(survivors)))
    shared = frozenset(adapters)
    mean = cost.timed(None, lambda: weighted_mean(session, keys, shared, survivors, total, revealed))
    ranks = summed_rank({client: adapters[client] for client in survivors})
    cost.timed(None, lambda: adapter_of_mean(summed, mean, first, ranks))
    return cost, float(np.abs(mean - exact).max())


def plain(adapters: dict[str, Adapter], summed: Summed) -> Cost:
    """Return the cost of sending adapters unmasked."""
    cost = Cost()
    some = next(iter(adapters.values()))
    if summed == "updates":
        cost.timed(None, lambda: weighted_sum(adapters, dict.fromkeys(adapters, 1 / len(adapters))))
    else:
        values = [summed_values(summed, adapter, None) for adapter in adapters.values()]
        cost.timed(None, lambda: np.mean(values, axis=0))
    cost.up = records.size_bytes(records.expert_record(some, {}, only_B=summed == "B"))
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--drop", type=float, default=0.1, help="share of clients that drop out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{NUM_MODULES} modules of {WIDTH} × {WIDTH}, rank {RANK}; bytes and CPU seconds of one client")
    head = (
        "K",
        "gone",
        "summed",
        "values",
        "up",
        "down",
        "plain up",
        "times",
        "client s",
        "server s",
        "plain s",
        "error",
    )
    print(("{:>4}{:>6}{:>9}{:>11}{:>12}{:>9}{:>10}{:>7}{:>10}{:>10}{:>9}{:>10}").format(*head), flush=True)
    for num_clients in options.clients:
        for summed in VARIANTS:
            adapters = {f"c{k:02}": random_adapter(k, shared_A=summed == "B") for k in range(num_clients)}
            dropped = set(sorted(adapters)[: int(options.drop * num_clients)])
            cost, error = secure(adapters, summed, dropped)
            beside = plain(adapters, summed)
            seconds = statistics.median(each for client, each in cost.clients.items() if client not in dropped)
            values = num_summed(summed, next(iter(adapters.values())))
            print(
                f"{num_clients:>4}{len(dropped):>6}{summed:>9}{values:>11,}{cost.up:>12,}{cost.down:>9,}{beside.up:>10,}"
                f"{cost.up / beside.up:>7.2f}{seconds:>10.3f}{cost.server:>10.3f}{beside.server:>9.3f}{error:>10.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
