"""The stages of a client and a server with one large catalog, each in a process of its own; see bench_catalog.py."""

import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from fedmerge.client.baselines.item_knn import item_neighbours
from fedmerge.client.baselines.rankers import baseline_rankers
from fedmerge.client.evaluate import TextVectors, encode_text, outcomes
from fedmerge.client.heads.heads import head_settings, head_sources
from fedmerge.client.heads.vectors import item_vectors
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.batches import training_batches
from fedmerge.client.training.loop import Budget, Recipe, Schedule, fit
from fedmerge.client.training.plain_sgd import batch_steps
from fedmerge.config import Evaluation, Head, Lora, Text, Train
from fedmerge.device import resolve_compute
from fedmerge.domain.splits import Examples, evaluation_examples, train_sequences
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.mergerec.learn import learn_coefficients
from fedmerge.mergerec.objective import MergeRecSettings
from fedmerge.mergerec.pseudo_users import PseudoDomain, centroid_domain, chain_domain, subset_domain
from fedmerge.mergerec.vectors import initial_vectors
from fedmerge.merging.stack import stack_adapters
from fedmerge.sequence.fusion import choose_weights
from fedmerge.sequence.model import SequenceModel
from fedmerge.sequence.training import train_sequence_model
from fedmerge.serving.index import load_or_build_index

PSEUDO_USERS, LEARNED_STEPS, TOP = 1000, 5, 100
BATCH = 64
HEAD = Head(kind="local", hidden_size=64, max_epochs=1, max_minutes=None)


@dataclass(frozen=True)
class Sizes:
    """What the stages are measured with.

    Attributes:
        users: ranked.
        steps: of a head.
        sampled: items drawn for a step of a head; None: all.
        draw: vectors of items are drawn, not encoded.
    """

    users: int
    steps: int
    sampled: int | None
    draw: bool


@dataclass(frozen=True)
class Client:
    """An opened shop."""

    domain: LocalDomain
    cache: Path
    sizes: Sizes

    @property
    def backbone(self) -> Backbone:
        """The encoder."""
        return self.domain.backbone

    @cached_property
    def vectors(self) -> torch.Tensor:
        """(N, d) under the backbone: of the stage "encode", or drawn."""
        if not self.sizes.draw:
            return item_vectors(self.domain, None, str(self.cache))
        drawn = torch.randn(len(self.domain.catalog), self.backbone.width, generator=torch.Generator().manual_seed(0))
        return torch.nn.functional.normalize(drawn, dim=1)

    def examples(self, split: str = "test") -> Examples:
        """Return the users who are ranked."""
        return evaluation_examples(
            self.domain.interactions, "test" if split == "test" else "valid", self.sizes.users, 0
        )

    def text(self, examples: Examples) -> TextVectors:
        """Return text vectors of users and items."""
        return encode_text(self.domain, None, examples.histories, self.vectors)

    @cached_property
    def pseudo(self) -> PseudoDomain:
        """Every item as a pseudo-user."""
        items = self.domain.item_sequences
        return PseudoDomain(self.domain.manifest.name, items, self.vectors, items, self.vectors)


def train(client: Client) -> Callable[[], object]:
    """Make two steps of an expert; validation is "encode" and "evaluate"."""
    settings, domain = Train(max_steps=2, batch_size=16), client.domain
    drawn = training_batches(domain.training_sequences, settings, 0, "shop")
    batches = ((domain, batch, epochs) for batch, epochs in drawn)
    schedule = Schedule(settings.learning_rate, 0, Budget(max_steps=2))
    recipe = Recipe("shop", lambda attached, first: batch_steps(batches, settings, attached, first), schedule)
    return lambda: fit(recipe, client.backbone, Lora(), 0)


def chains(client: Client) -> Callable[[], object]:
    """Walk among similar items."""
    pseudo, expert = client.pseudo, fresh_adapter(client.backbone, Lora(), 0)
    table, text = client.domain.table, client.domain.text
    return lambda: chain_domain(pseudo, client.backbone, expert, table, text, number=PSEUDO_USERS)


def distil(client: Client) -> Callable[[], object]:
    """Learn coefficients of two experts from the teacher's top items; both domains have the one catalog."""
    one = subset_domain(client.pseudo, PSEUDO_USERS, 0)
    domains = {name: replace(one, name=name) for name in ("north", "south")}
    experts = {name: fresh_adapter(client.backbone, Lora(), seed) for seed, name in enumerate(domains)}
    vectors = initial_vectors(stack_adapters(experts))
    settings = MergeRecSettings(loss="rec+kd", kd_top_k=TOP, steps=LEARNED_STEPS, pseudo_users="subset")
    students = dict.fromkeys(domains, client.vectors)
    return lambda: learn_coefficients(client.backbone, vectors, domains, settings, students=students)


