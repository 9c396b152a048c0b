"""What the card of an export says of its run: the data, the privacy, the scores."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedmerge.config.privacy import ALLOWED, Policy
from fedmerge.errors import RunDirError
from fedmerge.evaluation.sums import BACKBONE, EXPERT, LAST_ITEM
from fedmerge.files import read_record
from fedmerge.merging.candidate import Provenance
from fedmerge.privacy.dp.statement import PRIVACY_FILE, summarise_statement
from fedmerge.runs.checkpoints import ADAPTERS, MERGED
from fedmerge.runs.reading import RunDetails, describe_run, is_run

METRIC = "ndcg@10"
_COMPARED = (BACKBONE, "popularity", LAST_ITEM, "item-knn", "sasrec")
_COUNTS = ("num_users", "num_items", "num_interactions")


def run_of_adapter(folder: Path) -> Path | None:
    """Return the run folder that an adapter lies in: as a merge, an expert, or a merge made after the run."""
    return next((parent for parent in folder.resolve().parents[1:3] if is_run(parent)), None)


def sections_of_adapter(folder: Path) -> str:
    """Return :func:`sections_of_run` for an adapter's folder; empty if it lies in no run."""
    run = run_of_adapter(folder)
    if run is None:
        return ""
    name, within = folder.resolve().name, folder.resolve().parent.name
    if within == ADAPTERS:
        return sections_of_run(run, EXPERT, name)
    return sections_of_run(run, label_of(folder) if within == MERGED else None)  # the run measured no later merge


def label_of(merge: Path) -> str | None:
    """Return the label of a merge, which is its row in the metric sums of its run."""
    return Provenance.from_dict(read_record(merge / "provenance.json")).label


def sections_of_run(run: Path, row: str | None, domain: str | None = None) -> str:
    """Return the sections Data, Privacy and Scores of a model card.

    Numbers of users, items and interactions have two significant digits.

    Args:
        run: the run folder.
        row: of the model in the run's metric sums; None if it has none.
        domain: of a row that is another model in each domain; None for a model that all domains share.

    Raises:
        RunDirError: a damaged record.
    """
    details = describe_run(run)
    parts = {"Data": _data(details), "Privacy": _privacy(details), "Scores": _scores(run, row, domain)}
    return "\n".join(line for title, lines in parts.items() for line in (f"## {title}", "", *lines, ""))


def _data(run: RunDetails) -> list[str]:
    if not run.participants:
        return ["The run folder says nothing about its participants."]
    rows = ["| domain | role | users | items | interactions |", "| --- | --- | ---: | ---: | ---: |"]
    for name, client in run.participants.items():
        counts = " | ".join(_about(client.get(count)) for count in _COUNTS)
        rows.append(f"| {name} | {client.get('role', '')} | {counts} |")
    generated = [name for name, client in run.participants.items() if client.get("synthetic")]
    whose = "All data" if len(generated) == len(run.participants) else f"The data of {', '.join(generated)}"
    return [
        "Histories of users of these domains. Domains with the role `unseen` trained nothing.",
        *([f"{whose} are **generated**, they are not of people."] if generated else []),
        "",
        *rows,
    ]


def _privacy(run: RunDetails) -> list[str]:
    policy: Policy = run.settings.get("privacy.policy", "adapter+catalog")
    lines = [
        f"The policy was `{policy}`: interactions stayed in their domains, and what could leave them is "
        f"{', '.join(sorted(ALLOWED.get(policy, ())))}.",
        "",
    ]
    statement = read_record(run.summary.folder / PRIVACY_FILE)
    if not statement:
        return [*lines, "There is no differential privacy: nothing bounds what the weights reveal about a user."]
    return [*lines, *(f"- {line}" for line in summarise_statement(statement))]


def _scores(run: Path, row: str | None, domain: str | None) -> list[str]:
    values: dict[str, dict[str, float]] = {}  # domain -> method -> mean
    for each in _measured(run):
        if domain in (None, each["domain"]) and math.isfinite(each["sum"]):  # NaN is withheld
            values.setdefault(each["domain"], {})[each["method"]] = each["sum"] / each["num_users"]
    values = {name: of for name, of in values.items() if row in of}
    if row is None or not values:
        return ["The run has no scores of this model on test users."]
    shown = [name for name in _COMPARED if name != row and any(name in of for of in values.values())]
    lines = [
        "NDCG@10 of the next item of test users among all items of their domain, also those that they had before.",
        "",
        f"| domain | {' | '.join(['this model', *shown])} |",
        f"| --- | {' | '.join(['---:'] * (len(shown) + 1))} |",
        *(f"| {name} | {' | '.join(_score(of.get(each)) for each in (row, *shown))} |" for name, of in values.items()),
    ]
    below = [name for name, of in values.items() if of[row] < of.get("popularity", 0.0)]
    return [*lines, *(["", f"**Popularity ranks better than this model in {', '.join(below)}.**"] if below else [])]


def _measured(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.parquet"
    wanted = [("split", "=", "test"), ("variant", "=", "unmasked"), ("metric", "=", METRIC)]
    if not path.is_file():
        return []
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, filters=wanted).to_pylist()
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise RunDirError(f"{path}: cannot be read ({reason}). Copy the run folder again.") from error
    return rows


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _about(count: Any) -> str:
    return f"about {int(float(f'{count:.2g}')):,}" if isinstance(count, int) else ""
