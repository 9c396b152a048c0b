"""Training losses."""

import torch


def in_batch_softmax(
    user_vectors: torch.Tensor, item_vectors: torch.Tensor, target_rows: torch.Tensor, temperature: float
) -> torch.Tensor:
    """In-batch softmax cross-entropy, −log softmax(cos(u, ·)/τ)[target].

    Items are the different targets of the batch, each once, so an item that is the target of several users is never a
    negative of one of them, nor counted twice for the others.

    Args:
        user_vectors: (b, d), L2-normalised.
        item_vectors: (m, d), L2-normalised, m ≤ b different items.
        target_rows: int64 (b,), row of each user's target in ``item_vectors``.
        temperature: τ.

    Returns:
        The mean over the batch, a scalar.
    """
    logits = user_vectors @ item_vectors.T / temperature  # (b, m)
    return torch.nn.functional.cross_entropy(logits, target_rows)
