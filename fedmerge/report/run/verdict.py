"""Is what a run serves better than popularity and the last item, which need no model? By domain, and in a sentence.

A domain's model is the one that :func:`fedmerge.server.choice.served_row` names: the merge, its own expert or a head.
All scores are on test; differences are paired over a domain's users.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmerge.evaluation.sums import (
    LAST_ITEM,
    VARIANTS,
    Estimate,
    MetricSums,
    Variant,
    copy_row,
    paired_difference,
    paired_difference_of_mean,
)
from fedmerge.files import table_or_empty
from fedmerge.report.run.alone import METRIC
from fedmerge.report.tables import Role
from fedmerge.runs.metric_sums import read_domain_roles, read_metric_sums
from fedmerge.server.choice import served_row

POPULARITY = "popularity"
SIMPLE = (POPULARITY, LAST_ITEM)  # rows that need no model
MOST_NAMED = 5  # domains in a sentence
_WORDS = {POPULARITY: "popularity", LAST_ITEM: "the last item"}
_MODEL = "what is served"


@dataclass(frozen=True, slots=True)
class Against:
    """What is served against another row: the scores of both, and their paired difference; None with one user."""

    served: float
    other: float
    difference: Estimate | None

    @property
    def is_above(self) -> bool:
        """True if what is served scores higher."""
        return self.served > self.other

    @property
    def may_be_chance(self) -> bool:
        """True if the 95 % interval of the difference does not exclude 0, or there is none."""
        return self.difference is None or self.difference.low <= 0 <= self.difference.high


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a domain is served.

    Attributes:
        domain: its name.
        role: "train" or "unseen".
        model: row of the model in its metric sums.
        num_users: test users.
        score: of the model; NaN if the domain withholds it or did not evaluate the model.
        against: row that needs no model -> comparison; without the rows that the domain did not evaluate.
    """

    domain: str
    role: Role
    model: str
    num_users: int
    score: float
    against: Mapping[str, Against]


