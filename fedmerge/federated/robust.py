"""Robust rules in product space: up to f of n clients may send anything, and the result stays near the others.

Clients report their own number of examples, so median and trimmed mean ignore these weights.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import torch

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.errors import AggregationError
from fedmerge.federated.averages import Combined
from fedmerge.federated.product_space import weighted_sum
from fedmerge.merging.stack import dense_module, stack_adapters
from fedmerge.merging.training_free import domain_rows


def coordinate_median(adapters: Mapping[str, Adapter], _client_weights: Mapping[str, float]) -> Combined:
    """Take the median of every entry of Δ over the clients; for an even number, the mean of the middle two.

    The result has no low rank. Memory holds the dense updates of one module at a time. With fewer than three clients it
    is the mean and gives no protection.

    Args:
        adapters: client -> adapter or update.

    Source: Byzantine-Robust Distributed Learning, ICML 2018, arXiv:1803.01498, option I.
    """
    return Combined(_middle_mean(adapters, (len(adapters) - 1) // 2))


def trimmed_mean(adapters: Mapping[str, Adapter], _client_weights: Mapping[str, float], trim: float) -> Combined:
    """Take the mean of every entry of Δ without the ⌊trim · n⌋ smallest and the ⌊trim · n⌋ largest values.

    The result has no low rank. Memory holds the dense updates of one module at a time.

    Args:
        adapters: client -> adapter or update, n of them.
        trim: share that is cut at each end, below 1/2; read as a decimal number.

    Raises:
        AggregationError: too few clients: nothing would be cut.

    Source: Byzantine-Robust Distributed Learning, ICML 2018, arXiv:1803.01498, option II.
    """
    cut = math.floor(Fraction(str(trim)) * len(adapters))
    if cut < 1:
        raise AggregationError(
            f"trimmed-mean: found {len(adapters)} clients and trim {trim}, which cuts nothing; expected "
            f"trim · clients of at least 1: ask at least {math.ceil(1 / Fraction(str(trim)))} clients, or raise trim"
        )
    return Combined(_middle_mean(adapters, cut))


def krum(adapters: Mapping[str, Adapter], _client_weights: Mapping[str, float], num_malicious: int) -> Combined:
    """Select the update that is nearest to its n − f − 2 nearest neighbours.

    Args:
        adapters: client -> adapter or update, n of them.
        num_malicious: f, the number of clients that may be malicious.

    Raises:
        AggregationError: n < 2f + 3.

    Source: Machine Learning with Adversaries, NeurIPS 2017, arXiv:1703.02757.
    Differs: ties of scores go to the first client by name.
    """
    scores = krum_scores(adapters, num_malicious)
    chosen = min(scores, key=lambda client: (scores[client], client))
    return Combined(adapters[chosen], selected=(chosen,))


def multi_krum(
    adapters: Mapping[str, Adapter],
    client_weights: Mapping[str, float],
    num_malicious: int,
    num_selected: int | None,
) -> Combined:
    """Average, weighted and in product space, the m updates with the best Krum scores.

    Args:
        adapters: client -> adapter or update, n of them.
        client_weights: client -> p_k; those of the selected clients are normalised. The paper's are equal.
        num_malicious: f, the number of clients that may be malicious.
        num_selected: m, at most n − f; None means n − f − 2, the largest with a proof in the paper.

    Raises:
        AggregationError: n < 2f + 3, or m > n − f.

    Source: Machine Learning with Adversaries, NeurIPS 2017, arXiv:1703.02757.
    """
    scores = krum_scores(adapters, num_malicious)
    kept = len(adapters) - num_malicious - 2 if num_selected is None else num_selected
    if kept > len(adapters) - num_malicious:
        raise AggregationError(
            f"multi-krum: found num_selected {kept} of {len(adapters)} clients with num_malicious {num_malicious}, "
            f"expected at most {len(adapters) - num_malicious}; lower num_selected"
        )
    selected = sorted(sorted(scores, key=lambda client: (scores[client], client))[:kept])
    summed = sum(client_weights[client] for client in selected)
    shares = {client: client_weights[client] / summed for client in selected}
    return Combined(weighted_sum({client: adapters[client] for client in selected}, shares), selected=tuple(selected))


def krum_scores(adapters: Mapping[str, Adapter], num_malicious: int) -> dict[str, float]:
    """Compute every client's Krum score: the sum of ‖Δ_i − Δ_j‖²_F over its n − f − 2 nearest others and all modules.

    Distances come from inner products of factors, ⟨B_i A_i, B_j A_j⟩ = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ); no Δ is formed.

    Returns:
        client -> score, lower is better.

    Raises:
        AggregationError: n < 2f + 3.
    """
    needed = 2 * num_malicious + 3
    if len(adapters) < needed:
        raise AggregationError(
            f"krum: found {len(adapters)} clients and num_malicious {num_malicious}, expected at least "
            f"2 · num_malicious + 3 = {needed} clients; ask more clients, or lower num_malicious"
        )
    stack = stack_adapters(adapters)
    products = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for module in stack.modules.values():
        lora_A, lora_B = module.lora_A.double(), module.lora_B.double()
        of_client = torch.nn.functional.one_hot(module.owner, len(adapters)).double()  # (R, n)
        products += of_client.T @ ((lora_B.T @ lora_B) * (lora_A @ lora_A.T)) @ of_client
    squares = products.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0)
    distances.fill_diagonal_(math.inf)
    nearest = distances.sort(dim=1).values[:, : len(adapters) - num_malicious - 2]
    return dict(zip(stack.domains, nearest.sum(1).tolist(), strict=True))


def _middle_mean(adapters: Mapping[str, Adapter], cut: int) -> Adapter:
    """Take the mean of every entry without the ``cut`` smallest and largest values."""
    modules: dict[str, LoraModule] = {}
    for name, rows in domain_rows(stack_adapters(adapters), "task-arithmetic", coefficient=1.0):
        ordered = np.sort(rows.cpu().numpy(), axis=0)  # many times faster along this axis than torch
        modules[name] = dense_module(torch.from_numpy(ordered[cut : len(rows) - cut].mean(axis=0)))
    return Adapter(modules)
