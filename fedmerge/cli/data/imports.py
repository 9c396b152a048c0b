"""``fedmerge data import``: import a domain folder from a source."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.domain.importers.events import ImportReport, ImportSettings
    from fedmerge.domain.importers.source_files import Progress

SECONDS_BETWEEN_LINES = 30.0  # progress; on a terminal the line is overwritten
SECONDS_BETWEEN_RENEWALS = 0.5


def add_importers(data: "Commands") -> None:
    """Add ``import`` and its formats to ``fedmerge data``."""
    importer = data.add_parser("import", help="import a domain").add_subparsers(required=True, metavar="FORMAT")
    _add_mergerec(importer)
    _add_table(importer)
    _add_amazon(importer)
    _add_movielens(importer)


def _add_mergerec(importer: "Commands") -> None:
    mergerec = importer.add_parser("mergerec", help="MergeRec's files: train, val, test, meta_data, smap and umap.json")
    mergerec.add_argument("source", type=Path, metavar="SRC")
    _add_target(mergerec, "the name of SRC")
    mergerec.set_defaults(command=_import_mergerec)


def _add_table(importer: "Commands") -> None:
    table = importer.add_parser(
        "table",
        aliases=["csv", "parquet"],
        help="tables with named columns (CSV, TSV, JSON lines, Parquet, Excel, RecBole): interactions, and a catalog",
        description="Import tables with named columns. The format of each file is recognised, and so are delimiter, "
        "encoding and the header of text.",
    )
    _add_target(table, "the name of the folder that holds the interactions")
    table.add_argument("--interactions", type=Path, required=True, metavar="FILE", help="one row per interaction")
    table.add_argument(
        "--catalog",
        type=Path,
        default=None,
        metavar="FILE",
        help="one row per item (default: items and texts are taken from the interactions)",
    )
    for column, default in (("user", "user_id"), ("item", "item_id"), ("time", "timestamp")):
        table.add_argument(f"--{column}-column", default=default, metavar="NAME", help=f"(default: {default})")
    table.add_argument(
        "--rating-column", default=None, metavar="NAME", help="column of ratings, required by --min-rating"
    )
    table.add_argument("--catalog-item-column", default=None, metavar="NAME", help="(default: --item-column)")
    for column in ("title", "brand", "category"):
        table.add_argument(f"--{column}-column", default=None, metavar="NAME", help=f"(default: {column}, if present)")
    table.add_argument(
        "--text-columns",
        default=None,
        metavar="A,B=N,…",
        help="the items' attributes in the order of their text, instead of title, brand and category; of B at most N "
        "tokens are read",
    )
    table.add_argument(
        "--time-format",
        action="append",
        default=[],
        metavar="FORMAT",
        help="iso, s, ms, us or ns since 1970, excel (days), number (its order counts), or a pattern such as "
        "'%%d/%%m/%%Y %%H:%%M'; several: the first that fits a value (default: recognised)",
    )
    for prefix, file in (("", "interactions"), ("catalog-", "catalog")):
        table.add_argument(
            f"--{prefix}delimiter", default=None, metavar="D", help=f"of the {file}: one character, or 'tab'"
        )
        table.add_argument(f"--{prefix}encoding", default=None, metavar="NAME", help=f"of the {file}, such as cp1252")
        table.add_argument(
            f"--{prefix}column-names", default=None, metavar="A,B,…", help=f"of {file} without a header: all columns"
        )
    _add_rows(table, k_core=None)
    table.set_defaults(command=_import_table)


def _add_amazon(importer: "Commands") -> None:
    amazon = importer.add_parser("amazon", help="raw Amazon reviews and metadata of 2014, 2018 or 2023, plain or gzip")
    _add_target(amazon, "the name of the file of reviews, without reviews_, _5 and suffixes")
    amazon.add_argument("--reviews", type=Path, required=True, metavar="FILE", help="reviews of one category")
    amazon.add_argument("--metadata", type=Path, required=True, metavar="FILE", help="metadata of the same category")
    amazon.add_argument("--keep-items-without-text", action="store_true", help="keep items without metadata or text")
    _add_rows(amazon, k_core=5)
    amazon.set_defaults(command=_import_amazon)


def _add_movielens(importer: "Commands") -> None:
    movielens = importer.add_parser("movielens", help="a MovieLens release in the layout of ml-100k, ml-1m or ml-32m")
    movielens.add_argument("source", type=Path, metavar="SRC", help="the folder or the zip archive")
    _add_target(movielens, "the name of SRC without .zip")
    _add_rows(movielens, k_core=None)
    movielens.set_defaults(command=_import_movielens)


def _add_target(parser: argparse.ArgumentParser, default_name: str) -> None:
    parser.add_argument(
        "destination", type=Path, metavar="DST", help="folder of domain folders; the domain is written to DST/NAME"
    )
    parser.add_argument("--name", default=None, help=f"the domain's name (default: {default_name})")
    parser.add_argument("--overwrite", action="store_true", help="replace the domain if it exists")
    parser.add_argument(
        "--public-catalog", action="store_true", help="let the catalog leave the client (default: it never does)"
    )
    parser.add_argument("--private-catalog", action=_RemovedFlag, nargs=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "--catalog-source",
        choices=("given", "interactions"),
        default=None,
        help="given: a table of items, whatever users did, as differential privacy by user needs it; interactions: the "
        "items that users' interactions left (default: what the importer knows)",
    )


class _RemovedFlag(argparse.Action):
    """Name the remedy for a flag that was removed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parser.error("--private-catalog: removed; leave it out: a catalog is private unless you give --public-catalog")


