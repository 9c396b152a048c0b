"""Runs as text and as JSON records: a table of all, and one in full."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmerge.errors import RunDirError
from fedmerge.escaping import one_line, printable
from fedmerge.files import read_record, table_or_empty
from fedmerge.report.html.page import size
from fedmerge.report.run.alone import their
from fedmerge.report.run.verdict import judge_run, verdict
from fedmerge.report.tables import aligned
from fedmerge.runs.overview.cleaning import RunToClean
from fedmerge.runs.reading import MergeRecord, RunDetails, RunSummary
from fedmerge.server.choice import CHOICE_FILE, served_row

MOST_LINES = 20  # of one kind, in text
_ABSENT = "-"


def runs_table(summaries: Sequence[RunSummary]) -> str:
    """Return a table with one line per run, and problems below it.

    Scores and verdicts are of what each domain is served.
    """
    rows = [("run", "state", "started (UTC)", "seconds", "domains", "served", "on test", "verdict")]
    problems = []
    for run in summaries:
        outcome = outcome_of(run)
        problems += [f"{run.id}: {problem}" for problem in (*run.problems, *outcome.problems)]
        rows.append(
            (
                run.id,
                run.state,
                f"{run.started:%Y-%m-%d %H:%M}" if run.started else _ABSENT,
                _ABSENT if run.seconds is None else f"{run.seconds:,.0f}",
                _domains(run),
                outcome.served or _ABSENT,
                _ABSENT if outcome.score is None else f"{run.metric} {outcome.score:.4f}",
                outcome.verdict or _ABSENT,
            )
        )
    lines = aligned(rows)
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, *map(one_line, problems)]) + "\n"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run serves and how good it is, in a few words.

    Attributes:
        served: models by number of domains, the most frequent first; None without results.
        score: test mean over the training domains of what each is served, unmasked.
        verdict: whether that is better than popularity and the last item; None without results.
        problems: sentences about damaged files.
    """

    served: str | None
    score: float | None
    verdict: str | None
    problems: tuple[str, ...] = ()


def outcome_of(run: RunSummary) -> Outcome:
    """Return the outcome of a run; without results, or with damaged ones, what is known of the merge."""
    if run.state != "done" or run.test is None:
        return Outcome(run.served, run.test, None)
    try:
        judged = judge_run(run.folder, read_record(run.folder / CHOICE_FILE))
    except RunDirError as error:
        return Outcome(run.served, run.test, None, (str(error),))
    models = judged["unmasked"].models
    counts = Counter(_kind(model.model, str(run.served)) for model in models).most_common()
    named = [f"{kind} in {number}" for kind, number in counts] if len(counts) > 1 else [counts[0][0]]
    scores = [model.score for model in models if model.role == "train"]
    score = math.fsum(scores) / len(scores) if scores else math.nan
    return Outcome(_some(named), None if math.isnan(score) else score, verdict(judged).short)


def _kind(row: str, served: str) -> str:
    """Return the label of the merge, ``own expert``, ``own head`` of whatever inputs, or ``federated head``."""
    if row == served:
        return served
    kind, _, _ = their(row).partition(" on ")
    return kind.removeprefix("their ").removeprefix("the ").removesuffix(", fused")


def _domains(run: RunSummary) -> str:
    unseen = f" + {len(run.unseen)} unseen" if run.unseen else ""
    return _some(run.train) + unseen + (f", {len(run.missing)} missing" if run.missing else "")


def cleaning_text(planned: Sequence[RunToClean], *, is_deleted: bool) -> str:
    """Return a line for each run: deleted or kept, its size, and why."""
    words = ("deleted" if is_deleted else "delete", "keep")
    lines = aligned(
        [
            (words[0] if run.is_deleted else words[1], run.folder.name, run.state, size(run.size_bytes), run.why)
            for run in planned
        ]
    )
    going = [run for run in planned if run.is_deleted]
    total = f"{len(going)} of {len(planned)} runs, {size(sum(run.size_bytes for run in going))}"
    end = f"deleted: {total}" if is_deleted else f"{total}. Nothing was deleted; add --yes to delete them."
    if not going:
        end = f"nothing to delete among {len(planned)} runs; name a run to delete it: fedmerge runs clean RUN"
    return "\n".join([*lines, end]) + "\n"


def summary_record(run: RunSummary) -> dict[str, Any]:
    """Return the same as JSON types; ``served`` and ``test`` are those of the merge."""
    outcome = outcome_of(run)
    return {
        "id": run.id,
        "folder": str(run.folder),
        "state": run.state,
        "started": run.started and run.started.isoformat(),
        "seconds": run.seconds,
        "train": list(run.train),
        "unseen": list(run.unseen),
        "missing": dict(run.missing),
        "methods": list(run.methods),
        "served": run.served,
        "metric": run.metric,
        "test": run.test,
        "outcome": {"served": outcome.served, "test": outcome.score, "verdict": outcome.verdict},
        "synthetic": run.synthetic,
        "problems": [*run.problems, *outcome.problems],
    }


