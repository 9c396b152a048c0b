"""The tables of a privacy audit, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedmerge.escaping import one_line
from fedmerge.privacy.attacks import FALSE_POSITIVE_RATES

NOTE = """An AUC near .5 means that these attacks find nothing; it does not prove that nothing can be found. An audit
reads the users' interactions and its numbers are exact: they are for the domain's owner, and no differential privacy
covers them.
"""


def audit_text(audit: Mapping[str, Any]) -> str:
    """Return all tables of an audit.

    Args:
        audit: ``run`` (name), ``dp`` (setting -> value), and ``domains``: domain -> result of
            :func:`fedmerge.client.audit.attacks.audit_domain`.
    """
    settings = ", ".join(f"{key} {value}" for key, value in audit["dp"].items() if value is not None)
    parts = [
        f"privacy audit of {one_line(audit['run'])}\n"
        f"differential privacy of its training: {one_line(settings)}\n\n{NOTE}"
    ]
    parts += [_domain_text(domain, found) for domain, found in audit["domains"].items()]
    return "\n".join(parts)


def _domain_text(domain: str, found: Mapping[str, Any]) -> str:
    rates = [f"tpr_at_fpr_{rate:g}" for rate in FALSE_POSITIVE_RATES]
    heads = [f"TPR at {100 * rate:g} % FPR" for rate in FALSE_POSITIVE_RATES]
    parts = [
        f"{one_line(domain)}: {found['members']} users were trained on, {found['non_members']} were left out, "
        f"{found['items']} items, {found['shadows']} shadow trainings"
        + (f" ({one_line(found['why_no_shadows'])})\n" if found["why_no_shadows"] else "\n"),
        *(
            f"NOTHING WAS LEARNED: {one_line(model)} is zero, that is the untouched backbone. Its rows say nothing "
            "about what training reveals.\n"
            for model in found["nothing_learned"]
        ),
        "membership inference: telling the users that were trained on from those left out",
        _table(
            ["model", "attack", "AUC", "± s.e.", *heads],
            [
                [row["model"], row["attack"], _number(row["auc"]), _number(row["auc_error"])]
                + [_number(row[rate]) for rate in rates]
                for row in found["membership"]
            ],
        ),
    ]
    if any(row[rate] is None for row in found["membership"] for rate in rates):
        parts.append("  –: too few users were left out to measure that rate\n")
    recovery = found["recovery"]
    counts = sorted({int(k) for row in recovery["rows"] for k in row["precision_at"]})
    parts += [
        f"recovery of items bought one after the other (precision of the k likeliest pairs of items; "
        f"{recovery['pairs']:,} pairs are right, {100 * recovery['share_of_all_pairs']:.2f} % of all)",
        _table(
            ["read from", *(f"k = {k}" for k in counts)],
            [[row["from"], *(_number(row["precision_at"].get(str(k))) for k in counts)] for row in recovery["rows"]],
        ),
    ]
    if found["canaries"]:
        planted = found["canaries"][0]["planted"]
        parts += [
            f"canaries ({planted} planted users with random items, {planted} not planted; exposure in bits, 1.44 by "
            "chance)",
            _table(
                ["model", "median rank", "exposure", "largest", "not planted", "AUC", "± s.e."],
                [
                    [row["model"], f"{row['median_rank']:g}"]
                    + [f"{row[k]:.2f}" for k in ("mean_exposure", "max_exposure", "mean_exposure_not_planted")]
                    + [_number(row["auc"]), _number(row["auc_error"])]
                    for row in found["canaries"]
                ],
            ),
        ]
    return "\n".join(parts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    text_columns = {column for column, name in enumerate(head) if name in ("model", "attack", "read from")}
    lines = []
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if column in text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"
