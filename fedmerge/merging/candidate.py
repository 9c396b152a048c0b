"""A merge that validation can select: its variant, its origin and its provenance.

MergeVariant  a method and the values that distinguish it from the method's other variants
Origin        the facts that all merges of the same adapters share
Provenance    the content of ``provenance.json``
Candidate     an adapter and its provenance
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fedmerge.adapter import Adapter

LONGEST_NAMES = 100  # characters of the excluded domains in a label, which becomes the name of a folder

_SETTINGS = ("scope", "space", "output_rank", "seed")


@dataclass(frozen=True)
class MergeVariant:
    """One way to merge. Its label is derived from these values; no code reads them from a label.

    Attributes:
        method: name in METHODS, a rule of rounds, or ``package.module:function``.
        parameters: given parameters of a training-free method, in the order of the label; the others have defaults.
        granularity: granularity of learned coefficients; None for other merges.
        own_users: True for coefficients that clients learn from their own users.
        num_rounds: number of rounds of a federation over rounds; None for other merges.
        without: domains that this merge leaves out and other merges of the same run do not.
    """

    method: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    granularity: Literal["domain", "layer"] | None = None
    own_users: bool = False
    num_rounds: int | None = None
    without: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The label, but for ``without``; messages to clients contain it, whichever domains are merged."""
        from fedmerge.merging.methods import METHODS  # noqa: PLC0415 - torch, as in provenance_of_merge

        is_linear = self.method in METHODS and METHODS[self.method].coefficients is not None
        words = [self.method]
        for key, value in self.parameters.items():
            words.append(f"{value:g}" if is_linear and key == "coefficient" else f"{key} {value:g}")
        if self.granularity is not None:
            words.append(f"{self.granularity}-wise")
        if self.own_users:
            words.append("own-users")
        if self.num_rounds is not None:
            words.append(f"{self.num_rounds} round{'s' * (self.num_rounds > 1)}")
        return " ".join(words)

    @property
    def label(self) -> str:
        """Name of the merge, unique in a run, such as ``task-arithmetic 0.4``."""
        if not self.without:
            return self.name
        names = " ".join(self.without)
        if len(names) > LONGEST_NAMES:
            names = f"{len(self.without)} domains {hashlib.sha256(names.encode()).hexdigest()[:8]}"
        return f"{self.name} without {names}"


@dataclass(frozen=True)
class Origin:
    """The facts that all merges of the same adapters share; :class:`Provenance` explains them.

    Attributes:
        domains: domain -> hash of its adapter; an empty text where the server has none.
        backbone: name and sha256 of the backbone; None if unknown.
        policy: ``privacy.policy`` of the run.
        excluded: domain -> reason.
        is_remerge: True if the adapters existed before.
        run: id of the run that trained them, in that case.
    """

    domains: Mapping[str, str]
    backbone: Mapping[str, str | None] | None
    policy: str
    excluded: Mapping[str, str] = field(default_factory=dict)
    is_remerge: bool = False
    run: str | None = None


