"""The cells of personal merges: every client fits its own, as in a run."""

from collections.abc import Mapping
from pathlib import Path

import torch

from fedmerge.adapter import adapter_sha256
from fedmerge.bench.ranking import domain_of, questions
from fedmerge.client.audit.users import prepare_for_audit
from fedmerge.client.coefficients.personal import load_or_fit_personal_merge, personal_settings
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft.folder import write_adapter
from fedmerge.files import read_json, whole_folder, write_json
from fedmerge.runs.checkpoints import read_sources, stored_experts


def fit_personal(
    result: Path,
    config: ExperimentConfig,
    domain: str,
    run: Path,
    without: tuple[str, ...],
    evaluation: ExperimentConfig,
) -> None:
    """Fit the personal merge of one domain, or take it from the client's cache.

    Args:
        result: on the client's own disk; receives hash, coefficients, steps and seconds. The merge is beside it.
        config: the strategy's experiment.
        domain: its name.
        run: folder of the training run.
        without: domains that are not merged.
        evaluation: the experiment with the seed that selects the evaluated users.

    Raises:
        FedMergeError: the fit failed.
    """
    sources = {name: sha256 for name, sha256 in (read_sources(run) or {}).items() if name not in without}
    opened = domain_of(config, domain)
    if config.simulation.audited:
        opened = prepare_for_audit(opened, config.simulation, config.seed)
    choosing = questions(evaluation, domain, "valid", None).users
    settings, experts = personal_settings(config), dict(stored_experts(run, sources))
    made = load_or_fit_personal_merge(opened, experts, sources, settings, choosing, config.cache_dir)
    with whole_folder(personal_folder(result)) as folder:
        write_adapter(made.adapter, folder, config.backbone.source)
    write_json(result, {**made.record, "sha256": adapter_sha256(made.adapter)})


def personal_folder(result: Path) -> Path:
    """Return the folder of a personal merge, beside its record."""
    return result.with_suffix("")


def sent_coefficients(fits: Mapping[str, Path], min_users: int) -> dict[str, torch.Tensor]:
    """Return domain -> (K, G) coefficients that clients send for the universal merge: those that enough users fitted.

    Args:
        fits: domain -> record of :func:`fit_personal`.
        min_users: smallest number of users whose coefficients may leave.
    """
    records = {domain: read_json(file) for domain, file in sorted(fits.items())}
    return {
        domain: torch.tensor([values for _, values in sorted(record["coefficients"].items())])
        for domain, record in records.items()
        if record["num_users"] >= min_users
    }
