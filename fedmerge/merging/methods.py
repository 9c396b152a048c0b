"""Merging methods as rows of one literal table; ``fedmerge.merging.training_free`` runs those that need no model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fedmerge.errors import ConfigError
from fedmerge.merging.rows import breadcrumbs, dare, dare_ties, localize_and_stitch, pcb, ties
from fedmerge.merging.spectral import Factors, iso_c, iso_cts, tsv
from fedmerge.merging.stack import StackLayout

Law = Literal[
    "one domain is identity",  # with coefficient 1 and nothing dropped
    "permutation",  # the order and the names of the domains do not matter
    "zero coefficient is absent",
    "inputs unchanged",
    "homogeneous",  # updates times c, also below 0, give the merge times c
    "neurons",  # inputs and outputs of a module in another order: the same merge in that order
    "rotation",  # the same for any change of orthonormal bases
    "core is full",  # core space changes nothing
]
Value = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        default: also says its type; None stands for an integer that may be absent, or with ``number`` for a number.
        low: smallest value.
        high: largest value.
        above: a value that it must exceed.
        choices: of a string.
        number: not an integer but any finite number, where the default is None.
        optional: may be None, though the default is not.
    """

    default: Value
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    choices: tuple[str, ...] = ()
    number: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """One merging method: linear, elementwise, spectral, or (none of the three functions) learned.

    Attributes:
        what: what it does.
        parameters: name -> parameter.
        source: paper or standard.
        use: when to choose it.
        cost: time and memory, in K domains, R = Σ ranks, n = in · out entries of a module.
        laws: what the tests hold this method to.
        coefficients: linear: (stack, **parameters) -> (K,) or (K, G) float32.
        rows: elementwise: (pieces, **parameters) -> K rows a piece, see ``fedmerge.merging.rows``.
        factors: spectral: (updates, **parameters) -> the merge's factors, see ``fedmerge.merging.spectral``.
        knots: the rows are those of KnOTS' S V_k.
        random: ``rows`` also takes a seed.
    """

    what: str
    parameters: dict[str, Parameter]
    source: str
    use: str
    cost: str
    laws: tuple[Law, ...]
    coefficients: Callable[..., torch.Tensor] | None = None
    rows: Callable[..., Iterator[torch.Tensor]] | None = None
    factors: Callable[..., Factors] | None = None
    knots: bool = False
    random: bool = False

    @property
    def learned(self) -> bool:
        """Whether it takes pseudo-users and a model: ``fedmerge.mergerec.learn``."""
        return self.coefficients is None and self.rows is None and self.factors is None


def average(stack: StackLayout) -> torch.Tensor:
    """The mean of the updates: w_k = 1/K.

    Returns:
        (K,) float32.
    """
    return torch.full((len(stack.domains),), 1 / len(stack.domains))


def task_arithmetic(stack: StackLayout, coefficient: float) -> torch.Tensor:
    """The scaled sum of the updates: w_k = coefficient for every domain.

    Returns:
        (K,) float32.

    Source: arXiv:2212.04089, equation of task addition with one scaling for all tasks.
    """
    return torch.full((len(stack.domains),), float(coefficient))


_ALWAYS: tuple[Law, ...] = ("permutation", "zero coefficient is absent", "inputs unchanged")
_IDENTITY: tuple[Law, ...] = ("one domain is identity", *_ALWAYS)
_LINEAR: tuple[Law, ...] = (*_IDENTITY, "homogeneous", "neurons", "rotation", "core is full")
_LINEAR_COST = "O(R (in + out)) a module"
_TIES_COST = "O(K n) a module, 3 passes over the updates"


def _density(default: float) -> Parameter:
    return Parameter(default, above=0.0, high=1.0)


