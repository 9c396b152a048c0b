"""The baseline SASRec: a sequence model on item ids, trained once by one client on its own users, and cached."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedmerge import __version__
from fedmerge.client.cache.folders import fill_folder, inputs_key
from fedmerge.client.local_domain import LocalDomain
from fedmerge.domain.splits import evaluation_examples
from fedmerge.sequence.model import SequenceModel, SequenceSettings
from fedmerge.sequence.training import train_sequence_model

TENSOR_FILE = "model.safetensors"
REPORT_FILE = "training.json"
OF_TEXT = ("inputs", "id_dropout")  # settings that a model on ids does not read; its key leaves them out

Progress = Callable[[str], None]


def load_or_train_sasrec(
    domain: LocalDomain, settings: SequenceSettings, seed: int, cache_dir: Path, progress: Progress
) -> SequenceModel:
    """Return the domain's SASRec: from the cache if the same inputs were trained before, else trained and cached.

    Args:
        domain: the client's domain.
        settings: size and training.
        seed: seed of weights, order and dropout. Data, device, threads and versions are part of the cache's key, too.
        cache_dir: folder on the client's own disk.
        progress: receives one line now and then.

    Raises:
        DomainError: as :func:`train_sequence_model`.
        ClientError: as :func:`train_sequence_model`, or the model cannot be cached.
    """
    name, num_items, compute = domain.manifest.name, len(domain.catalog), domain.backbone.compute
    inputs = {
        "interactions": domain.manifest.interactions_sha256,
        "num_items": num_items,
        "sasrec": sasrec_inputs(settings),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "device": [str(compute.device), compute.precision],
        "versions": [__version__, torch.__version__],
    }
    if domain.left_out is not None or domain.planted:
        inputs["sequences"] = domain.training_sha256  # an audit trains on other users than the data have
    folder = cache_dir / "sasrec" / f"{name}-{inputs_key(inputs)}"
    if cached := _read_cached(folder):
        progress(f"{name}: reusing the cached sasrec in {folder}")
        model = SequenceModel(num_items, settings).to(compute.device)
        model.load_state_dict(cached)
        return model.eval()
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    validation = evaluation_examples(domain.interactions, "valid", settings.validation_users, seed)
    model, report = train_sequence_model(
        domain.training_sequences,
        num_items,
        validation,
        settings,
        seed,
        compute,
        progress=lambda line: progress(f"{name}: sasrec {line}"),
    )
    tensors = save({key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()})

    def write(partial: Path) -> None:
        (partial / TENSOR_FILE).write_bytes(tensors)
        record: dict[str, Any] = {**asdict(report), "sha256": hashlib.sha256(tensors).hexdigest()}
        (partial / REPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")

    fill_folder(folder, write, lambda: _read_cached(folder) is not None, f"domain {name}: its sasrec")
    return model


def sasrec_inputs(settings: SequenceSettings) -> dict[str, Any]:
    """Return the settings that a model on ids depends on, as JSON types."""
    return {key: value for key, value in settings.record().items() if key not in OF_TEXT}


def _read_cached(folder: Path) -> dict[str, torch.Tensor] | None:
    """Read the cached weights; None if they are missing or damaged."""
    try:
        tensors, report = (folder / TENSOR_FILE).read_bytes(), json.loads((folder / REPORT_FILE).read_text())
        return load(tensors) if hashlib.sha256(tensors).hexdigest() == report["sha256"] else None
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
