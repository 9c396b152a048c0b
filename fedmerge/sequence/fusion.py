"""Late fusion: a weighted sum of several sources' scores, standardised by user over the catalog."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.errors import LayoutMismatchError
from fedmerge.evaluation.ranks import IntArray, rank_targets, selection_score, target_ranks
from fedmerge.sequence.ranking import Source

SCORES_PER_BLOCK = 2**20  # of one source: 4 MiB of float32, and about 2 + number of sources as much in all
USERS_PER_BLOCK = 8  # at least: a large catalog does not fit the cache and is read once for each block
ROUNDING = 1e-6  # spread of scores, relative to the largest, that float32 inner products of equal items can have
MASKED = -1e6  # standardised score of a seen item: below every score of a catalog
CAUTIOUS_USERS = 200  # a domain's chosen weights are held back as by so many more users who keep to the given ones


@dataclass(frozen=True, slots=True)
class FusionChoice:
    """Weights of a fusion, selected on validation.

    Attributes:
        weights: one of each source, not negative, of sum 1.
        ndcg: NDCG@10 of the validation users under these weights.
    """

    weights: tuple[float, ...]
    ndcg: float


def fused_scores(sources: Sequence[Source], weights: Sequence[float]) -> torch.Tensor:
    """Return fused scores of all items.

    z(u, j) = sum over sources s of w_s · (S_s(u, j) - mean_j S_s(u, j)) / std_j S_s(u, j)

    A source whose scores for a user are all equal adds nothing. If one weight is 1, the scores are those of its source,
    not standardised.

    Args:
        sources: of the same U users and N items.
        weights: one of each source, not negative, of sum 1.

    Returns:
        float32 (U, N). For many users :func:`fused_ranks` needs less memory.

    Raises:
        LayoutMismatchError: sources of different users or items, or weights that do not fit them.

    Source: weighted CombSUM (Fox and Shaw, TREC-2, 1994) of z-scores.
    """
    _check(sources, weights)
    return _fused(sources, weights, slice(None))


def fused_ranks(
    sources: Sequence[Source],
    weights: Sequence[float],
    targets: IntArray,
    seen: Sequence[IntArray] | None = None,
    *,
    block_size: int | None = None,
) -> npt.NDArray[np.int64]:
    """Return ranks under :func:`fused_scores`; ties count against the target, and no (U, N) matrix is formed.

    Args:
        sources: of the same U users and N items.
        weights: one of each source, not negative, of sum 1. A weight of 1 gives exactly the ranks of its source.
        targets: (U,) item index of each user's one relevant item.
        seen: as in :func:`fedmerge.evaluation.ranks.target_ranks`; None is the unmasked variant. Seen items count in
            mean and standard deviation.
        block_size: users scored at once; None limits a block to about a million scores of each source, or eight users.

    Returns:
        (U,) int64 ranks from 1.

    Raises:
        LayoutMismatchError: sources, weights, targets or seen items do not fit each other.
        DivergedError: scores are NaN or infinite.
    """
    used = _check(sources, weights)
    if len(used) == 1:
        (only,) = used
        return rank_targets(
            sources[only].user_vectors, sources[only].item_vectors, targets, seen, block_size=block_size
        )
    ranks = np.zeros(len(targets), dtype=np.int64)
    for span in _spans(sources, targets, block_size):
        block = _fused(sources, weights, span)
        ranks[span] = target_ranks(block, targets[span], None if seen is None else seen[span])
    return ranks


def choose_weights(
    sources: Sequence[Source],
    targets: IntArray,
    seen: Sequence[IntArray] | None,
    towards: Sequence[float],
    num_users: int,
    step: float = 0.1,
) -> FusionChoice:
    """Return the weights in steps of ``step`` with the best NDCG@10, held back where a domain has few users.

    w = (N · w_best + n₀ · w_0) / (N + n₀)  for N users and n₀ = CAUTIOUS_USERS: few users overfit both a source that is
    trained on them and the choice of its weight. Scores are computed and standardised once, not once for each
    combination of weights.

    Args:
        sources: of the same U validation users and N items.
        targets: (U,) item index of each user's one relevant item.
        seen: as in :func:`fused_ranks`.
        towards: w_0, weights that need no users.
        num_users: N, users of the domain.
        step: 1 / step is a whole number.

    Returns:
        The weights and their NDCG@10. Of equally good ones those with the largest weight of the first source count,
        then of the second, and so on.

    Raises:
        LayoutMismatchError: sources, targets or seen items do not fit each other.
        DivergedError: scores are NaN or infinite.
    """
    num_steps = round(1 / step)
    grid = [tuple(part / num_steps for part in split) for split in _splits(num_steps, len(sources))]
    _check(sources, grid[0])
    ranks = np.zeros((len(grid), len(targets)), dtype=np.int64)
    for span in _spans(sources, targets, None):
        of_users, histories = targets[span], None if seen is None else seen[span]
        standardised = [_standardised(source, span) for source in sources]
        target = torch.from_numpy(of_users.astype(np.int64)).to(standardised[0].device)[:, None]  # (b, 1)
        if histories is not None:
            for scores in standardised:
                _mask(scores, histories, target)
        for row, fused in enumerate(_mixtures(standardised, grid)):
            if fused is not None:
                ranks[row, span] = (fused >= fused.gather(1, target)).sum(dim=1).cpu().numpy()  # itself included: + 1
    for row, weights in enumerate(grid):
        if max(weights) == 1:
            ranks[row] = fused_ranks(sources, weights, targets, seen)
    ndcgs = [selection_score(of_weights) for of_weights in ranks]
    both = zip(grid[int(np.argmax(ndcgs))], towards, strict=True)
    weights = tuple((num_users * best + CAUTIOUS_USERS * start) / (num_users + CAUTIOUS_USERS) for best, start in both)
    return FusionChoice(weights, selection_score(fused_ranks(sources, weights, targets, seen)))


def _check(sources: Sequence[Source], weights: Sequence[float]) -> list[int]:
    """Check that everything fits; return the sources with a weight above 0."""
    shapes = {(len(source.user_vectors), len(source.item_vectors)) for source in sources}
    if len(shapes) != 1:
        raise LayoutMismatchError(
            f"sources to fuse have (users, items) {sorted(shapes)}; expected one source or more of the same users and "
            "items"
        )
    if len(weights) != len(sources) or min(weights) < 0 or abs(sum(weights) - 1) > ROUNDING:
        raise LayoutMismatchError(
            f"{len(sources)} sources have the weights {tuple(weights)}; expected one weight of each, none negative, of "
            "sum 1"
        )
    return [index for index, weight in enumerate(weights) if weight > 0]


def _spans(sources: Sequence[Source], targets: IntArray, block_size: int | None) -> Iterator[slice]:
    num_users, num_items = len(sources[0].user_vectors), len(sources[0].item_vectors)
    if targets.shape != (num_users,):
        raise LayoutMismatchError(
            f"targets have shape {targets.shape}; expected one item for each of {num_users} users"
        )
    size = block_size or max(USERS_PER_BLOCK, SCORES_PER_BLOCK // max(1, num_items))
    return (slice(start, min(start + size, num_users)) for start in range(0, num_users, size))


@torch.no_grad()
def _fused(sources: Sequence[Source], weights: Sequence[float], span: slice) -> torch.Tensor:
    parts = [(source, weight) for source, weight in zip(sources, weights, strict=True) if weight > 0]
    if len(parts) == 1:
        return _scores(parts[0][0], span)
    total = _standardised(parts[0][0], span) * parts[0][1]
    for source, weight in parts[1:]:
        total = total.add(_standardised(source, span), alpha=weight)
    return total


def _scores(source: Source, span: slice) -> torch.Tensor:
    with torch.autocast(source.item_vectors.device.type, enabled=False):
        return source.user_vectors[span].float() @ source.item_vectors.float().T  # (b, N)


def _standardised(source: Source, span: slice) -> torch.Tensor:
    return standardise(_scores(source, span))


def standardise(scores: torch.Tensor) -> torch.Tensor:
    """Standardise scores (U, N) over the items, in place, and return them; where all are equal they become 0."""
    largest = scores.abs().amax(dim=1, keepdim=True)  # (b, 1)
    scores -= scores.mean(dim=1, keepdim=True)
    std = scores.square().mean(dim=1, keepdim=True).sqrt()
    says_nothing = std <= ROUNDING * largest
    return scores.div_(std.masked_fill(says_nothing, 1)).masked_fill_(says_nothing, 0)


def _mask(scores: torch.Tensor, seen: Sequence[IntArray], target: torch.Tensor) -> None:
    """Put the seen items of b users below all others, except the target itself, in place."""
    own = scores.gather(1, target)
    rows = np.repeat(np.arange(len(seen)), [len(history) for history in seen])
    columns = np.concatenate(seen).astype(np.int64)
    scores[torch.from_numpy(rows), torch.from_numpy(columns)] = MASKED
    scores.scatter_(1, target, own)


def _mixtures(standardised: Sequence[torch.Tensor], grid: Sequence[tuple[float, ...]]) -> Iterator[torch.Tensor | None]:
    """Yield weighted sums for the weights of a grid, bit for bit as :func:`_fused` adds them; None for a weight of 1.

    Neighbours of the grid differ in their last weights, so sums of the first sources are kept.
    """
    sums: list[tuple[float, torch.Tensor | None]] = []  # of each source but the last: its weight, and the sum up to it
    for weights in grid:
        if max(weights) == 1:
            yield None
            continue
        same = next((i for i, (kept, _) in enumerate(sums) if kept != weights[i]), len(sums))
        del sums[same:]
        for index in range(same, len(weights) - 1):
            before = sums[-1][1] if sums else None
            sums.append((weights[index], _added(before, standardised[index], weights[index])))
        yield _added(sums[-1][1], standardised[-1], weights[-1])


def _added(total: torch.Tensor | None, scores: torch.Tensor, weight: float) -> torch.Tensor | None:
    if weight == 0:
        return total
    return scores * weight if total is None else total.add(scores, alpha=weight)


def _splits(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to write total as an ordered sum, those with the largest first part first.

    >>> list(_splits(2, 2))
    [(2, 0), (1, 1), (0, 2)]
    """
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        yield from ((first, *rest) for rest in _splits(total - first, parts - 1))
