"""The loss of next items over a whole catalog, a block of positions at a time, so that memory stays bounded."""

from collections.abc import Callable

import torch

MIN_SEQUENCE = 2  # one item to read and one to predict
LOGITS_PER_BLOCK = 2**20  # 4 MiB of float32: larger blocks do not fit a CPU's cache and are a third slower


def backward_in_blocks(
    states: torch.Tensor,
    catalog: torch.Tensor,
    targets: torch.Tensor,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits_per_block: int = LOGITS_PER_BLOCK,
) -> float:
    """Add the gradients of a mean loss over positions to those of the leaves, a block of positions at a time.

    Args:
        states: (P, h) after the read items.
        catalog: (N, h) item representations.
        targets: (P,) next items.
        loss_of: (logits (block, N), targets (block,)) -> summed loss of a block.
        logits_per_block: logits held at once.

    Returns:
        The loss.
    """
    total, size = 0.0, max(1, logits_per_block // len(catalog))
    for some, of_block in zip(torch.split(states, size), torch.split(targets, size), strict=True):
        loss = loss_of(some @ catalog.T, of_block) / len(targets)
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        total += loss.item()
    return total
