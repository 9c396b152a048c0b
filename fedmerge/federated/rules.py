"""Aggregation rules as rows of one literal table; ``fedmerge.federated.rounds.aggregate`` runs them.

To add a rule, write its function in the file of its kind (``averages``, ``robust``, ``server_steps``), add a row to
RULES, and add its name to ``RoundRule`` in ``fedmerge.config``. Training-free merging methods are rules already.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Literal, get_args

from fedmerge.adapter import Adapter
from fedmerge.config import LEARNED_METHODS, Rounds
from fedmerge.errors import ConfigError
from fedmerge.federated.averages import Combined, fedit, ffa_lora, hetlora, weighted_average
from fedmerge.federated.robust import coordinate_median, krum, multi_krum, trimmed_mean
from fedmerge.federated.server_steps import Moments, fedadam, fedavgm, fedyogi
from fedmerge.federated.summed import Summed
from fedmerge.merging.methods import METHODS, method_named
from fedmerge.merging.parameters import (
    Parameter,
    Value,
    checked_parameters,
    markdown_table,
    parameter_text,
    parse_parameters,
)
from fedmerge.merging.training_free import Scope, Space, merge_adapters

Continuation = Literal["truncated", "frozen", "factors"]
CONTINUATIONS: dict[Continuation, str] = {
    "truncated": "from the global adapter truncated to their rank by SVD; the residual is reported",
    "frozen": "on the frozen global adapter with a fresh one of their rank; nothing is cut, so it grows",
    "factors": "from the averaged A and B, of which a smaller rank takes the first rows",
}
MergeFunction = Callable[[Mapping[str, Adapter]], Adapter]
"""A function from updates by client to their merge, for example a learned one."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One aggregation rule: the server's part of a round, and how clients continue.

    Attributes:
        what: what it computes.
        parameters: name -> parameter.
        source: paper or standard.
        cost: cost at the server, for n clients, R = Σ ranks, and modules of in · out entries.
        combine: (adapters or updates, client_weights, **parameters) -> Combined.
        continuations: ways for clients to continue, the default first; with several, "continuation" is a parameter.
        of: input of ``combine``: "updates" Δ_local − Δ_start, whose result is added to the global adapter; or whole
            "adapters", whose result replaces it.
        step: server optimiser: (combined update, moments, **parameters) -> (step to add instead, new moments).
        trained: factors that clients train and send.
        random: True if ``combine`` takes a seed.
        summed: values that clients add in a secure sum instead, see ``fedmerge.federated.summed``; None if the rule
            needs single adapters.
    """

    what: str
    parameters: dict[str, Parameter]
    source: str
    cost: str
    combine: Callable[..., Combined]
    continuations: tuple[Continuation, ...] = ("truncated", "frozen")
    of: Literal["updates", "adapters"] = "updates"
    step: Callable[..., tuple[Adapter, Moments]] | None = None
    trained: Literal["A and B", "B"] = "A and B"
    random: bool = False
    summed: Summed | None = None


_CONTINUED = {
    "continuation": Parameter("truncated", choices=("truncated", "frozen")),
    "output_rank": Parameter(None, low=1),
}
_ADAPTIVE = {
    "learning_rate": Parameter(0.01, above=0.0),
    "beta_1": Parameter(0.9, low=0.0, high=0.9999),
    "beta_2": Parameter(0.99, low=0.0, high=0.9999),
    "tau": Parameter(0.001, above=0.0),
}
_MALICIOUS = {"num_malicious": Parameter(1, low=0)}
_SVD_COST = "O((R + global rank)² (in + out)) a module"
_DENSE_COST = "O(n in · out) a module, one module's n dense updates in memory; SVD of dense modules"

RULES: dict[str, Rule] = {
    "weighted-average": Rule(
        what="Σ p_k Δ_k of the updates, exact",
        combine=weighted_average,
        parameters=_CONTINUED,
        source="FedAvg (arXiv:1602.05629), in product space",
        cost=_SVD_COST,
        summed="updates",
    ),
    "fedit": Rule(
        what="A and B averaged separately: inexact, the error is reported; equal ranks",
        combine=fedit,
        parameters={},
        continuations=("factors",),
        of="adapters",
        source="FedIT (arXiv:2305.05644)",
        cost="O(R (in + out)) a module, and the error O(R² (in + out))",
        summed="A and B",
    ),
    "ffa-lora": Rule(
        what="B averaged over a shared, frozen A: exact, half the traffic; equal ranks",
        combine=ffa_lora,
        parameters={},
        continuations=("factors",),
        of="adapters",
        trained="B",
        source="FFA-LoRA (arXiv:2403.12313)",
        cost="O(R out) a module",
        summed="B",
    ),
    "flora": Rule(
        what="stacked: Σ p_k Δ_k at rank Σ r_k, exact, any ranks",
        combine=weighted_average,
        parameters={},
        continuations=("frozen",),
        source="FLoRA (arXiv:2409.05976)",
        cost="O(R (in + out)) a module; the global adapter grows by R a round, to min(in, out) at most",
    ),
    "flexlora": Rule(
        what="Σ p_k Δ_k of the whole adapters, exact, any ranks",
        combine=weighted_average,
        parameters={},
        continuations=("truncated",),
        of="adapters",
        source="FlexLoRA (arXiv:2402.11505)",
        cost="O(R² (in + out)) a module",
        summed="updates",
    ),
    "hetlora": Rule(
        what="A and B, filled up with zeros, averaged by ‖B_k A_k‖: inexact, the error is reported; any ranks",
        combine=hetlora,
        parameters={},
        continuations=("factors",),
        of="adapters",
        source="HetLoRA (arXiv:2401.06432)",
        cost="O(R² (in + out)) a module",
    ),
    "median": Rule(
        what="coordinate-wise median of the updates, unweighted",
        combine=coordinate_median,
        parameters=_CONTINUED,
        source="coordinate-wise median (arXiv:1803.01498)",
        cost=_DENSE_COST,
    ),
    "trimmed-mean": Rule(
        what="coordinate-wise mean without the smallest and largest values, unweighted",
        combine=trimmed_mean,
        parameters={"trim": Parameter(0.2, above=0.0, high=0.49), **_CONTINUED},
        source="coordinate-wise trimmed mean (arXiv:1803.01498)",
        cost=_DENSE_COST,
    ),
    "krum": Rule(
        what="the update nearest to its neighbours; at least 2f + 3 clients",
        combine=krum,
        parameters={**_MALICIOUS, **_CONTINUED},
        source="Krum (arXiv:1703.02757)",
        cost="distances O(R² (in + out)) a module, from factors",
    ),
    "multi-krum": Rule(
        what="the weighted average of the updates nearest to their neighbours; at least 2f + 3 clients",
        combine=multi_krum,
        parameters={**_MALICIOUS, "num_selected": Parameter(None, low=1), **_CONTINUED},
        source="Multi-Krum (arXiv:1703.02757)",
        cost="as krum",
    ),
    "fedavgm": Rule(
        what="a step along the momentum of the weighted average",
        combine=weighted_average,
        step=fedavgm,
        parameters={
            "learning_rate": Parameter(1.0, above=0.0),
            "momentum": Parameter(0.9, low=0.0, high=0.9999),
            **_CONTINUED,
        },
        source="FedAvgM (arXiv:1909.06335)",
        cost="as weighted-average; the momentum's rank grows by R a round, to min(in, out) at most",
        summed="updates",
    ),
    "fedadam": Rule(
        what="Adam's step along the weighted average, entry by entry",
        combine=weighted_average,
        step=fedadam,
        parameters={**_ADAPTIVE, **_CONTINUED},
        source="FedAdam (arXiv:2003.00295)",
        cost="O(in · out) a module, two dense moments kept; SVD of dense modules",
        summed="updates",
    ),
    "fedyogi": Rule(
        what="Yogi's step along the weighted average, entry by entry",
        combine=weighted_average,
        step=fedyogi,
        parameters={**_ADAPTIVE, **_CONTINUED},
        source="FedYogi (arXiv:2003.00295)",
        cost="as fedadam",
        summed="updates",
    ),
}


def rule_named(name: str) -> Rule:
    """Return a row of RULES, or a rule made from a training-free merging method.

    Such a rule merges the updates, each multiplied by n · p_k (1 for equal weights). Its parameters are the method's,
    ``scope``, ``space``, ``continuation`` and ``output_rank``.

    Raises:
        ConfigError: no such rule, a learned method, or one that weighs by training signals.
    """
    if name in RULES:
        return RULES[name]
    if name not in METHODS and ":" not in name:
        expected = ", ".join([*RULES, *(method for method, row in METHODS.items() if not (row.learned or row.signals))])
        raise ConfigError(f"aggregation rule: found {name!r}, expected one of {expected}")
    method = method_named(name)
    if method.signals:
        raise ConfigError(f"aggregation rule {name!r}: rounds have no training signals. Choose another rule.")
    if method.learned:
        raise ConfigError(
            f"aggregation rule {name!r}: it learns from catalogs with a model; pass a function from the clients' "
            "updates to their merge"
        )
    scopes = get_args(Scope) if method.rows is not None else ("tensor",)
    parameters = {
        **method.parameters,
        "scope": Parameter("tensor", choices=scopes),
        "space": Parameter("full", choices=get_args(Space)),
        **_CONTINUED,
    }
    return Rule(
        what=f"{method.what}, of the updates",
        combine=partial(_merged, name),
        parameters=parameters,
        source=method.source,
        cost=method.cost,
        random=method.random,
    )


def rule_of(merge: MergeFunction) -> Rule:
    """Make a rule from a function: it gets the clients' updates, and its result is added."""
    return Rule(
        what="a merge of the updates by a given function",
        combine=lambda updates, _client_weights: Combined(merge(updates)),
        parameters=_CONTINUED,
        source="",
        cost="its own",
    )


