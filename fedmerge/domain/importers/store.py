"""Rows of an import: a DuckDB database that removes repeats, selects the k-core and sorts, in bounded memory.

Only item ids, which the catalog needs anyway, are numbered in Python. Everything that grows with the rows or the users
lies in the database. What exceeds its memory goes to DuckDB's temporary files, in a hidden folder beside the domain
that is removed at the end. A database in memory that spills takes two thirds of the CPU time of one in a file.
"""

import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.interactions import SequencePart
from fedmerge.errors import DomainError

OUTSIDE_CORE = "outside the k-core"
OF_SHORT_USERS = "of users with fewer than k rows"
REPEATED = "the same user, item and time as an earlier row"
UNKNOWN_ITEM = "the item is not in the catalog"

# number: line or row of the file, for reports. user, item: ids, not empty. time: any unit; only the order counts.
ROWS = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        pa.field("user", pa.string(), nullable=False),
        pa.field("item", pa.string(), nullable=False),
        pa.field("time", pa.int64(), nullable=False),
    ]
)

Settings = dict[str, str | bool | int | float | list[str]]
# Extensions are never fetched: an import needs no network.
OFFLINE: Settings = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
# What DuckDB may hold; Python and Arrow need some 300 MiB more. Two threads, since each needs buffers of its own.
SETTINGS: Settings = {
    "memory_limit": "1GiB",
    "threads": 2,
    "preserve_insertion_order": False,  # the order is in the column "position"
    **OFFLINE,
}
ROWS_AT_ONCE = 1 << 20  # added to the database
USERS_AT_ONCE = 1 << 13  # read from it
LOCK = "lock"


