"""``fedmerge report``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_runs_folder

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    report = commands.add_parser(
        "report", help="write the HTML page of a run or a benchmark: one file without network access"
    )
    report.add_argument("run", metavar="RUN|BENCH", help="run or benchmark folder, or the beginning of a run id")
    add_runs_folder(report)
    report.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="file to write (default: report.html in the folder)"
    )
    report.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    from fedmerge.errors import RunDirError
    from fedmerge.files import write_text
    from fedmerge.report.bench.page import bench_page
    from fedmerge.report.bench_tables import is_bench, read_bench_tables
    from fedmerge.report.run.page import run_page
    from fedmerge.runs.folder import REPORT_PAGE
    from fedmerge.runs.reading import find_run

    folder = Path(options.run)
    if is_bench(folder):
        text = bench_page(read_bench_tables(folder))
    else:
        folder = find_run(options.run, options.dir)
        text = run_page(folder)
    out = options.out or folder / REPORT_PAGE
    if not out.parent.is_dir() or out.is_dir():
        raise RunDirError(f"{out}: expected a file name in an existing folder. Give another --out.")
    write_text(out, text)
    print(out)
    return 0
