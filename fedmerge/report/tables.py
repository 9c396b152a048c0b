"""Tables of results as plain text and Markdown: a row per method, a column per domain, then means over domains.

Numbers that do not belong together are refused, never averaged. A mean is shown only if every domain of its group has
a value.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fedmerge.config import Split
from fedmerge.errors import LayoutMismatchError
from fedmerge.escaping import one_line
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import (
    VARIANTS,
    Estimate,
    MetricSums,
    Variant,
    paired_difference,
    paired_difference_of_mean,
)

Role = Literal["train", "unseen"]
TableFormat = Literal["plain", "markdown"]

TABLE_METRICS: tuple[str, ...] = ("recall@10", "ndcg@10")
MAX_DOMAIN_COLUMNS = 20  # with more domains, a table shows the means alone

_ROLES: tuple[Role, ...] = get_args(Role)
_MEAN_TITLES: Mapping[Role, str] = {"train": "mean of training", "unseen": "mean of unseen"}
_SYNTHETIC = "SYNTHETIC DATA: generated interactions; these numbers say nothing about real users."
_VARIANT_TEXT: Mapping[Variant, str] = {
    "unmasked": "unmasked (items of the user's history stay candidates)",
    "masked": "masked (items of the user's history are removed, except the target)",
}
_ABSENT = "-"

Cell = tuple[str, bool]  # text, is marked


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One method on one domain: its role, the number of evaluated users, and metric -> mean, NaN where withheld."""

    domain: str
    role: Role
    method: str
    num_users: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Domains:
    """The columns: domains in order of appearance, training domains first."""

    roles: Mapping[str, Role]
    num_users: Mapping[str, int]

    def of(self, role: Role) -> list[str]:
        return [domain for domain, its_role in self.roles.items() if its_role == role]

    @property
    def ordered(self) -> list[str]:
        return [*self.of("train"), *self.of("unseen")]

    @property
    def shown(self) -> list[str]:
        """Domains with a column of their own."""
        return self.ordered if len(self.roles) <= MAX_DOMAIN_COLUMNS else []

    @property
    def used_roles(self) -> list[Role]:
        return [role for role in _ROLES if self.of(role)]


def result_rows(sums: Mapping[str, MetricSums], roles: Mapping[str, Role]) -> tuple[ResultRow, ...]:
    """Return the rows of :func:`results_table`, from the metric sums of every domain.

    Args:
        sums: domain -> its metric sums.
        roles: domain -> "train" or "unseen", for every domain of ``sums``.
    """
    _check_roles(sums, roles)
    return tuple(
        ResultRow(domain, roles[domain], method, of_domain.num_users, dict(zip(METRICS, means, strict=True)))
        for domain, of_domain in sums.items()
        for method, means in zip(of_domain.methods, of_domain.means().tolist(), strict=True)
    )


def results_table(
    rows: Sequence[ResultRow],
    *,
    variant: Variant,
    split: Split,
    metrics: Sequence[str] = TABLE_METRICS,
    merged_methods: Collection[str] = (),
    synthetic: bool = False,
    table_format: TableFormat = "plain",
    num_digits: int = 4,
) -> str:
    """Return one table per metric; in every column the best merged method is marked.

    Args:
        rows: one per domain and method; their order is that of the columns and rows.
        variant: how all rows were ranked; named in the header.
        split: what all rows were evaluated on; named in the header.
        metrics: tables to give, in this order.
        merged_methods: methods that compete for the mark; a column with fewer than two of them has no mark.
        synthetic: the header says that the data are generated.
        table_format: "plain" for a monospace font, or "markdown".
        num_digits: decimals.

    Returns:
        Text that ends in a newline.

    Raises:
        LayoutMismatchError: there are no rows, two rows for one domain and method, two roles or user counts for one
            domain, a metric that is missing or infinite, or a merged method without a row.
    """
    _check_format(table_format)
    domains, cells = _collect(rows, metrics)
    methods = list(dict.fromkeys(row.method for row in rows))
    unknown = sorted(set(merged_methods) - set(methods))
    if unknown:
        raise LayoutMismatchError(f"results table: no rows of the merged methods {unknown}; found rows of {methods}")

    tables, any_absent, any_marked = [], False, False
    for metric in metrics:
        values = {key: of_metric[metric] for key, of_metric in cells.items() if not math.isnan(of_metric[metric])}
        columns: list[list[Cell]] = []
        averaged = _averaged(domains, {domain for domain, _ in values})
        for column in _value_columns(domains, averaged, methods, values):
            merged = [
                value
                for method, value in zip(methods, column, strict=True)
                if value is not None and method in merged_methods
            ]
            best = max(merged) if len(merged) > 1 else None
            any_marked |= best is not None
            any_absent |= None in column
            columns.append(
                [
                    (_ABSENT, False)
                    if value is None
                    else (f"{value:.{num_digits}f}", method in merged_methods and value == best)
                    for method, value in zip(methods, column, strict=True)
                ]
            )
        tables.append(_layout(metric, domains, averaged, methods, columns, table_format))

    notes = []
    if any_marked:
        mark = "bold" if table_format == "markdown" else "*"
        notes.append(
            f"{mark}: best merged method in its column, before rounding; the paired differences show whether that is "
            "significant."
        )
    if any_absent:
        notes.append(_absent_note())
    return _page(_header(variant, split, domains, synthetic), tables, notes, table_format)


