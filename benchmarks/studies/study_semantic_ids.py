"""Study: do semantic ids pay? Item vectors as codes of residual k-means, decoded level by level among the codes in use.

    python benchmarks/studies/study_semantic_ids.py data/amazon/Beauty data/amazon/Pantry data/amazon/Toys
    python benchmarks/studies/study_semantic_ids.py --num-items 1000000

An item is its nearest centroid among 256, then the nearest of what that leaves, and so on: one byte a level, as in
TIGER and MSCGRec. A user's score of an item is the sum of its scores of the centroids, so the best items are found by a
search with beams in the tree of the codes in use. Domains: validation users, ranked by text with exact vectors, with 8
bits a value, and with codes of several lengths and beams; test is never read. ``--num-items`` measures drawn vectors:
memory, and how much of the exact 10 best a list of 10 has. Needs faiss, of the extra ``serve``.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import torch
from study_adapter_under_head import CONFIG, vectors_of

from fedmerge.bench.ranking import backbone_of
from fedmerge.client.local_domain import open_domain
from fedmerge.config import load_config
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.lora import applied
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.evaluation.ranks import METRICS, per_user_metrics, target_ranks

CODES = 256  # a level, one byte
WIDTH = 384  # of drawn vectors
FITTED = 100_000  # vectors that place the centroids


@dataclass(frozen=True, eq=False)
class CodeTree:
    """Codes of N items, and the prefixes that are in use, level by level.

    Attributes:
        codes: (N, L) uint8.
        centroids: (L, 256, d) float32.
        prefixes: of each level, the code (P,) and the parent among the prefixes before (P,).
        leaves: the full prefix of each item, (N,).
    """

    codes: npt.NDArray[np.uint8]
    centroids: npt.NDArray[np.float32]
    prefixes: tuple[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], ...]
    leaves: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Bytes of what is needed to score: codes and centroids; the tree can be made from the codes."""
        return self.codes.nbytes + self.centroids.nbytes

    def cut(self, levels: int) -> "CodeTree":
        """Return the tree of the first codes of each item."""
        return code_tree(self.codes[:, :levels], self.centroids[:levels])


def residual_kmeans(vectors: npt.NDArray[np.float32], levels: int, seed: int) -> CodeTree:
    """Quantise vectors (N, d) by k-means of what the levels before leave."""
    residual, codes, centroids = vectors.copy(), [], []
    drawn = np.random.default_rng(seed).permutation(len(vectors))[:FITTED]
    for level in range(levels):
        count = min(CODES, len(vectors))
        kmeans = faiss.Kmeans(
            vectors.shape[1], count, niter=20, seed=seed + level, min_points_per_centroid=1, max_points_per_centroid=512
        )
        kmeans.train(residual[drawn])
        nearest = kmeans.index.search(residual, 1)[1][:, 0]
        residual -= kmeans.centroids[nearest]
        codes.append(nearest.astype(np.uint8))
        centroids.append(np.pad(kmeans.centroids, ((0, CODES - count), (0, 0))))
    return code_tree(np.stack(codes, axis=1), np.stack(centroids))


