"""What the page of a run costs by number of domains: seconds, memory above the imports, size of the page.

    python benchmarks/federation/bench_report.py --num-domains 200 1000 10000

The tables are drawn at random, with six rows by domain. The named alternative is the page with every domain in every
table, as runs of up to `many.MOST_DOMAINS` domains have it; it is measured up to --all-shown domains.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support" / "runs"))

from report_folders import give_many_domains, make_reported_run
from run_folders import make_place

MEASURED = """
import resource, sys, time
from pathlib import Path
from fedmerge.report.run import many
from fedmerge.report.run.page import run_page
if sys.argv[2] == "all":
    many.MOST_DOMAINS = 10**9
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
page = run_page(Path(sys.argv[1]))
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(time.process_time() - started, used * 1024, len(page.encode()))
"""


def main() -> None:
    """Print a row for each number of domains and each form of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-domains", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--all-shown", type=int, default=1000, help="largest number of domains for the alternative")
    options = parser.parse_args()
    print(f"{'domains':>8}{'shown':>8}{'CPU s':>8}{'MB':>8}{'page, MB':>10}{'kB a domain':>13}")
    with tempfile.TemporaryDirectory(prefix="fedmerge-") as folder:
        place = make_place(Path(folder))
        for number in options.num_domains:
            run = make_reported_run(place, f"domains-{number}")
            give_many_domains(run, number)
            for shown in ("worst", "all") if number <= options.all_shown else ("worst",):
                command = [sys.executable, "-c", MEASURED, str(run), shown]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                cpu, memory, size = map(float, done.stdout.split())
                columns = f"{number:>8,}{shown:>8}{cpu:>8.1f}{memory / 1e6:>8.0f}{size / 1e6:>10.2f}"
                print(f"{columns}{memory / 1e3 / number:>13.0f}", flush=True)


if __name__ == "__main__":
    main()
