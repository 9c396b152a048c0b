"""Merging methods as rows of one literal table; ``fedmerge.merging.training_free`` runs those that need no model.

To add a method, write its function in the file of its kind, named after the paper's step: linear (here), elementwise
(``rows``) or spectral (``spectral``). Then add a row to METHODS with its parameters, their defaults and bounds, and the
laws that it obeys, and its name to ``MergeMethod`` in ``fedmerge.config``. tests/merging run over all rows; add a case
by hand. A method that stays outside this repository needs none of this: see ``fedmerge.merging.own_method``.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fedmerge.errors import ConfigError
from fedmerge.merging.low_rank.spectral import Factors, iso_c, iso_cts, multi_slerp, slerp, tsv
from fedmerge.merging.own_method import OwnMethod, function_name, function_parameters, load_function
from fedmerge.merging.parameters import Parameter, Value, checked_parameters
from fedmerge.merging.rows import (
    breadcrumbs,
    consensus,
    dare,
    dare_ties,
    della,
    della_linear,
    emr_unified,
    localize_and_stitch,
    pcb,
    ties,
)
from fedmerge.merging.signals import NO_SIGNALS, Signals, livar
from fedmerge.merging.stack import StackLayout, linear_by_layer

Law = Literal[
    "one domain is identity",  # with coefficient 1 and nothing dropped
    "permutation",  # order and names of the domains do not matter
    "zero coefficient is absent",
    "inputs unchanged",
    "homogeneous",  # scaling all updates by c, also c < 0, scales the merge by c
    "neurons",  # reordering the inputs and outputs of a module reorders the merge in the same way
    "rotation",  # any change of orthonormal bases changes the merge in the same way
    "core is full",  # core space changes nothing
]


@dataclass(frozen=True, slots=True)
class Method:
    """One merging method: linear, elementwise, spectral, a function of one's own, or (none of these) learned.

    Attributes:
        what: what it does.
        parameters: name -> parameter.
        source: paper or standard.
        use: when to choose it.
        cost: time and memory, for K domains, R = Σ ranks, n = in · out entries of a module.
        laws: laws that the tests check.
        coefficients: linear: (stack, **parameters) -> (K,) or (K, G) float32.
        rows: elementwise: (pieces, **parameters) -> K rows per piece, see ``fedmerge.merging.rows``.
        factors: spectral: (updates, **parameters) -> factors of the merge, see ``fedmerge.merging.low_rank.spectral``.
        function: one's own: (updates, **parameters) -> (out, in), see ``fedmerge.merging.own_method``.
        knots: True if ``rows`` works on S V_k of KnOTS.
        random: True if ``rows`` or ``function`` also takes a seed.
        signals: True if ``coefficients`` also takes training signals, and weighs every module by itself.
        most_domains: largest K; None for any.
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
    function: OwnMethod | None = None
    knots: bool = False
    random: bool = False
    signals: bool = False
    most_domains: int | None = None

    @property
    def learned(self) -> bool:
        """True if the merge needs pseudo-users and a model: ``fedmerge.mergerec.learn``."""
        return all(each is None for each in (self.coefficients, self.rows, self.factors, self.function))


def average(stack: StackLayout) -> torch.Tensor:
    """Return the coefficients of the mean of the updates: w_k = 1/K.

    Returns:
        (K,) float32.
    """
    return torch.full((len(stack.domains),), 1 / len(stack.domains))


def task_arithmetic(stack: StackLayout, coefficient: float) -> torch.Tensor:
    """Return the coefficients of the scaled sum of the updates: w_k = coefficient for every domain.

    Returns:
        (K,) float32.

    Source: arXiv:2212.04089, task addition with one scaling for all tasks.
    """
    return torch.full((len(stack.domains),), float(coefficient), dtype=torch.float64).float()


_ALWAYS: tuple[Law, ...] = ("permutation", "zero coefficient is absent", "inputs unchanged")
_IDENTITY: tuple[Law, ...] = ("one domain is identity", *_ALWAYS)
_LINEAR: tuple[Law, ...] = (*_IDENTITY, "homogeneous", "neurons", "rotation", "core is full")
_LINEAR_COST = "O(R (in + out)) per module"
_TIES_COST = "O(K n) per module, 3 passes over the updates"
_FACTOR, _TRUE = Parameter(1.0), Parameter(True)


