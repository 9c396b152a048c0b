"""What left each client of a run and what differential privacy bounds of it, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedmerge.escaping import one_line
from fedmerge.privacy.dp.statement import summarise_statement
from fedmerge.runs.exposure import Exposed


def ledger_text(run: str, exposed: Sequence[Exposed], statement: Mapping[str, Any]) -> str:
    """Return a table of the replies and the paragraph on differential privacy.

    Args:
        run: id of the run.
        exposed: of :func:`fedmerge.runs.exposure.read_exposure`.
        statement: content of ``privacy.json``; empty without one.
    """
    rows = [("domain", "message", "replies", "bytes")]
    rows += [(one_line(of.domain), one_line(of.message), f"{of.num_replies:,}", f"{of.size_bytes:,}") for of in exposed]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{one_line(run)}: what left each client", ""]
    for row in rows:
        cells = (row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].rjust(widths[2]), row[3].rjust(widths[3]))
        lines.append("  ".join(cells))
    lines.insert(3, "-" * (sum(widths) + 6))
    if statement:
        lines += ["", *(one_line(sentence) for sentence in summarise_statement(statement))]
    else:
        lines += ["", "No differential privacy: neither dp.mode nor privacy.metrics = 'noised' was set."]
    return "\n".join(lines) + "\n"
