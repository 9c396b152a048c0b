"""``fedmerge runs`` and ``fedmerge show``."""

import argparse
import json
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_runs_folder

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add them to the parser."""
    runs = commands.add_parser("runs", help="list runs: what they were, how they ended, what is served")
    add_runs_folder(runs)
    runs.add_argument("--json", action="store_true", help="machine-readable output")
    runs.set_defaults(command=_runs)
    show = commands.add_parser("show", help="show a run: who took part, coefficients, results, files")
    show.add_argument("run", metavar="RUN", help="a run folder, or the beginning of a run's id")
    add_runs_folder(show)
    show.add_argument("--json", action="store_true", help="machine-readable output")
    show.set_defaults(command=_show)


def _runs(options: argparse.Namespace) -> int:
    from fedmerge.report.runs import runs_table, summary_record
    from fedmerge.runs import list_runs, summarise_run

    summaries = [summarise_run(folder) for folder in list_runs(options.dir)]
    if options.json:
        print(json.dumps([summary_record(summary) for summary in summaries], indent=2, ensure_ascii=False))
    elif summaries:
        print(runs_table(summaries), end="")
    else:
        print(f"{options.dir}: no run in it")
    return 0


def _show(options: argparse.Namespace) -> int:
    from fedmerge.report.runs import run_record, run_text
    from fedmerge.runs import describe_run, find_run

    run = describe_run(find_run(options.run, options.dir))
    print(json.dumps(run_record(run), indent=2, ensure_ascii=False) if options.json else run_text(run).rstrip())
    return 0