def differences_table(
    sums: Mapping[str, MetricSums],
    roles: Mapping[str, Role],
    *,
    baseline: str,
    split: Split,
    metrics: Sequence[str] = TABLE_METRICS,
    synthetic: bool = False,
    table_format: TableFormat = "plain",
    num_digits: int = 4,
) -> str:
    """Return paired differences to a baseline method on the same users, with 95 % normal intervals.

    A cell is ``difference ± half-width``, so the interval is the difference minus to plus the half-width; intervals
    without 0 are marked.

    Args:
        sums: domain -> its metric sums, all of one variant.
        roles: domain -> "train" or "unseen", for every domain of ``sums``.
        baseline: the method that the others are compared with; a domain without it, or with one user, has no
            differences.
        split: what was evaluated on; named in the header.
        metrics: tables to give, in this order.
        synthetic: the header says that the data are generated.
        table_format: "plain" for a monospace font, or "markdown".
        num_digits: decimals.

    Returns:
        Text that ends in a newline.

    Raises:
        LayoutMismatchError: there are no domains, domains of different variants or without a role, or no domain with
            the baseline.
        ClientError: as :func:`fedmerge.evaluation.sums.paired_difference`.
    """
    _check_roles(sums, roles)
    _check_format(table_format)
    variants = sorted({of_domain.variant for of_domain in sums.values()})
    if len(variants) != 1:
        raise LayoutMismatchError(
            f"differences table: domains of the variants {variants}; expected at least one domain, and one variant"
        )
    all_methods = list(dict.fromkeys(method for of_domain in sums.values() for method in of_domain.methods))
    if baseline not in all_methods:
        raise LayoutMismatchError(f"differences table: no domain has the baseline {baseline!r}; found {all_methods}")
    methods = [method for method in all_methods if method != baseline]
    domains = _Domains(
        {domain: roles[domain] for domain in sums}, {domain: of_domain.num_users for domain, of_domain in sums.items()}
    )

    def is_comparable(each: MetricSums, metric: str) -> bool:
        others = [each.mean(name, metric) for name in each.methods if name != baseline]
        known = baseline in each.methods and not math.isnan(each.mean(baseline, metric))
        return known and each.num_users > 1 and not all(map(math.isnan, others))

    def difference(group: Sequence[str], method: str, metric: str) -> Estimate | None:
        members = [sums[domain] for domain in group]
        if not members:
            return None
        if any(member.num_users < 2 or not {method, baseline} <= set(member.methods) for member in members):
            return None
        if any(math.isnan(member.mean(name, metric)) for member in members for name in (method, baseline)):
            return None
        if len(members) == 1:
            return paired_difference(members[0], method, baseline, metric)
        return paired_difference_of_mean(members, method, baseline, metric)

    tables, any_absent, any_marked = [], False, False
    for metric in metrics:
        averaged = _averaged(domains, {domain for domain, each in sums.items() if is_comparable(each, metric)})
        groups = [*([domain] for domain in domains.shown), *averaged.values()]
        columns: list[list[Cell]] = []
        for group in groups:
            differences = [difference(group, method, metric) for method in methods]
            columns.append([difference_cell(found, num_digits) for found in differences])
            any_absent |= None in differences
            any_marked |= any(marked for _, marked in columns[-1])
        title = f"{metric}, difference to {baseline}"
        tables.append(_layout(title, domains, averaged, methods, columns, table_format))

    notes = [
        "difference ± half-width of its 95 % interval, paired over users. "
        "The interval of a mean holds for other users of these domains, not for other domains."
    ]
    if any_marked:
        mark = "bold" if table_format == "markdown" else "*"
        notes.append(f"{mark}: the interval excludes 0; not corrected for the number of comparisons.")
    if any_absent:
        notes.append(_absent_note() + " A difference needs both methods and at least two users.")
    return _page(_header(next(iter(sums.values())).variant, split, domains, synthetic), tables, notes, table_format)


