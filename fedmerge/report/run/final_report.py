"""What a run says at its end: the rows of its tables of sums, and the report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmerge.config import Simulation, Split
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import EXPERT, VARIANTS, MetricSums, Variant
from fedmerge.report.tables import Role, differences_table, result_rows, results_table
from fedmerge.server.choice import SERVED, with_served

SumsByDomain = Mapping[str, Mapping[Variant, MetricSums]]


@dataclass(frozen=True)
class Evaluated:
    """What was evaluated on test, and what validation had chosen.

    Attributes:
        sums: domain -> variant -> sums on test.
        roles: domain -> "train" or "unseen".
        merged: labels of the merges, one a method.
        served: the label that validation chose.
        per_domain: domain -> its ``serve`` and scores, see :func:`fedmerge.server.choice.choose_per_domain`.
        excluded: domain (or node) -> why.
        merged_domains: whose experts are in the merges.
        synthetic: whether any domain's data are generated.
        attack: says who poisoned its training on purpose, see :func:`attack_note`.
        flagged: domain -> why the gate would have kept its expert out; it is in the merges all the same.
        dropped: domain -> difference of the merge to its own expert, of those that it ranks worse beyond noise.
        rollback: what was served instead, see :func:`fedmerge.server.choice.roll_back`.
    """

    sums: SumsByDomain
    roles: Mapping[str, Role]
    merged: Sequence[str]
    served: str
    per_domain: Mapping[str, Mapping[str, Any]]
    excluded: Mapping[str, str]
    merged_domains: Sequence[str]
    synthetic: bool
    attack: str = ""
    flagged: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rollback: Mapping[str, Any] | None = None


def attack_note(simulation: Simulation) -> str:
    """Who poisons its training on purpose, in capitals; empty for nobody."""
    if simulation.attacker is None:
        return ""
    return (
        f"POISONED ON PURPOSE: {simulation.attacker} spoils its own training ({simulation.attack}, "
        f"strength {simulation.attack_strength:g}), "
        "for a benchmark of robust merges. Serve none of these models."
    )


def metric_rows(splits: Mapping[Split, SumsByDomain], roles: Mapping[str, Role]) -> Iterator[dict[str, Any]]:
    """``metrics.parquet``: one row a split, domain, variant, method and metric."""
    return (
        {
            "split": split,
            "variant": variant,
            "domain": domain,
            "role": roles[domain],
            "method": method,
            "metric": metric,
            "num_users": sums.num_users,
            "sum": float(sums.sums[p, m]),
        }
        for split, results in splits.items()
        for domain, variants in results.items()
        for variant, sums in variants.items()
        for p, method in enumerate(sums.methods)
        for m, metric in enumerate(METRICS)
    )


def product_rows(splits: Mapping[Split, SumsByDomain]) -> Iterator[dict[str, Any]]:
    """``products.parquet``: one row a split, domain, variant, metric and pair of methods."""
    return (
        {
            "split": split,
            "variant": variant,
            "domain": domain,
            "metric": metric,
            "method": left,
            "other": right,
            "sum_of_products": float(sums.products[m, p, q]),
        }
        for split, results in splits.items()
        for domain, variants in results.items()
        for variant, sums in variants.items()
        for m, metric in enumerate(METRICS)
        for p, left in enumerate(sums.methods)
        for q, right in enumerate(sums.methods)
        if q >= p
    )


def run_report(run: Evaluated, fallback: bool) -> str:
    """The tables on test, who was excluded, and what is to be served.

    Args:
        run: results and choices.
        fallback: with one more row: each domain under what it is served.
    """
    domains = [domain for role in ("train", "unseen") for domain in sorted(run.sums) if run.roles[domain] == role]
    roles = {domain: run.roles[domain] for domain in domains}
    by_variant: dict[Variant, dict[str, MetricSums]] = {}
    for variant in VARIANTS:
        of_variant = {domain: run.sums[domain][variant] for domain in domains}
        if fallback:
            of_variant = {domain: with_served(sums, _served_model(run, domain)) for domain, sums in of_variant.items()}
        by_variant[variant] = of_variant
    parts = [
        results_table(
            result_rows(by_variant[variant], roles),
            variant=variant,
            split="test",
            merged_methods=run.merged,
            synthetic=run.synthetic,
        )
        for variant in VARIANTS
    ]
    baseline = "average" if "average" in run.merged else run.merged[0]
    parts.append(
        differences_table(by_variant["unmasked"], roles, baseline=baseline, split="test", synthetic=run.synthetic)
    )
    if run.attack:
        parts = [f"{run.attack}\n", *parts]
    for name, reason in sorted(run.flagged.items()):
        parts.append(f"flagged by the admission gate, and merged all the same: {name}: {reason}\n")
    for name, reason in sorted(run.excluded.items()):
        merged = ", its expert is in the merges" if name in run.merged_domains else ""
        parts.append(f"excluded{merged}: {name}: {reason}\n")
    if run.dropped:
        each = ", ".join(f"{name} ({found['mean']:+.4f})" for name, found in sorted(run.dropped.items()))
        parts.append(f"dropped below their own expert on validation, beyond noise: {each}\n")
    if run.rollback:
        parts.append(f"rolled back from {run.rollback['from']} to: {run.rollback['to']}\n")
    parts.append(f"chosen on validation and to be served: {run.served}\n")
    if fallback:
        own = [domain for domain in sorted(run.per_domain) if run.per_domain[domain]["serve"] == EXPERT]
        parts.append(
            f"to be served their own expert instead, chosen on validation: {', '.join(own) or 'none'}\n"
            f"({SERVED}: each domain under what it is served. Validation scores of what was chosen there are too good "
            "on average, so judge the choice by this row on test.)\n"
        )
    return "\n".join(parts)


def _served_model(run: Evaluated, domain: str) -> str:
    return EXPERT if run.per_domain.get(domain, {}).get("serve") == EXPERT else run.served