def run_text(run: RunDetails) -> str:
    """Return a run's settings, participants, merges, served model, files and report."""
    summary, settings = run.summary, run.settings
    entries: list[tuple[str, Sequence[str]]] = [
        ("run", [f"{summary.id}{'  (SYNTHETIC DATA)' if summary.synthetic else ''}"]),
        ("state", [_state(summary)]),
        ("folder", [str(summary.folder)]),
        ("settings", [_settings(settings)]),
        ("participants", [_participant(name, client, run.experts) for name, client in run.participants.items()]),
        ("missing", [f"{name}: {reason}" for name, reason in summary.missing.items()]),
        ("failure", (run.failure or "").splitlines()),
        ("merges", [_merge(merge, run) for merge in run.merges]),
        ("merged later", [_merge(merge, run) for merge in run.remerges]),
        ("served", [_served(run), *_served_instead(run)] if summary.served else []),
        ("files", _files(summary)),
        ("problems", summary.problems),
    ]
    lines = []
    for title, values in entries:
        shown = list(values[:MOST_LINES])
        if len(values) > MOST_LINES:
            shown.append(f"and {len(values) - MOST_LINES} more; --json shows all")
        for number, value in enumerate(shown):
            lines.append(f"{'' if number else title:14}{one_line(value)}")
    return "\n".join(lines) + "\n" + (f"\n{printable(run.report)}" if run.report else "")


def run_record(run: RunDetails) -> dict[str, Any]:
    """Return the same as JSON types."""
    return {
        **summary_record(run.summary),
        "settings": dict(run.settings),
        "participants": {name: dict(client) for name, client in run.participants.items()},
        "excluded": dict(run.excluded),
        "experts": {name: dict(report) for name, report in run.experts.items()},
        "merges": [_merge_record(merge) for merge in run.merges],
        "remerges": [_merge_record(merge) for merge in run.remerges],
        "choice": dict(run.choice),
        "failure": run.failure,
        "report": run.report,
    }


def _merge_record(merge: MergeRecord) -> dict[str, Any]:
    """Return the entries of ``provenance.json``, but the loss curve."""
    entries = {key: value for key, value in merge.provenance.to_dict().items() if key != "losses"}
    return {"folder": str(merge.folder), **entries}


def coefficients_text(coefficients: Mapping[str, Any] | None) -> str:
    """Return ``beauty 0.250, books 0.250``; coefficients by layer as their mean and range."""
    if not coefficients:
        return "coefficients not recorded"
    parts = []
    for domain, value in coefficients.items():
        values = [float(number) for number in value] if isinstance(value, list) else [float(value)]
        mean = sum(values) / len(values)
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        parts.append(f"{domain} {mean:.3f}{spread}")
    return _some(parts, most=12)


def _state(run: RunSummary) -> str:
    when = f", started {run.started:%Y-%m-%d %H:%M} UTC" if run.started else ""
    if run.state == "done":
        return f"done{f' in {run.seconds:,.0f} s' if run.seconds is not None else ''}{when}"
    return f"failed{when}" if run.state == "failed" else f"incomplete: running or killed{when}"


def _settings(settings: Mapping[str, Any]) -> str:
    shown = ("name", "seed", "backbone.source", "lora.rank", "merge.methods", "privacy.policy")
    return ", ".join(f"{key} = {settings[key]}" for key in shown if key in settings) or _ABSENT


def _participant(name: str, client: Mapping[str, Any], experts: Mapping[str, Mapping[str, Any]]) -> str:
    counts = ", ".join(
        f"{client[f'num_{what}']:,} {what}"
        for what in ("users", "items", "interactions")
        if isinstance(client.get(f"num_{what}"), int)
    )
    report = experts.get(name, {})
    trained = ""
    if isinstance(report.get("seconds"), (int, float)):
        cached = ", cached" if report.get("cached") else ""
        best = f", best at {report['best_step']}" if "best_step" in report else ""
        trained = f"; {report.get('steps')} steps{best}, {report['seconds']:,.0f} s{cached}"
    if report.get("nothing_learned") is True:
        trained += "; nothing was learned"
    return f"{name} ({client.get('role', _ABSENT)}): {counts or _ABSENT}{trained}"


def _merge(merge: MergeRecord, run: RunDetails) -> str:
    excluded = merge.provenance.excluded
    without = f"; without {', '.join(excluded)}" if excluded else ""
    return (
        f"{merge.folder.relative_to(run.summary.folder)}: {coefficients_text(merge.provenance.coefficients)}{without}"
    )


def _served(run: RunDetails) -> str:
    scores = run.choice.get("validation")
    score = scores.get(run.summary.served) if isinstance(scores, dict) else None
    parts = [f"{run.summary.metric} {score:.4f} on validation"] if isinstance(score, float) else []
    parts += [f"{run.summary.metric} {run.summary.test:.4f} on test"] if run.summary.test is not None else []
    return f"{run.summary.served}" + (f" ({', '.join(parts)}; mean over training domains, unmasked)" if parts else "")


def _served_instead(run: RunDetails) -> list[str]:
    """Name the domains that are served another model than the merge."""
    served, per_domain = str(run.summary.served), table_or_empty(run.choice.get("per_domain"))
    rows = {domain: served_row(per_domain, served, domain) for domain in per_domain}
    return [f"{domain}: {their(row).replace('their', 'its')}" for domain, row in rows.items() if row != served]


def _files(run: RunSummary) -> list[str]:
    meanings = {
        "config.toml": "its settings",
        "adapters": "each domain's expert",
        "merged": "the merges, as PEFT folders",
        "remerged": "merges made later",
        "metrics.parquet": "sums and counts",
        "exposure.parquet": "data that left each client",
        "run.log": "the log",
    }
    return [f"{run.folder / name}  ({meaning})" for name, meaning in meanings.items() if (run.folder / name).exists()]


def _some(names: Sequence[str], most: int = 4) -> str:
    if not names:
        return _ABSENT
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
