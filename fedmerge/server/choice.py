"""Choose on validation: each method's best variant, the merge to serve, and the model that each domain is served.

    choose            the best variant of each method and the best of all
    dropped_domains   the domains that a merge harms
    roll_back         a better merge for them, or the fallback
    choose_per_domain the merge, the domain's own expert, or one of its heads
    best_row          the best of a domain's own rows
    choose_for_unseen the merge or the federated head, for a domain that trained neither
    served_row        the row of metric sums of what a domain is served
    Choice            all of it, as in ``choice.json``

A domain's own validation users decide between these models, so the score of the chosen model on *these* users is too
high on average (the winner's curse), most of all if they are few and the models are close. With heads it is higher
still: the same users end the training of a head and choose the weights of its fusion before they choose among the
models. Test shows what the choice is worth.

All choices are on unmasked NDCG@10, while :mod:`fedmerge.serving` ranks without the seen items unless asked to keep
them: what is served may differ from what would be best there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np

from fedmerge.errors import RunDirError
from fedmerge.evaluation.sums import (
    EXPERT,
    FEDERATED_FUSED,
    FEDERATED_HEAD,
    GROUP,
    LAST_ITEM,
    PERSONAL,
    WOVEN,
    MetricSums,
    copy_row,
    paired_difference,
)
from fedmerge.merging.candidate import Candidate

CHOICE_FILE = "choice.json"
SELECTION_FILE = "selection.json"  # with heads: the same without ``per_domain``, written before they are trained
MERGED = "merged"
FALLBACK = "fallback"
SERVED = "served (with fallback)"
ROLLED_BACK = "rolled back"  # key of ``best_variants`` in the file for the merge that a rollback selected


@dataclass(frozen=True)
class Choice:
    """The selection on validation, the content of ``choice.json``.

    Attributes:
        metric: the selection metric.
        validation: label -> score of every merge of all members.
        best_variants: method -> label of its best variant.
        served: label of the merge that is served.
        domains: the domains whose validation decided.
        per_domain: domain -> the model it is served, see :func:`choose_per_domain`.
        dropped: domains that are significantly worse with the merge selected first than with their own expert, see
            :func:`dropped_domains`.
        rollback: what is served in place of that merge, see :func:`roll_back`; None without a rollback.
        groups: the choice between one merge and merges of groups, see
            :func:`fedmerge.server.groups.choose_grouping`; None if no groups were tried.
    """

    metric: str
    validation: Mapping[str, float]
    best_variants: Mapping[str, str]
    served: str
    domains: list[str]
    per_domain: Mapping[str, Mapping[str, Any]]
    dropped: Mapping[str, Mapping[str, float]]
    rollback: Mapping[str, Any] | None
    groups: Mapping[str, Any] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the selected merges: the best variant of each method, and the merge that is served."""
        return tuple(dict.fromkeys([*self.best_variants.values(), self.served]))

    @property
    def fell_back(self) -> bool:
        """True if the rollback led to the per-domain fallback."""
        return self.rollback is not None and self.rollback["to"] == FALLBACK

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of ``choice.json``, whose ``best_variants`` also names the merge of a rollback."""
        entries = asdict(self)
        if self.groups is None:
            del entries["groups"]
        if self.rollback is not None and not self.fell_back:
            entries["best_variants"][ROLLED_BACK] = self.served
        return entries

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Self:
        """Read the entries of ``choice.json``; entries that this version does not know are left out.

        Raises:
            RunDirError: an entry is missing.
        """
        names = [each.name for each in fields(cls) if each.name != "groups"]
        if missing := [name for name in names if name not in entries]:
            raise RunDirError(
                f"{CHOICE_FILE}: found no {', '.join(missing)}, expected {', '.join(names)}. Resume the run with the "
                "fedmerge version that started it."
            )
        best = {method: label for method, label in entries["best_variants"].items() if method != ROLLED_BACK}
        given = {name: entries[name] for name in names} | {"best_variants": best}
        return cls(**given, groups=entries.get("groups"))


def choose(
    candidates: Sequence[Candidate], validation: Mapping[str, MetricSums], train_domains: Sequence[str], metric: str
) -> tuple[dict[str, str], str, dict[str, float]]:
    """Choose each method's variant and the merge to serve.

    Args:
        candidates: all merges.
        validation: domain -> unmasked metric sums of all candidates.
        train_domains: domains whose unweighted mean decides; unseen domains have no vote.
        metric: the selection metric.

    Returns:
        Method -> label of its best variant; label of the best merge; label -> score. Of equal scores the first wins.
        A domain that withholds the score of a merge has no vote; if none has one, all scores are 0.
    """
    labels = [candidate.label for candidate in candidates]
    means = {
        domain: {label: validation[domain].mean(label, metric) for label in labels} for domain in sorted(train_domains)
    }
    voters = [of_domain for of_domain in means.values() if not any(map(math.isnan, of_domain.values()))]
    scores = {label: float(np.mean([of_domain[label] for of_domain in voters])) if voters else 0.0 for label in labels}
    best: dict[str, str] = {}
    for candidate in candidates:
        if candidate.method not in best or scores[candidate.label] > scores[best[candidate.method]]:
            best[candidate.method] = candidate.label
    return best, max(best.values(), key=lambda label: scores[label]), scores


def dropped_domains(validation: Mapping[str, MetricSums], merge: str, metric: str) -> dict[str, dict[str, float]]:
    """Find the domains whose validation users are significantly worse with a merge than with the domain's expert.

    Args:
        validation: domain -> unmasked sums of the merge and of the domain's own expert, if it has one.
        merge: label of the merge.
        metric: the selection metric.

    Returns:
        Domain -> ``mean``, ``low`` and ``high`` of merge minus expert, if the 95 % interval is below 0.
    """
    found = {}
    for domain, sums in sorted(validation.items()):
        if EXPERT in sums.methods:
            difference = paired_difference(sums, merge, EXPERT, metric)
            if difference.high < 0:
                found[domain] = {"mean": difference.mean, "low": difference.low, "high": difference.high}
    return found


def roll_back(
    validation: Mapping[str, MetricSums], served: str, without: Sequence[str], failed: Sequence[str], metric: str
) -> dict[str, Any] | None:
    """Choose what to serve in place of a merge that drops domains below their own expert.

    Of the merges without the failed domains, the best on the other domains is taken if it scores higher there and drops
    fewer of them. Else the dropped domains are served their own experts. Failed domains have no vote.

    Args:
        validation: domain -> unmasked sums of all merges and of the domain's own expert.
        served: label of the merge that was chosen.
        without: labels of the merges without the failed domains.
        failed: domains that failed a check of the admission gate.
        metric: the selection metric.

    Returns:
        ``from``, ``to`` (a label, or "fallback") and ``dropped``; None if no other domain is dropped.
    """
    judges = {domain: sums for domain, sums in validation.items() if domain not in failed}
    dropped = dropped_domains(judges, served, metric)
    if not dropped:
        return None
    scores = {
        label: float(np.mean([sums.mean(label, metric) for sums in judges.values()])) for label in (served, *without)
    }  # NaN, which is better than nothing, if a judge withholds its score
    better = [
        label
        for label in without
        if scores[label] > scores[served] and len(dropped_domains(judges, label, metric)) < len(dropped)
    ]
    to = max(better, key=lambda label: scores[label], default=FALLBACK)
    return {"from": served, "to": to, "dropped": sorted(dropped)}


def choose_per_domain(
    validation: Mapping[str, MetricSums],
    served: str,
    metric: str,
    fallback: bool,
    heads: Mapping[str, Sequence[str]] | None = None,
    dropped: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Choose the model that each training domain is served.

    Args:
        validation: domain -> unmasked metric sums of the served merge, the domain's own expert, personal and woven
            merge and the merge of its group, if it has them, and its heads.
        served: label of the merge that is served by default.
        metric: the selection metric.
        fallback: False to serve every domain the merge, or that of its group if groups were chosen.
        heads: domain -> rows of its heads; None without any.
        dropped: domains that a rollback takes the merge away from: they are served the best of the others.

    Returns:
        Domain -> ``serve`` (``merged``, ``expert`` or the row of a head) and the scores, None where withheld. Of equal
        scores the first wins. Where the merge's score is withheld, the merge is served; a model whose score is withheld
        is not.
    """
    chosen = {}
    for domain, sums in sorted(validation.items()):
        labels = {MERGED: served} | {own: own for own in (EXPERT, PERSONAL, WOVEN, GROUP) if own in sums.methods}
        labels |= {row: row for row in (heads or {}).get(domain, ())}
        scores = {model: sums.mean(label, metric) for model, label in labels.items()}
        known = {model: score for model, score in scores.items() if not math.isnan(score)}
        default = GROUP if GROUP in known else MERGED
        serve = max(known, key=known.__getitem__) if fallback and MERGED in known else default
        if domain in dropped:
            others = {model: score for model, score in known.items() if fallback and model != MERGED}
            serve = max(others, key=others.__getitem__, default=EXPERT)
        chosen[domain] = {
            "serve": serve,
            **{model: None if math.isnan(score) else score for model, score in scores.items()},
        }
    return chosen


