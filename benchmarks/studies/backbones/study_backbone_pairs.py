"""Study: how far are the backbones of finished benchmarks apart, paired over the same test users?

    python benchmarks/studies/backbones/study_backbone_pairs.py --bench configs/bench/amazon3/backbones.toml FOLDER

A benchmark pairs the rows of one data set. Here the data sets differ in their backbone alone and have the same test
users, which the ranks of popularity prove; so every row of one can be paired with every row of another. The ranks of
the first seed are read as they lie in the folder; nothing is ranked again. Several --bench are read as one. Each row is
compared with the same row of --baseline, by NDCG@10 in the mean over domains.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmerge.bench.config import load_bench
from fedmerge.bench.grid import Grid
from fedmerge.bench.outcomes import rows_on_test, tested_domains
from fedmerge.bench.ranking import sums_of_ranks
from fedmerge.evaluation.ranks import SELECTION_METRIC
from fedmerge.evaluation.sums import VARIANTS, MetricSums, Variant, estimate_mean, paired_difference_of_mean

WITNESS = "popularity"  # its ranks depend on users and targets alone


def files_of(benches: Sequence[tuple[Path, Path]], overrides: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Return domain -> "data set: row" -> file of test ranks.

    Raises:
        SystemExit: data sets whose test users differ.
    """
    files: dict[str, dict[str, Path]] = {}
    for file, folder in benches:
        grid = Grid(load_bench(file, overrides), folder.resolve())
        for place in grid.places():
            if place.seed != grid.bench.config.seeds[0] or place.left_out:
                continue
            for domain in tested_domains(grid, place):
                rows = rows_on_test(grid, place, domain)
                found = {f"{place.dataset}: {row}": cell.result for row, cell in rows.items() if cell.result.is_file()}
                files.setdefault(domain, {}).update(found)
    for domain, of_domain in files.items():
        witnesses = [np.load(file) for row, file in of_domain.items() if row.endswith(f": {WITNESS}")]
        same = all(np.array_equal(each["unmasked"], witnesses[0]["unmasked"]) for each in witnesses)
        if not same or len(witnesses) < len({row.partition(": ")[0] for row in of_domain}):
            raise SystemExit(f"{domain}: the data sets have other test users, or one lacks the row {WITNESS}")
    return files


def compare(sums: dict[str, dict[Variant, MetricSums]], baseline: str) -> None:
    """Print the mean of each row over domains, and its difference to the baseline's row."""
    for variant in VARIANTS:
        domains = [of_domain[variant] for of_domain in sums.values()]
        rows = [row for row in domains[0].methods if all(row in each.methods for each in domains)]
        print(f"\n{variant}, {SELECTION_METRIC}, mean of {', '.join(sums)}")
        for row in rows:
            mean = sum(estimate_mean(each, row, SELECTION_METRIC).mean for each in domains) / len(domains)
            line, other = f"{row:<60}{mean:.4f}", f"{baseline}: {row.partition(': ')[2]}"
            if other in rows and other != row:
                difference = paired_difference_of_mean(domains, row, other, SELECTION_METRIC)
                line += f"  − {other}: {difference.mean:+.4f} ± {difference.mean - difference.low:.4f}"
            print(line)


def main() -> None:
    """Read the ranks of all benchmarks and print the paired differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bench", type=Path, nargs=2, action="append", required=True, metavar=("FILE", "FOLDER"), help="a benchmark"
    )
    parser.add_argument("--baseline", default="minilm", help="data set that the others are compared with")
    parser.add_argument("--set", nargs="+", default=[], help="changed settings of the benchmarks, as they were run")
    options = parser.parse_args()
    files = files_of([(file, folder) for file, folder in options.bench], options.set)
    sums = {domain: sums_of_ranks(of_domain, domain, 2) for domain, of_domain in files.items()}
    compare(sums, options.baseline)


if __name__ == "__main__":
    main()