def _density(default: float) -> Parameter:
    return Parameter(default, above=0.0, high=1.0)


_LOSSES = ("rec+kd", "rec", "kd", "mse", "entropy", "entropy+kd", "self", "self+kd", "similarity", "similarity+kd")

METHODS: dict[str, Method] = {
    "average": Method(
        what="the mean of the updates",
        coefficients=average,
        parameters={},
        source="mean of task vectors (model soups, arXiv:2203.05482)",
        use="first choice: nothing to tune",
        cost=_LINEAR_COST,
        laws=_LINEAR,
    ),
    "task-arithmetic": Method(
        what="the scaled sum of the updates",
        coefficients=task_arithmetic,
        parameters={"coefficient": Parameter(0.5)},
        source="task arithmetic (arXiv:2212.04089)",
        use="the factor can be tuned on validation",
        cost=_LINEAR_COST,
        laws=_LINEAR,
    ),
    "linear-by-layer": Method(
        what="the sum with given weights per domain and layer",
        coefficients=linear_by_layer,
        parameters={"weights": Parameter(""), "normalize": Parameter(True)},
        source="mergekit's linear with gradients; layer-wise task arithmetic (arXiv:2212.04089)",
        use="early and late layers should come from different domains; `weights` as in law=1:0,medicine=0:1",
        cost=_LINEAR_COST,
        laws=_LINEAR,
    ),
    "slerp": Method(
        what="a point on the arc between two updates",
        factors=slerp,
        parameters={"t": Parameter(0.5, low=0.0, high=1.0)},
        source="spherical linear interpolation (Shoemake 1985), mergekit's slerp",
        use="two domains (the first by name is at t = 0); the mean would shorten what they do not share",
        cost=_LINEAR_COST,
        laws=("one domain is identity", *_ALWAYS[1:], "homogeneous", "neurons", "rotation", "core is full"),
        most_domains=2,
    ),
    "multi-slerp": Method(
        what="the mean direction of the updates, with their mean length",
        factors=multi_slerp,
        parameters={"coefficient": _FACTOR},
        source="mergekit's multislerp, equal weights",
        use="as the average, but long updates do not dominate and nothing is shortened",
        cost=_LINEAR_COST,
        laws=_LINEAR,
    ),
    "ties": Method(
        what="trim to the largest entries, elect a sign per entry, average the entries that have it",
        rows=ties,
        parameters={"density": _density(0.2), "coefficient": _FACTOR},
        source="TIES-Merging (arXiv:2306.01708)",
        use="domains pull the same weights in opposite directions",
        cost=_TIES_COST,
        laws=(*_IDENTITY, "homogeneous", "neurons"),
    ),
    "dare": Method(
        what="drop entries at random, rescale the rest, average",
        rows=dare,
        parameters={"density": _density(0.1), "coefficient": _FACTOR},
        source="DARE, then average (arXiv:2311.03099)",
        use="updates with many redundant entries; in expectation it is the average",
        cost="O(K n) per module, 1 pass",
        laws=(*_IDENTITY, "homogeneous"),
        random=True,
    ),
    "dare-ties": Method(
        what="drop entries at random, rescale the rest, then TIES",
        rows=dare_ties,
        parameters={"density": _density(0.1), "ties_density": _density(1.0), "coefficient": _FACTOR},
        source="DARE, then TIES (arXiv:2311.03099)",
        use="as TIES, with random instead of magnitude trimming",
        cost="O(K n) per module, 1 pass (3 with ties_density below 1)",
        laws=(*_IDENTITY, "homogeneous"),
        random=True,
    ),
    "della": Method(
        what="drop entries at random, small ones more often, rescale the rest, elect a sign, average what has it",
        rows=della,
        parameters={"density": _density(0.3), "epsilon": Parameter(0.2, low=0.0, high=1.0), "coefficient": _FACTOR},
        source="DELLA-Merging (arXiv:2406.11617)",
        use="as DARE-TIES, where large entries matter more than small ones",
        cost="O(K n log in) per module, 1 pass",
        laws=(*_IDENTITY, "homogeneous"),
        random=True,
    ),
    "della-linear": Method(
        what="drop entries at random, small ones more often, rescale the rest, average",
        rows=della_linear,
        parameters={"density": _density(0.3), "epsilon": Parameter(0.2, low=0.0, high=1.0), "coefficient": _FACTOR},
        source="DELLA-Merging without election (arXiv:2406.11617), mergekit's della_linear",
        use="as DARE, where large entries matter more than small ones",
        cost="O(K n log in) per module, 1 pass",
        laws=(*_IDENTITY, "homogeneous"),
        random=True,
    ),
    "emr-unified": Method(
        what="elect a sign per entry, take the largest entry that has it",
        rows=emr_unified,
        parameters={"coefficient": _FACTOR},
        source="unified vector of EMR-Merging (arXiv:2405.17461)",
        use="updates that differ in strength: the strongest domain decides an entry",
        cost="O(K n) per module, 1 pass",
        laws=(*_IDENTITY, "homogeneous", "neurons"),
    ),
    "consensus": Method(
        what="the scaled sum, without entries that matter to fewer than two domains",
        rows=consensus,
        parameters={
            "mask_threshold": Parameter(0.4, low=0.0),
            "min_domains": Parameter(2, low=1),
            "coefficient": _FACTOR,
        },
        source="Consensus Merging by TALL masks (arXiv:2405.07813)",
        use="many domains, where entries of single ones spoil the sum",
        cost="O(K n) per module, 1 pass",
        laws=(*_IDENTITY, "homogeneous", "neurons"),
    ),
    "pcb": Method(
        what="average weighted by an entry's size within its domain and its agreement with the other domains",
        rows=pcb,
        parameters={
            "density": _density(0.1),
            "clamp": Parameter(0.0001, low=0.0, high=0.49),
            "coefficient": _FACTOR,
        },
        source="PCB-Merging (arXiv:2410.02396)",
        use="domains compete for the same weights with unequal strength",
        cost="O(K n) per module, 7 passes, scores in float64",
        laws=(*_ALWAYS, "neurons"),
    ),
    "localize-and-stitch": Method(
        what="keep each domain's largest entries, average where they overlap; uses no data",
        rows=localize_and_stitch,
        parameters={"density": _density(0.05), "coefficient": _FACTOR},
        source="Localize-and-Stitch, dataless (arXiv:2408.13656)",
        use="each domain learned in a few weights, mostly different ones",
        cost=_TIES_COST,
        laws=(*_IDENTITY, "homogeneous", "neurons"),
    ),
    "breadcrumbs": Method(
        what="drop each domain's smallest and largest entries, then the scaled sum",
        rows=breadcrumbs,
        parameters={
            "drop_smallest": Parameter(0.85, low=0.0, high=1.0),
            "drop_largest": Parameter(0.006, low=0.0, high=1.0),
            "coefficient": _FACTOR,
        },
        source="Model Breadcrumbs (arXiv:2312.06795)",
        use="many domains, where outliers of single ones spoil the sum",
        cost=_TIES_COST,
        laws=(*_IDENTITY, "homogeneous", "neurons"),
    ),
    "knots-ties": Method(
        what="TIES in coordinates common to all updates, found by an SVD",
        rows=ties,
        knots=True,
        parameters={"density": _density(0.2), "coefficient": _FACTOR},
        source="KnOTS, then TIES (arXiv:2410.19735)",
        use="as TIES, for low-rank updates that are not aligned entry by entry",
        cost="O(R² (in + out) + K R in) per module, 3 passes",
        laws=(*_IDENTITY, "homogeneous", "neurons"),
    ),
    "knots-dare": Method(
        what="DARE in coordinates common to all updates, found by an SVD",
        rows=dare,
        knots=True,
        parameters={"density": _density(0.9), "coefficient": _FACTOR},
        source="KnOTS, then DARE (arXiv:2410.19735)",
        use="as DARE, in aligned coordinates",
        cost="O(R² (in + out) + K R in) per module, 1 pass",
        laws=(*_IDENTITY, "homogeneous"),
        random=True,
    ),
    "knots-dare-ties": Method(
        what="DARE, then TIES, in coordinates common to all updates, found by an SVD",
        rows=dare_ties,
        knots=True,
        parameters={"density": _density(0.9), "ties_density": _density(1.0), "coefficient": _FACTOR},
        source="KnOTS, then DARE and TIES (arXiv:2410.19735)",
        use="as KnOTS-TIES, with random instead of magnitude trimming",
        cost="O(R² (in + out) + K R in) per module, 1 pass (3 with ties_density below 1)",
        laws=(*_IDENTITY, "homogeneous"),
        random=True,
    ),
    "knots-task-arithmetic": Method(
        what="the scaled sum in KnOTS' coordinates",
        coefficients=task_arithmetic,
        parameters={"coefficient": Parameter(0.5)},
        source="KnOTS, then task arithmetic (arXiv:2410.19735)",
        use="never: U Σ S V_k = Σ Δ_k, so it equals task arithmetic; included for comparison with the paper",
        cost=_LINEAR_COST,
        laws=_LINEAR,
    ),
    "tsv": Method(
        what="the leading singular triples of every update, their directions made orthogonal",
        factors=tsv,
        parameters={"coefficient": _FACTOR},
        source="TSV-Merge (arXiv:2412.00081)",
        use="the leading directions of different domains overlap",
        cost="O(R² (in + out)) per module",
        laws=(*_IDENTITY, "homogeneous", "neurons", "rotation"),
    ),
    "iso-c": Method(
        what="the sum of the updates with all singular values made equal",
        factors=iso_c,
        parameters={"coefficient": _FACTOR},
        source="Iso-C (arXiv:2502.04959)",
        use="a few shared directions drown what single domains need",
        cost="O(R² (in + out)) per module",
        laws=(*_ALWAYS, "homogeneous", "neurons", "rotation", "core is full"),
    ),
    "iso-cts": Method(
        what="Iso-C with some common directions replaced by the domains' own",
        factors=iso_cts,
        parameters={"common_fraction": Parameter(0.8, low=0.0, high=1.0), "coefficient": _FACTOR},
        source="Iso-CTS (arXiv:2502.04959)",
        use="as Iso-C, with many domains that each have directions of their own",
        cost="O(R² (in + out)) per module",
        laws=(*_ALWAYS, "homogeneous", "neurons", "rotation", "core is full"),
    ),
    "livar-style": Method(
        what="the sum with weights per domain and module by how strongly training moved A and B there",
        coefficients=livar,
        signals=True,
        parameters={"coefficient": _FACTOR, "per_step": _TRUE, "per_entry": _TRUE, "spread": Parameter(False)},
        source="LIVAR (arXiv:2507.06813), in product space",
        use="experts of fedmerge, whose training.json holds the signals; without signals it is the average",
        cost=_LINEAR_COST,
        laws=_LINEAR,
    ),
    "mergerec": Method(
        what="the sum with coefficients learned by distilling the experts on pseudo-users from the catalogs",
        parameters={
            "granularity": Parameter("layer", choices=("domain", "layer")),
            "initialisation": Parameter("task-vectors", choices=("task-vectors", "ties", "pcb", "localize-and-stitch")),
            "initial_coefficient": Parameter(None, number=True),
            "loss": Parameter("kd", choices=_LOSSES),
            "teacher": Parameter("expert", choices=("expert", "contrastive")),
            "kd_top_k": Parameter(50, low=2, optional=True),
            "learning_rate": Parameter(5e-3, above=0.0, high=1.0),
            "steps": Parameter(100, low=1),
            "batch_size": Parameter(16, low=1),
            "pseudo_users": Parameter(
                "one-item",
                choices=("one-item", "subset", "centroid", "popular", "chain", "contrastive", "contrastive-adaptive"),
            ),
            "num_pseudo_users": Parameter(None, low=1),
            "domains_per_step": Parameter(None, low=1),
        },
        source="MergeRec (arXiv:2601.01753)",
        use="catalogs are available; the coefficients are learned so that the merge ranks as the experts do",
        cost="per step one low-rank or sparse forward and backward of a batch; every catalog is encoded once",
        laws=("permutation", "inputs unchanged"),
    ),
    "adamerging": Method(
        what="the sum with coefficients in [0, 1] learned by lowering the entropy of the merged model on pseudo-users",
        parameters={
            "granularity": Parameter("domain", choices=("domain", "layer")),
            "steps": Parameter(500, low=1),
        },
        source="AdaMerging (arXiv:2310.02575), on pseudo-users",
        use="as a baseline for mergerec: no teacher, the merged model is made more certain",
        cost="as mergerec",
        laws=("permutation", "inputs unchanged"),
    ),
    "rmm-style": Method(
        what="a candidate for every layer, such as a multiple of the sum or an expert, found by a search",
        parameters={
            "searcher": Parameter("coordinate", choices=("coordinate", "evolution", "ppo")),
            "reward": Parameter("pseudo-users", choices=("pseudo-users", "validation")),
            "budget": Parameter(150, low=1),
            "users": Parameter(500, low=1),
            "shards": Parameter(1, low=1),
        },
        source="after Reinforced Model Merging (arXiv:2503.21272), a reconstruction",
        use="layers want different multiples of the updates, and there is time for a search",
        cost="every episode encodes up to 2,000 items a domain and its users",
        laws=("permutation", "inputs unchanged"),
    ),
}


