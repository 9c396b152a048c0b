"""Study: the untrained federated head, with and without whitening and by its decay, on validation users of domains.

    python benchmarks/studies/study_whitening.py data/amazon/Beauty data/amazon/Pantry data/amazon/Toys

Nothing is trained. Rows are ranked by the text of the history, by the last item, and by a mean of the history's item
vectors that falls by c with every later item: of vectors as they are, centred, and whitened. Test is never read.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from study_adapter_under_head import CONFIG, vectors_of

from fedmerge.bench.ranking import backbone_of
from fedmerge.client.local_domain import open_domain
from fedmerge.config import load_config
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.lora import applied
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.evaluation.ranks import METRICS, IntArray, per_user_metrics, rank_targets
from fedmerge.sequence.anchored import whitened, whitening

RECALL, NDCG = METRICS.index("recall@10"), METRICS.index("ndcg@10")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each domain: Recall@10 / NDCG@10, masked and unmasked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domains", nargs="+", type=Path, help="domain folders")
    parser.add_argument("--adapter", type=Path, help="PEFT folder of the encoder (default: the backbone)")
    parser.add_argument("--decays", nargs="+", type=float, default=[0.3, 0.5, 0.8])
    parser.add_argument("--users", type=int, default=4000, help="validation users (default: 4000)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change amazon3.toml")
    options = parser.parse_args(arguments)
    config = load_config(CONFIG, options.set)
    torch.set_num_threads(config.runtime.threads_per_client)
    backbone = backbone_of(config.backbone, config.runtime)
    adapter = None if options.adapter is None else read_adapter(options.adapter)
    for folder in options.domains:
        domain = open_domain(folder, backbone, config.text)
        examples = evaluation_examples(domain.interactions, "valid", options.users, config.seed)
        with applied(backbone, adapter):
            items, (users,) = vectors_of(domain, (examples,))
        mean = torch.nn.functional.normalize(items - items.mean(dim=0), dim=1)
        last = torch.tensor([int(history[-1]) for history in examples.histories])
        rows = {"text of the history": (users, items), "last item": (items[last], items)}
        for name, read in (("plain", items), ("centred", mean), ("whitened", whitened(items, whitening(items)))):
            for decay in options.decays:
                rows[f"{name}, c = {decay}"] = recency(read, examples.histories, decay), read
        print(f"{domain.manifest.name}, {len(examples.targets)} validation users | masked | unmasked")
        for row, (of_users, of_items) in rows.items():
            print(row, *(_scores(of_users, of_items, examples, masked) for masked in (True, False)), sep=" | ")


def recency(items: torch.Tensor, histories: Sequence[IntArray], decay: float) -> torch.Tensor:
    """Return the mean of each history's item vectors (U, d), the weight of an item of age a being exp(-decay a)."""
    means = []
    for history in histories:
        ages = np.arange(len(history))[::-1]
        means.append(torch.from_numpy(np.exp(-decay * ages).astype(np.float32)) @ items[history.astype(np.int64)])
    return torch.nn.functional.normalize(torch.stack(means), dim=1)


def _scores(users: torch.Tensor, items: torch.Tensor, examples: Examples, masked: bool) -> str:
    ranks = rank_targets(users, items, examples.targets, examples.histories if masked else None)
    means = per_user_metrics(ranks).mean(axis=0)
    return f"{means[RECALL]:.4f} / {means[NDCG]:.4f}"


if __name__ == "__main__":
    main()