def _add_rows(parser: argparse.ArgumentParser, k_core: int | None) -> None:
    parser.add_argument(
        "--k-core",
        type=int,
        default=k_core,
        metavar="K",
        help=f"drop users and items with fewer than K interactions, repeatedly (default: {k_core or 'keep all'})",
    )
    parser.add_argument(
        "--keep-all-items",
        action="store_true",
        help="keep the whole catalog and all rows of its items; --k-core then drops only users",
    )
    parser.add_argument("--min-rating", type=float, default=None, metavar="R", help="leave out lower ratings")
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="fail if a larger share of a file's rows is unusable (default: 0.01); a share above 0.1 is also the "
        "consent to lose it for other reasons",
    )


def _import_mergerec(options: argparse.Namespace) -> int:
    from fedmerge.domain.importers.mergerec import import_mergerec

    manifest = import_mergerec(
        options.source,
        options.destination,
        name=options.name,
        overwrite=options.overwrite,
        public_catalog=options.public_catalog,
        catalog_source=options.catalog_source,
    )
    print(
        f"{options.destination / manifest.name}: {manifest.num_users} users, {manifest.num_items} items, "
        f"{manifest.num_interactions} interactions"
    )
    return 0


def _import_table(options: argparse.Namespace) -> int:
    from fedmerge.domain.importers.reading.table import FileOptions
    from fedmerge.domain.importers.table import Columns, Reading, import_table

    def file_options(prefix: str) -> FileOptions:
        delimiter = getattr(options, f"{prefix}delimiter")
        names = getattr(options, f"{prefix}column_names")
        return FileOptions(
            "\t" if delimiter in ("tab", "\\t") else delimiter,
            getattr(options, f"{prefix}encoding"),
            None if names is None else _names(names),
        )

    texts = None if options.text_columns is None else _names(options.text_columns)
    columns = Columns(**_columns(options), texts=texts)
    reading = Reading(file_options(""), file_options("catalog_"), tuple(options.time_format))
    files = (options.interactions, options.catalog)
    return _import(options, lambda dst, settings: import_table(*files, dst, columns, settings, reading))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _import_amazon(options: argparse.Namespace) -> int:
    from fedmerge.domain.importers.amazon import import_amazon

    files, keep = (options.reviews, options.metadata), options.keep_items_without_text
    return _import(options, lambda dst, settings: import_amazon(*files, dst, settings, keep_items_without_text=keep))


def _import_movielens(options: argparse.Namespace) -> int:
    from fedmerge.domain.importers.movielens import import_movielens

    return _import(options, lambda dst, settings: import_movielens(options.source, dst, settings))


def _import(options: argparse.Namespace, read: "Callable[[Path, ImportSettings], ImportReport]") -> int:
    """Import into ``DST`` with the settings of the command, showing progress, and print what was imported."""
    from fedmerge.domain.importers.events import ImportSettings
    from fedmerge.report.domains import import_text, import_warnings

    with _progress() as progress:
        settings = ImportSettings(
            name=options.name,
            overwrite=options.overwrite,
            public_catalog=options.public_catalog,
            k_core=options.k_core,
            keep_all_items=options.keep_all_items,
            catalog_source=options.catalog_source,
            min_rating=options.min_rating,
            max_bad_share=options.max_bad_share,
            progress=progress,
        )
        report = read(options.destination, settings)
    print(f"{options.destination / report.manifest.name}: {import_text(report)}")
    for warning in import_warnings(report):
        print(f"fedmerge: WARNING: {warning}", file=sys.stderr)
    return 0


def _columns(options: argparse.Namespace) -> dict[str, str]:
    names = ("user", "item", "time", "rating", "catalog_item", "title", "brand", "category")
    return {name: getattr(options, f"{name}_column") for name in names}


@contextmanager
def _progress() -> Iterator["Progress"]:
    """Show the progress of long imports on standard error."""
    terminal = sys.stderr.isatty()
    start = last = time.monotonic()
    shown = False

    def show(file: str, num_rows: int, share: float) -> None:
        nonlocal last, shown
        now = time.monotonic()
        if now - last >= (SECONDS_BETWEEN_RENEWALS if terminal else SECONDS_BETWEEN_LINES):
            last, shown = now, True
            text = f"{file}: {num_rows:,} rows, {100 * share:.0f} % read, {now - start:.0f} s"
            print(f"\r\x1b[K{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if terminal and shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
