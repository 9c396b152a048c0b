"""Study: an adapter trained under a sequence head against one trained as today, at equal CPU time, on validation users.

    python benchmarks/studies/study_adapter_under_head.py data/amazon/Beauty --cpu-minutes 30 --out under-head.json

Today an adapter is trained so that the text of a history is near the text of its next item; the negatives are the
targets of the batch. Under a head, every distinct item of a batch is encoded once, a causal Transformer reads their
vectors, all positions are predicted among these items, and the gradient reaches the adapter through the items. Both
adapters get the same CPU seconds, validations included. Then each has a fresh head trained on its frozen item vectors,
as in a run, and the rows are compared with those of the backbone. Test is never read: one half of the validation users
selects steps, epochs and weights of the fusion, the other half is reported.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.adapter import Adapter
from fedmerge.bench.ranking import backbone_of
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.batches import Batch, training_batches
from fedmerge.client.training.loop import Attached, Budget, Recipe, Schedule, Step, StepResult, fit
from fedmerge.client.training.plain_sgd import batch_steps, check_loss
from fedmerge.config import ExperimentConfig, Train, load_config
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.encode import embed_in_groups, encode
from fedmerge.encoder.fast.frozen import frozen_products, using
from fedmerge.encoder.lora import applied
from fedmerge.evaluation.ranks import METRICS, per_user_metrics, rank_targets
from fedmerge.files import write_json
from fedmerge.seeding import derive
from fedmerge.sequence.anchored import recent_items_source
from fedmerge.sequence.fusion import choose_weights, fused_ranks
from fedmerge.sequence.model import SequenceModel, SequenceSettings
from fedmerge.sequence.ranking import Source, sequence_source
from fedmerge.sequence.training import train_sequence_model

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "amazon3.toml"
HEAD_LEARNING_RATE = 1e-3
Ranks = npt.NDArray[np.int64]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both adapters and their heads, and print the rows."""
    options = _options(arguments)
    config = load_config(CONFIG, options.set)
    torch.set_num_threads(config.runtime.threads_per_client)
    domain = open_domain(options.domain, backbone_of(config.backbone, config.runtime), config.text)
    select, report = halves(evaluation_examples(domain.interactions, "valid", options.users, config.seed))
    rows: dict[str, Any] = {}
    for name in ("backbone", "today", "under the head"):
        started = time.process_time()
        adapter = None if name == "backbone" else _train(name, domain, config, options.cpu_minutes * 60, select)
        seconds = time.process_time() - started
        settings = replace(SequenceSettings(), inputs=options.inputs, max_epochs=options.head_epochs)
        rows[name] = {"cpu_seconds": seconds, **_scores(domain, adapter, settings, config.seed, select, report)}
        print(name, rows[name], flush=True)
    if options.out:
        write_json(options.out, {"domain": domain.manifest.name, "seed": config.seed, "rows": rows})


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", type=Path, help="a domain folder")
    parser.add_argument("--cpu-minutes", type=float, default=30.0, help="of each adapter's training (default: 30)")
    parser.add_argument("--head-epochs", type=int, default=30, help="of each head's training (default: 30)")
    parser.add_argument("--inputs", choices=("text", "text+ids"), default="text+ids", help="of the final heads")
    parser.add_argument("--users", type=int, default=4000, help="validation users, both halves (default: 4000)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change amazon3.toml")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    return parser.parse_args(arguments)


def halves(examples: Examples) -> tuple[Examples, Examples]:
    """Split users by turns: those who select, and those who are reported."""
    return tuple(  # type: ignore[return-value]  # of length 2
        Examples(examples.users[part::2], examples.histories[part::2], examples.targets[part::2]) for part in (0, 1)
    )


def _train(name: str, domain: LocalDomain, config: ExperimentConfig, cpu_seconds: float, select: Examples) -> Adapter:
    """Train an adapter for CPU seconds, which the loop counts as one epoch."""
    settings, started = config.train, time.process_time()
    drawn = training_batches(domain.training_sequences, settings, config.seed, domain.manifest.name)

    def spent() -> float:
        return (time.process_time() - started) / cpu_seconds

    if name == "today":
        batches = ((domain, batch, epochs) for batch, epochs in drawn)

        def init(attached: Attached, first: int) -> Step:
            step = batch_steps(batches, settings, attached, first)
            return lambda number: StepResult(step(number).loss, spent())

        def validate() -> float:
            return _ndcg(rank_targets(_user_vectors(domain, select), _vectors(domain), select.targets))

    else:
        torch.manual_seed(derive(config.seed, "study", "head"))
        head = SequenceModel(
            len(domain.catalog), replace(SequenceSettings(), inputs="text"), domain.backbone_item_vectors
        )

        def init(attached: Attached, first: int) -> Step:
            return under_head_steps(domain, head, (batch for batch, _ in drawn), settings, attached, spent)

        def validate() -> float:
            head.eval()
            with torch.no_grad():
                _read(head, _vectors(domain))
                source = sequence_source(head, select.histories)
            return _ndcg(rank_targets(source.user_vectors, source.item_vectors, select.targets))

    schedule = Schedule(
        settings.learning_rate, settings.warmup_steps, Budget(max_epochs=1.0), settings.validate_every_steps, patience=5
    )
    recipe = Recipe(f"{domain.manifest.name}, {name}", init, schedule, validate)
    return fit(recipe, domain.backbone, config.lora, config.seed, lambda line: print(line, flush=True)).adapter