@dataclass(frozen=True, slots=True)
class Judged:
    """What is served in all domains, training domains first, and its mean over them against rows without a model."""

    models: Sequence[ServedModel]
    num_compared: int
    means: Mapping[str, Against]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A sentence or two, whether they are a warning, and the same in a few words for a table."""

    text: str
    is_warning: bool
    short: str


def judge_run(folder: Path, choice: Mapping[str, Any]) -> dict[Variant, Judged]:
    """Compare what a finished run serves with popularity and the last item, by variant.

    Args:
        folder: run folder.
        choice: content of its ``choice.json``.

    Raises:
        RunDirError: a table is missing or damaged.
    """
    roles, served = read_domain_roles(folder), str(choice.get("served"))
    per_domain = table_or_empty(choice.get("per_domain"))
    rows = {served, *SIMPLE, *(served_row(per_domain, served, domain) for domain in roles)}
    return {
        variant: judge(read_metric_sums(folder, "test", variant, rows), roles, per_domain, served)
        for variant in VARIANTS
    }


def judge(
    sums: Mapping[str, MetricSums], roles: Mapping[str, Role], per_domain: Mapping[str, Any], served: str
) -> Judged:
    """Compare what each domain is served with popularity and the last item.

    Args:
        sums: domain -> sums on test, all of one variant.
        roles: domain -> "train" or "unseen".
        per_domain: of the choice; empty if every domain is served the merge.
        served: label of the merge that is served by default.
    """
    models = []
    renamed: dict[str, MetricSums] = {}
    for domain in sorted(sums, key=lambda name: (roles[name] != "train", name)):
        of_domain, model = sums[domain], served_row(per_domain, served, domain)
        known = model in of_domain.methods
        score = of_domain.mean(model, METRIC) if known else math.nan
        if not math.isnan(score):
            renamed[domain] = copy_row(of_domain, model, _MODEL)
        against = {
            row: _against([renamed[domain]], row)
            for row in SIMPLE
            if domain in renamed and row in of_domain.methods and not math.isnan(of_domain.mean(row, METRIC))
        }
        models.append(ServedModel(domain, roles[domain], model, of_domain.num_users, score, against))
    compared = [each for each in models if each.role == "train" and each.against]
    means = {
        row: _against([renamed[each.domain] for each in compared], row)
        for row in SIMPLE
        if compared and all(row in each.against for each in compared)
    }
    return Judged(models, len(compared), means)


def _against(domains: Sequence[MetricSums], row: str) -> Against:
    served, other = (math.fsum(sums.mean(name, METRIC) for sums in domains) / len(domains) for name in (_MODEL, row))
    difference = None
    if all(sums.num_users > 1 for sums in domains):
        difference = (
            paired_difference(domains[0], _MODEL, row, METRIC)
            if len(domains) == 1
            else paired_difference_of_mean(domains, _MODEL, row, METRIC)
        )
    return Against(served, other, difference)


def verdict(judged: Mapping[Variant, Judged]) -> Verdict:
    """Say whether what is served is better than popularity and the last item, in the mean and by domain.

    Args:
        judged: by variant. The first sentence is on unmasked scores, by which models are selected; another follows
            where masked scores, which are those of :mod:`fedmerge.serving`, are not above.
    """
    first = judged["unmasked"]
    if not first.means:
        return Verdict(
            "Nothing says whether what is served is better than popularity or the last item: they were not evaluated "
            "in every training domain (evaluation.baselines).",
            is_warning=False,
            short="not compared",
        )
    below, masked = _not_above(first), _not_above(judged["masked"]) if "masked" in judged else []
    on_test = f"{_mean_over(first.num_compared)} on test, unmasked"
    if below:
        text = f"What is served ranks {_how(first, below)} {_scores(first, below)}, {on_test}{_chance(first, below)}."
    else:
        text = f"What is served ranks above {join_words([_WORDS[row] for row in first.means])}: "
        text += f"{_scores(first, list(first.means))}, {on_test}{_chance(first, list(first.means))}{_but(first)}."
    if masked and masked != below:
        also = "also " if below else ""
        text += (
            f" Without the items of a user's history, as fedmerge recommend ranks, it {also}ranks "
            f"{_how(judged['masked'], masked)} {_scores(judged['masked'], masked)}."
        )
    return Verdict(text, is_warning=bool(below or masked), short=_short(judged, below, masked))


def _short(judged: Mapping[Variant, Judged], below: Sequence[str], masked: Sequence[str]) -> str:
    """Return the verdict in a few words."""
    first = judged["unmasked"]
    rows = below or list(first.means)
    words = f"{_rank(first, below) if below else 'above'} {join_words(rows)}"
    elsewhere = sum(any(not against.is_above for against in each.against.values()) for each in first.models)
    if elsewhere and not below:
        words += f", not in {elsewhere} of {len(first.models)} domains"
    words += _chance(first, rows, "may be chance")
    if masked and masked != below:
        words += f"; masked {_rank(judged['masked'], masked)} {join_words(masked)}"
    return words


def _not_above(judged: Judged) -> list[str]:
    return [row for row, against in judged.means.items() if not against.is_above]


def _rank(judged: Judged, rows: Sequence[str]) -> str:
    equal = all(judged.means[row].served == judged.means[row].other for row in rows)
    return "no higher than" if equal else "below"


def _how(judged: Judged, rows: Sequence[str]) -> str:
    return f"{_rank(judged, rows)} {join_words([_WORDS[row] for row in rows])}:"


def _scores(judged: Judged, rows: Sequence[str]) -> str:
    ours = judged.means[rows[0]].served
    return f"{METRIC.upper()} {ours:.4f} against {join_words([f'{judged.means[row].other:.4f}' for row in rows])}"


def _mean_over(number: int) -> str:
    return "one training domain" if number == 1 else f"mean over {number} training domains"


def _chance(judged: Judged, rows: Sequence[str], what: str = "the difference may be chance") -> str:
    means = judged.means
    unclear = [_WORDS[row] for row in rows if means[row].may_be_chance and means[row].served != means[row].other]
    if not unclear:
        return ""
    return f"; {what}" + (f" for {join_words(unclear)}" if len(unclear) < len(rows) else "")


def _but(judged: Judged) -> str:
    """Name the domains in which a row without a model is not beaten."""
    parts = []
    for row in judged.means:
        names = [
            each.domain + (" (unseen)" if each.role == "unseen" else "")
            for each in judged.models
            if row in each.against and not each.against[row].is_above
        ]
        among = sum(row in each.against for each in judged.models)
        where = join_words(names) if len(names) <= MOST_NAMED else f"{len(names)} of {among} domains"
        parts += [f"not above {_WORDS[row]} in {where}"] if names else []
    return f", but {join_words(parts)}" if parts else ""


def join_words(words: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