def _collect(
    rows: Sequence[ResultRow], metrics: Sequence[str]
) -> tuple[_Domains, dict[tuple[str, str], Mapping[str, float]]]:
    if not rows:
        raise LayoutMismatchError("results table: no rows; expected at least one method on one domain")
    roles: dict[str, Role] = {}
    num_users: dict[str, int] = {}
    cells: dict[tuple[str, str], Mapping[str, float]] = {}
    for row in rows:
        where = f"results table: {row.method!r} on {row.domain!r}"
        if row.role not in _ROLES:
            raise LayoutMismatchError(f"{where} has the role {row.role!r}; expected one of {list(_ROLES)}")
        if (row.domain, row.method) in cells:
            raise LayoutMismatchError(f"{where} is given twice; expected one row")
        expected = (roles.setdefault(row.domain, row.role), num_users.setdefault(row.domain, row.num_users))
        if (row.role, row.num_users) != expected:
            raise LayoutMismatchError(
                f"{where} has role and users {(row.role, row.num_users)}, other rows of this domain {expected}; "
                "evaluate every method on the same users"
            )
        for metric in metrics:
            if math.isinf(row.metrics.get(metric, math.inf)):
                raise LayoutMismatchError(
                    f"{where} has {metric} = {row.metrics.get(metric)}; expected a finite number (found "
                    f"{sorted(row.metrics)})"
                )
        cells[row.domain, row.method] = row.metrics
    return _Domains(roles, num_users), cells


def _check_roles(sums: Mapping[str, MetricSums], roles: Mapping[str, Role]) -> None:
    wrong = sorted(domain for domain in sums if roles.get(domain) not in _ROLES)
    if wrong:
        raise LayoutMismatchError(f"the domains {wrong} have no role; expected one of {list(_ROLES)} for each domain")


def _check_format(table_format: str) -> None:
    if table_format not in get_args(TableFormat):
        raise ValueError(f"table_format is {table_format!r}; expected one of {list(get_args(TableFormat))}")


def _averaged(domains: _Domains, with_values: Collection[str]) -> dict[Role, list[str]]:
    """Return role -> domains in its mean: one without any value, such as one that withholds them, is left out."""
    return {role: [domain for domain in domains.of(role) if domain in with_values] for role in domains.used_roles}


def _value_columns(
    domains: _Domains,
    averaged: Mapping[Role, Sequence[str]],
    methods: Sequence[str],
    values: Mapping[tuple[str, str], float],
) -> list[list[float | None]]:
    """A column a shown domain, then one a role: the unweighted mean over its domains, None where one is absent."""
    by_domain = {domain: [values.get((domain, method)) for method in methods] for domain in domains.ordered}
    means: list[list[float | None]] = []
    for members in averaged.values():
        means.append([_mean([by_domain[domain][i] for domain in members]) for i in range(len(methods))])
    return [*(by_domain[domain] for domain in domains.shown), *means]


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present and len(present) == len(values) else None


def _some_of(number: int, total: int) -> str:
    return str(total) if number == total else f"{number} of {total}"


