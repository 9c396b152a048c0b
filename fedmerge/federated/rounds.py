"""Rounds of a federation as values: the state after a round, and the function that computes the next state.

    state = initial_state(starts)
    for every round:
        locals = {client: adapter trained from state.starts[client], with state.base folded into the backbone}
        state = aggregate("flexlora", state, locals, num_examples)

A client sends its trained adapter. The state holds the adapter that it started from, so the server computes the
difference Δ_local − Δ_start itself; sent as an adapter, it would have twice the rank.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.encoder.lora import initial_lora_A
from fedmerge.errors import AggregationError, ConfigError, LayoutMismatchError
from fedmerge.federated.averages import Combined
from fedmerge.federated.product_space import (
    client_update,
    compressed,
    cut_to,
    decomposed,
    first_rows,
    relative_error,
    weighted_sum,
)
from fedmerge.federated.rules import RULES, Continuation, MergeFunction, Rule, rule_named, rule_of, rule_parameters
from fedmerge.federated.server_steps import Moments
from fedmerge.federated.summed import adapter_of_mean, summed_rank
from fedmerge.merging.parameters import Value
from fedmerge.merging.stack import survey_adapters
from fedmerge.seeding import derive


@dataclass(frozen=True)
class RoundReport:
    """The aggregation of one round: parameters, weights and errors.

    Attributes:
        rule: name in RULES, of a merging method, or of the function.
        parameters: all parameters of the rule.
        client_weights: client -> p_k, for the clients that took part.
        error: ‖Δ − Σ p_k Δ_k‖ / ‖Σ p_k Δ_k‖ (Frobenius, all modules) for FedIT and HetLoRA; 0 for the others; None for
            FedIT from a secure sum.
        selected: clients that Krum or Multi-Krum selected; else empty.
        output_residual: part of the global adapter's norm that ``output_rank`` cut.
        start_residuals: client -> ‖Δ − Δ_start‖ / ‖Δ‖, the part of the global adapter Δ that its start lacks; for all
            clients.
        rank: largest rank of the global adapter.
        size_bytes: size of the global adapter.
        bytes_up: client -> bytes of the tensors it sent, for the clients that took part.
        bytes_down: client -> bytes of the tensors it needs for the next round, for all clients of the state. Fresh
            tensors come from a seed and do not count; a frozen global adapter counts in full.
    """

    rule: str
    parameters: Mapping[str, Value]
    client_weights: Mapping[str, float]
    error: float | None
    selected: tuple[str, ...]
    output_residual: float
    start_residuals: Mapping[str, float]
    rank: int
    size_bytes: int
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]


@dataclass(frozen=True)
class GlobalState:
    """A federation after a round.

    Attributes:
        num_rounds: number of aggregated rounds.
        adapter: the global adapter Δ, the model to evaluate; 0 before the first round.
        starts: client -> adapter to train in the next round, with the client's rank and scaling; for all clients, also
            those that did not take part.
        frozen: True if clients train fresh ``starts`` with ``adapter`` folded into the backbone.
        moments: state of a server optimiser.
        report: report of the last round; None before the first.
    """

    num_rounds: int
    adapter: Adapter
    starts: Mapping[str, Adapter]
    frozen: bool = False
    moments: Moments | None = None
    report: RoundReport | None = None

    @property
    def base(self) -> Adapter | None:
        """The adapter that clients fold into the backbone before training, or None."""
        return self.adapter if self.frozen else None


def initial_state(starts: Mapping[str, Adapter]) -> GlobalState:
    """Return the state before the first round.

    Args:
        starts: client -> fresh adapter with B = 0, whose modules, rank and scaling the client has in all rounds.
            :func:`fedmerge.encoder.lora.attach` makes them; FFA-LoRA and HetLoRA need one seed for all.

    Raises:
        AggregationError: a B is not 0, or a scaling is not above 0.
        LayoutMismatchError, MergeError: as in :func:`fedmerge.merging.stack.survey_adapters`.
    """
    survey_adapters(starts)
    for client, adapter in starts.items():
        for name, module in adapter.modules.items():
            if module.lora_B.any() or module.scaling <= 0:
                raise AggregationError(
                    f"initial_state: client {client!r}, module {name}: found scaling {module.scaling:g} and "
                    f"{int(module.lora_B.count_nonzero())} values of lora_B that are not 0, expected a scaling above 0 "
                    "and lora_B = 0; start from fresh adapters"
                )
    return GlobalState(0, weighted_sum(starts, dict.fromkeys(starts, 0.0)), dict(sorted(starts.items())))


def aggregate(
    rule: str | MergeFunction,
    state: GlobalState,
    adapters: Mapping[str, Adapter],
    client_weights: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
    **parameters: Value,
) -> GlobalState:
    """Aggregate one round: return the next state from the clients' trained adapters. Inputs are unchanged.

    Rules over updates: Δ ← Δ + rule(Δ_k − Δ_start,k). Rules over whole adapters: Δ ← rule(Δ_k).

    Args:
        rule: name in RULES, name of a training-free method, or a function from updates by client to their merge.
        state: state that the clients started from.
        adapters: client -> adapter after local training, with the rank and scaling of its start; any clients of the
            state, in any order.
        client_weights: client -> number of training examples, or any weight above 0; None for equal weights.
        seed: seed of random rules and of fresh adapters; every round derives its own from it.
        parameters: parameters of the rule.

    Raises:
        ConfigError: no such rule, or a parameter is unknown or out of bounds.
        AggregationError: no or unknown clients, wrong weights, or the rule refuses the adapters.
        LayoutMismatchError: an adapter's modules or shapes differ from its client's start, or from the others.
        MergeError: a value is not finite.
    """
    name = rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)
    row = rule_named(rule) if isinstance(rule, str) else rule_of(rule)
    chosen = rule_parameters(name, row, parameters)
    _check_adapters(name, row, state, adapters)
    shares = _shares(adapters, client_weights)
    if row.of == "adapters":
        received = {client: adapters[client] for client in shares}
    else:
        received = {client: client_update(adapters[client], state.starts[client]) for client in shares}
    own = {} if row.step else _own(chosen)
    drawn = {"seed": derive(seed, "aggregate", state.num_rounds)} if row.random else {}
    combined = row.combine(received, shares, **own, **drawn)
    bytes_up = {client: _sent_bytes(adapters[client], row) for client in shares}
    return _advanced(name, row, state, combined, shares, chosen, bytes_up, seed)


def aggregate_mean(
    rule: str,
    state: GlobalState,
    mean: NDArray[np.floating],
    client_weights: Mapping[str, float],
    *,
    seed: int = 0,
    **parameters: Value,
) -> GlobalState:
    """Aggregate one round from a secure sum, which shows only the weighted mean of the clients' values.

    Args:
        rule: name of a row of RULES with ``summed``.
        state: state that the clients started from.
        mean: (n,), weighted mean of their :func:`fedmerge.federated.summed.summed_values`.
        client_weights: client -> weight, for the clients in the sum.
        seed, parameters: as in :func:`aggregate`.

    Raises:
        ConfigError: no such rule, a rule that needs single adapters, or an unknown parameter.
        AggregationError: unknown clients, wrong weights, or another number of values.
    """
    row = rule_named(rule)
    if row.summed is None:
        able = ", ".join(name for name, each in RULES.items() if each.summed)
        raise ConfigError(
            f"aggregation rule {rule!r}: it needs every single adapter, not their mean; use one of {able}"
        )
    chosen = rule_parameters(rule, row, parameters)
    starts = {client: state.starts[client] for client in client_weights if client in state.starts}
    _check_clients(rule, row, state, client_weights)
    shares = _shares(client_weights, client_weights)
    doubled = row.of == "updates" and any(
        module.lora_B.any() for each in starts.values() for module in each.modules.values()
    )
    like = starts[min(starts)]
    adapter = adapter_of_mean(row.summed, mean, like, summed_rank(starts) * (2 if doubled else 1))
    combined = Combined(adapter, None if row.summed == "A and B" else 0.0)
    return _advanced(rule, row, state, combined, shares, chosen, dict.fromkeys(shares, 4 * mean.size), seed)


def _own(chosen: Mapping[str, Value]) -> dict[str, Value]:
    """Return the parameters of the rule itself, without those for the steps after it."""
    return {key: value for key, value in chosen.items() if key not in ("continuation", "output_rank")}


def _advanced(
    name: str,
    row: Rule,
    state: GlobalState,
    combined: Combined,
    shares: Mapping[str, float],
    chosen: Mapping[str, Value],
    bytes_up: Mapping[str, int],
    seed: int,
) -> GlobalState:
    """Return the state after a round from the result of its rule."""
    continuation = _continuation(row, chosen)
    result, moments = combined.adapter, None
    if row.step is not None:
        result, moments = row.step(result, state.moments, **_own(chosen))
    if row.of == "updates" and state.num_rounds:
        result = weighted_sum({"global": state.adapter, "update": result}, {"global": 1.0, "update": 1.0})

    adapter, starts, residuals, lost = _continued(
        result, state.starts, continuation, chosen.get("output_rank"), fresh_seed(seed, state.num_rounds + 1)
    )
    report = RoundReport(
        rule=name,
        parameters=chosen,
        client_weights=shares,
        error=combined.error,
        selected=combined.selected,
        output_residual=lost,
        start_residuals=residuals,
        rank=max(module.rank for module in adapter.modules.values()),
        size_bytes=adapter.size_bytes,
        bytes_up=bytes_up,
        bytes_down={
            client: adapter.size_bytes if continuation == "frozen" else _sent_bytes(start, row)
            for client, start in starts.items()
        },
    )
    return GlobalState(state.num_rounds + 1, adapter, starts, continuation == "frozen", moments, report)


def steps_of_round(max_steps: int, number: int, num_rounds: int) -> int:
    """Return the number of steps of a round (rounds count from 1): a share of all steps, and at least one."""
    return max(1, max_steps * number // num_rounds - max_steps * (number - 1) // num_rounds)


def fresh_seed(seed: int, num_rounds: int) -> int:
    """Return the seed of the fresh adapters that clients get after ``num_rounds`` rounds, for ``attach``."""
    return derive(seed, "lora-round", num_rounds)


def state_tensors(state: GlobalState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split a state into tensors by name, for safetensors, and a record, for JSON."""
    starts = {id(start): start for start in state.starts.values()}
    numbers = {key: number for number, key in enumerate(starts)}
    parts = {"adapter": state.adapter, **{f"start {numbers[key]}": start for key, start in starts.items()}}
    record: dict[str, Any] = {
        "num_rounds": state.num_rounds,
        "frozen": state.frozen,
        "starts": {client: numbers[id(start)] for client, start in state.starts.items()},
        "report": None if state.report is None else asdict(state.report),
        "moments": None,
    }
    tensors = {}
    if state.moments is not None:
        parts["moment"] = state.moments.first
        record["moments"] = {"optimiser": state.moments.optimiser, "num_steps": state.moments.num_steps}
        tensors = {f"second/{name}": tensor.clone() for name, tensor in state.moments.second.items()}
    for part, adapter in parts.items():
        for name, module in adapter.modules.items():
            tensors[f"{part}/{name}/lora_A"] = module.lora_A.clone(memory_format=torch.contiguous_format)
            tensors[f"{part}/{name}/lora_B"] = module.lora_B.clone(memory_format=torch.contiguous_format)
    record["scalings"] = {
        part: {name: module.scaling for name, module in adapter.modules.items()} for part, adapter in parts.items()
    }
    return tensors, record


