"""A client's trained experts on its own disk: the same inputs are never trained on twice."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedmerge import __version__
from fedmerge.client.kept import inputs_key, keep
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.train import Progress, train_expert
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.lora import Adapter, adapter_sha256, read_adapter, write_adapter
from fedmerge.errors import ClientError

REPORT_FILE = "training.json"


def trained_expert(domain: LocalDomain, config: ExperimentConfig, progress: Progress) -> tuple[Adapter, dict[str, Any]]:
    """The domain's expert: from disk where the same inputs were trained on before, else trained now and kept.

    Args:
        domain: the client's own.
        config: lora, train, text, seed and runtime decide what is the same; so do data, backbone, versions, precision.
        progress: receives one line now and then.

    Returns:
        The adapter, and :class:`fedmerge.client.train.TrainingReport` as a dict with ``cached`` and ``sha256``.
    """
    folder = _folder(domain, config)
    if kept := _kept(folder):
        progress(f"{domain.manifest.name}: expert of an earlier run with the same inputs taken from {folder}")
        return kept[0], {**kept[1], "cached": True}
    shutil.rmtree(folder, ignore_errors=True)  # damaged, if there is anything
    begun = folder.with_name(f"{folder.name}.begun.safetensors")
    lora = config.lora.of(domain.manifest.name)
    adapter, training = train_expert(domain, lora, config.train, config.seed, progress, begun)
    report = {**asdict(training), "sha256": adapter_sha256(adapter)}
    report["validations"][0]["loss"] = None  # nothing was trained on yet; JSON has no NaN

    def write(expert: Path) -> None:
        write_adapter(adapter, expert, domain.backbone.name)
        (expert / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")

    keep(folder, write, lambda: _kept(folder) is not None, f"domain {domain.manifest.name}: its expert")
    begun.unlink(missing_ok=True)
    return adapter, {**report, "cached": False}


def expert_by_hash(
    domain: LocalDomain, config: ExperimentConfig, sha256: str, received: Callable[[Adapter], str] = adapter_sha256
) -> Adapter:
    """The expert that this client shipped before.

    Args:
        domain: the client's own.
        config: as for :func:`trained_expert`.
        sha256: what the server knows it by.
        received: expert -> the hash of what arrives of it, where it does not travel as it is.

    Raises:
        ClientError: it is no longer on this client's disk.
    """
    kept = _kept(_folder(domain, config))
    if kept is None or received(kept[0]) != sha256:
        raise ClientError(
            f"domain {domain.manifest.name}: its expert {sha256[:12]} is not in {_folder(domain, config)}. "
            "Keep cache_dir between training and evaluation."
        )
    return kept[0]


def _kept(folder: Path) -> tuple[Adapter, dict[str, Any]] | None:
    """An expert on disk with its report, if it is there and whole."""
    try:
        adapter, report = read_adapter(folder), json.loads((folder / REPORT_FILE).read_text())
        return (adapter, report) if adapter_sha256(adapter) == report["sha256"] else None
    except (OSError, ValueError, KeyError):
        return None


def _folder(domain: LocalDomain, config: ExperimentConfig) -> Path:
    experts = Path(config.cache_dir).expanduser() / "experts"
    return experts / f"{domain.manifest.name}-{_training_key(domain, config)}"


def _training_key(domain: LocalDomain, config: ExperimentConfig) -> str:
    lora = config.lora.of(domain.manifest.name)
    inputs = {
        "catalog": domain.manifest.catalog_sha256,
        "interactions": domain.manifest.interactions_sha256,
        "name": domain.manifest.name,
        "backbone": domain.backbone.sha256,
        "pooling": domain.backbone.pooling,
        "text": config.text.model_dump(),
        "lora": {"rank": lora.rank, "alpha": lora.alpha, "target_modules": lora.target_modules},
        "train": config.train.model_dump(),
        "seed": config.seed,
        "threads": config.runtime.threads_per_client,
        "device": str(domain.backbone.device),
        "precision": domain.backbone.compute.precision,
        "versions": [__version__, torch.__version__],
    }
    return inputs_key(inputs)
