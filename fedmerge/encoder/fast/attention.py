"""Attention over sequences that lie end to end, those of equal length together: no padding, hence no mask for it."""

from collections.abc import Sequence

import torch

ATTENTION_SCORES = 2**19  # scores of one block, which fit into the cache
Runs = Sequence[tuple[int, int]]  # number and length of consecutive sequences of equal length


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Runs, biases: Sequence[torch.Tensor] | None
) -> torch.Tensor:
    """Compute softmax(Q Kᵀ + bias) V for every sequence and head, with scores in float32.

    Args:
        query: (t, h, w) for t tokens together and h heads, scaled.
        key: (t, g, w); each of the g heads serves h / g consecutive heads of ``query``.
        value: bfloat16 (t, g, w).
        runs: where the sequences lie.
        biases: float32 (1 or h, n, n) for each run, n its length; what is hidden has -inf.

    Returns:
        bfloat16 (t, h · w).
    """
    heads, width, groups = query.shape[1], query.shape[2], key.shape[1]
    attended, start = value.new_empty(len(query), heads * width), 0
    for index, (number, length) in enumerate(runs):
        at_once = max(1, ATTENTION_SCORES // (heads * length * length))
        for size in [at_once] * (number // at_once) + [number % at_once] * (number % at_once > 0):
            end = start + size * length
            scores = torch.bmm(
                _by_head(query[start:end].float(), size, groups), _by_head(key[start:end].float(), size, groups).mT
            )  # (size · g, h / g · length, length)
            if biases is not None:
                scores.view(size, heads, length, length).add_(biases[index])
            mixed = torch.bmm(scores.softmax(dim=-1).bfloat16(), _by_head(value[start:end], size, groups))
            attended[start:end].view(size, length, heads, width).copy_(
                mixed.view(size, heads, length, width).transpose(1, 2)
            )
            start = end
    return attended


def _by_head(block: torch.Tensor, size: int, groups: int) -> torch.Tensor:
    """Reorder (size · length, h, w) to (size · groups, h / groups · length, w)."""
    width = block.shape[-1]
    split = block.reshape(size, -1, groups, block.shape[1] // groups, width)
    return split.permute(0, 2, 3, 1, 4).reshape(size * groups, -1, width)