def under_head_steps(
    domain: LocalDomain,
    head: SequenceModel,
    batches: Iterator[Batch],
    settings: Train,
    attached: Attached,
    spent: Callable[[], float],
) -> Step:
    """Return the step that trains head and adapter together on the positions of a batch."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_LEARNING_RATE, weight_decay=0.0)
    products = frozen_products(domain.backbone)

    def step(number: int) -> StepResult:
        batch = next(batches)
        sequences = [
            np.append(history, target)[-head.settings.max_length - 1 :]
            for history, target in zip(batch.histories, batch.targets, strict=True)
        ]
        items, rows = np.unique(np.concatenate(sequences), return_inverse=True)  # (m,) distinct items of the batch
        by_user = np.split(rows, np.cumsum([len(sequence) for sequence in sequences])[:-1])
        longest = max(map(len, sequences)) - 1
        histories = torch.zeros(len(by_user), longest, dtype=torch.int64)
        read = torch.zeros(len(by_user), longest, dtype=torch.bool)
        for user, of_user in enumerate(by_user):
            histories[user, : len(of_user) - 1] = torch.from_numpy(of_user[:-1])
            read[user, : len(of_user) - 1] = True
        targets = torch.from_numpy(np.concatenate([of_user[1:] for of_user in by_user]))  # (positions,)
        head.train()
        attached.optimizer.zero_grad()
        optimizer.zero_grad()
        with using(products):
            vectors = embed_in_groups(domain.backbone, [domain.item_sequences[item] for item in items])  # (m, d)
            _read(head, vectors)
            base = head.base()
            states = head(histories, base)[read]  # (positions, h)
            loss = torch.nn.functional.cross_entropy(states @ head.item_representations(base).T, targets)
            loss.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        check_loss(domain.manifest.name, loss.item(), number + 1, settings)
        attached.optimizer.step()
        optimizer.step()
        return StepResult(loss.item(), spent())

    return step


def _read(head: SequenceModel, vectors: torch.Tensor) -> None:
    """Let a head read these vectors, whitened as those of the backbone's catalog, so that gradients reach them."""
    head.whitened = (vectors - head.text_mean) @ head.text_axes


def _scores(
    domain: LocalDomain,
    adapter: Adapter | None,
    settings: SequenceSettings,
    seed: int,
    select: Examples,
    report: Examples,
) -> dict[str, float]:
    """Train a fresh head on an adapter's item vectors; return the rows of :func:`fused_rows`."""
    with applied(domain.backbone, adapter):
        items, users = vectors_of(domain, (select, report))
    head, _ = train_sequence_model(
        domain.training_sequences, len(domain.catalog), select, settings, seed, domain.backbone.compute, items
    )
    return fused_rows(head, items, users, select, report)


def vectors_of(domain: LocalDomain, of: Sequence[Examples]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Encode the catalog (N, d) and the histories of examples (U, d) under the adapter that is applied."""
    return _vectors(domain), [_user_vectors(domain, examples) for examples in of]


def fused_rows(
    head: SequenceModel, items: torch.Tensor, users: Sequence[torch.Tensor], select: Examples, report: Examples
) -> dict[str, float]:
    """Return the masked NDCG@10 of users by head, text, recent items and their fusion, whose weights others choose."""
    of_select, of_report = (
        [
            sequence_source(head, examples.histories),
            Source("text", vectors, items),
            recent_items_source(items, examples.histories, "recent items"),
        ]
        for examples, vectors in zip((select, report), users, strict=True)
    )
    choice = choose_weights(of_select, select.targets, select.histories, (0, 0.5, 0.5), len(select.targets))
    weights = {
        "head": (1.0, 0.0, 0.0),
        "text": (0.0, 1.0, 0.0),
        "recent items": (0.0, 0.0, 1.0),
        "fused": choice.weights,
    }
    return {
        row: _ndcg(fused_ranks(of_report, of_row, report.targets, report.histories)) for row, of_row in weights.items()
    }


def _vectors(domain: LocalDomain) -> torch.Tensor:
    return encode(domain.backbone, domain.item_sequences)


def _user_vectors(domain: LocalDomain, examples: Examples) -> torch.Tensor:
    return encode(domain.backbone, domain.packed(examples.histories))


def _ndcg(ranks: Ranks) -> float:
    return float(per_user_metrics(ranks)[:, METRICS.index("ndcg@10")].mean())


if __name__ == "__main__":
    main()
