"""``fedmerge report``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_open, add_runs_folder, open_page

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    report = commands.add_parser(
        "report",
        help="write the HTML page of a run or a benchmark, or of runs against each other: one file",
    )
    report.add_argument(
        "runs",
        nargs="+",
        metavar="RUN|BENCH",
        help="run or benchmark folder, or the beginning of a run id; several runs are compared with the first",
    )
    add_runs_folder(report)
    report.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="FILE",
        help="file to write (default: report.html in the folder; of several runs compared.html in the last one's)",
    )
    add_open(report)
    report.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    from fedmerge.errors import RunDirError
    from fedmerge.files import write_text
    from fedmerge.report.against.page import compare_page
    from fedmerge.report.bench.page import bench_page
    from fedmerge.report.bench_tables import is_bench, read_bench_tables
    from fedmerge.report.run.page import run_page
    from fedmerge.runs.folder import COMPARED_PAGE, REPORT_PAGE
    from fedmerge.runs.reading import find_run

    benches = [name for name in options.runs if is_bench(Path(name))]
    if benches and len(options.runs) > 1:
        raise RunDirError(
            f"report: found the benchmark {benches[0]} among {len(options.runs)} folders, expected one benchmark, or "
            "runs alone. A benchmark's page compares its own runs."
        )
    if benches:
        folder = Path(benches[0])
        text, name = bench_page(read_bench_tables(folder)), REPORT_PAGE
    else:
        folders = [find_run(run, options.dir) for run in options.runs]
        folder = folders[-1]
        text, name = (compare_page(folders), COMPARED_PAGE) if len(folders) > 1 else (run_page(folder), REPORT_PAGE)
    out = options.out or folder / name
    if not out.parent.is_dir() or out.is_dir():
        raise RunDirError(f"{out}: expected a file name in an existing folder. Give another --out.")
    write_text(out, text)
    print(out)
    if options.open:
        open_page(out)
    return 0
