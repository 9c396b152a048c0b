"""Study: how far should the weights of a fusion be held back that few users have chosen? On validation users alone.

    fedmerge data cut data/amazon/Toys data/few --share 0.01
    python benchmarks/studies/study_fusion_weights.py data/few/Toys --whole data/amazon/Toys --adapter RUN/adapters/Toys
    python benchmarks/studies/study_fusion_weights.py data/amazon/Pantry --adapter RUN/merged/average

A head is trained on the domain's users, or taken from the cache of a run, and validation users choose the best of 66
weights w of head, text and recent items. Used are (N w + n0 w_0) / (N + n0) for N users of the domain, several n0, and
two w_0: equal weights of all, and of text and recent items alone. Reported is NDCG@10 of 4,000 other validation users,
of the whole domain, under the best weights themselves and these. Test is never read.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedmerge.bench.ranking import backbone_of
from fedmerge.client.evaluate import encode_text, seen_items
from fedmerge.client.heads.heads import head_sources, load_or_train_head
from fedmerge.client.heads.vectors import item_vectors
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import load_config
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.evaluation.ranks import FloatArray, selection_score
from fedmerge.evaluation.sums import VARIANTS, Variant
from fedmerge.sequence.fusion import fused_ranks
from fedmerge.sequence.ranking import Source

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "amazon3.toml"
HELD_BACK = (50, 100, 200, 400)
TOWARDS = {"all": np.full(3, 1 / 3), "untrained": np.array([0, 0.5, 0.5])}
GRID = np.array([(a, b, 10 - a - b) for a in range(10, -1, -1) for b in range(10 - a, -1, -1)]) / 10  # (66, 3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print NDCG@10 of other users by variant and n0."""
    options = _options(arguments)
    config = load_config(CONFIG, ["head.kind=local", *options.set])
    torch.set_num_threads(config.runtime.threads_per_client)
    backbone = backbone_of(config.backbone, config.runtime)
    domain = open_domain(options.domain, backbone, config.text)
    whole = open_domain(options.whole or options.domain, backbone, config.text)
    adapter = None if options.adapter is None else read_adapter(options.adapter)
    users = config.evaluation.validation_users
    head = load_or_train_head(domain, adapter, config.head, users, config.seed, config.cache_dir, print)
    choosing = evaluation_examples(domain.interactions, "valid", users, config.seed)
    others = evaluation_examples(whole.interactions, "valid", options.users, config.seed + 1)
    if options.whole is None:
        others = _without(others, choosing)
    items = item_vectors(domain, adapter, config.cache_dir)

    def sources(of: LocalDomain, examples: Examples) -> list[Source]:
        return head_sources(head.model, encode_text(of, adapter, examples.histories, items), examples.histories)

    chosen_by, reported = sources(domain, choosing), sources(whole, others)
    num_users = domain.interactions.num_users
    columns = [f"{name} {n0}" for name in TOWARDS for n0 in HELD_BACK]
    print(f"{domain.manifest.name}, {num_users} users", "chosen", "best", *columns, sep=" | ")
    for variant in VARIANTS:
        best = GRID[_outcomes(chosen_by, choosing, variant, GRID).argmax()]
        held_back = [(num_users * best + n0 * w) / (num_users + n0) for w in TOWARDS.values() for n0 in HELD_BACK]
        cells = [f"{ndcg:.4f}" for ndcg in _outcomes(reported, others, variant, np.array([best, *held_back]))]
        print(variant, " + ".join(f"{weight:.1f}" for weight in best), *cells, sep=" | ", flush=True)


def _outcomes(sources: Sequence[Source], examples: Examples, variant: Variant, grid: FloatArray) -> FloatArray:
    """Return NDCG@10 of the users under each of (G, 3) weights: (G,)."""
    seen = seen_items(examples, variant)
    return np.array([selection_score(fused_ranks(sources, row, examples.targets, seen)) for row in grid.tolist()])


def _without(examples: Examples, left_out: Examples) -> Examples:
    kept = np.flatnonzero(~np.isin(examples.users, left_out.users))
    return Examples(examples.users[kept], [examples.histories[i] for i in kept], examples.targets[kept])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", type=Path, help="a domain folder")
    parser.add_argument("--whole", type=Path, help="folder of the whole domain, where DOMAIN is a cut of it")
    parser.add_argument("--adapter", type=Path, help="PEFT folder of the encoder (default: the backbone)")
    parser.add_argument("--users", type=int, default=4000, help="reported users (default: 4000)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change amazon3.toml")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