def best_row(sums: MetricSums, rows: Sequence[str], metric: str) -> str:
    """Return the best of some rows; the first of equals, and where all scores are withheld."""
    scores = {row: sums.mean(row, metric) for row in rows}
    known = {row: score for row, score in scores.items() if not math.isnan(score)}
    return max(known, key=known.__getitem__, default=rows[0])


def choose_for_unseen(
    validation: Mapping[str, MetricSums], served: str, metric: str, fallback: bool
) -> dict[str, dict[str, Any]]:
    """Choose between the shared merge and the federated head for each domain that trained neither.

    Args:
        validation: domain -> unmasked metric sums of the served merge, the federated head, alone and fused, and last
            item, over its own validation users.
        served: label of the merge that is served by default.
        metric: the selection metric.
        fallback: False to serve every domain the merge.

    Returns:
        Domain -> ``serve`` (``merged``, or the better row of the federated head that is above the merge and above last
        item) and the scores, None where withheld. With a withheld score the merge is served.
    """
    chosen = {}
    for domain, sums in sorted(validation.items()):
        labels = {MERGED: served} | {row: row for row in (FEDERATED_HEAD, FEDERATED_FUSED, LAST_ITEM)}
        scores = {model: sums.mean(label, metric) for model, label in labels.items()}
        known = fallback and not any(map(math.isnan, scores.values()))
        to_beat = max(scores[MERGED], scores[LAST_ITEM])
        better = [row for row in (FEDERATED_HEAD, FEDERATED_FUSED) if known and scores[row] > to_beat]
        chosen[domain] = {
            "serve": max(better, key=scores.__getitem__, default=MERGED),
            **{model: None if math.isnan(score) else score for model, score in scores.items()},
        }
    return chosen


def served_row(per_domain: Mapping[str, Any], served: str, domain: str) -> str:
    """Return the row of metric sums of the model that a domain is served.

    Args:
        per_domain: of the choice; a domain without an entry is served the merge.
        served: label of the merge that is served by default.
        domain: name of the domain.
    """
    entry = per_domain.get(domain)
    serve = entry.get("serve") if isinstance(entry, Mapping) else None
    return served if serve in (None, MERGED) else str(serve)


def with_served(sums: MetricSums, model: str) -> MetricSums:
    """Add the row :data:`SERVED` to metric sums, a copy of the row of the model that this domain is served."""
    return copy_row(sums, model, SERVED)