@dataclass(frozen=True)
class Provenance:
    """The origin of an adapter; ``provenance.json`` has the entries that are not None, in this order.

    Attributes:
        label: unique in the run, e.g. ``task-arithmetic 0.4``; None outside runs.
        method: name in METHODS, a rule of rounds, ``expert``, or ``package.module:function``.
        domains: domain -> hash of its expert; empty text where the server has no expert.
        rank: the largest rank of a module.
        excluded: domain -> reason.
        policy: ``privacy.policy`` of the run.
        backbone: name and sha256 of the backbone, each None if unknown; always written, null for no known backbone.
        sha256: hash of the adapter, and of what its folder holds beside LoRA if there is something.
        is_remerge: True for merges of adapters that exist already; only these have the entry ``run``.
        run: id of the run that trained the adapters of such a merge; None for adapters of no run.
        parameters: parameters of the method, or the settings of ``[rounds]``.
        privacy: the noise of ``dp.mode = 'domain-central'`` and what it spent.
        losses: the loss terms of each step of a learned merge; empty where they stay at the clients.
        validation: (step, score) of a learned merge.
        chosen_step: the step whose coefficients a learned merge has.
        reconstructions: parts of a learned merge that follow a paper in another setting or without its code.
        through_clients: settings of coefficients that are learned through the clients.
        coefficients: domain -> coefficient, or one for each group.
        coefficient_groups: names of the groups.
        search: map, reward and episodes of ``rmm-style``, see [mergerec.md](reference/mergerec.md#rmm-style).
        settings: scope, space, output_rank and seed of a training-free merge; entries of the file's top level.
        residuals: module -> relative loss by truncation to the output rank.
        secure_sum: the clients of a secure sum, and its settings.
        rounds: the aggregation of each round.
        weave: settings of weaving, and the continued adapters, target -> source -> hash.
        stages: of a merge that was trained on titles: the merge that it was, the settings, and the losses by stage.
        training: report of an expert's training.
        more: entries that this version does not know.
    """

    method: str
    domains: Mapping[str, str]
    sha256: str
    backbone: Mapping[str, str | None] | None = None
    label: str | None = None
    rank: int | None = None
    excluded: Mapping[str, str] | None = None
    policy: str | None = None
    is_remerge: bool = False
    run: str | None = None
    parameters: Mapping[str, Any] | None = None
    privacy: Mapping[str, Any] | None = None
    losses: Sequence[Mapping[str, float]] | None = None
    validation: Sequence[tuple[int, float]] | None = None
    chosen_step: int | None = None
    reconstructions: Sequence[str] | None = None
    through_clients: Mapping[str, Any] | None = None
    coefficients: Mapping[str, Any] | None = None
    coefficient_groups: Sequence[str] | None = None
    search: Mapping[str, Any] | None = None
    settings: Mapping[str, str | int] = field(default_factory=dict)
    residuals: Mapping[str, float] | None = None
    secure_sum: Mapping[str, Any] | None = None
    rounds: Sequence[Mapping[str, Any]] | None = None
    weave: Mapping[str, Any] | None = None
    stages: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_learned(self) -> bool:
        """True for merges with learned coefficients."""
        return self.losses is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of ``provenance.json``."""
        entries: dict[str, Any] = {}
        for key in _ORDER:
            value = getattr(self, key)
            if key in ("settings", "more"):
                entries |= value
            elif value is not None or key == "backbone" or (key == "run" and self.is_remerge):
                entries[key] = dict(value) if isinstance(value, Mapping) else value
        return entries

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Provenance:
        """Read the entries of ``provenance.json``; missing ones and those of a wrong type get their defaults."""
        known = {
            key: entries[key] for key in _ORDER if key in entries and isinstance(entries[key], _TYPES.get(key, object))
        }
        known = {"method": "", "domains": {}, "sha256": ""} | known
        settings = {key: entries[key] for key in _SETTINGS if key in entries}
        more = {key: value for key, value in entries.items() if key not in {*_ORDER, *_SETTINGS}}
        return cls(**{**known, "is_remerge": "run" in entries, "settings": settings, "more": more})


_MAPPINGS = ("domains", "excluded", "parameters", "privacy", "through_clients", "coefficients", "residuals", "search")
_LISTS = ("losses", "validation", "coefficient_groups", "rounds")
_TEXTS = ("label", "method", "policy", "sha256")
_TYPES: dict[str, type] = {
    **dict.fromkeys((*_MAPPINGS, "secure_sum", "weave", "stages", "training", "backbone"), Mapping),
    **dict.fromkeys(_LISTS, list),
    **dict.fromkeys(_TEXTS, str),
    **dict.fromkeys(("rank", "chosen_step"), int),
}
_HEAD = ("label", "method", "domains", "rank", "excluded", "policy", "backbone", "sha256", "run")
_ORDER = (*_HEAD, *(each.name for each in fields(Provenance) if each.name not in (*_HEAD, "is_remerge")))


def provenance_of_merge(variant: MergeVariant, adapter: Adapter, origin: Origin) -> Provenance:
    """Return what every merge of a run records; the caller adds the entries of its method."""
    from fedmerge.adapter import adapter_sha256  # noqa: PLC0415 - torch, which readers of provenance.json do without

    return Provenance(
        label=variant.label,
        method=variant.method,
        domains=dict(origin.domains),
        rank=largest_rank(adapter),
        excluded=dict(origin.excluded),
        policy=origin.policy,
        backbone=origin.backbone,
        sha256=adapter_sha256(adapter),
        is_remerge=origin.is_remerge,
        run=origin.run,
    )


def largest_rank(adapter: Adapter) -> int:
    """Return the largest rank of a module."""
    return max(module.rank for module in adapter.modules.values())


@dataclass(frozen=True)
class Candidate:
    """One merge. Two are equal if their provenance is, which contains the hash of the adapter.

    Attributes:
        adapter: the merged adapter.
        provenance: its origin.
    """

    adapter: Adapter = field(compare=False)
    provenance: Provenance = field(repr=False)

    @property
    def label(self) -> str:
        """Name of the merge, unique in a run, such as ``task-arithmetic 0.4``."""
        return self.provenance.label or self.provenance.method

    @property
    def method(self) -> str:
        """The method, of whose variants validation selects one."""
        return self.provenance.method