def state_of(tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> GlobalState:
    """Invert :func:`state_tensors`.

    Raises:
        AggregationError: an entry is missing.
    """
    try:
        parts = {
            part: Adapter(
                {
                    name: LoraModule(tensors[f"{part}/{name}/lora_A"], tensors[f"{part}/{name}/lora_B"], float(scaling))
                    for name, scaling in scalings.items()
                }
            )
            for part, scalings in record["scalings"].items()
        }
        moments = None
        if record["moments"] is not None:
            second = {key.removeprefix("second/"): value for key, value in tensors.items() if key.startswith("second/")}
            moments = Moments(**record["moments"], first=parts["moment"], second=second)
        report = record["report"]
        return GlobalState(
            num_rounds=record["num_rounds"],
            adapter=parts["adapter"],
            starts={client: parts[f"start {number}"] for client, number in record["starts"].items()},
            frozen=record["frozen"],
            moments=moments,
            report=None if report is None else RoundReport(**{**report, "selected": tuple(report["selected"])}),
        )
    except KeyError as error:
        raise AggregationError(
            f"state of a federation: {error} is missing; restore the files from an undamaged copy, or start a new run"
        ) from error


def _check_clients(name: str, rule: Rule, state: GlobalState, clients: Mapping[str, Any]) -> None:
    unknown = sorted(clients.keys() - state.starts.keys())
    if unknown or not clients:
        who = f"clients {', '.join(unknown)}" if unknown else "no client"
        raise AggregationError(
            f"{name}, round {state.num_rounds + 1}: found {who}, expected some of {', '.join(state.starts)}; "
            "initial_state takes all clients that ever take part"
        )
    if rule.of == "adapters" and state.frozen:
        raise AggregationError(
            f"{name}, round {state.num_rounds + 1}: the clients trained on a frozen global adapter, which a rule over "
            "whole adapters would drop; keep one rule for all rounds"
        )


def _check_adapters(name: str, rule: Rule, state: GlobalState, adapters: Mapping[str, Adapter]) -> None:
    _check_clients(name, rule, state, adapters)
    survey_adapters(adapters)
    for client, adapter in adapters.items():
        start = state.starts[client].modules
        if start.keys() != adapter.modules.keys():
            raise LayoutMismatchError(
                f"adapter of {client!r}: found modules {', '.join(adapter.modules)}, expected {', '.join(start)}, "
                "which it started from; train what the server sent"
            )
        for module, factors in adapter.modules.items():
            found, expected = _shape(factors), _shape(start[module])
            if found != expected:
                raise LayoutMismatchError(
                    f"adapter of {client!r}, module {module}: found (lora_A, lora_B, scaling) {found}, expected "
                    f"{expected}, which it started from; train what the server sent"
                )
            if rule.trained == "B" and not torch.equal(factors.lora_A, start[module].lora_A):
                raise AggregationError(
                    f"{name}: client {client!r}, module {module}: its lora_A differs from the one it started from, "
                    "which must stay frozen; train lora_B only"
                )


def _shape(module: LoraModule) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    return tuple(module.lora_A.shape), tuple(module.lora_B.shape), module.scaling


def _shares(adapters: Mapping[str, Any], client_weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return client -> p_k, sorted by name."""
    weights = dict.fromkeys(adapters, 1.0) if client_weights is None else client_weights
    if weights.keys() != adapters.keys():
        found, expected = ", ".join(sorted(weights)), ", ".join(sorted(adapters))
        raise AggregationError(
            f"client_weights: found weights of {found}, expected weights of {expected}, which took part"
        )
    for client, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise AggregationError(
                f"client_weights: client {client!r}: found {weight}, expected a finite number above 0; leave a client "
                "without examples out of the round"
            )
    summed = sum(weights[client] for client in sorted(adapters))
    return {client: weights[client] / summed for client in sorted(adapters)}


def _continuation(rule: Rule, chosen: Mapping[str, Value]) -> Continuation:
    return next(each for each in rule.continuations if each == chosen.get("continuation", each))


def _continued(
    result: Adapter,
    before: Mapping[str, Adapter],
    continuation: Continuation,
    output_rank: Value,
    fresh_seed: int,
) -> tuple[Adapter, dict[str, Adapter], dict[str, float], float]:
    """Return the global adapter, every client's start and its residual, and the residual of ``output_rank``."""
    adapter, triples, lost = result, None, 0.0
    if continuation == "truncated" or output_rank is not None:
        rank = output_rank if isinstance(output_rank, int) else None
        triples = decomposed(result)
        adapter, lost = compressed(triples, rank)
        triples = {name: (U[:, :rank], S[:rank], Vh[:rank]) for name, (U, S, Vh) in triples.items()}
    made: dict[tuple[Any, ...], tuple[Adapter, float]] = {}  # clients with equal shapes share a start
    starts, residuals = {}, {}
    for client, like in before.items():
        shape = tuple((name, module.rank, module.scaling) for name, module in like.modules.items())
        if shape not in made:
            fresh = _fresh(like, fresh_seed)
            if continuation == "frozen":
                made[shape] = fresh, 0.0
            elif continuation == "factors":
                start = first_rows(adapter, like, fresh)
                made[shape] = start, relative_error(start, adapter)
            elif triples is not None:
                made[shape] = cut_to(triples, like, fresh)
        starts[client], residuals[client] = made[shape]
    return adapter, starts, residuals, lost


def _fresh(like: Adapter, seed: int) -> Adapter:
    """Draw A and set B = 0 in the shapes of an adapter."""
    modules = {}
    for name, module in like.modules.items():
        lora_A = initial_lora_A(seed, name, module.rank, module.lora_A.shape[1])
        modules[name] = LoraModule(lora_A, torch.zeros_like(module.lora_B), module.scaling)
    return Adapter(modules)


def _sent_bytes(adapter: Adapter, rule: Rule) -> int:
    if rule.trained == "B":
        return sum(module.lora_B.nbytes for module in adapter.modules.values())
    return adapter.size_bytes
