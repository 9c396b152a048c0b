"""`fedmerge run`: one experiment through Flower's simulation engine, watched from outside to its end."""

import sys
import tempfile
from pathlib import Path

from fedmerge.config import DEMO_ROOT, ExperimentConfig, to_toml
from fedmerge.domain.demo import DEMO_DOMAINS
from fedmerge.domain.folder import list_domains
from fedmerge.errors import ConfigError
from fedmerge.run_dir import DONE, new_run_id
from sim.launch import run_federation


def run_experiment(config: ExperimentConfig, app_dir: Path) -> int:
    """Run an experiment and print its log as it comes.

    Args:
        config: with absolute paths.
        app_dir: the folder of the Flower app.

    Returns:
        0 if the run finished and its folder is complete, else 1.

    Raises:
        ConfigError: a domain that is not there, before anything is started.
    """
    _check_domains(config)
    config = config.model_copy(update={"run_id": config.run_id or new_run_id(config.name)})
    run_dir = Path(config.output_dir) / str(config.run_id)
    with tempfile.TemporaryDirectory(prefix="fedmerge-config-") as folder:
        resolved = Path(folder) / "experiment.toml"
        resolved.write_text(to_toml(config), encoding="utf-8")
        outcome = run_federation(
            app_dir,
            resolved,
            num_supernodes=len(config.domains.train) + len(config.domains.unseen),
            cpus_per_client=config.runtime.threads_per_client,
            gpus_per_client=config.runtime.gpus_per_client,
            on_line=lambda line: print(line, flush=True),
        )
    if outcome.exit_code == 0 and (run_dir / DONE).is_file():
        print(f"run folder: {run_dir}")
        return 0
    print(f"fedmerge: the run did not finish: {outcome.status} {outcome.details}", file=sys.stderr)
    print(f"fedmerge: what there is lies in {run_dir}; Flower's and Ray's logs in {outcome.kept}", file=sys.stderr)
    return 1


def _check_domains(config: ExperimentConfig) -> None:
    root = config.domains.root
    known = DEMO_DOMAINS if root == DEMO_ROOT else list_domains(Path(root))
    missing = [name for name in config.domains.train + config.domains.unseen if name not in known]
    if missing:
        raise ConfigError(
            f"domains.root = {root!r} has no domain {', '.join(missing)}; it has: {', '.join(known) or 'none'}. "
            "Make domain folders with 'fedmerge data import' or 'fedmerge data demo', or correct domains.train and "
            "domains.unseen."
        )
