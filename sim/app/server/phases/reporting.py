"""Write what a run has found: tables, report, privacy statement, tracking."""

import logging
from collections.abc import Mapping
from pathlib import Path

from fedmerge.config import ExperimentConfig, Split, Tracking
from fedmerge.files import write_json, write_table, write_text
from fedmerge.merging.candidate import Candidate
from fedmerge.privacy.dp.statement import PRIVACY_FILE, privacy_statement, statement_text
from fedmerge.report.run.final_report import Evaluated, attack_note, metric_rows, product_rows, run_report
from fedmerge.report.tables import Role
from fedmerge.report.tracking import track_run
from fedmerge.runs.checkpoints import Sums, read_untrained
from fedmerge.runs.dp_spent import add_metric_sums, not_counted, spent_by_domain
from fedmerge.runs.folder import REPORT_PAGE
from fedmerge.server.choice import Choice
from fedmerge.server.gate import probes
from sim.app.messages import records
from sim.app.server.phases.merging import Merges
from sim.app.server.run import Run

logger = logging.getLogger("fedmerge.server")


def write_report(
    run: Run,
    merges: Merges,
    choice: Choice,
    validation: Mapping[str, Sums],
    test: Mapping[str, Sums],
    privacy_text: str,
) -> str:
    """Write the tables of metrics and ``report.txt``; return the report."""
    roles: dict[str, Role] = {
        domain: "train" if domain in merges.members else "unseen" for domain in [*validation, *test]
    }
    splits: dict[Split, Mapping[str, Sums]] = {"valid": validation, "test": test}
    write_table(run.folder / "metrics.parquet", metric_rows(splits, roles))
    write_table(run.folder / "products.parquet", product_rows(splits))
    evaluated = Evaluated(
        test,
        roles,
        merged=[candidate.label for candidate in selected(merges, choice)],
        served=choice.served,
        per_domain=choice.per_domain,
        excluded={name: exclusion.reason for name, exclusion in run.members.excluded.items()},
        merged_domains=merges.members,
        synthetic=any(run.members.descriptions[domain].synthetic for domain in test),
        attack=attack_note(run.config.simulation),
        flagged={domain: reason for domain, reason in merges.failed.items() if domain in merges.members},
        nothing_learned=[] if run.config.rounds.rule else read_untrained(run.folder, merges.members),
        dropped=choice.dropped,
        rollback=choice.rollback,
    )
    report = run_report(evaluated, fallback=run.config.evaluation.fallback or choice.fell_back) + privacy_text
    write_text(run.folder / "report.txt", report)
    return report


def selected(merges: Merges, choice: Choice) -> list[Candidate]:
    """Return the best variant of each method, and the merge that is served."""
    return [candidate for candidate in merges.candidates if candidate.label in choice.labels]


def write_privacy(run: Run) -> str:
    """Write the differential privacy that the run gives, if any; return its part of the report."""
    config: ExperimentConfig = run.config
    noised_metrics = config.privacy.metrics == "noised" and not config.dp.mode.startswith("domain")
    if config.dp.mode == "none" and not noised_metrics:
        return ""
    catalogs = bool(config.methods_from_catalogs) or config.refines_merges or probes(config)
    evaluated = run.ledger.senders(records.EVALUATE)
    spent = spent_by_domain(run.folder, config)
    if noised_metrics:
        spent = add_metric_sums(spent, evaluated, config)
    exact_sums = bool(evaluated) and not noised_metrics
    heads = config.head.kind is not None
    statement = privacy_statement(
        config.dp, spent, exact_sums, catalogs, not_counted(run.folder), noised_metrics, heads
    )
    write_json(run.folder / PRIVACY_FILE, statement)
    return "\n" + statement_text(statement)


def write_page(folder: Path) -> None:
    """Write ``report.html`` of a finished run; a failure is logged, since the run is finished and the page can wait."""
    from fedmerge.report.run.page import run_page  # noqa: PLC0415  # imports SciPy; the server starts sooner

    path = folder / REPORT_PAGE
    try:
        write_text(path, run_page(folder))
        logger.info("report: %s", path)
    except Exception:
        logger.warning("%s was not written; try: fedmerge report %s", path, folder, exc_info=True)


def track(folder: Path, tracking: Tracking | None) -> None:
    """Write a finished run for TensorBoard or MLflow, if the experiment says so; a failure of theirs is logged."""
    if tracking is None:
        return
    try:
        track_run(folder, tracking)
    except Exception:  # of somebody else's package; the run is finished in any case
        logger.warning("tracking = '%s' failed; the run is finished without it", tracking, exc_info=True)
