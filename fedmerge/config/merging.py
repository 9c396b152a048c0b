"""Sections about merging: the methods to try, and the learned coefficients of MergeRec and AdaMerging."""

import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from fedmerge.config.section import Section, twice

MergeMethod = Literal[
    "average",
    "task-arithmetic",
    "linear-by-layer",
    "slerp",
    "multi-slerp",
    "ties",
    "dare",
    "dare-ties",
    "della",
    "della-linear",
    "emr-unified",
    "consensus",
    "pcb",
    "localize-and-stitch",
    "breadcrumbs",
    "knots-ties",
    "knots-dare",
    "knots-dare-ties",
    "knots-task-arithmetic",
    "tsv",
    "iso-c",
    "iso-cts",
    "livar-style",
    "mergerec",
    "adamerging",
    "rmm-style",
]
LEARNED_METHODS = frozenset({"mergerec", "adamerging"})  # learned from pseudo-users, so they need the catalogs
SEARCHED_METHODS = frozenset({"rmm-style"})  # a search over layers, on pseudo-users or through the clients
SIGNAL_METHODS = frozenset({"livar-style"})  # weigh by training signals, which leave the clients for them
PAIR_METHODS = frozenset({"slerp"})  # of two domains at most
SUMMED_METHODS = ("average", "task-arithmetic", "knots-task-arithmetic")  # multiples of the sum: a secure sum will do
SUMMED_RULES = ("weighted-average", "fedit", "ffa-lora", "flexlora", "fedavgm", "fedadam", "fedyogi")
MIN_SUMMED = 3  # adapters in a secure sum: with two, each client reads the other's adapter off the sum

OWN_METHOD = r"^[\w.]+:\w+$"  # package.module:function; imported by the server alone, never to check a configuration


def _merge_method(name: str) -> str:
    if name not in typing.get_args(MergeMethod) and not re.fullmatch(OWN_METHOD, name):
        raise ValueError(f"expected package.module:function or one of {', '.join(typing.get_args(MergeMethod))}")
    return name


class Merge(Section):
    """The merges to make. The best of a method's variants on validation represents the method."""

    methods: tuple[
        Annotated[
            str,
            AfterValidator(_merge_method),
            WithJsonSchema({"anyOf": [{"enum": list(typing.get_args(MergeMethod))}, {"pattern": OWN_METHOD}]}),
        ],
        ...,
    ] = Field(
        ("average", "task-arithmetic", "mergerec"),
        min_length=1,
        description="Methods to try; `fedmerge methods` describes them.",
    )
    task_arithmetic_coefficients: tuple[float, ...] = Field(
        (0.2, 0.4, 0.6, 0.8), min_length=1, description="Variants to try: factors on the sum of all updates."
    )
    densities: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (), description="Variants to try of every method with a density; empty: each method's own default."
    )
    coefficients: tuple[float, ...] = Field(
        (), description="Variants to try of every method that is not linear: factors on the merge; empty: 1."
    )
    scope: Literal["tensor", "layer", "model"] = Field(
        "tensor", description="Unit over which densities are taken: a module, a layer, or the whole model."
    )
    space: Literal["full", "core"] = Field(
        "full", description="Coordinates in which methods that are not linear merge; core: cheap, and of low rank."
    )
    output_rank: int | None = Field(
        None, ge=1, description="Rank to which merges that are not linear are compressed; 'none': no compression."
    )
    groups: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (),
        description="Numbers of groups of similar domains to try, with a merge for each group, beside one merge for "
        "all; empty: one merge.",
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Merge":
        if names := twice(self.methods):
            raise ValueError(f"methods names {names} more than once; name each method once")
        for key in ("task_arithmetic_coefficients", "densities", "coefficients", "groups"):
            if values := twice([f"{value:g}" for value in getattr(self, key)]):
                raise ValueError(
                    f"{key} has {values} more than once (to the six digits that name a merge); give each once"
                )
        return self


