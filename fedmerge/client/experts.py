"""A client's trained experts on its own disk: the same inputs are never trained on twice."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedmerge import __version__
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

    Returns:
        The adapter, and :class:`fedmerge.client.train.TrainingReport` as a dict with ``cached`` and ``sha256``.
    """
    folder = _experts(config) / f"{domain.manifest.name}-{_training_key(domain, config)}"
    if (folder / REPORT_FILE).is_file():
        adapter, report = read_adapter(folder), json.loads((folder / REPORT_FILE).read_text())
        if adapter_sha256(adapter) == report["sha256"]:
            progress(f"{domain.manifest.name}: expert of an earlier run with the same inputs taken from {folder}")
            return adapter, {**report, "cached": True}
        shutil.rmtree(folder)  # damaged: train again
    adapter, training = train_expert(domain, config.lora, config.train, config.seed, progress)
    report = {**asdict(training), "sha256": adapter_sha256(adapter)}
    report["validations"][0]["loss"] = None  # nothing was trained on yet; JSON has no NaN
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial:
        write_adapter(adapter, Path(partial) / "expert", domain.backbone.name)
        (Path(partial) / "expert" / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        try:
            os.rename(Path(partial) / "expert", folder)
        except OSError:
            if not (folder / REPORT_FILE).is_file():  # otherwise another process was faster with the same result
                raise
    return adapter, {**report, "cached": False}


def expert_by_hash(domain: LocalDomain, config: ExperimentConfig, sha256: str) -> Adapter:
    """The expert that this client shipped before.

    Raises:
        ClientError: it is no longer on this client's disk.
    """
    adapter, report = trained_expert(domain, config, lambda line: None) if _is_trained(domain, config) else (None, {})
    if adapter is None or report["sha256"] != sha256:
        raise ClientError(
            f"domain {domain.manifest.name}: its expert {sha256[:12]} is not under {_experts(config)}. "
            "Keep cache_dir between training and evaluation."
        )
    return adapter


def _is_trained(domain: LocalDomain, config: ExperimentConfig) -> bool:
    return (_experts(config) / f"{domain.manifest.name}-{_training_key(domain, config)}" / REPORT_FILE).is_file()


def _experts(config: ExperimentConfig) -> Path:
    return Path(config.cache_dir).expanduser() / "experts"


def _training_key(domain: LocalDomain, config: ExperimentConfig) -> str:
    inputs = {
        "catalog": domain.manifest.catalog_sha256,
        "interactions": domain.manifest.interactions_sha256,
        "name": domain.manifest.name,
        "backbone": domain.backbone.sha256,
        "pooling": domain.backbone.pooling,
        "text": config.text.model_dump(),
        "lora": config.lora.model_dump(),
        "train": config.train.model_dump(),
        "seed": config.seed,
        "threads": config.runtime.threads_per_client,
        "device": str(domain.backbone.device),
        "precision": domain.backbone.compute.precision,
        "versions": [__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
