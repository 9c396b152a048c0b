"""The interactions of a domain, its private half. Only client code may import this module.

Messages name rows and counts, never a user's id, because an error may travel further than the data.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fedmerge.domain.manifest import read_manifest
from fedmerge.domain.parquet import CELL_BYTES, LONGEST_TEXT, table_limits
from fedmerge.domain.tables import RESTORE, decode_table, read_file
from fedmerge.errors import DomainError

INTERACTIONS_FILE = "interactions.parquet"
SCHEMA = pa.schema([pa.field("user_id", pa.string()), pa.field("item_index", pa.int32())])
ROWS_AT_ONCE = 1 << 20  # written


class SequencePart(NamedTuple):
    """Some users of a domain, each with all items; as many parts as needed make the whole, in bounded memory.

    Attributes:
        user_ids: (u,) original ids, as Arrow strings.
        lengths: (u,) int64, interactions of each user.
        items: (t,) int32 item indices, user after user, each oldest first.
    """

    user_ids: pa.StringArray
    lengths: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Interactions:
    """The items of every user in time order, repeats included.

    Attributes:
        user_ids: (U,) original ids, unique.
        items: (T,) int32 item indices, user after user.
        offsets: (U + 1,) int64; user u owns ``items[offsets[u]:offsets[u + 1]]``, at least one.

    Raises:
        DomainError: no users, a repeated user, a user without interactions, or arrays of another type or length.
    """

    user_ids: tuple[str, ...]
    items: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        _check_arrays("Interactions", self.user_ids, self.items, self.offsets)

    @property
    def num_users(self) -> int:
        """Return the number of users U."""
        return len(self.user_ids)

    def sequence(self, user: int) -> npt.NDArray[np.int32]:
        """Return the items of one user, oldest first (a view).

        Args:
            user: index in [0, U).
        """
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def parts(self) -> Iterator[SequencePart]:
        """Yield the sequences, some users at a time.

        Raises:
            DomainError: a user id that is not valid UTF-8.
        """
        start = 0
        while start < self.num_users:
            last = int(np.searchsorted(self.offsets, self.offsets[start] + ROWS_AT_ONCE, "right")) - 1
            stop = max(last, start + 1)
            try:
                user_ids = pa.array(self.user_ids[start:stop], pa.string())
            except (pa.ArrowException, TypeError, UnicodeEncodeError) as error:
                raise DomainError(
                    "Interactions: a user id is not valid UTF-8 text. Correct it in the source."
                ) from error
            offsets = self.offsets[start : stop + 1]
            yield SequencePart(user_ids, np.diff(offsets), self.items[offsets[0] : offsets[-1]])
            start = stop


def make_interactions(
    user_ids: Sequence[str], sequences: Sequence[Sequence[int] | npt.NDArray[np.integer]]
) -> Interactions:
    """Make checked interactions from one sequence of item indices per user, oldest first.

    Args:
        user_ids: (U,) original ids, unique.
        sequences: U sequences, none empty.

    Raises:
        DomainError: as for Interactions.
    """
    if len(user_ids) != len(sequences):
        raise DomainError(
            f"Interactions: found {len(sequences)} sequences, expected {len(user_ids)}, one per user. Give one each."
        )
    offsets = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
    items = np.fromiter((item for sequence in sequences for item in sequence), np.int32, count=int(offsets[-1]))
    return Interactions(tuple(user_ids), items, offsets)


def interactions_fingerprint(interactions: Interactions) -> str:
    """Return the SHA-256 (hex) of users and sequences in order, independent of file, compression and library.

    Hashed are the JSON of the list of users, the offsets (``<i8``) and the items (``<i4``).
    """
    digest = hashlib.sha256(json.dumps(interactions.user_ids, separators=(",", ":")).encode())
    digest.update(interactions.offsets.astype("<i8").tobytes())
    digest.update(interactions.items.astype("<i4").tobytes())
    return digest.hexdigest()


class WrittenInteractions(NamedTuple):
    """What write_interactions wrote: counts, and the interactions_fingerprint."""

    num_users: int
    num_interactions: int
    sha256: str


def write_interactions(parts: Iterable[SequencePart], path: Path, num_items: int) -> WrittenInteractions:
    """Write ``interactions.parquet``, synced, in memory for one part and 8 bytes a user.

    Args:
        parts: at least one user; each user once.
        path: the file.
        num_items: items of the catalog.

    Raises:
        DomainError: an item index outside the catalog, or a user id that is too long.
        OSError: the file cannot be written.
    """
    digest = hashlib.sha256(b"[")
    ends = [np.zeros(1, np.int64)]
    with path.open("wb") as file:
        with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for table in _row_groups(_hashed(parts, digest, ends, num_items)):
                writer.write_table(table, ROWS_AT_ONCE)
        file.flush()
        os.fsync(file.fileno())
    digest.update(b"]")
    for part in ends:
        digest.update(part.astype("<i8").tobytes())
    # The items are hashed last; reading them again is cheaper than a copy.
    with pq.ParquetFile(path, pre_buffer=False) as written:
        for batch in written.iter_batches(ROWS_AT_ONCE, columns=["item_index"]):
            digest.update(batch.column(0).to_numpy().astype("<i4").tobytes())
    return WrittenInteractions(sum(map(len, ends)) - 1, int(ends[-1][-1]), digest.hexdigest())


def _hashed(
    parts: Iterable[SequencePart], digest: "hashlib._Hash", ends: list[npt.NDArray[np.int64]], num_items: int
) -> Iterator[pa.Table]:
    """Yield the rows of each part after checks; hash its users, and append the end of each user's rows to ends."""
    for part in parts:
        longest = pc.max(pc.utf8_length(part.user_ids)).as_py()
        if longest > LONGEST_TEXT:
            raise DomainError(
                f"Interactions: a user id has {longest:,} characters, at most {LONGEST_TEXT:,} are read. Shorten it in "
                "the source."
            )
        check_item_range("Interactions", part.items, num_items, first_row=int(ends[-1][-1]))
        cells = json.dumps(part.user_ids.to_pylist(), separators=(",", ":")).encode()
        digest.update(b"," * (len(ends) > 1) + cells[1:-1])
        ends.append(ends[-1][-1] + np.cumsum(part.lengths))
        rows = np.repeat(np.arange(len(part.lengths)), part.lengths)
        yield pa.table([part.user_ids.take(pa.array(rows)), pa.array(part.items)], schema=SCHEMA)


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join small tables to row groups of about ROWS_AT_ONCE rows."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(map(len, pending)) >= ROWS_AT_ONCE:
            yield pa.concat_tables(pending)
            pending = []
    if pending:
        yield pa.concat_tables(pending)


