"""Weaving: clients continue each other's adapters on their own users before the merge, WeaveRec-style.

Δ_k is the expert of domain k. Client t starts from Δ_k and continues on its own users: Δ_{t←k}, with Δ_{t←t} = Δ_t.

    schedule_passes  who continues what, one pass after another
    start_of         what a client continues
    target_merge     Δ^t = λ · mean of Δ_t and of all that t continued
    woven_merge      Δ = λ · mean over t of the means in Δ^t

Source: WeaveRec, arXiv:2510.26546.
Differs: there every hybrid adapter is trained on the pooled histories of two domains, which have to meet in one place.
Here adapters travel, and no history does: a reconstruction. The mixture of source and target depends on the number of
steps and on the proximal term, and Δ_{t←k} is not Δ_{k←t}. Schedule ``mean`` is FedAvg with local fine-tuning, and
``relay`` is cyclic weight transfer. Schedule ``similarity`` is FedCIA-style, see ``fedmerge.federated.shared_items``:
each client continues its own expert, and what it continued is merged in place of the expert.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from fedmerge.adapter import Adapter, OnDemand, adapter_sha256
from fedmerge.config import Weave
from fedmerge.federated.product_space import cut_to, decomposed, weighted_sum
from fedmerge.merging.stack import linear_merge_of_many, survey_adapters
from fedmerge.seeding import generator

MEAN = "mean of the others"  # the source of schedule ``mean``; no domain has a name with spaces
SHARED = "shared items"  # of schedule ``similarity``, whose clients continue their own experts


@dataclass(frozen=True, order=True)
class Weaving:
    """One training: the client that continues an adapter, and the domain whose expert the adapter was; MEAN; SHARED."""

    target: str
    source: str


Woven = Mapping[Weaving, Adapter]


def schedule_passes(weave: Weave, domains: Sequence[str], seed: int) -> list[list[Weaving]]:
    """Return the trainings of a schedule in passes; in a pass every client makes one training.

    Args:
        weave: schedule and sources are read.
        domains: K domains, in any order.
        seed: seed of the experiment; schedule ``sampled`` draws the sources of t from (seed, "weave", t).

    Returns:
        ``weave.trainings(K)`` passes, each with one training for every domain, sorted by target.
    """
    names, number = sorted(domains), weave.trainings(len(domains))
    if weave.schedule in ("mean", "similarity"):
        source = MEAN if weave.schedule == "mean" else SHARED
        return [[Weaving(target, source) for target in names]] * number
    if weave.schedule == "sampled":
        drawn = {name: _drawn_sources(name, names, seed) for name in names}
        return [[Weaving(target, drawn[target][index]) for target in names] for index in range(number)]
    size = len(names)
    return [
        [Weaving(target, names[(place - step) % size]) for place, target in enumerate(names)]
        for step in range(1, number + 1)
    ]


def _drawn_sources(target: str, names: Sequence[str], seed: int) -> list[str]:
    others = [name for name in names if name != target]
    return [others[index] for index in generator(seed, "weave", target).permutation(len(others))]


def start_of(
    weaving: Weaving, weave: Weave, experts: Mapping[str, Adapter], woven: Woven, fresh: Callable[[], Adapter]
) -> Adapter:
    """Return the adapter that a client continues.

    Args:
        weaving: the training.
        weave: schedule is read.
        experts: domain -> expert, of all domains that are woven.
        woven: what arrived in earlier passes; schedule ``relay`` continues the latest of an adapter's walk.
        fresh: makes a fresh adapter of the target; schedule ``mean`` is cut to its ranks, and has its scalings.

    Returns:
        The adapter; under all schedules but ``mean`` with the bytes of what was received.
    """
    if weaving.source == MEAN:
        return mean_of_others(weaving.target, experts, fresh())
    if weaving.source == SHARED:
        return experts[weaving.target]
    if weave.schedule == "relay":
        names = sorted(experts)
        place = names.index(weaving.source)
        walk = [*names[place + 1 :], *names[:place]]
        for before in reversed(walk[: walk.index(weaving.target)]):  # a client that failed is passed over
            if (found := woven.get(Weaving(before, weaving.source))) is not None:
                return found
    return experts[weaving.source]


def mean_of_others(target: str, experts: Mapping[str, Adapter], like: Adapter) -> Adapter:
    """Return Σ_{j≠t} Δ_j / (K − 1), cut to the ranks of ``like`` by SVD, as rounds start from a merge."""
    others = {name: experts[name] for name in experts if name != target}
    mean = weighted_sum(others, dict.fromkeys(others, 1 / len(others)))
    return cut_to(decomposed(mean), like, like)[0]


def target_merge(target: str, expert: Adapter, woven: Woven, factor: float) -> Adapter:
    """Return λ · mean of a domain's expert and of all adapters that its client continued, exactly.

    Args:
        target: the domain.
        expert: its expert.
        woven: of this domain and of others, which are not read.
        factor: λ.
    """
    members = _members([target], woven)
    return _weighted({target: expert}, woven, dict.fromkeys(members, Fraction(1, len(members))), factor)


def woven_merge(experts: Mapping[str, Adapter], woven: Woven, factor: float) -> Adapter:
    """Return λ · (1/K) Σ_t (1/n_t) Σ_k Δ_{t←k} over the n_t adapters of every target t, its expert among them, exactly.

    Under schedules ``all`` and ``relay`` this is λ/K² Σ_t Σ_k Δ_{t←k}. Equal adapters are added up first, so without
    steps the merge has the bytes of the average.

    Args:
        experts: domain -> expert, of the K targets.
        woven: what clients continued; that of other targets is not read.
        factor: λ.
    """
    members = _members(experts, woven)
    count = Counter(each.target for each in members)
    shares = {each: Fraction(1, len(experts) * count[each.target]) for each in members}
    return _weighted(experts, woven, shares, factor)


def _members(targets: Collection[str], woven: Woven) -> list[Weaving]:
    """Return what is merged of these targets: their experts, unless SHARED continued them, and what they continued."""
    continued = [each for each in woven if each.target in targets]
    replaced = {each.target for each in continued if each.source == SHARED}
    return [Weaving(name, name) for name in targets if name not in replaced] + continued


def _weighted(
    experts: Mapping[str, Adapter], woven: Woven, shares: Mapping[Weaving, Fraction], factor: float
) -> Adapter:
    """Return λ Σ share · Δ, reading one adapter at a time; equal adapters are one, in the place of the first."""
    names: dict[str, str] = {}  # hash -> name
    members: dict[str, Weaving] = {}
    totals: dict[str, Fraction] = {}

    def read(each: Weaving) -> Adapter:
        return experts[each.target] if each.source == each.target else woven[each]

    for each in sorted(shares, key=lambda each: (each.source, each.target)):
        name = names.setdefault(adapter_sha256(read(each)), f"{each.source} {each.target}")
        members.setdefault(name, each)
        totals[name] = totals.get(name, Fraction(0)) + shares[each]
    adapters = OnDemand(members, lambda name: read(members[name]))
    layout = survey_adapters(adapters)
    coefficients = torch.tensor([factor * float(totals[name]) for name in layout.domains])
    return linear_merge_of_many(adapters, layout, coefficients)