def evaluate(client: Client) -> Callable[[], object]:
    """Rank test users exactly, with and without seen items: by text, popularity and the last item."""
    domain, examples = client.domain, client.examples()
    domain.__dict__["backbone_item_vectors"] = client.vectors  # those of the last item are not encoded again
    rankers = baseline_rankers(domain, ("popularity", "last-item"), Evaluation(), 0, str(client.cache))
    encoded = {"backbone": client.text(examples)}
    return lambda: outcomes(domain, {"backbone": None}, examples, rankers, encoded=encoded)


def item_knn(client: Client) -> Callable[[], object]:
    """Find the neighbours of ItemKNN."""
    sequences = train_sequences(client.domain.interactions)
    return lambda: item_neighbours(sequences, len(client.domain.catalog), 50)


def head(client: Client) -> Callable[[], SequenceModel]:
    """Make an epoch of some users, and rank the validation users exactly before and after it."""
    settings = replace(head_settings(HEAD, None), sampled_items=client.sizes.sampled)
    sequences = client.domain.training_sequences[: BATCH * client.sizes.steps]
    arguments = sequences, len(client.domain.catalog), client.examples("valid"), settings, 0, client.backbone.compute
    return lambda: train_sequence_model(*arguments, client.vectors)[0]


def fusion(client: Client) -> Callable[[], object]:
    """Choose among 66 weights of head, text and recent items for the validation users."""
    settings = replace(head_settings(HEAD, None), sampled_items=client.sizes.sampled)
    model, examples = (
        SequenceModel(len(client.domain.catalog), settings, client.vectors).eval(),
        client.examples("valid"),
    )
    text, towards, users = client.text(examples), (0.0, 0.5, 0.5), len(examples.targets)
    return lambda: choose_weights(head_sources(model, text, examples.histories), examples.targets, None, towards, users)


def serve(client: Client) -> Callable[[], object]:
    """Build the index, and search it for 100 users."""
    users = client.vectors[torch.arange(0, len(client.vectors), max(1, len(client.vectors) // 100))[:100]]

    def work() -> object:
        index = load_or_build_index("shop", client.vectors, lambda: users, str(client.cache))
        return None if index is None else [index.search(user, 10) for user in users]

    return work


STAGES: dict[str, Callable[[Client], Callable[[], object]]] = {
    "encode": lambda client: lambda: client.vectors,
    "train, two steps": train,
    "pseudo-users, subset": lambda client: lambda: subset_domain(client.pseudo, PSEUDO_USERS, 0),
    "pseudo-users, centroid": lambda client: lambda: centroid_domain(client.pseudo, PSEUDO_USERS, 0),
    "pseudo-users, chain": chains,
    "distil, five steps": distil,
    "evaluate": evaluate,
    "item-knn": item_knn,
    "head": head,
    "choose a fusion": fusion,
    "serve": serve,
}


def measure(shop: Path, backbone: Path, cache: Path, sizes: Sizes, only: Sequence[str]) -> dict[str, float]:
    """Return seconds, CPU seconds and peak memory of stages, each in a process that was forked for it."""
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    for stage in ("open", *only):
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
            of_stage = process.submit(run_stage, stage, shop, backbone, cache, sizes).result()
        found |= {f"{stage}, {what}": value for what, value in of_stage.items()}
        print(f"{stage}: {of_stage}", file=sys.stderr, flush=True)
    return found


def run_stage(stage: str, shop: Path, backbone_folder: Path, cache: Path, sizes: Sizes) -> dict[str, float]:
    """Run one stage; return its seconds, and the peak resident set of this process in MB of 10^6 bytes.

    What the stage before leaves on the disk, tokens and vectors, is read before the time starts, and counts as memory.
    """
    backbone = load_backbone(str(backbone_folder), "mean", resolve_compute("cpu", "float32"))
    start, cpu = time.perf_counter(), time.process_time()
    domain = open_domain(shop, backbone, Text(max_tokens=64, max_items=5), cache)
    if stage != "open":
        client = Client(domain, cache, sizes)
        if stage != "encode":
            client.vectors  # noqa: B018  # of the stage "encode"
        work = STAGES[stage](client)
        start, cpu = time.perf_counter(), time.process_time()
        work()
    found = {"s": time.perf_counter() - start, "CPU s": time.process_time() - cpu}
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {**found, "MB": int(peak) * 1024 / 1e6}
