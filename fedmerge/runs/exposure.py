"""What left each client in a run, by message, from its ledger."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fedmerge.errors import RunDirError
from fedmerge.files import read_lines

EXPOSURE_TABLE = "exposure.parquet"  # of a finished run
EXPOSURE_LINES = "exposure.jsonl"  # of one that is not
TOO_MUCH = "(too much)"  # name in the place of contents that were too large to list


@dataclass(frozen=True)
class Exposed:
    """The replies of a domain to messages of one type.

    Attributes:
        domain: that sent them.
        message: type of the message.
        num_replies: number of replies; of a finished run a lower bound, because its table has values.
        size_bytes: of all together.
    """

    domain: str
    message: str
    num_replies: int
    size_bytes: int


def read_exposure(folder: Path) -> list[Exposed]:
    """Return what left each client, by domain and in the order of arrival.

    Raises:
        RunDirError: the run has no ledger, or it is damaged.
    """
    table, lines = folder / EXPOSURE_TABLE, folder / EXPOSURE_LINES
    try:
        if table.exists():
            return _add_up(pq.read_table(table, columns=["domain", "message", "name", "size_bytes"]))
        if lines.exists():
            return _add_up_replies(read_lines(lines))
    except (OSError, LookupError, TypeError, pa.ArrowException) as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunDirError(
            f"{table if table.exists() else lines}: cannot be read ({found}). Copy the run folder again."
        ) from error
    raise RunDirError(f"{folder}: found neither {EXPOSURE_TABLE} nor {EXPOSURE_LINES}; no client has answered yet.")


def _add_up(values: pa.Table) -> list[Exposed]:
    """A reply has each name once, so the most frequent name counts the replies; errors are replies of their own."""
    by_name = values.group_by(["domain", "message", "name"], use_threads=False).aggregate(
        [("size_bytes", "sum"), ("size_bytes", "count")]
    )
    is_error = pc.starts_with(by_name["name"], "error")
    is_too_much = pc.equal(by_name["name"], TOO_MUCH)
    kind = pc.if_else(is_error, "error", pc.if_else(is_too_much, TOO_MUCH, "content"))
    by_kind = by_name.append_column("kind", kind).group_by(["domain", "message", "kind"], use_threads=False)
    sizes: Counter[tuple[str, str]] = Counter()
    replies: Counter[tuple[str, str]] = Counter()
    for row in by_kind.aggregate([("size_bytes_sum", "sum"), ("size_bytes_count", "max")]).to_pylist():
        key = row["domain"], row["message"]
        sizes[key] += row["size_bytes_sum_sum"]
        replies[key] += row["size_bytes_count_max"]
    return [Exposed(domain, message, replies[domain, message], total) for (domain, message), total in sizes.items()]


def _add_up_replies(lines: Iterable[Mapping[str, Any]]) -> list[Exposed]:
    sizes: Counter[tuple[str, str]] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    for line in lines:
        key = line["domain"], line["message"]
        numbers[key] += 1
        sizes[key] += sum(row["size_bytes"] for row in line["contents"])
    return [
        Exposed(domain, message, numbers[domain, message], total)
        for (domain, message), total in sorted(sizes.items(), key=lambda entry: str(entry[0][0]))
    ]
