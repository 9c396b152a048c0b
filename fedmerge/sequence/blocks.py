"""The loss of next items over a whole catalog, a block of positions at a time, so that memory stays bounded."""

import math

import torch

from fedmerge.sequence.catalog import DrawnItems

MIN_SEQUENCE = 2  # one item to read and one to predict
LOGITS_PER_BLOCK = 2**20  # 4 MiB of float32: larger blocks do not fit a CPU's cache


@torch.no_grad()
def backward_in_blocks(
    states: torch.Tensor,
    catalog: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    background: float = 0.0,
    dtype: torch.dtype | None = None,
    logits_per_block: int = LOGITS_PER_BLOCK,
    drawn: DrawnItems | None = None,
) -> float:
    """Compute a mean loss over positions and write its gradients to the leaves, a block of positions at a time.

    loss = mean over positions of −log((1 − b) p_t + b / N), p = softmax(logits / temperature), b the background

    The gradient by the logits, w (p − onehot(t)) / temperature with w the first term's share of the sum, is written
    down: automatic differentiation reads and writes every logit twice as often.

    Args:
        states: (P, h) after the read items; its gradient is set.
        catalog: (N, h) item representations; its gradient is set if it requires one.
        targets: (P,) next items t.
        temperature: divides the logits.
        background: share of the uniform distribution, below 1; 0 is the cross-entropy.
        dtype: of the products that give gradients; None for that of the states. The loss does not depend on it.
        logits_per_block: logits held at once; it changes the gradients by rounding only.
        drawn: the items of ``catalog``, if they are not all of N: the softmax is then that of
            :meth:`~fedmerge.sequence.catalog.DrawnItems.correct`, and ``targets`` count among them.

    Returns:
        The loss.
    """
    loss, size = 0.0, max(1, logits_per_block // len(catalog))
    num_items = len(catalog) if drawn is None else drawn.num_items
    rounded = catalog if dtype is None else catalog.to(dtype)
    states.grad = torch.empty_like(states)
    catalog.grad = torch.zeros_like(catalog) if catalog.requires_grad else None
    for start in range(0, len(targets), size):
        of_block, wanted = states[start : start + size], targets[start : start + size, None]
        logits = (of_block / temperature) @ catalog.T  # (block, N)
        if drawn is not None:
            drawn.correct(logits, wanted)
        above, p = logits.gather(1, wanted) - logits.amax(dim=1, keepdim=True), logits.softmax(dim=1)
        # The largest probability is at least 1 / N, so its logarithm is precise where that of p_t may not be.
        log_found = above + p.amax(dim=1, keepdim=True).log()  # (block, 1), log p_t
        mixed = torch.logaddexp(
            log_found + math.log(1 - background),
            torch.full_like(log_found, math.log(background / num_items) if background else -math.inf),
        )
        loss -= mixed.sum().item() / len(targets)
        p.scatter_add_(1, wanted, torch.full_like(log_found, -1.0))
        share = (1 - background) * (log_found - mixed).exp() / (temperature * len(targets))  # (block, 1)
        p = p.to(rounded.dtype)
        states.grad[start : start + size] = share * (p @ rounded)
        if catalog.grad is not None:
            catalog.grad += p.T @ (share * of_block).to(p.dtype)
    return loss
