"""``fedmerge runs``, ``fedmerge show`` and ``fedmerge watch``."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_runs_folder

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add the commands to the parser."""
    runs = commands.add_parser("runs", help="list runs: settings, state, served merge")
    add_runs_folder(runs)
    runs.add_argument("--json", action="store_true", help="machine-readable output")
    runs.add_argument(
        "--federation", metavar="NAME", help="list the runs of a federation's server instead, with their state"
    )
    runs.set_defaults(command=_runs)
    actions = runs.add_subparsers(metavar="ACTION")
    clean = actions.add_parser(
        "clean", help="delete runs from which nothing can be lost, or the named ones; lists them, unless --yes"
    )
    clean.add_argument("runs", nargs="*", metavar="RUN", help="run folder, or the beginning of a run id")
    add_runs_folder(clean, again=True)
    clean.add_argument("--yes", action="store_true", help="delete; without it, list only")
    clean.set_defaults(command=_clean)
    show = commands.add_parser("show", help="show a run: participants, coefficients, results, files")
    show.add_argument("run", metavar="RUN", help="run folder, or the beginning of a run id")
    add_runs_folder(show)
    show.add_argument("--json", action="store_true", help="machine-readable output")
    show.set_defaults(command=_show)
    watch = commands.add_parser("watch", help="watch a run at work: its phases, who is waited for, the time left")
    watch.add_argument("run", metavar="RUN", help="run folder, or the beginning of a run id")
    add_runs_folder(watch)
    watch.set_defaults(command=_watch)


def _runs(options: argparse.Namespace) -> int:
    if options.federation is not None:
        return _submitted(options)
    from fedmerge.report.run.listing import runs_table, summary_record
    from fedmerge.runs.reading import list_runs, summarise_run

    summaries = [summarise_run(folder) for folder in list_runs(options.dir)]
    if options.json:
        print(json.dumps([summary_record(summary) for summary in summaries], indent=2, ensure_ascii=False))
    elif summaries:
        print(runs_table(summaries), end="")
    else:
        print(f"{options.dir}: no runs")
    return 0


def _clean(options: argparse.Namespace) -> int:
    from fedmerge.report.run.listing import cleaning_text
    from fedmerge.runs.overview.cleaning import delete_run, plan_cleaning
    from fedmerge.runs.reading import find_run

    planned = plan_cleaning(options.dir, [find_run(name, options.dir) for name in dict.fromkeys(options.runs)])
    if options.yes:
        for run in planned:
            if run.is_deleted:
                delete_run(run.folder)
    print(cleaning_text(planned, is_deleted=options.yes), end="")
    return 0


def _submitted(options: argparse.Namespace) -> int:
    from sim.machines.runs import find_connection, list_submitted

    runs = list_submitted(find_connection(options.federation))
    if options.json:
        print(json.dumps([asdict(run) for run in runs], indent=2, ensure_ascii=False))
        return 0
    for run in runs:
        numbers = f"{run.seconds:.0f} s  {run.received_bytes / 2**20:.1f} MiB received"
        print(f"{run.run or '(started elsewhere)'}  {run.status}  {numbers}  {run.started}  {run.flower_id}")
    if not runs:
        print(f"{options.federation}: no runs yet")
    return 0


def _show(options: argparse.Namespace) -> int:
    from fedmerge.report.run.listing import run_record, run_text
    from fedmerge.runs.reading import describe_run, find_run

    run = describe_run(find_run(options.run, options.dir))
    print(json.dumps(run_record(run), indent=2, ensure_ascii=False) if options.json else run_text(run).rstrip())
    return 0


def _watch(options: argparse.Namespace) -> int:
    from fedmerge.report.run.live import watch
    from fedmerge.runs.reading import find_run

    folder = find_run(options.run, options.dir)
    if watch(folder) == "done":
        print(f"{folder.name} is finished; see: fedmerge show {folder}")
        return 0
    print(f"{folder.name}: no process works on it; resume it with: fedmerge run --resume {folder}")
    return 1