class EventStore:
    """The rows of one import; a context manager that removes its files at the end.

    First :meth:`add` all rows and :meth:`flush`, then :meth:`select`; the other methods work on what is left.

    Args:
        folder: the domain folder to be written; the files lie beside it.
        items: code of each item, if the items are known before the rows; rows of other items are then bad. None numbers
            items in the order of their first row.

    Attributes:
        items: code by id.
        num_good: rows added, or left out by drop.
        num_rows: rows left.
        dropped: number of good rows that were left out, by reason.

    Raises:
        DomainError: from every method: the disk is full, or the files cannot be written.
    """

    def __init__(self, folder: Path, items: Mapping[str, int] | None = None) -> None:
        self.items: dict[str, int] = dict(items or {})
        self.num_good = self.num_rows = 0
        self.dropped: dict[str, int] = {}
        self._known = items is not None
        self._folder = folder
        self._pending: list[pa.RecordBatch] = []

    def __enter__(self) -> Self:
        with _refusing(self._folder), ExitStack() as stack:
            scratch = stack.enter_context(scratch_folder(self._folder))
            settings = {**SETTINGS, "temp_directory": str(scratch / "spill")}
            self._database = duckdb.connect(":memory:", config=settings)
            stack.callback(self._database.close)
            self._run("CREATE TABLE rows (position BIGINT, user_id VARCHAR, item INTEGER, moment BIGINT)")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, batch: pa.RecordBatch, bad: BadRows) -> None:
        """Add rows, in the order of the file; :meth:`flush` after the last.

        Args:
            batch: rows of the schema ROWS.
            bad: bad rows of the file, to which rows of unknown items are added.
        """
        self._pending.append(batch)
        if sum(map(len, self._pending)) >= ROWS_AT_ONCE:
            self.flush(bad)

    def flush(self, bad: BadRows) -> None:
        """Store the rows that were added; due before the file's report, since rows of unknown items may turn out bad.

        Args:
            bad: as for add.
        """
        if not self._pending:
            return
        table = pa.Table.from_batches(self._pending).combine_chunks()
        self._pending = []
        ids = pc.dictionary_encode(table.column("item")).combine_chunks()
        if self._known:
            codes = [self.items.get(item, -1) for item in ids.dictionary.to_pylist()]
        else:
            codes = [self.items.setdefault(item, len(self.items)) for item in ids.dictionary.to_pylist()]
        items = np.array(codes, np.int32)[ids.indices.to_numpy()]
        if not (known := items >= 0).all():
            bad.add_many(table.column("number").filter(pa.array(~known)), UNKNOWN_ITEM)
            table, items = table.filter(pa.array(known)), items[known]
        positions = np.arange(self.num_rows, self.num_rows + len(table))
        columns = [pa.array(positions), table.column("user"), pa.array(items), table.column("time")]
        self._database.register("pending", pa.table(columns, ["position", "user_id", "item", "moment"]))
        self._run("INSERT INTO rows SELECT * FROM pending")
        self._database.unregister("pending")
        self.num_rows += len(table)
        self.num_good += len(table)

    def drop(self, reason: str, count: int = 1) -> None:
        """Count good rows that are left out before they are added."""
        self.num_good += count
        self._count(reason, count)

    def select(self, k: int | None, users_only: bool = False) -> None:
        """Keep the k-core of the rows without repeats, see :meth:`core`.

        Of rows with equal user, item and time the first is kept. The k-core of a subset lies within the k-core of the
        whole, so a first k-core is safe and leaves fewer rows in which to look for repeats.
        """
        self._run(
            "CREATE TABLE users AS SELECT user_id, min(position) AS code FROM rows GROUP BY user_id "
            f"HAVING count(*) >= {k or 1}"
        )
        self._keep(
            "SELECT code, item, moment, position FROM rows JOIN users USING (user_id)",
            OF_SHORT_USERS if users_only else OUTSIDE_CORE,
        )
        self._run("DROP TABLE rows")
        self.core(k, users_only)
        before = self.num_rows
        self._keep(
            "SELECT code, item, moment, min(position) AS position FROM events GROUP BY code, item, moment", REPEATED
        )
        if self.num_rows < before:
            self.core(k, users_only)

    def core(self, k: int | None, users_only: bool = False) -> None:
        """Keep the largest set of rows in which each user and each item has at least k rows; all rows if k is None.

        Rows of users and items below k are dropped repeatedly, because each pass may push others below k. With
        ``users_only`` items may have any number of rows, so that no user decides about another one's rows.
        """
        if k is None:
            return
        columns = ("code",) if users_only else ("code", "item")
        while True:
            num_weak = 0
            for column in columns:
                self._run(
                    f"CREATE OR REPLACE TABLE weak_{column} AS "
                    f"SELECT {column} FROM events GROUP BY {column} HAVING count(*) < {k}"
                )
                num_weak += self._count_of(f"weak_{column}")
            if not num_weak:
                return
            self._keep(
                "SELECT * FROM events " + " ".join(f"ANTI JOIN weak_{column} USING ({column})" for column in columns),
                OF_SHORT_USERS if users_only else OUTSIDE_CORE,
            )

    def keep_items(self, kept: npt.NDArray[np.bool_], reason: str) -> None:
        """Keep the rows of some items.

        Args:
            kept: (number of item codes,) True for each item to keep.
            reason: why the others are left out.
        """
        chosen = pa.table({"item": pa.array(np.flatnonzero(kept), pa.int32())})
        self._keep("SELECT events.* FROM events SEMI JOIN chosen USING (item)", reason, chosen)

    def item_codes(self) -> npt.NDArray[np.int32]:
        """Return the codes of the items that have rows, ascending."""
        found = self._run("SELECT DISTINCT item FROM events ORDER BY item").fetchnumpy()["item"]
        return np.asarray(found, np.int32)

    def parts(self, item_index: npt.NDArray[np.int32]) -> Iterator[SequencePart]:
        """Yield the sequences, some users at a time: users by their first row that was added, items by time.

        Ties stay in the order of the rows.

        Args:
            item_index: (number of item codes,) index in the catalog of each item that has rows.
        """
        with _refusing(self._folder):
            users = self._batches(
                "SELECT any_value(user_id), count(*) FROM events JOIN users USING (code) GROUP BY code ORDER BY code",
                USERS_AT_ONCE,
            )
            take = _taker(self._batches("SELECT item FROM events ORDER BY code, moment, position", ROWS_AT_ONCE))
            for batch in users:
                lengths = batch.column(1).to_numpy()
                yield SequencePart(batch.column(0), lengths, item_index[take(int(lengths.sum()))])

    def _keep(self, query: str, reason: str, chosen: pa.Table | None = None) -> None:
        """Replace the events by the rows of a query on them, and count the others under the reason."""
        if chosen is not None:
            self._database.register("chosen", chosen)
        self._run(f"CREATE TABLE kept AS {query}")
        count = self._count_of("kept")
        self._run("DROP TABLE IF EXISTS events")
        self._run("ALTER TABLE kept RENAME TO events")
        self._count(reason, self.num_rows - count)
        self.num_rows = count

    def _count_of(self, table: str) -> int:
        [(count,)] = self._run(f"SELECT count(*) FROM {table}").fetchall()
        return int(count)

    def _count(self, reason: str, count: int) -> None:
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def _batches(self, query: str, batch_rows: int) -> Iterator[pa.RecordBatch]:
        reader: pa.RecordBatchReader = self._database.cursor().sql(query).to_arrow_reader(batch_rows)
        return iter(reader)

    def _run(self, query: str) -> duckdb.DuckDBPyConnection:
        with _refusing(self._folder):
            return self._database.execute(query)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yield a new private folder beside a domain folder, ``.<name>.import-…``, and remove it at the end.

    Those of killed imports of the same domain are removed first: they hold private interactions. An import that runs
    holds a lock, which ends with its process.

    Args:
        folder: the domain folder. Of its parents the nearest that exists holds the new folder, so that a failed import
            leaves no folders behind.

    Raises:
        OSError: the folder cannot be created.
    """
    parent = next(parent for parent in folder.absolute().parents if parent.is_dir())
    for left in parent.glob(f".{folder.name}.import-*"):
        with suppress(OSError), (left / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.import-", dir=parent, ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        with (scratch / f"{LOCK}.new").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            Path(file.name).rename(scratch / LOCK)  # only now can others find it, and it is locked
            yield scratch


def _taker(batches: Iterator[pa.RecordBatch]) -> Callable[[int], npt.NDArray[np.int32]]:
    """Return a function that takes the next so many values of the batches' only column."""
    rest = np.empty(0, np.int32)

    def take(count: int) -> npt.NDArray[np.int32]:
        nonlocal rest
        found, missing = [rest[:count]], count - len(rest)
        rest = rest[count:]
        while missing > 0:
            column = next(batches).column(0).to_numpy()
            found.append(column[:missing])
            rest, missing = column[missing:], missing - len(column)
        return np.concatenate(found)

    return take


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Turn errors of the database and its files into a DomainError."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DomainError(
            f"{folder}: the rows of the import could not be stored beside it ({reason}); nothing was changed. "
            f"Check the space and the permissions of {folder.parent} and try again."
        ) from error