def rule_parameters(name: str, rule: Rule, given: Mapping[str, Value]) -> dict[str, Value]:
    """Check the parameters of a rule and fill in the defaults of the others.

    Raises:
        ConfigError: a parameter is unknown or out of bounds.
    """
    return checked_parameters(f"aggregation rule {name!r}", rule.parameters, given)


def check_rounds(rounds: Rounds, num_domains: int) -> None:
    """Refuse parameters that the rule does not have, and a trimmed mean of too few clients.

    Args:
        rounds: the section; without a rule nothing is checked.
        num_domains: training domains.

    Raises:
        ConfigError: the parameter, or the number of clients.
    """
    rule = rounds.rule
    if rule is None:
        return
    row = rule_of(lambda updates: next(iter(updates.values()))) if rule in LEARNED_METHODS else rule_named(rule)
    parameters = rule_parameters(rule, row, parse_parameters(rounds.parameters))
    clients = rounds.clients_a_round(num_domains)
    if rule == "trimmed-mean" and math.floor(Fraction(str(parameters["trim"])) * clients) < 1:
        raise ConfigError(
            f"rounds.rule = 'trimmed-mean' with trim = {parameters['trim']} and {clients} clients in a round trims "
            "no client; raise trim in rounds.parameters to one over the clients, or name more domains"
        )


def rules_table() -> str:
    """Return RULES as a Markdown table."""
    rows = []
    for name, rule in RULES.items():
        parameters = ", ".join(f"{key} {parameter_text(parameter)}" for key, parameter in rule.parameters.items())
        sent = "B" if rule.trained == "B" else "A, B"
        rows.append(
            (
                f"`{name}`",
                rule.what,
                " or ".join(rule.continuations),
                sent,
                parameters or "none",
                rule.cost,
                rule.source,
            )
        )
    return markdown_table(
        ("rule", "what it computes", "clients continue", "sent", "parameters", "cost", "source"), rows
    )


def _merged(
    method: str,
    updates: Mapping[str, Adapter],
    client_weights: Mapping[str, float],
    *,
    seed: int = 0,
    **parameters: Any,  # of the method, checked
) -> Combined:
    factors = {client: len(updates) * client_weights[client] for client in updates}
    return Combined(merge_adapters(updates, method, coefficients=factors, seed=seed, **parameters).adapter)
