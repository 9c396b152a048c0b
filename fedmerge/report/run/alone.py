"""Alone against joined: the best that a domain has without the federation, against the model that it is served.

A domain has for itself its expert and, where they were evaluated, the heads on vectors of its expert or of the
backbone; its own validation users choose among them, as they choose what it is served. A SASRec on its item ids is not
evaluated on validation, so it is compared separately. Both models of a comparison are scored on the same test users.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmerge.config import HeadVectors
from fedmerge.evaluation.sums import (
    EXPERT,
    FEDERATED_FUSED,
    FEDERATED_HEAD,
    Estimate,
    MetricSums,
    Variant,
    copy_row,
    fused_label,
    head_label,
    paired_difference,
    paired_difference_of_mean,
)
from fedmerge.report.tables import Cell, difference_cell, plain_table
from fedmerge.server.choice import served_row

METRIC = "ndcg@10"
MEAN = "mean"  # of the domains; the name of the last row
SASREC = "sasrec"  # label of this baseline
TITLE = "Alone against joined"
EXPLAINED = (
    "Alone: a domain's expert or a head that does not read the merge, whichever was best on its validation users. "
    "Joined: the model that it is served. Both were selected on validation; the scores are on test."
)
_ALONE, _JOINED = "alone", "joined"
_WITHOUT_MERGE: tuple[HeadVectors, ...] = ("expert", "backbone")
_OWN_HEADS = tuple(label(vectors) for vectors in _WITHOUT_MERGE for label in (head_label, fused_label))
_OWN = (EXPERT, *_OWN_HEADS)
_WITH_MERGE = (head_label("merge"), fused_label("merge"))
_ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A domain's model for itself against the model that it is served, in the mean over its test users.

    Attributes:
        domain: name of the domain, or MEAN.
        alone: row of the model without the federation; empty for the mean.
        joined: row of the model that is served; empty for the mean.
        scores: of alone and of joined.
        difference: joined minus alone, paired over users; None with fewer than two users.
    """

    domain: str
    alone: str
    joined: str
    scores: tuple[float, float]
    difference: Estimate | None


def compare_alone(
    sums: Mapping[str, MetricSums], per_domain: Mapping[str, Any], served: str, alone: str | None = None
) -> list[Comparison]:
    """Compare what each training domain has for itself with what it is served.

    Args:
        sums: domain -> sums on test, all of one variant.
        per_domain: of the choice, of the training domains: scores on validation, and what is served.
        served: label of the merge that is served by default.
        alone: row that stands for alone in every domain; None for the best of a domain's own on validation.

    Returns:
        A comparison for each domain with both models, sorted, then their unweighted mean. Domains that withhold a score
        are left out.
    """
    rows: list[Comparison] = []
    renamed: list[MetricSums] = []
    for domain, entry in sorted(per_domain.items()):
        of_domain = sums.get(domain)
        own, joined = alone or _best_own(entry), served_row(per_domain, served, domain)
        if of_domain is None or own is None or not {own, joined} <= {*of_domain.methods}:
            continue
        scores = (of_domain.mean(own, METRIC), of_domain.mean(joined, METRIC))
        if any(map(math.isnan, scores)):
            continue
        renamed.append(copy_row(copy_row(of_domain, own, _ALONE), joined, _JOINED))
        difference = paired_difference(renamed[-1], _JOINED, _ALONE, METRIC) if of_domain.num_users > 1 else None
        rows.append(Comparison(domain, own, joined, scores, difference))
    if len(rows) < 2:
        return rows
    means = tuple(math.fsum(row.scores[side] for row in rows) / len(rows) for side in (0, 1))
    enough = all(row.difference is not None for row in rows)
    of_mean = paired_difference_of_mean(renamed, _JOINED, _ALONE, METRIC) if enough else None
    return [*rows, Comparison(MEAN, "", "", (means[0], means[1]), of_mean)]


def note_on_heads(per_domain: Mapping[str, Any]) -> str:
    """Return a sentence if a domain is served a head on the merge and none was trained without it; else empty."""
    entries = [entry for entry in per_domain.values() if isinstance(entry, Mapping)]
    if not any(entry.get("serve") in _WITH_MERGE for entry in entries) or any({*_OWN_HEADS} & {*e} for e in entries):
        return ""
    return (
        "No head was trained without the merge, so the difference is partly that of having a head; "
        'head.vectors = "merge,expert" tells them apart.'
    )


def their(row: str) -> str:
    """Return ``their own expert``; of a federated head, which is of all, ``the federated head``."""
    return f"the {row}" if row in (FEDERATED_HEAD, FEDERATED_FUSED) else f"their own {row}"


def _best_own(entry: Any) -> str | None:
    """Return the best on validation of what a domain has without the federation; the first of equals."""
    known = {row: entry[row] for row in _OWN if isinstance(entry, Mapping) and isinstance(entry.get(row), (int, float))}
    return max(known, key=known.__getitem__, default=None)


def alone_text(sums: Mapping[Variant, Mapping[str, MetricSums]], per_domain: Mapping[str, Any], served: str) -> str:
    """Return the comparisons of every variant as text; empty if there is nothing to compare."""
    tables = []
    for variant, of_variant in sums.items():
        compared = compare_alone(of_variant, per_domain, served)
        compared += compare_alone(of_variant, per_domain, served, SASREC)
        if compared:
            tables.append(_text_table(f"{METRIC}, {variant}", compared))
    if not tables:
        return ""
    note = note_on_heads(per_domain)
    return "\n\n".join(["\n".join([TITLE, EXPLAINED, *([note] if note else [])]), *tables]) + "\n"


def _text_table(title: str, rows: Sequence[Comparison]) -> str:
    lines: list[tuple[str, list[Cell]]] = [
        (title, [(head, False) for head in ("alone", "score", "joined", "score", "difference")])
    ]
    lines.append(("", [("", False)] * 5))
    for row in rows:
        scores = [(f"{score:.4f}", False) for score in row.scores]
        cells = [(row.alone or _ABSENT, False), scores[0], (row.joined or _ABSENT, False), scores[1]]
        lines.append((row.domain, [*cells, difference_cell(row.difference)]))
    return plain_table(lines)
