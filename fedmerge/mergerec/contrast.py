"""Contrast the scores of two models over one catalog, with fixed weights or with weights that adapt to every item."""

import torch

CONTRAST_TEMPERATURE = 0.05  # of the distributions that the weights are computed from, and of the walks
SAME_MODEL = 1e-12  # divergence of two encodings of one model, which differ by the rounding of float32


def contrast(
    expert: torch.Tensor, amateur: torch.Tensor, alpha: torch.Tensor | float, beta: torch.Tensor | float
) -> torch.Tensor:
    """Return (1 + α) S - β S', elementwise.

    Args:
        expert: S, scores of any shape under the model whose view counts.
        amateur: S', scores of the same shape under the model to contrast with.
        alpha, beta: numbers, or weights of the same shape.
    """
    return (1 + alpha) * expert - beta * amateur


def adaptive_weights(expert: torch.Tensor, amateur: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the weights of a contrast for every item: α by entropy, β by divergence.

    With p = softmax(S / 0.05), q = softmax(S' / 0.05) and m = (p + q) / 2 over the catalog:
    α_j = (1 - H_j) / (1 - max H), H_j = -p_j log p_j; β_j = JS_j / max JS,
    JS_j = ½ p_j log(p_j / m_j) + ½ q_j log(q_j / m_j). So α lies in [1, 1.59] and β in [0, 1].

    Args:
        expert: S, (n, N) scores of n users under the expert; -inf excludes an item.
        amateur: S', (n, N), with the same items excluded.

    Returns:
        α and β, (n, N) each. β is 0 where both models agree on the whole catalog.

    Source: Taesar-style, after arXiv:2602.22743 and its released code.
    Differs: the original contrasts decoders of one mixed model, whose users are in all domains; here they are the
        domain's expert and another adapter over the domain's own catalog. The divergence is Jensen-Shannon's; the
        released code turns both of its arguments.
    """
    p, q = (torch.softmax(scores.double() / CONTRAST_TEMPERATURE, dim=1) for scores in (expert, amateur))
    entropies = torch.special.entr(p)
    alpha = (1 - entropies) / (1 - entropies.amax(dim=1, keepdim=True))
    # JS_j in terms of -x log x, which is 0 at 0
    divergences = (torch.special.entr((p + q) / 2) - (entropies + torch.special.entr(q)) / 2).clamp(min=0)
    largest = divergences.amax(dim=1, keepdim=True)
    beta = torch.where(largest > SAME_MODEL, divergences / largest.clamp(min=SAME_MODEL), 0.0)
    return alpha.to(expert.dtype), beta.to(expert.dtype)


def adaptive_contrast(expert: torch.Tensor, amateur: torch.Tensor) -> torch.Tensor:
    """Return :func:`contrast` with the weights of :func:`adaptive_weights`, (n, N)."""
    return contrast(expert, amateur, *adaptive_weights(expert, amateur))