class Livar(Section):
    """Weights by training signals, [LIVAR-style](reference/merging.md#livar-style-weights-from-training-signals)."""

    coefficients: tuple[float, ...] = Field(
        (1.0, 1.8), min_length=1, description="Variants to try: factors on the sum, whose weights add up to 1."
    )
    forms: tuple[Literal["per-step", "published"], ...] = Field(
        ("per-step",),
        min_length=1,
        description="Variants to try. per-step: signals by step and by root of the entries of a factor; published: as "
        "they add up.",
    )
    spread: bool = Field(
        False, description="Weighing by the spread of each client's users, too; then one more number leaves it."
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Livar":
        for key, values in (("coefficients", [f"{each:g}" for each in self.coefficients]), ("forms", self.forms)):
            if names := twice(values):
                raise ValueError(f"{key} has {names} more than once; give each once")
        return self


Granularities = tuple[Literal["domain", "layer"], ...]

LEFT_TO_PRESET = "preset"  # value of a key that mergerec.preset decides; Flower's run configuration needs some value
PUBLISHED: Mapping[str, Any] = {
    "loss": "rec+kd",
    "kd_top_k": None,
    "learning_rate": 1e-3,
    "steps": 500,
    "initial_coefficient": 0.2,
}
"""The values of the paper where they differ from the defaults."""
PRESET_KEYS = tuple(PUBLISHED)  # of mergerec


def teacher_problem(teacher: str, loss: str) -> str:
    """Return the problem of a teacher that the loss does not have, else an empty text."""
    if teacher == "expert" or "kd" in loss.split("+"):
        return ""
    return (
        f"teacher = {teacher!r} teaches by the term kd, which loss = {loss!r} does not have; choose a loss with kd, or "
        "teacher = 'expert'"
    )


class MergeRec(Section):
    """Learned merging (https://arxiv.org/abs/2601.01753), explained in [mergerec.md](reference/mergerec.md)."""

    LATER: ClassVar[tuple[str, ...]] = ("teacher", "domains_per_step")

    preset: Literal["default", "paper"] = Field(
        "default",
        description="Source of the values that the section does not give; paper: the published ones, except for "
        "granularities.",
    )
    granularities: Granularities = Field(
        ("layer",),
        min_length=1,
        description="Variants to try: one coefficient per domain, or per domain and layer.",
    )
    initial_coefficient: float | None = Field(
        None,
        description="Start of every coefficient; 'none': 1/√K for K domains.",
    )
    loss: Literal[
        "rec+kd", "rec", "kd", "mse", "entropy", "entropy+kd", "self", "self+kd", "similarity", "similarity+kd"
    ] = Field(
        "kd",
        description="Terms of the loss. rec: the expert's first choice; kd: distillation; self: the merge's own first "
        "choice; similarity: the experts' mean item similarity over all catalogs.",
    )
    teacher: Literal["expert", "contrastive"] = Field(
        "expert",
        description="Teacher of kd. contrastive: the expert's scores, contrasted with those of the other experts' "
        "average.",
    )
    kd_top_k: int | None = Field(
        50, ge=2, description="Items that are distilled: only the expert's top-k; 'none': the whole catalog."
    )
    learning_rate: float = Field(5e-3, gt=0, le=1, description="Adam learning rate, constant.")
    steps: int = Field(100, ge=1, description="Optimiser steps.")
    pseudo_users: Literal["one-item", "subset", "centroid", "chain", "contrastive", "contrastive-adaptive"] = Field(
        "one-item",
        description="Histories of the pseudo-users; adamerging uses the same ones. subset, centroid: 1000 a domain; "
        "else as many as items; chain and contrastive ones 2000 of more than 131,072 items.",
    )
    domains_per_step: int | None = Field(
        None,
        ge=1,
        description="Domains whose coefficients a step learns, drawn for every step, with adapters read from disk; "
        "'none': all domains, in memory.",
    )

    @model_validator(mode="before")
    @classmethod
    def _under_preset(cls, data: Any) -> Any:
        """Fill in what the preset decides, so that a value that was given stays, also where it equals the default."""
        if not isinstance(data, Mapping):
            return data
        given = {key: value for key, value in data.items() if key not in PRESET_KEYS or value != LEFT_TO_PRESET}
        if given.get("preset") != "paper":
            return given
        return {**PUBLISHED, **given}

    @model_validator(mode="after")
    def _consistent(self) -> "MergeRec":
        if names := twice(self.granularities):
            raise ValueError(f"granularities names {names} more than once; name each once")
        if problem := teacher_problem(self.teacher, self.loss):
            raise ValueError(problem)
        return self


class AdaMerging(Section):
    """Least entropy of the merged model (https://arxiv.org/abs/2310.02575) on the pseudo-users of mergerec."""

    granularities: Granularities = Field(
        ("domain", "layer"),
        min_length=1,
        description="Variants to try: one coefficient per domain, or per domain and layer.",
    )
    steps: int = Field(500, ge=1, description="Optimiser steps.")

    @model_validator(mode="after")
    def _distinct(self) -> "AdaMerging":
        if names := twice(self.granularities):
            raise ValueError(f"granularities names {names} more than once; name each once")
        return self


class Rmm(Section):
    """The search of `rmm-style`, explained in [mergerec.md](reference/mergerec.md#rmm-style)."""

    searcher: Literal["coordinate", "evolution", "ppo"] = Field(
        "coordinate",
        description="Search over the layers. coordinate: the best candidate of one layer after the other, twice; ppo: "
        "a learned policy, as published.",
    )
    candidates: tuple[Literal["experts", "coefficients", "ties", "zero"], ...] = Field(
        ("coefficients",),
        min_length=1,
        description="Choices of every layer. experts: each expert; coefficients: multiples of the sum; ties: TIES with "
        "density 0.5; zero: the backbone.",
    )
    coefficients: tuple[float, ...] = Field(
        (0.2, 0.4, 0.6, 0.8, 1.0), min_length=1, description="Factors on the sum of all updates, as candidates."
    )
    reward: Literal["pseudo-users", "validation"] = Field(
        "pseudo-users",
        description="Users who judge a map of the layers. pseudo-users: the distance from each expert, on the server; "
        "validation: NDCG@10 of the clients' validation users, which needs privacy.policy = 'catalog-private'.",
    )
    budget: int = Field(150, ge=1, description="Episodes of the search at most; an episode reads one map.")
    users: int = Field(
        500,
        ge=1,
        description="Users a domain in the search, and as many others who choose among its ten best maps; at most half "
        "of the users each.",
    )
    shards: int = Field(
        1, ge=1, description="Parts of the users; an episode reads one part, and a reward is the mean over visits."
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Rmm":
        if names := twice(self.candidates):
            raise ValueError(f"candidates names {names} more than once; name each once")
        if values := twice([f"{value:g}" for value in self.coefficients]):
            raise ValueError(f"coefficients has {values} more than once (to six digits); give each once")
        if self.shards > self.users:
            raise ValueError(f"shards = {self.shards} exceeds users = {self.users}; lower the one, or raise the other")
        return self


class ThroughClients(Section):
    """Coefficients learned by the clients under `catalog-private` ([policies](reference/privacy/policies.md))."""

    mode: Literal["exact", "local-steps"] = Field(
        "exact",
        description="Work of a message. exact: one gradient, as if the server had the catalogs; local-steps: several "
        "steps.",
    )
    local_steps: int = Field(10, ge=1, description="Steps a message in mode local-steps; the changes are averaged.")
    users: Literal["pseudo-users", "own-users"] = Field(
        "pseudo-users",
        description="Users to learn from. own-users: each client's real ones, where its own policy file allows it.",
    )
    batch_size: int = Field(32, ge=1, description="Own users per client and step.")