def code_tree(codes: npt.NDArray[np.uint8], centroids: npt.NDArray[np.float32]) -> CodeTree:
    """Return the tree of the prefixes that N items (N, L) use."""
    prefixes = []
    of_item = np.zeros(len(codes), dtype=np.int64)  # prefix of each item so far
    for level in range(codes.shape[1]):
        keys, of_item = np.unique(of_item * CODES + codes[:, level], return_inverse=True)
        prefixes.append((keys % CODES, keys // CODES))
    return CodeTree(codes, centroids, tuple(prefixes), of_item)


def decode(users: npt.NDArray[np.float32], tree: CodeTree, beams: int | None) -> torch.Tensor:
    """Return the scores of all items (U, N) for users (U, d); items that no beam reaches lie below all others.

    Args:
        users: vectors of the users.
        tree: codes of the items; the score of an item is Σ over levels of ⟨user, centroid⟩.
        beams: prefixes kept after each level but the last; None keeps all.
    """
    scores = np.zeros((len(users), 1), dtype=np.float32)
    lost = np.zeros((len(users), 1), dtype=bool)
    for level, (codes, parents) in enumerate(tree.prefixes):
        scores = scores[:, parents] + (users @ tree.centroids[level].T)[:, codes]
        lost = lost[:, parents]
        if beams is not None and level < len(tree.prefixes) - 1 and scores.shape[1] > beams:
            open_scores = np.where(lost, -np.inf, scores)
            edge = np.partition(open_scores, -beams, axis=1)[:, -beams]
            lost = open_scores < edge[:, None]
    scores = np.where(lost, scores.min(axis=1, keepdims=True) - 1, scores)
    return torch.from_numpy(scores[:, tree.leaves])


def eight_bits(vectors: torch.Tensor) -> torch.Tensor:
    """Return vectors (N, d) as 8 bits a value would give them back, between the least and the greatest of a column."""
    low, high = vectors.min(dim=0).values, vectors.max(dim=0).values
    step = (high - low).clamp(min=1e-12) / (CODES - 1)
    return low + ((vectors - low) / step).round() * step


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each domain, or the memory of a large catalog."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domains", nargs="*", type=Path, help="domain folders")
    parser.add_argument("--adapter", type=Path, help="PEFT folder of the encoder (default: the backbone)")
    parser.add_argument("--levels", nargs="+", type=int, default=[2, 3, 4, 8], help="lengths of the codes")
    parser.add_argument("--beams", nargs="+", type=int, default=[10, 50, 200], help="for codes of three levels")
    parser.add_argument("--users", type=int, default=4000, help="validation users (default: 4000)")
    parser.add_argument("--num-items", type=int, help="measure a catalog of so many drawn vectors instead")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change amazon3.toml")
    options = parser.parse_args(arguments)
    config = load_config(CONFIG, options.set)
    torch.set_num_threads(config.runtime.threads_per_client)
    faiss.omp_set_num_threads(config.runtime.threads_per_client)
    if options.num_items:
        _large(options.num_items, options.levels, options.beams, config.seed)
        return
    backbone = backbone_of(config.backbone, config.runtime)
    adapter = None if options.adapter is None else read_adapter(options.adapter)
    for folder in options.domains:
        domain = open_domain(folder, backbone, config.text)
        examples = evaluation_examples(domain.interactions, "valid", options.users, config.seed)
        with applied(backbone, adapter):
            items, (users,) = vectors_of(domain, (examples,))
        print(f"{domain.manifest.name}, {len(items)} items, {len(users)} validation users")
        print("row | bytes an item | items that share their codes | masked Recall@10 / NDCG@10 | unmasked")
        _print("exact", 4 * items.shape[1], 0, users @ items.T, examples)
        _print("8 bits a value", items.shape[1], 0, users @ eight_bits(items).T, examples)
        longest = residual_kmeans(items.numpy(), max(options.levels), config.seed)
        for levels in options.levels:
            tree = longest.cut(levels)
            for beams in [None, *(options.beams if levels == 3 else [])]:
                row = f"{levels} codes" + (f", {beams} beams" if beams else "")
                _print(row, levels, _shared(tree), _of_codes(users, tree, beams), examples)


def _shared(tree: CodeTree) -> float:
    """Return the share of items that have their codes in common with another."""
    return float((np.bincount(tree.leaves)[tree.leaves] > 1).mean())


def _of_codes(users: torch.Tensor, tree: CodeTree, beams: int | None, at_once: int = 256) -> torch.Tensor:
    return torch.cat([decode(block.numpy(), tree, beams) for block in torch.split(users, at_once)])


def _print(row: str, nbytes: int, shared: float, scores: torch.Tensor, examples: Examples) -> None:
    cells = []
    for seen in (examples.histories, None):
        means = per_user_metrics(target_ranks(scores, examples.targets, seen)).mean(axis=0)
        cells.append(f"{means[METRICS.index('recall@10')]:.4f} / {means[METRICS.index('ndcg@10')]:.4f}")
    print(row, nbytes, f"{shared:.1%}", *cells, sep=" | ", flush=True)


def _large(number: int, lengths: Sequence[int], beams: Sequence[int], seed: int) -> None:
    """Print memory and time of codes for drawn vectors, and the share of the exact 10 best that a list of 10 keeps."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(max(1, number // 100), WIDTH, generator=rng))
    items, users = (_near(centres, count, distance, rng) for count, distance in ((number, 0.6), (200, 0.9)))
    best = torch.topk(users @ items.T, 10).indices
    print(f"{number:,} drawn vectors of width {WIDTH}")
    print("row | MB | items that share their codes | of the 10 best in a list of 10")
    print("exact", f"{items.nbytes / 1e6:.0f}", "0%", "100%", sep=" | ")
    rounded = _kept(users @ eight_bits(items).T, best)
    print("8 bits a value", f"{items.numel() / 1e6:.0f}", "0%", rounded, sep=" | ", flush=True)
    start = time.process_time()
    longest = residual_kmeans(items.numpy(), max(lengths), seed)
    print(f"{max(lengths)} codes made in {time.process_time() - start:.0f} s of CPU time")
    for levels in lengths:
        tree = longest.cut(levels)
        for kept in [None, *(beams if levels == 3 else [])]:
            row = f"{levels} codes" + (f", {kept} beams" if kept else "")
            scores = _of_codes(users, tree, kept, 20)
            print(row, f"{tree.nbytes / 1e6:.1f}", f"{_shared(tree):.0%}", _kept(scores, best), sep=" | ", flush=True)


def _kept(scores: torch.Tensor, best: torch.Tensor) -> str:
    found = torch.topk(scores, best.shape[1]).indices
    return f"{(found[:, :, None] == best[:, None, :]).any(dim=2).float().mean():.0%}"


def _near(centres: torch.Tensor, number: int, distance: float, rng: torch.Generator) -> torch.Tensor:
    """Return unit vectors about drawn centres, ``distance`` the length of the noise."""
    vectors = torch.randn(number, centres.shape[1], generator=rng).mul_(distance / centres.shape[1] ** 0.5)
    chosen = torch.randint(len(centres), (number,), generator=rng)
    for start in range(0, number, FITTED):
        vectors[start : start + FITTED] += centres[chosen[start : start + FITTED]]
    return torch.nn.functional.normalize(vectors, out=vectors)


if __name__ == "__main__":
    main()
