"""Which domains of two runs were evaluated on the same data and the same users."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmerge.errors import RunDirError
from fedmerge.evaluation.sums import BACKBONE, LAST_ITEM, VARIANTS, MetricSums, Variant
from fedmerge.files import table_or_empty
from fedmerge.report.against.difference import shared_rows
from fedmerge.report.tables import Role
from fedmerge.runs.metric_sums import read_domain_roles, read_metric_sums
from fedmerge.runs.reading import RunDetails, describe_run
from fedmerge.server.choice import served_row

# Rows that depend on a domain's data and evaluated users, and on no training: if they differ, so do the data.
DATA_ROWS = ("popularity", LAST_ITEM)
_OF_DATA = {
    "catalog_sha256": "catalog",
    "num_items": "number of items",
    "num_users": "number of users",
    "num_interactions": "number of interactions",
}


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished run with its metric sums on test.

    Attributes:
        run: what the folder says.
        sums: variant -> domain -> metric sums.
        roles: domain -> "train" or "unseen".
    """

    run: RunDetails
    sums: Mapping[Variant, Mapping[str, MetricSums]]
    roles: Mapping[str, Role]

    def served(self, domain: str) -> str:
        """Return the row of what a domain is served."""
        per_domain = table_or_empty(self.run.choice.get("per_domain"))
        return served_row(per_domain, str(self.run.summary.served), domain)

    def participant(self, domain: str) -> Mapping[str, Any]:
        """Return a client's description of its domain."""
        return self.run.participants.get(domain, {})


def read_evaluated_run(folder: Path) -> EvaluatedRun:
    """Read a run.

    Raises:
        RunDirError: the run is not finished or was not evaluated, or its folder is damaged.
    """
    run = describe_run(folder)
    if run.summary.state != "done":
        raise RunDirError(
            f"{folder}: the run is {run.summary.state}; expected a finished run. Resume it with "
            f"fedmerge run --resume {folder}"
        )
    if run.settings.get("until") == "train":
        raise RunDirError(
            f"{folder}: the run ends with its experts (until = 'train'); expected one that was evaluated. Compare runs "
            "with until = 'report'."
        )
    sums = {variant: read_metric_sums(folder, "test", variant) for variant in VARIANTS}
    return EvaluatedRun(run, sums, read_domain_roles(folder))


def find_differing_data(first: EvaluatedRun, other: EvaluatedRun) -> dict[str, str]:
    """Return domain -> why its scores cannot be compared; empty text where they can. Domains of either run, sorted."""
    domains = sorted({*first.sums["unmasked"], *other.sums["unmasked"]})
    return {domain: _why_not(first, other, domain) for domain in domains}


def _why_not(first: EvaluatedRun, other: EvaluatedRun, domain: str) -> str:
    of_first, of_other = (each.sums["unmasked"].get(domain) for each in (first, other))
    if of_first is None or of_other is None:
        return "evaluated in one of the runs only"
    described = first.participant(domain), other.participant(domain)
    different = [what for key, what in _OF_DATA.items() if described[0].get(key) != described[1].get(key)]
    if different:
        return f"other data: {', '.join(different)}"
    if of_first.num_users != of_other.num_users:
        return f"other test users: {of_first.num_users:,} against {of_other.num_users:,}"
    shared = shared_rows(of_first, of_other)
    both = [row for row in DATA_ROWS if {row} <= {*of_first.methods} & {*of_other.methods}]
    if both and not of_first.noise and not of_other.noise:
        return "" if {*both} <= {*shared} else f"other interactions or test users: {both[0]} scores differently"
    if BACKBONE in shared or _draws_equally(first, other):
        return ""
    return "other test users: drawn with another seed or number (seed, evaluation.test_users)"


def _draws_equally(first: EvaluatedRun, other: EvaluatedRun) -> bool:
    """Return True if the settings draw the same test users of the same data."""
    limits = [each.run.settings.get("evaluation.test_users", "none") for each in (first, other)]
    seeds = [each.run.settings.get("seed") for each in (first, other)]
    return limits[0] == limits[1] and (limits[0] == "none" or seeds[0] == seeds[1])
