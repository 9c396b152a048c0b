"""Training losses."""

from collections.abc import Iterable

import torch

TEMPERATURE = 0.05  # τ of every training loss


def in_batch_softmax(
    user_vectors: torch.Tensor, item_vectors: torch.Tensor, target_rows: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Compute the in-batch softmax cross-entropy, −log softmax(cos(u, ·)/τ)[target].

    Items are the distinct targets of the batch, so an item that is the target of several users is never a negative of
    one of them, nor counted twice for the others.

    Args:
        user_vectors: (b, d), L2-normalised.
        item_vectors: (m, d), L2-normalised, m ≤ b distinct items.
        target_rows: int64 (b,), row of each user's target in ``item_vectors``.
        temperature: τ.

    Returns:
        The mean over the batch, a scalar.
    """
    logits = user_vectors @ item_vectors.T / temperature  # (b, m)
    return torch.nn.functional.cross_entropy(logits, target_rows)


def catalog_softmax(
    user_vectors: torch.Tensor, item_vectors: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Compute every user's softmax cross-entropy over the whole catalog, −log softmax(cos(u, ·)/τ)[target].

    Args:
        user_vectors: (b, d), L2-normalised.
        item_vectors: (N, d), L2-normalised; constants, so that no user's loss depends on another user.
        targets: int64 (b,), row of each user's target in ``item_vectors``.
        temperature: τ.

    Returns:
        (b,) one loss per user.
    """
    logits = user_vectors @ item_vectors.detach().T / temperature  # (b, N)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def proximal_term(
    parameters: Iterable[torch.Tensor], global_parameters: Iterable[torch.Tensor], strength: float
) -> torch.Tensor:
    """Compute FedProx' penalty μ/2 ‖θ − θ_global‖², which keeps local training near its start.

    Args:
        parameters: the trainable tensors θ: lora_A and lora_B of all modules.
        global_parameters: the tensors at the start, in the same order and shapes; gradients do not reach them.
        strength: μ, at least 0.

    Returns:
        A scalar to add to the loss, summed over all tensors; differentiable in θ.

    Raises:
        ValueError: the numbers of tensors or their shapes differ.

    Source: Federated Optimization in Heterogeneous Networks, MLSys 2020, arXiv:1812.06127.
    Differs: nothing; but A and B are penalised separately, which is not μ/2 ‖Δ − Δ_global‖².
    """
    distances = []
    for tensor, start in zip(parameters, global_parameters, strict=True):
        if tensor.shape != start.shape:
            raise ValueError(
                f"proximal_term: found a tensor of shape {tuple(tensor.shape)} and its start of shape "
                f"{tuple(start.shape)}, expected equal shapes. Pass both in the same order."
            )
        distances.append((tensor - start.detach()).square().sum())
    return strength / 2 * torch.stack(distances).sum()