METHODS: dict[str, Method] = {
    "average": Method(
        what="the mean of the updates",
        coefficients=average,
        parameters={},
        source="mean of task vectors (model soups, arXiv:2203.05482)",
        use="first: nothing to tune",
        cost=_LINEAR_COST,
        laws=_LINEAR,
    ),
    "task-arithmetic": Method(
        what="the scaled sum of the updates",
        coefficients=task_arithmetic,
        parameters={"coefficient": Parameter(0.5)},
        source="task arithmetic (arXiv:2212.04089)",
        use="the size of the sum can be tuned on validation",
        cost=_LINEAR_COST,
        laws=_LINEAR,
    ),
    "ties": Method(
        what="trim to the largest entries, elect a sign per entry, average those that bear it",
        rows=ties,
        parameters={"density": _density(0.2), "coefficient": Parameter(1.0)},
        source="TIES-Merging (arXiv:2306.01708)",
        use="domains pull the same weights in opposite directions",
        cost=_TIES_COST,
        laws=(*_IDENTITY, "homogeneous", "neurons"),
    ),
    "dare": Method(
        what="drop entries at random, rescale the others, average",
        rows=dare,
        parameters={"density": _density(0.1), "coefficient": Parameter(1.0)},
        source="DARE, then average (arXiv:2311.03099)",
        use="many redundant entries; the average in expectation",
        cost="O(K n) a module, 1 pass",
        laws=(*_IDENTITY, "homogeneous"),
        random=True,
    ),
    "dare-ties": Method(
        what="drop entries at random, rescale the others, then TIES",
        rows=dare_ties,
        parameters={"density": _density(0.1), "ties_density": _density(1.0), "coefficient": Parameter(1.0)},
        source="DARE, then TIES (arXiv:2311.03099)",
        use="as TIES, with random instead of magnitude trimming",
        cost="O(K n) a module, 1 pass (3 with ties_density below 1)",
        laws=(*_IDENTITY, "homogeneous"),
        random=True,
    ),
    "pcb": Method(
        what="average weighted by how large an entry is in its domain and how well it agrees with the others",
        rows=pcb,
        parameters={
            "density": _density(0.1),
            "clamp": Parameter(0.0001, low=0.0, high=0.49),
            "coefficient": Parameter(1.0),
        },
        source="PCB-Merging (arXiv:2410.02396)",
        use="domains compete for the same weights with different strength",
        cost="O(K n) a module, 7 passes, scores in float64",
        laws=(*_ALWAYS, "neurons"),
    ),
    "localize-and-stitch": Method(
        what="keep each domain's largest entries, average where they overlap, without data",
        rows=localize_and_stitch,
        parameters={"density": _density(0.05), "coefficient": Parameter(1.0)},
        source="Localize-and-Stitch, dataless (arXiv:2408.13656)",
        use="what each domain learned sits in few, mostly different weights",
        cost=_TIES_COST,
        laws=(*_IDENTITY, "homogeneous", "neurons"),
    ),
    "breadcrumbs": Method(
        what="drop each domain's smallest and largest entries, then the scaled sum",
        rows=breadcrumbs,
        parameters={
            "drop_smallest": Parameter(0.85, low=0.0, high=1.0),
            "drop_largest": Parameter(0.006, low=0.0, high=1.0),
            "coefficient": Parameter(1.0),
        },
        source="Model Breadcrumbs (arXiv:2312.06795)",
        use="outliers of single domains spoil the sum; many domains",
        cost=_TIES_COST,
        laws=(*_IDENTITY, "homogeneous", "neurons"),
    ),
    "knots-ties": Method(
        what="TIES in coordinates common to all updates, found by an SVD",
        rows=ties,
        knots=True,
        parameters={"density": _density(0.2), "coefficient": Parameter(1.0)},
        source="KnOTS, then TIES (arXiv:2410.19735)",
        use="as TIES, where low-rank updates are not aligned entry by entry",
        cost="O(R² (in + out) + K R in) a module, 3 passes",
        laws=(*_IDENTITY, "homogeneous", "neurons"),
    ),
    "knots-dare": Method(
        what="DARE in coordinates common to all updates, found by an SVD",
        rows=dare,
        knots=True,
        parameters={"density": _density(0.9), "coefficient": Parameter(1.0)},
        source="KnOTS, then DARE (arXiv:2410.19735)",
        use="as DARE, in aligned coordinates",
        cost="O(R² (in + out) + K R in) a module, 1 pass",
        laws=(*_IDENTITY, "homogeneous"),
        random=True,
    ),
    "knots-dare-ties": Method(
        what="DARE, then TIES, in coordinates common to all updates, found by an SVD",
        rows=dare_ties,
        knots=True,
        parameters={"density": _density(0.9), "ties_density": _density(1.0), "coefficient": Parameter(1.0)},
        source="KnOTS, then DARE and TIES (arXiv:2410.19735)",
        use="as KnOTS-TIES, with random instead of magnitude trimming",
        cost="O(R² (in + out) + K R in) a module, 1 pass (3 with ties_density below 1)",
        laws=(*_IDENTITY, "homogeneous"),
        random=True,
    ),
    "knots-task-arithmetic": Method(
        what="the scaled sum, by way of KnOTS' coordinates",
        coefficients=task_arithmetic,
        parameters={"coefficient": Parameter(0.5)},
        source="KnOTS, then task arithmetic (arXiv:2410.19735)",
        use="never: U Σ S V_k is Σ Δ_k, so it is task arithmetic; here for comparison with the paper",
        cost=_LINEAR_COST,
        laws=_LINEAR,
    ),
    "tsv": Method(
        what="the leading singular triples of every update, their directions made orthogonal",
        factors=tsv,
        parameters={"coefficient": Parameter(1.0)},
        source="TSV-Merge (arXiv:2412.00081)",
        use="the leading directions of different domains overlap",
        cost="O(R² (in + out)) a module",
        laws=(*_IDENTITY, "homogeneous", "neurons", "rotation"),
    ),
    "iso-c": Method(
        what="the sum of the updates with all singular values made equal",
        factors=iso_c,
        parameters={"coefficient": Parameter(1.0)},
        source="Iso-C (arXiv:2502.04959)",
        use="a few shared directions drown what single domains need",
        cost="O(R² (in + out)) a module",
        laws=(*_ALWAYS, "homogeneous", "neurons", "rotation", "core is full"),
    ),
    "iso-cts": Method(
        what="as Iso-C, with some common directions given up for the domains' own",
        factors=iso_cts,
        parameters={"common_fraction": Parameter(0.8, low=0.0, high=1.0), "coefficient": Parameter(1.0)},
        source="Iso-CTS (arXiv:2502.04959)",
        use="as Iso-C, with room for what only one domain has; many domains",
        cost="O(R² (in + out)) a module",
        laws=(*_ALWAYS, "homogeneous", "neurons", "rotation", "core is full"),
    ),
    "mergerec": Method(
        what="the sum with coefficients learned by distilling the experts on pseudo-users from the catalogs",
        parameters={
            "granularity": Parameter("layer", choices=("domain", "layer")),
            "initialisation": Parameter("task-vectors", choices=("task-vectors", "ties", "pcb", "localize-and-stitch")),
            "initial_coefficient": Parameter(None, number=True),
            "loss": Parameter("kd", choices=("rec+kd", "rec", "kd", "mse", "entropy", "entropy+kd", "self", "self+kd")),
            "rec_weight": Parameter(1.0, low=0.0),
            "rec_temperature": Parameter(1.0, above=0.0),
            "kd_weight": Parameter(1000.0, low=0.0),
            "temperature": Parameter(0.05, above=0.0),
            "kd_top_k": Parameter(50, low=2, optional=True),
            "learning_rate": Parameter(5e-3, above=0.0, high=1.0),
            "steps": Parameter(100, low=1),
            "batch_size": Parameter(16, low=1),
            "pseudo_users": Parameter(
                "one-item", choices=("one-item", "subset", "centroid", "popular", "chain", "contrastive")
            ),
            "num_pseudo_users": Parameter(None, low=1),
            "refresh_every": Parameter(None, low=1),
            "balance_domains": Parameter(True),
            "select_every": Parameter(None, low=1),
            "prior_weight": Parameter(0.0, low=0.0),
        },
        source="MergeRec (arXiv:2601.01753)",
        use="catalogs are at hand: the coefficients are learned so that the merge ranks as the experts do",
        cost="steps of one low-rank or sparse forward and backward of a batch, plus encoding every catalog once",
        laws=("permutation", "inputs unchanged"),
    ),
    "adamerging": Method(
        what="the sum with coefficients in [0, 1] learned by lowering the entropy of the merged model on pseudo-users",
        parameters={
            "granularity": Parameter("domain", choices=("domain", "layer")),
            "initial_coefficient": Parameter(0.3, low=0.0, high=1.0),
            "learning_rate": Parameter(1e-3, above=0.0, high=1.0),
            "steps": Parameter(500, low=1),
            "batch_size": Parameter(16, low=1),
        },
        source="AdaMerging (arXiv:2310.02575), on pseudo-users",
        use="as mergerec, without a teacher: the merged model is made sure of itself; a baseline",
        cost="as mergerec",
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


def method_coefficients(name: str, stack: StackLayout, **parameters: Value) -> torch.Tensor:
    """The coefficients of a linear method, its parameters checked and completed with their defaults.

    Returns:
        (K,) or (K, G) float32.

    Raises:
        ConfigError: no such method, one that is not linear, or a parameter that it does not have or out of its bounds.
    """
    method = method_named(name)
    if method.learned:
        raise ConfigError(f"merging method {name!r}: its coefficients are learned; call learn_coefficients")
    if method.coefficients is None:
        raise ConfigError(
            f"merging method {name!r}: it is no linear merge and has no coefficients; call merge_adapters"
        )
    return method.coefficients(stack, **complete_parameters(name, parameters))


def complete_parameters(name: str, parameters: Mapping[str, Value]) -> dict[str, Value]:
    """The parameters of a method, checked, with the defaults of those that are not given.

    Raises:
        ConfigError: no such method, or a parameter that it does not have or out of its bounds.
    """
    return checked_parameters(f"merging method {name!r}", method_named(name).parameters, parameters)


def checked_parameters(where: str, parameters: Mapping[str, Parameter], given: Mapping[str, Value]) -> dict[str, Value]:
    """Given values, checked, with the defaults of those that are not given.

    Raises:
        ConfigError: one that is not among the parameters, or out of its bounds.
    """
    unknown = sorted(given.keys() - parameters.keys())
    if unknown:
        expected = ", ".join(parameters) or "none"
        raise ConfigError(f"{where}: found parameters {', '.join(unknown)}, expected {expected}")
    chosen = {key: given.get(key, parameter.default) for key, parameter in parameters.items()}
    for key, value in chosen.items():
        check_parameter(f"{where}: {key}", parameters[key], value)
    return chosen


def describe_method(name: str) -> str:
    """A row of METHODS as text of several lines.

    Raises:
        ConfigError: no such method.
    """
    method = method_named(name)
    about = [("use", method.use)]
    about += [("parameter", f"{key} = {parameter_text(parameter)}") for key, parameter in method.parameters.items()]
    about += [
        ("scope", _scopes(method)),
        ("cost", method.cost),
        ("source", method.source),
        ("laws", ", ".join(method.laws)),
    ]
    return f"{name}: {method.what}\n" + "".join(f"  {key:<11}{text}\n" for key, text in about)


def methods_table() -> str:
    """METHODS as a Markdown table, without the laws."""
    rows = []
    for name, method in METHODS.items():
        parameters = ", ".join(f"{key} {parameter_text(parameter)}" for key, parameter in method.parameters.items())
        rows.append(
            (f"`{name}`", method.what, method.use, parameters or "none", _scopes(method), method.cost, method.source)
        )
    return markdown_table(("method", "what it is", "when to use", "parameters", "scope", "cost", "source"), rows)


def laws_table() -> str:
    """Which method obeys which law, as a Markdown table."""
    laws = get_args(Law)
    rows = [(f"`{name}`", *("x" if law in method.laws else "" for law in laws)) for name, method in METHODS.items()]
    return markdown_table(("method", *laws), rows)


def _scopes(method: Method) -> str:
    if method.learned:
        return "its granularity"
    return "tensor, layer, model" if method.rows else "tensor" if method.factors else "all the same"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def check_parameter(where: str, parameter: Parameter, value: Value) -> None:
    """Refuse a value of another type than its parameter's default, or outside its bounds or choices.

    Raises:
        ConfigError: with ``where``, the value and what was expected.
    """
    default = parameter.default
    if isinstance(default, str):
        good = value in parameter.choices
    elif isinstance(default, bool):
        good = isinstance(value, bool)
    else:
        good = False
        number = parameter.number or isinstance(default, float)
        if isinstance(value, int) or (isinstance(value, float) and number and math.isfinite(value)):
            good = not isinstance(value, bool) and value > parameter.above and parameter.low <= value <= parameter.high
    if default is None or parameter.optional:
        good = good or value is None
    if not good:
        raise ConfigError(f"{where}: found {value!r}, expected {_expected(parameter)}")


def _expected(parameter: Parameter) -> str:
    default = parameter.default
    if isinstance(default, str):
        return f"one of {', '.join(parameter.choices)}"
    if isinstance(default, bool):
        return "true or false"
    kind = "a finite number" if parameter.number or isinstance(default, float) else "an integer"
    bounds = (f"at least {parameter.low}", f"above {parameter.above}", f"at most {parameter.high}")
    expected = ", ".join([kind, *(bound for bound in bounds if "inf" not in bound)])
    return f"{expected}, or None" if default is None or parameter.optional else expected


def parameter_text(parameter: Parameter) -> str:
    """Default and bounds of a parameter, as the tables have them."""
    bounds = _expected(parameter)
    if isinstance(parameter.default, float):
        bounds = bounds.removeprefix("a finite number").removeprefix(", ")
    return f"{parameter.default} ({bounds})" if bounds else str(parameter.default)