def method_named(name: str | OwnMethod) -> Method:
    """Return the row of a method: one of METHODS, or a row made for a function of one's own.

    Args:
        name: a name in METHODS, ``package.module:function``, or the function itself.

    Raises:
        ConfigError: no such method, or a function that cannot be one.
    """
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    if isinstance(name, str) and ":" not in name:
        expected = f"one of {', '.join(sorted(METHODS))}, or package.module:function"
        raise ConfigError(f"merging method: found {name!r}, expected {expected}")
    function = load_function(name) if isinstance(name, str) else name
    parameters, random = function_parameters(name_of(name), function)
    return Method(
        what=(inspect.getdoc(function) or "a function of your own").partition("\n")[0],
        function=function,
        parameters=parameters,
        source=name_of(name),
        use="your own method",
        cost="O(K n) per module, and the function's own",
        laws=(),
        random=random,
    )


def name_of(method: str | OwnMethod) -> str:
    """Return the name of a method, as settings and provenance give it."""
    return method if isinstance(method, str) else function_name(method)


def method_coefficients(
    name: str, stack: StackLayout, signals: Signals = NO_SIGNALS, **parameters: Value
) -> torch.Tensor:
    """Return the coefficients of a linear method; its parameters are checked and completed with their defaults.

    Args:
        name: name in METHODS.
        stack: layout of the K adapters.
        signals: training signals, for a method that weighs by them.
        parameters: parameters of the method.

    Returns:
        (K,) or (K, G) float32.

    Raises:
        ConfigError: no such method, a method that is not linear, or a parameter that is unknown or out of bounds.
    """
    method = method_named(name)
    if method.learned:
        raise ConfigError(f"merging method {name!r}: its coefficients are learned, not fixed; call learn_coefficients")
    if method.coefficients is None:
        raise ConfigError(
            f"merging method {name!r}: not a linear merge, so it has no coefficients; call merge_adapters"
        )
    more = {"signals": signals} if method.signals else {}
    return method.coefficients(stack, **complete_parameters(name, parameters), **more)


def complete_parameters(name: str, parameters: Mapping[str, Value]) -> dict[str, Value]:
    """Check the parameters of a method and fill in the defaults of the others.

    Raises:
        ConfigError: no such method, or a parameter that is unknown or out of bounds.
    """
    return checked_parameters(f"merging method {name!r}", method_named(name).parameters, parameters)
