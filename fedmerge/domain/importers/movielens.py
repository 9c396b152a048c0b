"""Import a domain from a MovieLens release (GroupLens).

Layouts: ml-100k; ml-1m (also ml-10m); ml-32m (also ml-20m, ml-25m, ml-latest).
"""

import itertools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from fedmerge.domain.importers.bad_rows import BadRows, FileReport
from fedmerge.domain.importers.events import (
    DEFAULT_SETTINGS,
    LOW_RATING,
    ImportReport,
    ImportSettings,
    prepare,
    write_rows,
)
from fedmerge.domain.importers.reading.delimited import delimited_table
from fedmerge.domain.importers.reading.events import EventColumns, read_events
from fedmerge.domain.importers.reading.table import NUMBER, FileOptions, Table, check_columns
from fedmerge.domain.importers.source_files import Progress, SourceFile, read_lines
from fedmerge.domain.importers.store import EventStore
from fedmerge.domain.manifest import folder_name
from fedmerge.errors import DomainError

NO_GENRES = "(no genres listed)"
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a release: ratings, movies and, in ml-100k, genres; and whether movies lists unrated ones."""

    name: str
    ratings: str
    movies: str
    others: tuple[str, ...] = ()
    lists_unrated: bool = False


LAYOUTS = (
    Layout("ml-100k", "u.data", "u.item", ("u.genre",)),
    Layout("ml-1m", "ratings.dat", "movies.dat", lists_unrated=True),
    Layout("ml-32m", "ratings.csv", "movies.csv"),
)

Row = tuple[int, Sequence[str]]  # number of the line, values
Movies = dict[str, tuple[str, str]]  # title and genres by id
RATINGS = EventColumns("userId", "movieId", "timestamp", "rating")
MOVIE_COLUMNS = ("movieId", "title", "genres")


def import_movielens(
    src: Path,
    dst: Path,
    settings: ImportSettings = DEFAULT_SETTINGS,
) -> ImportReport:
    """Import a release, an unpacked folder or the zip archive, as the domain folder ``dst/name``.

    A movie's category is its genres, its brand is empty. Every rating is an interaction, unless settings.min_rating is
    set.

    Args:
        src: the folder or the zip archive with the files of one layout.
        dst: folder that holds the domains.
        settings: the name defaults to that of src without ``.zip``.

    Raises:
        DomainError: files of no layout or of several, an unreadable file, too many bad rows, no rows left, or a folder
            that may not be written.
    """
    folder = prepare(dst, settings, folder_name(src).removesuffix(".zip"))
    layout, files = _find(src)
    if layout.name == "ml-32m":
        movies, movies_report = _movies_csv(_csv(files[layout.movies], MOVIE_COLUMNS, settings))
        ratings = _csv(files[layout.ratings], RATINGS.names(), settings)
    else:
        movies_bad = BadRows(str(files[layout.movies]), "line", settings.max_bad_share)
        if layout.name == "ml-100k":
            movies, movies_report = _movies_100k(files["u.genre"], files["u.item"], movies_bad)
        else:
            movies, movies_report = _movies_1m(files["movies.dat"], movies_bad)
        ratings = _ratings(files[layout.ratings], "\t" if layout.name == "ml-100k" else "::", settings)
    if not movies:
        raise DomainError(f"{files[layout.movies]}: found no movies. Use a complete copy of the release.")
    with EventStore(folder, {movie: code for code, movie in enumerate(movies)}) as store:
        for batch in read_events(ratings, RATINGS, (), settings.min_rating):
            store.drop(LOW_RATING, batch.num_low)
            store.add(batch.rows, ratings.bad)
        store.flush(ratings.bad)
        report = ratings.bad.report(store.num_good)
        store.select(settings.k_core, settings.keep_all_items)
        titles, categories = zip(*movies.values(), strict=True)
        return write_rows(
            folder,
            store,
            settings,
            attributes={"title": titles, "brand": [""] * len(movies), "category": categories},
            source=f"MovieLens, layout of {layout.name}, {folder_name(src)!r}",
            files=(report, movies_report),
            lists_all_items=layout.lists_unrated,
        )


def _find(src: Path) -> tuple[Layout, dict[str, SourceFile]]:
    """Find the layout whose files are present; return it with the files by name."""
    expected = " or ".join(", ".join((layout.ratings, layout.movies, *layout.others)) for layout in LAYOUTS)
    if src.is_dir():
        files = {path.name: SourceFile(path) for path in sorted(src.iterdir()) if path.is_file()}
    elif src.exists():
        try:
            with zipfile.ZipFile(src) as archive:
                members = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
        except (zipfile.BadZipFile, OSError) as error:
            raise DomainError(
                f"{src}: cannot be read as a zip archive ({error}). Give the folder or a complete archive of a release."
            ) from error
        files = {member.rsplit("/", 1)[-1]: SourceFile(src, member) for member in members}
    else:
        raise DomainError(f"{src}: no such folder or file. Check the path.")
    found = [layout for layout in LAYOUTS if {layout.ratings, layout.movies, *layout.others} <= files.keys()]
    if len(found) != 1:
        which = ", ".join(layout.name for layout in found) or "no release"
        raise DomainError(
            f"{src}: found the files of {which}, expected those of exactly one release: {expected}. "
            "Give the folder or the archive of one release."
        )
    return found[0], files


def _csv(source: SourceFile, names: Sequence[str], settings: ImportSettings) -> Table:
    options = FileOptions(",", "utf-8")
    table = delimited_table(source, names, settings.max_bad_share, settings.progress, options)
    check_columns(table, names)
    return table


def _movies_csv(table: Table) -> tuple[Movies, FileReport]:
    columns = (batch.to_pylist() for batch in table.batches(MOVIE_COLUMNS))
    rows = ((row[NUMBER], [row[name] for name in MOVIE_COLUMNS]) for batch in columns for row in batch)
    return _collect_movies(rows, table.bad)


def _movies_1m(source: SourceFile, bad: BadRows) -> tuple[Movies, FileReport]:
    return _collect_movies(_split(source, "::", lambda num_fields: num_fields == 3, bad), bad)


def _movies_100k(genres: SourceFile, source: SourceFile, bad: BadRows) -> tuple[Movies, FileReport]:
    """Read the movies of u.item: id, title, two dates, address, and a 0 or 1 for each genre of u.genre."""
    genres_bad = BadRows(str(genres), "line", 0)
    names = [name for _, (name, _) in _split(genres, "|", lambda num_fields: num_fields == 2, genres_bad)]
    genres_bad.report(len(names))
    rows = _split(source, "|", lambda num_fields: num_fields == 5 + len(names), bad)
    return _collect_movies(
        (
            (n, (*values[:2], "|".join(name for name, flag in zip(names, values[5:], strict=True) if flag == "1")))
            for n, values in rows
        ),
        bad,
    )


def _collect_movies(rows: Iterator[Row], bad: BadRows) -> tuple[Movies, FileReport]:
    """Collect movies from rows of id, title and genres, separated by bars; the first row of an id counts."""
    movies: Movies = {}
    for number, (movie, title, genres) in rows:
        if not movie:
            bad.add(number, "no movie id")
        elif movie in movies:
            bad.add(number, "the movie has a row already")
        else:
            movies[movie] = (title.strip(), " ".join(genre for genre in genres.split("|") if genre != NO_GENRES))
    return movies, bad.report(len(movies))


def _ratings(source: SourceFile, separator: str, settings: ImportSettings) -> Table:
    """Open the lines of user, movie, rating and time as a table."""
    columns = (RATINGS.user, RATINGS.item, "rating", RATINGS.time)
    bad = BadRows(str(source), "line", settings.max_bad_share)

    def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        rows = _split(source, separator, lambda num_fields: num_fields == len(columns), bad, settings.progress)
        while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
            numbers, values = zip(*some, strict=True)
            texts = dict(zip(columns, zip(*values, strict=True), strict=True))
            yield pa.record_batch({**{name: pa.array(texts[name]) for name in names}, NUMBER: pa.array(numbers)})

    return Table(str(source), "MovieLens", columns, batches, bad)


def _split(
    source: SourceFile,
    separator: str,
    fits: Callable[[int], bool],
    bad: BadRows,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield the fields of each line with a fitting number of them; UTF-8 (ml-10m) or else Latin-1 (ml-100k, ml-1m)."""
    for number, line in enumerate(read_lines(source, progress), 1):
        if line.isspace():
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError:
            text = line.decode("latin-1")
        fields = text.rstrip("\r\n").split(separator)
        if fits(len(fields)):
            yield number, fields
        else:
            bad.add(number, f"wrong number of fields separated by {separator!r}")
