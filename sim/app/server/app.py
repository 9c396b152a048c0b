"""The Flower app of the server, and the flow of a run from the first message to the report.

Every phase writes each result as soon as it exists (see :mod:`fedmerge.runs.folder`) and starts from the results on
disk, so that a killed run resumes at the point where it stopped.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmerge.config import CSFT, ExperimentConfig, from_flat
from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import open_backbone
from fedmerge.escaping import RecordFormatter
from fedmerge.federated.rules import check_rounds
from fedmerge.files import read_json, write_text
from fedmerge.llm2rec.head import language_head
from fedmerge.llm2rec.stages import check_stages
from fedmerge.privacy.dp.accountant import opacus_accountants
from fedmerge.privacy.dp.agreement import check_releases
from fedmerge.privacy.signatures import find_client_keys, read_registered_keys
from fedmerge.report.run.final_report import attack_note
from fedmerge.report.tracking import check_tracking
from fedmerge.runs.attempts import LOG_FILE, Attempt, start_attempt
from fedmerge.runs.folder import DONE, create_run, environment, locked, open_run, run_to_resume
from fedmerge.runs.overview.progress import remove_stages
from sim.app.flower_internals import InMemoryGrid
from sim.app.server.phases.catalogs import collect_catalogs
from sim.app.server.phases.choosing import validate_and_choose
from sim.app.server.phases.evaluating import evaluate_models
from sim.app.server.phases.joining import gather, greet_late, log_members, restore_members
from sim.app.server.phases.merging import train_and_merge
from sim.app.server.phases.reporting import selected, track, write_page, write_privacy, write_report
from sim.app.server.run import Run, new_run
from sim.app.server.simulated_nodes import skip_idle_nodes

app = ServerApp()
logger = logging.getLogger("fedmerge.server")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one experiment; raise if it cannot be finished, so that Flower marks the run as failed."""
    run_server(grid, from_flat(context.run_config), console=True)


def run_server(grid: Grid, config: ExperimentConfig, *, console: bool) -> None:
    """Run one experiment to its end, or resume it.

    Args:
        grid: Flower's connection to the nodes.
        config: the experiment.
        console: log to stderr and not to the root logger's handlers, as an app does; a library leaves both as they are.

    Raises:
        FedMergeError: the run cannot be finished; its folder can be resumed.
    """
    wanted = Path(config.output_dir).expanduser().resolve() / str(config.run_id)
    folder = run_to_resume(wanted) if config.resume else create_run(config)
    if (folder / DONE).is_file():
        _log_to(None, console)
        logger.info("%s is finished; nothing is left to do", folder)
        return
    with locked(folder):
        if config.resume:
            open_run(config)
        attempt = start_attempt(folder)
        _log_to(folder / LOG_FILE, console)
        logger.info("run folder: %s%s", folder, f", resumed (attempt {attempt.number})" if config.resume else "")
        run = new_run(config, folder, grid)
        try:
            _experiment(run, attempt)
            write_page(folder)
        except Exception:
            logger.exception("the run failed")
            raise
        except BaseException:  # Ctrl-C, or SystemExit from a signal
            logger.warning("the run was interrupted; resume with: fedmerge run --resume %s", folder)
            raise
        finally:
            if not (folder / DONE).is_file():
                attempt.end()


def _experiment(run: Run, attempt: Attempt) -> None:
    config = run.config
    # 1. Check all that can be checked before any work, and load the backbone.
    torch.set_num_threads(config.runtime.server_threads)
    if isinstance(run.grid, InMemoryGrid):
        skip_idle_nodes(run.grid)
    _check(config)
    _log_changed_versions(run.folder)
    if (keys := find_client_keys(config.server.client_keys, run.simulated, Path.cwd())) is not None:
        run.members.keys = read_registered_keys(keys)
        logger.info("answers must be signed by the %d keys in %s", len(run.members.keys), keys)
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    backbone = open_backbone(config.backbone, compute)
    if config.train.objective == "csft":
        language_head(backbone, CSFT)  # refused here, before any client starts
    check_stages(backbone, config.mntp, config.simcse)
    try:
        # 2. Gather the clients and collect the catalogs of their domains.
        restore_members(run)
        gather(run, backbone)
        catalogs = collect_catalogs(run)
        # 3. Train, admit and merge.
        merges = train_and_merge(run, backbone, catalogs)
        if config.until == "train":
            _finish(run, attempt, "trained after")
            logger.info("all experts are trained, run folder: %s", run.folder)
            return
        # 4. Validate, train heads over the merge that is served, and choose.
        validation, choice, heads, own = validate_and_choose(run, backbone, merges)
        # 5. Evaluate the selection on test, once; clients that joined late count as unseen.
        greet_late(run, backbone, merges.members)
        adapters = {candidate.label: candidate.adapter for candidate in selected(merges, choice)}
        test = evaluate_models(run, "test", sorted(run.members.nodes), adapters, merges.sources, heads, own)
        run.require_quorum([domain for domain in test if domain in merges.members])
    finally:
        # 6. Write what left the clients, for a run that fails as well.
        run.members.write()
        run.ledger.write_table()
        privacy_text = write_privacy(run)
    # 7. Report.
    report = write_report(run, merges, choice, validation, test, privacy_text)
    _finish(run, attempt, "finished after")
    run.ledger.remove_lines()
    track(run.folder, config.tracking)
    logger.info("results\n\n%s", report)
    log_members(run)
    logger.info("done in %s, run folder: %s", attempt, run.folder)


def _check(config: ExperimentConfig) -> None:
    check_rounds(config.rounds, len(config.domains.train))
    if config.simulation.attacker is not None:
        logger.warning("%s", attack_note(config.simulation))
    if config.dp.mode != "none":
        opacus_accountants()  # raises if it is not installed
    check_releases(config)
    check_tracking(config.tracking)


def _finish(run: Run, attempt: Attempt, what: str) -> None:
    attempt.end()
    remove_stages(run.folder)
    write_text(run.folder / DONE, f"{what} {attempt}\n")


def _log_changed_versions(folder: Path) -> None:
    """Log the versions that changed since the run started, since they can change numbers."""
    packages: Mapping[str, str] = (read_json(folder / "environment.json") or {}).get("packages", {})
    current = environment()["packages"]
    changed = [f"{name} {then} -> {current.get(name)}" for name, then in packages.items() if then != current.get(name)]
    if changed:
        logger.warning("these versions changed since the run started, which can change numbers: %s", ", ".join(changed))


def _log_to(path: Path | None, console: bool) -> None:
    library = logging.getLogger("fedmerge")
    library.setLevel(logging.INFO)
    handlers: list[logging.Handler] = []
    if console:
        library.propagate = False
        library.handlers.clear()
        handlers.append(logging.StreamHandler())
    if path:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(RecordFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
        library.addHandler(handler)
