"""Seconds of a client's answer to a message of coefficient learning: a process each, or one that stays.

    python benchmarks/federation/bench_messages.py                      # random weights of MiniLM's size (22 M)
    python benchmarks/federation/bench_messages.py --small              # a tiny BERT

A client of an organisation receives a cohort of two adapters, then requests for gradients of the merging coefficients,
as learning through the clients sends 100 to 500 of them. The executor answers each in a process that ends with its
answer, which was the only way before, and in one that stays; in turn, without Flower, whose polls (3 s) come on top.
All answers of a request must be equal to the bit. Memory is the resident set of the process that stays.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))

import torch
from flwr.app import Context, Message, RecordDict
from interleaved import print_table, timed_in_turn
from transformers import BertConfig, BertModel

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.config import ExperimentConfig, from_flat, to_flat
from fedmerge.domain.demo import write_demo
from fedmerge.encoder.demo_backbone import write_demo_backbone
from fedmerge.mergerec.cohort import cohort_sha256
from fedmerge.organisation.folder import Client, init_client, read_client
from sim.app.messages import records
from sim.flower_internals import TaskIdentity
from sim.machines.executor import override_run_config, prepare_for, read_answer, request_of
from sim.machines.worker import Workers

DOMAINS = ("beauty", "books")
POLICY = 'policies = "catalog-private"\nreceive_adapters = true\nmin_users = 1\nmetrics = "exact"\n'
OWNER = "the benchmark"
LAYERS = 6


def random_adapter(layers: int, width: int, seed: int) -> Adapter:
    """Draw an adapter of rank 8 on query and value."""
    rng = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            f"encoder.layer.{layer}.attention.self.{name}": LoraModule(
                torch.randn(8, width, generator=rng) / width**0.5, 0.02 * torch.randn(width, 8, generator=rng), 2.0
            )
            for layer in range(layers)
            for name in ("query", "value")
        }
    )


def make_client(folder: Path, options: argparse.Namespace) -> tuple[Client, dict[str, Adapter]]:
    """Write domain, backbone, policy and client; return the client, and the cohort's adapters by domain."""
    write_demo(folder / "domains", num_domains=2, num_users=options.users, num_items=options.items)
    backbone = write_demo_backbone(folder / "backbone")
    size = BertConfig.from_pretrained(backbone)
    if not options.small:
        size = BertConfig(num_hidden_layers=LAYERS, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
        BertModel(size, add_pooling_layer=False).save_pretrained(backbone)
    init_client(folder / "client", "north", folder / "domains" / DOMAINS[0], options.threads, str(backbone))
    (folder / "client" / "policy.toml").write_text(POLICY)
    layers, width = size.num_hidden_layers, size.hidden_size
    adapters = {name: random_adapter(layers, width, seed) for seed, name in enumerate(DOMAINS)}
    return read_client(folder / "client"), adapters


def resident_mib(process: str) -> float:
    """Return the resident memory of a process."""
    (line,) = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def run(folder: Path, options: argparse.Namespace) -> None:
    """Print the table."""
    client, adapters = make_client(folder, options)
    config: ExperimentConfig = from_flat(
        {
            "domains.train": ",".join(DOMAINS),
            "domains.unseen": "",
            "privacy.policy": "catalog-private",
            "privacy.min_users": 1,
            "merge.methods": "mergerec",
            "run_id": "bench",
        }
    )

    def request(kind: str, content: RecordDict) -> bytes:
        context = Context(1, 1, {}, RecordDict(), dict(to_flat(config)))
        override_run_config(context, client)
        return request_of(Message(content, dst_node_id=1, message_type=kind), context)

    own, staying = Workers(prepare_for), Workers(prepare_for)

    def ask(asked: bytes, workers: Workers, owner: str | None) -> str:
        if owner is None:
            content, _ = read_answer(workers.once(lambda: prepare_for(asked), lambda: True))
        else:
            content, _ = read_answer(workers.ask(asked, owner, lambda: True))
        if (error := records.read_error(content)) is not None:
            raise SystemExit(f"the client answered with an error: {error}")
        return records.content_sha256(content)  # without the signature, which is another each time

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    ask(request(records.COHORT, records.cohort_record(adapters)), own, None)
    asked = records.GradientRequest("mergerec layer-wise", cohort_sha256(adapters), 0, 0)
    at = torch.full((2, 2 if options.small else LAYERS), 0.7)
    gradient = request(records.GRADIENT, records.gradient_request_record(asked, at, at, list(range(16))))
    found: list[str] = []
    seconds = timed_in_turn(
        {
            "a process each": lambda: found.append(ask(gradient, own, None)),
            "one that stays": lambda: found.append(ask(gradient, staying, OWNER)),
        },
        options.repeats,
        "wall",
    )
    if len(set(found)) > 1:
        raise SystemExit("the answers differ")
    print_table(seconds, "a process each", "messages/s", 1)
    saved = statistics.median(seconds["a process each"]) - statistics.median(seconds["one that stays"])
    (child,) = Path("/proc/self/task", str(os.getpid()), "children").read_text().split()
    print(f"saved a message: {saved:.2f} s; the process that stays holds {resident_mib(child):.0f} MiB")
    staying.close()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny backbone")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1, help="of the client")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads of this process would not exist in those that it forks
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options)


if __name__ == "__main__":
    main()