def load_interactions(folder: Path) -> Interactions:
    """Load the interactions of a domain folder and verify them against the manifest.

    Raises:
        DomainError: an invalid manifest, a damaged file, rows of a user that are not contiguous, an item index out of
            range, or content that differs from the manifest.
    """
    manifest = read_manifest(folder)
    path = folder / INTERACTIONS_FILE
    rows = manifest.num_interactions
    table = decode_table(read_file(path), str(path), SCHEMA, table_limits(rows, 2**20 + CELL_BYTES * rows))
    if not len(table):
        raise DomainError(f"{path}: found no interactions, expected at least one. {RESTORE}")
    users = table.column("user_id").combine_chunks().dictionary_encode()
    steps = np.diff(
        users.indices.to_numpy()
    )  # users are numbered in order of appearance, so 0 or 1 if rows are grouped
    returns = np.flatnonzero(steps < 0)
    if len(returns):
        raise DomainError(
            f"{path}: row {returns[0] + 1} belongs to an earlier user, expected contiguous rows of each user. {RESTORE}"
        )
    offsets = np.concatenate([[0], np.flatnonzero(steps) + 1, [len(table)]]).astype(np.int64)
    items = table.column("item_index").to_numpy()
    check_item_range(str(path), items, manifest.num_items)
    interactions = Interactions(tuple(users.dictionary.to_pylist()), items, offsets)
    found = (interactions.num_users, len(items), interactions_fingerprint(interactions))
    if found != (manifest.num_users, manifest.num_interactions, manifest.interactions_sha256):
        raise DomainError(
            f"{path}: found {found[0]} users and {found[1]} interactions with hash {found[2][:12]}…, the manifest "
            f"says {manifest.num_users} and {manifest.num_interactions} with {manifest.interactions_sha256[:12]}…; "
            f"the content was changed. {RESTORE}"
        )
    return interactions


def check_item_range(where: str, items: npt.NDArray[np.int32], num_items: int, first_row: int = 0) -> None:
    """Raise DomainError for an item index outside [0, num_items); the message names the first such row.

    Args:
        where: name of the rows for the message.
        items: (t,) item indices.
        num_items: items of the catalog.
        first_row: number of the first of these rows.
    """
    wrong = np.flatnonzero((items < 0) | (items >= num_items))
    if len(wrong):
        raise DomainError(
            f"{where}: {len(wrong)} rows have an item_index outside the catalog, the first is {items[wrong[0]]} in row "
            f"{first_row + wrong[0]}; expected 0 to {num_items - 1}. Correct the source and import the domain again."
        )


def _check_arrays(
    where: str, user_ids: tuple[str, ...], items: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]
) -> None:
    if not user_ids:
        raise DomainError(
            f"{where}: found 0 users, expected at least one. Import the domain again with its interactions."
        )
    if len(set(user_ids)) != len(user_ids):
        raise DomainError(
            f"{where}: found {len(set(user_ids))} different ids for {len(user_ids)} users, expected unique ids. "
            "Join the sequences of equal ids."
        )
    if items.dtype != np.int32 or items.ndim != 1 or offsets.dtype != np.int64 or offsets.shape != (len(user_ids) + 1,):
        raise DomainError(
            f"{where}: found items {items.dtype}{list(items.shape)} and offsets {offsets.dtype}{list(offsets.shape)}, "
            f"expected int32[T] and int64[{len(user_ids) + 1}]. Build them with make_interactions."
        )
    if offsets[0] != 0 or offsets[-1] != len(items):
        raise DomainError(
            f"{where}: offsets run from {offsets[0]} to {offsets[-1]}, expected 0 to {len(items)}. "
            "Build them with make_interactions."
        )
    empty = np.flatnonzero(np.diff(offsets) < 1)
    if len(empty):
        raise DomainError(
            f"{where}: found {len(empty)} users without interactions, beginning with user {empty[0]}, expected none. "
            "Leave them out."
        )
