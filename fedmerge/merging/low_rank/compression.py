"""A merge of one module as a LoRA module, of its own rank or of a smaller one."""

import torch

from fedmerge.adapter import LoraModule
from fedmerge.merging.low_rank.spaces import Bases, lift
from fedmerge.merging.low_rank.spectral import Factors, dense_svd, support, thin_svd
from fedmerge.merging.stack import dense_module


def compressed(update: torch.Tensor | Factors, bases: Bases, output_rank: int | None) -> tuple[LoraModule, float]:
    """Write a merge as a LoRA module of at most this rank (None: its own); also return the relative residual."""
    if isinstance(update, torch.Tensor):
        full = min(update.shape)
        if bases.identity and (output_rank is None or output_rank >= full) and not _of_low_rank(update):
            return dense_module(update.float()), 0.0  # factors would not be smaller
        U, S, Vh = dense_svd(update)
    else:
        U, S, Vh = thin_svd(*update)
    rank = support(S) if output_rank is None else min(support(S), output_rank)
    if rank == 0:  # a zero merge keeps one row of zeros, so that the layout stays complete
        left, right = lift((U.new_zeros(U.shape[0], 1), Vh.new_zeros(1, Vh.shape[1])), bases)
        return LoraModule(right.float(), left.float(), 1.0), 0.0
    root = S[:rank].sqrt()
    left, right = lift((U[:, :rank] * root, root[:, None] * Vh[:rank]), bases)
    residual = float(torch.linalg.vector_norm(S[rank:]) / torch.linalg.vector_norm(S))
    return LoraModule(right.float().contiguous(), left.float().contiguous(), 1.0), residual


def _of_low_rank(update: torch.Tensor) -> bool:
    """Return True if the rank is below half of min(a, b) and below 128, by a random sketch of that many columns."""
    width = max(1, min(128, min(update.shape) // 2))
    rng = torch.Generator().manual_seed(0)
    sketch = torch.randn(update.shape[1], width, generator=rng, dtype=torch.float64).to(update.device)
    return support(torch.linalg.svdvals(update.double() @ sketch)) < width
