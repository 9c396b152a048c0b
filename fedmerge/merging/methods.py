"""Merging methods as rows of one literal table: stack -> coefficients; ``linear_merge`` turns these into an adapter."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from fedmerge.errors import ConfigError
from fedmerge.merging.stack import Stack

Law = Literal["one domain is identity", "permutation", "zero coefficient is absent", "inputs unchanged"]
Value = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        default: also says its type; None stands for an integer that may be absent.
        low: smallest value.
        high: largest value.
        above: a value that it must exceed.
        choices: of a string.
    """

    default: Value
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """One merging method.

    Attributes:
        coefficients: (stack, **parameters) -> (K,) or (K, G) float32; None: learned on the server from pseudo-users,
            see ``fedmerge.server.collaborative``.
        parameters: name -> parameter.
        source: paper or standard.
        cost: time and memory, in K domains, R = Σ ranks.
        laws: what the tests hold this method to ("one domain is identity": with its coefficient, if it has one, at 1).
    """

    coefficients: Callable[..., torch.Tensor] | None
    parameters: dict[str, Parameter]
    source: str
    cost: str
    laws: tuple[Law, ...]


def average(stack: Stack) -> torch.Tensor:
    """The mean of the updates: w_k = 1/K.

    Returns:
        (K,) float32.
    """
    return torch.full((len(stack.domains),), 1 / len(stack.domains))


def task_arithmetic(stack: Stack, coefficient: float) -> torch.Tensor:
    """The scaled sum of the updates: w_k = coefficient for every domain.

    Returns:
        (K,) float32.

    Source: arXiv:2212.04089, equation of task addition with one scaling for all tasks.
    """
    return torch.full((len(stack.domains),), float(coefficient))


METHODS: dict[str, Method] = {
    "average": Method(
        coefficients=average,
        parameters={},
        source="mean of task vectors (model soups, arXiv:2203.05482)",
        cost="O(R (in + out)) a module, no model run",
        laws=("one domain is identity", "permutation", "inputs unchanged"),
    ),
    "task-arithmetic": Method(
        coefficients=task_arithmetic,
        parameters={"coefficient": Parameter(0.5)},
        source="task arithmetic (arXiv:2212.04089)",
        cost="O(R (in + out)) a module, no model run",
        laws=("one domain is identity", "permutation", "zero coefficient is absent", "inputs unchanged"),
    ),
    "mergerec": Method(
        coefficients=None,
        parameters={
            "granularity": Parameter("domain", choices=("domain", "layer")),
            "initial_coefficient": Parameter(0.2),
            "learning_rate": Parameter(1e-3, above=0.0, high=1.0),
            "steps": Parameter(500, low=1),
            "batch_size": Parameter(16, low=1),
            "temperature": Parameter(0.05, above=0.0),
            "rec_weight": Parameter(1.0, low=0.0),
            "kd_weight": Parameter(1000.0, low=0.0),
            "refresh_every": Parameter(None, low=1),
            "balance_domains": Parameter(False),
        },
        source="MergeRec, task-vector initialisation (arXiv:2601.01753)",
        cost="steps of one low-rank forward and backward of a batch, plus encoding every catalog once",
        laws=("permutation", "inputs unchanged"),
    ),
}


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
        ConfigError: no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"merging method: found {name!r}, expected one of {', '.join(sorted(METHODS))}")
    return METHODS[name]


def method_coefficients(name: str, stack: Stack, **parameters: Value) -> torch.Tensor:
    """The coefficients of a method that needs no model run, its parameters checked and completed with their defaults.

    Returns:
        (K,) or (K, G) float32.

    Raises:
        ConfigError: no such method, a learned method, or a parameter that it does not have or out of its bounds.
    """
    method = method_named(name)
    if method.coefficients is None:
        raise ConfigError(f"merging method {name!r}: its coefficients are learned; call learn_coefficients")
    unknown = sorted(parameters.keys() - method.parameters.keys())
    if unknown:
        expected = ", ".join(method.parameters) or "none"
        raise ConfigError(f"merging method {name!r}: found parameters {', '.join(unknown)}, expected {expected}")
    chosen = {key: parameters.get(key, parameter.default) for key, parameter in method.parameters.items()}
    for key, value in chosen.items():
        check_parameter(f"merging method {name!r}: {key}", method.parameters[key], value)
    return method.coefficients(stack, **chosen)


def check_parameter(where: str, parameter: Parameter, value: Value) -> None:
    """Refuse a value of another type than its parameter's default, or outside its bounds or choices.

    Raises:
        ConfigError: with ``where``, the value and what was expected.
    """
    default = parameter.default
    if isinstance(default, str):
        good, expected = value in parameter.choices, f"one of {', '.join(parameter.choices)}"
    elif isinstance(default, bool):
        good, expected = isinstance(value, bool), "true or false"
    else:
        kind = "a finite number" if isinstance(default, float) else "an integer"
        bounds = (f"at least {parameter.low}", f"above {parameter.above}", f"at most {parameter.high}")
        expected = ", ".join([kind, *(bound for bound in bounds if "inf" not in bound)])
        good = False
        if isinstance(value, int) or (isinstance(value, float) and isinstance(default, float) and math.isfinite(value)):
            good = not isinstance(value, bool) and value > parameter.above and parameter.low <= value <= parameter.high
        if default is None:
            good, expected = good or value is None, f"{expected}, or None"
    if not good:
        raise ConfigError(f"{where}: found {value!r}, expected {expected}")