def difference_cell(difference: Estimate | None, num_digits: int = 4) -> Cell:
    """Return ``difference ± half-width`` of the 95 % interval, marked if the interval excludes 0."""
    if difference is None:
        return _ABSENT, False
    rounded = round(difference.mean, num_digits) + 0.0  # no "-0.0000"
    text = f"{rounded:+.{num_digits}f} ± {difference.high - difference.mean:.{num_digits}f}"
    return text, difference.low > 0 or difference.high < 0


def _absent_note() -> str:
    return (
        f"{_ABSENT}: not evaluated, or withheld by the client. A mean leaves out domains without any value, and is "
        "shown if all others have one."
    )


def _header(variant: Variant, split: Split, domains: _Domains, synthetic: bool) -> list[str]:
    if variant not in VARIANTS or split not in get_args(Split):
        raise LayoutMismatchError(
            f"table of variant {variant!r} and split {split!r}; expected one of {list(VARIANTS)} and of "
            f"{list(get_args(Split))}"
        )
    counts = domains.num_users
    lines = [_SYNTHETIC] if synthetic else []
    lines.append(f"variant: {_VARIANT_TEXT[variant]}")
    lines.append(f"split: {split}")
    lines.append(f"users: {sum(counts.values()):,} in {len(counts)} {'domain' if len(counts) == 1 else 'domains'}")
    if not domains.shown:
        lines.append(f"columns: the means alone; the sums of each of the {len(counts)} domains are in metrics.parquet")
    return lines


def _layout(
    title: str,
    domains: _Domains,
    averaged: Mapping[Role, Sequence[str]],
    methods: Sequence[str],
    columns: Sequence[Sequence[Cell]],
    table_format: TableFormat,
) -> str:
    """Return the table of one metric: a row per method, under the column titles and the numbers of users."""
    means = [
        f"{_MEAN_TITLES[role]} ({_some_of(len(members), len(domains.of(role)))})" for role, members in averaged.items()
    ]
    unseen = set(domains.of("unseen"))
    titles = [*(f"{domain} (unseen)" if domain in unseen else domain for domain in domains.shown), *means]
    num_users = [*(f"{domains.num_users[domain]:,}" for domain in domains.shown), *("" for _ in means)]
    lines: list[tuple[str, list[Cell]]] = [
        (title, [(text, False) for text in titles]),
        ("users", [(text, False) for text in num_users]),
        *((method, [column[i] for column in columns]) for i, method in enumerate(methods)),
    ]
    return _markdown(lines) if table_format == "markdown" else plain_table(lines)


def _markdown(lines: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    rows = []
    for label, cells in lines:
        texts = [one_line(text).replace("|", "\\|") for text in (label, *(text for text, _ in cells))]
        marks = [False, *(marked for _, marked in cells)]
        rows.append(
            "| " + " | ".join(f"**{text}**" if mark else text for text, mark in zip(texts, marks, strict=True)) + " |"
        )
    return "\n".join([rows[0], "| --- |" + " ---: |" * len(lines[0][1]), *rows[1:]])


def plain_table(lines: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """Return lines of a label and cells as aligned text, with a rule below the first two."""
    # A space in place of the mark keeps the digits of a column aligned.
    table = [
        [one_line(label), *(one_line(text) + ("*" if marked else " ") for text, marked in cells)]
        for label, cells in lines
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = [
        "  ".join(
            [label.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        ).rstrip()
        for label, *cells in table
    ]
    return "\n".join([*rows[:2], "-" * (sum(widths) + 2 * len(widths[1:])), *rows[2:]])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of texts as lines whose columns begin below each other."""
    shown = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*shown, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]


def _page(header: Sequence[str], tables: Sequence[str], notes: Sequence[str], table_format: TableFormat) -> str:
    if table_format == "markdown":
        # Two spaces at the end of a line are a line break in Markdown.
        head = "  \n".join(f"**{line}**" if line == _SYNTHETIC else line for line in header)
        return "\n\n".join([head, *tables, "  \n".join(notes)]).rstrip() + "\n"
    return "\n\n".join(["\n".join(header), *tables, "\n".join(notes)]).rstrip() + "\n"
