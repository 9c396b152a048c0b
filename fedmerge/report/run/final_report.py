"""The end of a run: the rows of its tables of sums, and the report as text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmerge.config import Simulation, Split
from fedmerge.escaping import one_line
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import EXPERT, GROUP, PERSONAL, VARIANTS, WOVEN, MetricSums, Variant
from fedmerge.report.run.alone import alone_text, their
from fedmerge.report.run.verdict import judge, verdict
from fedmerge.report.tables import Role, differences_table, result_rows, results_table
from fedmerge.server.choice import MERGED, SERVED, served_row, with_served

SumsByDomain = Mapping[str, Mapping[Variant, MetricSums]]


@dataclass(frozen=True)
class Evaluated:
    """Results on test, and the choices made on validation.

    Attributes:
        sums: domain -> variant -> sums on test.
        roles: domain -> "train" or "unseen".
        merged: labels of the merges, one per method.
        served: label of the merge selected on validation.
        per_domain: domain -> its ``serve`` and scores, see :func:`fedmerge.server.choice.choose_per_domain`.
        excluded: domain or node -> reason.
        merged_domains: domains whose experts are in the merges.
        synthetic: True if the data of any domain are generated.
        attack: warning about a client that poisons its training, see :func:`attack_note`.
        flagged: domain -> reason of the admission gate; its expert is still merged.
        nothing_learned: domains whose experts are zero.
        dropped: domain -> difference between the merge and the domain's own expert, where the merge is significantly
            worse.
        rollback: the merge served instead, see :func:`fedmerge.server.choice.roll_back`.
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
    nothing_learned: Sequence[str] = ()
    dropped: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rollback: Mapping[str, Any] | None = None


def attack_note(simulation: Simulation) -> str:
    """Warning about a client that poisons its training on purpose; empty without one."""
    if simulation.attacker is None:
        return ""
    return (
        f"POISONED ON PURPOSE: {simulation.attacker} corrupts its own training ({simulation.attack}, "
        f"strength {simulation.attack_strength:g}), "
        "for a benchmark of robust merges. Serve none of these models."
    )


def metric_rows(splits: Mapping[Split, SumsByDomain], roles: Mapping[str, Role]) -> Iterator[dict[str, Any]]:
    """Rows of ``metrics.parquet``: one per split, domain, variant, method and metric; NaN where withheld."""
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
            "noise": sums.noise,
        }
        for split, results in splits.items()
        for domain, variants in results.items()
        for variant, sums in variants.items()
        for p, method in enumerate(sums.methods)
        for m, metric in enumerate(METRICS)
    )


def product_rows(splits: Mapping[Split, SumsByDomain]) -> Iterator[dict[str, Any]]:
    """Rows of ``products.parquet``: one per split, domain, variant, metric and pair of methods."""
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
    """Return the report: tables on test, excluded and flagged clients, the served merge.

    Names and reasons come from clients; each is shown on one line, without control characters.

    Args:
        run: results and choices.
        fallback: add a row in which each domain is served the model that was selected for it.
    """
    domains = [domain for role in ("train", "unseen") for domain in sorted(run.sums) if run.roles[domain] == role]
    roles = {domain: run.roles[domain] for domain in domains}
    by_variant: dict[Variant, dict[str, MetricSums]] = {}
    for variant in VARIANTS:
        of_variant = {domain: run.sums[domain][variant] for domain in domains}
        if fallback:
            of_variant = {
                domain: with_served(sums, served_row(run.per_domain, run.served, domain))
                for domain, sums in of_variant.items()
            }
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
    trained = {domain: entry for domain, entry in run.per_domain.items() if roles.get(domain) == "train"}
    first = [alone_text(by_variant, trained, run.served)] if fallback else []
    parts = [*filter(None, first), *parts]
    judged = {
        variant: judge(of_variant, roles, run.per_domain, run.served) for variant, of_variant in by_variant.items()
    }
    parts = [f"{one_line(verdict(judged).text)}\n", *parts]
    if run.attack:
        parts = [f"{one_line(run.attack)}\n", *parts]
    for name, reason in sorted(run.flagged.items()):
        parts.append(f"{_named('flagged, but still merged', name, reason)}\n")
    if run.nothing_learned:
        names = ", ".join(one_line(name) for name in run.nothing_learned)
        parts.append(f"nothing was learned (the expert is the untouched backbone, but still merged): {names}\n")
    for name, reason in sorted(run.excluded.items()):
        merged = ", but its expert is still merged" if name in run.merged_domains else ""
        parts.append(f"{_named(f'excluded{merged}', name, reason)}\n")
    if run.dropped:
        each = ", ".join(f"{one_line(name)} ({found['mean']:+.4f})" for name, found in sorted(run.dropped.items()))
        parts.append(f"significantly worse than their own expert on validation: {each}\n")
    if run.rollback:
        parts.append(f"rolled back from {one_line(run.rollback['from'])} to {one_line(run.rollback['to'])}\n")
    parts.append(f"selected on validation; served: {one_line(run.served)}\n")
    if fallback:
        parts.append(_served_instead(run))
    return "\n".join(parts)


def _served_instead(run: Evaluated) -> str:
    """Name the domains that are served another model than the merge, by model."""
    by_row: dict[str, list[str]] = {EXPERT: []}
    for domain in sorted(run.per_domain):
        row = served_row(run.per_domain, run.served, domain)
        if row != run.served:
            by_row.setdefault(row, []).append(one_line(domain))
    lines = [
        f"served {their(one_line(row))} instead, selected on validation: {', '.join(domains) or 'none'}\n"
        for row, domains in by_row.items()
    ]
    heads = any(
        row not in ("serve", MERGED, EXPERT, PERSONAL, WOVEN, GROUP)
        for entry in run.per_domain.values()
        for row in entry
    )
    twice = " The same users ended the training of the heads and chose the weights of their fusion." if heads else ""
    return (
        f"{''.join(lines)}({SERVED}: each domain with the model that it is served. Scores on validation favour the "
        f"models that were selected there, so judge the selection by this row on test.{twice})\n"
    )


def _named(what: str, name: str, reason: str) -> str:
    return f"{what}: {one_line(name)}: {one_line(reason)}"
