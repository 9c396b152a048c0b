"""Averages of the clients' adapters: exact in product space, or of A and B separately as published."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.errors import AggregationError
from fedmerge.federated.product_space import factors_of, frobenius, relative_error, weighted_sum


@dataclass(frozen=True, slots=True)
class Combined:
    """Result of a rule for the adapters or updates of one round.

    Attributes:
        adapter: the result.
        error: ‖Δ − Σ p_k Δ_k‖_F / ‖Σ p_k Δ_k‖_F for rules that average inexactly; 0 for exact rules and rules that do
            not average; None if it is unknown because the Δ_k are hidden.
        selected: clients that the rule selected; empty for rules that do not select.
    """

    adapter: Adapter
    error: float | None = 0.0
    selected: tuple[str, ...] = ()


def weighted_average(adapters: Mapping[str, Adapter], client_weights: Mapping[str, float]) -> Combined:
    """Compute Δ = Σ p_k Δ_k by stacking: the A_k, times p_k and the scaling, as rows, and the B_k as columns.

    Exact for any ranks. The result has rank Σ r_k, at most min(in, out).

    Args:
        adapters: client -> adapter or update.
        client_weights: client -> p_k, Σ p_k = 1.

    Source: FLoRA, NeurIPS 2024, arXiv:2409.05976, for one round; FlexLoRA, NeurIPS 2024, arXiv:2402.11505, before its
        SVD.
    """
    return Combined(weighted_sum(adapters, client_weights))


def fedit(adapters: Mapping[str, Adapter], client_weights: Mapping[str, float]) -> Combined:
    """Average the factors separately: A = Σ p_k A_k and B = Σ p_k B_k.

    This is not Σ p_k B_k A_k; ``error`` is the relative difference.

    Args:
        adapters: client -> adapter, of equal ranks and scalings.
        client_weights: client -> p_k, Σ p_k = 1.

    Raises:
        AggregationError: ranks or scalings differ.

    Source: FedIT, ICASSP 2024, arXiv:2305.05644.
    """
    _equal_shapes("fedit", adapters)
    averaged = _factorwise(adapters, dict.fromkeys(_modules(adapters), client_weights))
    return Combined(averaged, relative_error(averaged, weighted_sum(adapters, client_weights)))


def ffa_lora(adapters: Mapping[str, Adapter], client_weights: Mapping[str, float]) -> Combined:
    """Average B = Σ p_k B_k over a frozen A that all clients share: exactly Σ p_k Δ_k, at the rank of one client.

    Args:
        adapters: client -> adapter, of equal ranks and scalings, with the same A to the last bit.
        client_weights: client -> p_k, Σ p_k = 1.

    Raises:
        AggregationError: ranks or scalings differ, or an A is not the first client's.

    Source: FFA-LoRA, ICLR 2024, arXiv:2403.12313.
    """
    _equal_shapes("ffa-lora", adapters)
    first = min(adapters)
    for client, adapter in adapters.items():
        for name, module in adapter.modules.items():
            shared = adapters[first].modules[name].lora_A
            if not torch.equal(module.lora_A, shared):
                raise AggregationError(
                    f"ffa-lora: client {client!r}, module {name}: its lora_A differs from that of client {first!r} "
                    f"(largest difference {float((module.lora_A - shared).abs().max()):.3g}), expected the shared one; "
                    "freeze lora_A in local training, and start all clients from one seed"
                )
    averaged = {}
    for name, module in adapters[first].modules.items():
        lora_B = sum(client_weights[client] * adapters[client].modules[name].lora_B for client in sorted(adapters))
        averaged[name] = LoraModule(module.lora_A, torch.as_tensor(lora_B), module.scaling)
    return Combined(Adapter(averaged))


def hetlora(adapters: Mapping[str, Adapter], client_weights: Mapping[str, float]) -> Combined:
    """Average A and B, padded with zeros to the largest rank, with weights ‖B_k A_k‖_F / Σ_j ‖B_j A_j‖_F.

    Weights are computed per module, and are equal where all updates of a module are 0. As in FedIT, the result is not
    an average in product space; ``error`` is relative to Σ p_k Δ_k.

    Args:
        adapters: client -> adapter, of any ranks and equal scalings.
        client_weights: client -> p_k, used for the error only.

    Raises:
        AggregationError: scalings differ.

    Source: HetLoRA, EMNLP 2024, arXiv:2401.06432, sparsity-weighted aggregation.
    Differs: ranks are given; clients do not prune themselves by a penalty.
    """
    _equal_scalings("hetlora", adapters)
    shares, padded = {}, {}
    for name in _modules(adapters):
        modules = {client: adapters[client].modules[name] for client in sorted(adapters)}
        norms = {client: frobenius(*factors_of(module)) for client, module in modules.items()}
        summed = sum(norms.values())
        shares[name] = {client: norm / summed if summed else 1 / len(norms) for client, norm in norms.items()}
        rank = max(module.rank for module in modules.values())
        padded[name] = {client: _padded(module, rank) for client, module in modules.items()}
    filled = {client: Adapter({name: padded[name][client] for name in padded}) for client in adapters}
    averaged = _factorwise(filled, shares)
    return Combined(averaged, relative_error(averaged, weighted_sum(adapters, client_weights)))


def _padded(module: LoraModule, rank: int) -> LoraModule:
    missing = rank - module.rank
    return LoraModule(
        torch.nn.functional.pad(module.lora_A, (0, 0, 0, missing)),
        torch.nn.functional.pad(module.lora_B, (0, missing)),
        module.scaling,
    )


def _factorwise(adapters: Mapping[str, Adapter], shares: Mapping[str, Mapping[str, float]]) -> Adapter:
    """Compute Σ w_k A_k and Σ w_k B_k of every module, sorted by name; shares: module -> client -> w_k."""
    averaged = {}
    for name, weights in shares.items():
        modules = [(weights[client], adapters[client].modules[name]) for client in sorted(adapters)]
        lora_A = torch.stack([weight * module.lora_A for weight, module in modules]).sum(0)
        lora_B = torch.stack([weight * module.lora_B for weight, module in modules]).sum(0)
        averaged[name] = LoraModule(lora_A, lora_B, modules[0][1].scaling)
    return Adapter(averaged)


def _modules(adapters: Mapping[str, Adapter]) -> list[str]:
    return list(adapters[min(adapters)].modules)


def _equal_shapes(rule: str, adapters: Mapping[str, Adapter]) -> None:
    for name in _modules(adapters):
        ranks = {client: adapters[client].modules[name].rank for client in sorted(adapters)}
        if len(set(ranks.values())) > 1:
            found = ", ".join(f"{client} {rank}" for client, rank in ranks.items())
            raise AggregationError(
                f"{rule}: module {name}: found ranks {found}, expected equal ones; give all clients the same rank, or "
                "choose a rule for unequal ranks: flexlora, flora, hetlora"
            )
    _equal_scalings(rule, adapters)


def _equal_scalings(rule: str, adapters: Mapping[str, Adapter]) -> None:
    for name in _modules(adapters):
        scalings = {client: adapters[client].modules[name].scaling for client in sorted(adapters)}
        if len(set(scalings.values())) > 1:
            found = ", ".join(f"{client} {scaling:g}" for client, scaling in scalings.items())
            raise AggregationError(
                f"{rule}: module {name}: found scalings {found}, expected equal ones, since A and B are averaged "
                "separately; set alpha in proportion to the rank, or choose flexlora or flora"
            )
