"""The cache of a client's experts on its own disk: the same inputs are trained once."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedmerge import __version__
from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.cache.dp_releases import Release, release_expert_once, released_expert_folder
from fedmerge.client.cache.folders import fill_folder, inputs_key
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.by_mode import train_adapter
from fedmerge.client.training.expert import TrainingReport, training_record
from fedmerge.client.training.loop import Progress
from fedmerge.client.training.poisoning import is_attacker
from fedmerge.client.training.settings import TrainingSettings
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import ClientError, FedMergeError
from fedmerge.files import read_json, seal, write_json

REPORT_FILE = "training.json"
BATCHES = "equal"  # how users are split into batches; part of the key, so that experts of another split are not reused
# Settings that the other kind of negatives ignores: left out of the key, so that they do not train an expert again.
Trained = tuple[Adapter, TrainingReport, Mapping[str, Any] | None]
_UNUSED = {"in-batch": {"negatives", "item_refresh_steps"}, "catalog": set[str]()}


def load_or_train_expert(
    domain: LocalDomain, settings: TrainingSettings, cache_dir: str, run_id: str | None, progress: Progress
) -> tuple[Adapter, dict[str, Any]]:
    """Return the domain's expert: from the cache if the same inputs were trained before, else trained and cached.

    With differential privacy the cache holds the noisy adapter, so sending it again spends nothing. By user a run has
    one expert, even if it resumes with other versions, threads or another device: a second expert would be a second
    release.

    Args:
        domain: the client's domain.
        settings: settings of the training; with data, backbone, text, versions and precision they are the cache's key.
        cache_dir: folder on the client's own disk.
        run_id: name of the run; by user it names the release.
        progress: receives a line now and then.

    Returns:
        The adapter, and :class:`fedmerge.client.training.expert.TrainingReport` as a dict with ``cached``, ``sha256``
        and ``privacy``.

    Raises:
        PolicyError: by user, the run has released another expert, or the cached one is damaged.
    """
    if not is_released_once(settings, run_id):
        return _load_or_train(domain, settings, cache_dir, progress)
    trained_here: list[str] = []

    def make() -> Release:
        adapter, report = _load_or_train(domain, settings, cache_dir, progress)
        if not report["cached"]:
            trained_here.append(report["sha256"])
        return Release(adapter, report)

    folder = released_expert_folder(cache_dir, run_id, domain.manifest.name)
    release = release_expert_once(domain, folder, _release_key(domain, settings), make)
    return release.adapter, {**release.report, "cached": release.report["sha256"] not in trained_here}


def _load_or_train(
    domain: LocalDomain, settings: TrainingSettings, cache_dir: str, progress: Progress
) -> tuple[Adapter, dict[str, Any]]:
    def train(checkpoint: Path) -> Trained:
        return train_adapter(domain, settings, progress, checkpoint)

    return cached_or_trained(domain, settings, _folder(domain, settings, cache_dir), "expert", train, progress)


def cached_or_trained(
    domain: LocalDomain,
    settings: TrainingSettings,
    folder: Path,
    what: str,
    train: Callable[[Path], Trained],
    progress: Progress,
) -> tuple[Adapter, dict[str, Any]]:
    """Return the adapter in a cache folder, or train it and fill the folder.

    Args:
        domain: the client's domain.
        settings: settings of the training, for the report.
        folder: named by a key of the inputs.
        what: what the adapter is, for messages.
        train: checkpoint file -> adapter, report, and record of its privacy loss.
        progress: receives a line now and then.

    Returns:
        The adapter, and the report as :func:`load_or_train_expert` has it.

    Raises:
        ClientError: it cannot be cached.
    """
    name = domain.manifest.name
    if cached := _read_cached(folder):
        progress(f"{name}: reusing the cached {what} in {folder}")
        return cached[0], {**cached[1], "cached": True}
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    checkpoint = folder.with_name(f"{folder.name}.checkpoint.safetensors")
    adapter, training, spent = train(checkpoint)
    report = {**asdict(training), "sha256": adapter_sha256(adapter), "privacy": spent}
    if auxiliary := settings.train.auxiliary_record():
        report["auxiliary"] = auxiliary
    for validation in report["validations"][:1]:
        validation["loss"] = None  # there is no loss before the first step, and JSON has no NaN

    def write(expert: Path) -> None:
        write_adapter(adapter, expert, domain.backbone.name)
        write_json(expert / REPORT_FILE, seal(report))

    fill_folder(folder, write, lambda: _read_cached(folder) is not None, f"domain {name}: its {what}")
    checkpoint.unlink(missing_ok=True)
    adapter, report = _read_cached(folder) or (adapter, report)  # another process may have been faster
    return adapter, {**report, "cached": False}


def load_expert(
    domain: LocalDomain,
    settings: TrainingSettings,
    cache_dir: str,
    run_id: str | None,
    sha256: str | None,
    received: Callable[[Adapter], str] = adapter_sha256,
) -> Adapter:
    """Load the expert that this client trained before.

    Args:
        domain, settings, cache_dir, run_id: as for :func:`load_or_train_expert`.
        sha256: the hash by which the server knows the expert; None if the expert never left the client.
        received: expert -> the hash of its decoded copy at the server.

    Raises:
        ClientError: it is not in the cache.
    """
    folder = released_expert_folder(cache_dir, run_id, domain.manifest.name)
    if not is_released_once(settings, run_id) or not folder.exists():
        folder = _folder(domain, settings, cache_dir)
    cached = _read_cached(folder)
    if cached is None or sha256 not in (None, received(cached[0])):
        raise ClientError(
            f"domain {domain.manifest.name}: its expert {(sha256 or '')[:12]} is not in {folder}. "
            "Keep cache_dir between training and evaluation."
        )
    return cached[0]


def _read_cached(folder: Path) -> tuple[Adapter, dict[str, Any]] | None:
    """Read a cached expert with its report; None if it is missing or damaged."""
    try:
        adapter, report = read_adapter(folder), read_json(folder / REPORT_FILE) or {}
        return (adapter, report) if adapter_sha256(adapter) == report["sha256"] else None
    except (FedMergeError, OSError, ValueError, KeyError):
        return None


def _folder(domain: LocalDomain, settings: TrainingSettings, cache_dir: str) -> Path:
    return Path(cache_dir).expanduser() / "experts" / f"{domain.manifest.name}-{_training_key(domain, settings)}"


def is_released_once(settings: TrainingSettings, run_id: str | None) -> bool:
    """Return True if a run counts what is trained, so that it has one adapter of each kind."""
    return settings.dp.mode == "user" and run_id is not None


def _release_key(domain: LocalDomain, settings: TrainingSettings) -> str:
    return release_key(expert_inputs(domain, settings))


def release_key(inputs: Mapping[str, Any]) -> str:
    """Return the key of a release: versions, threads and device may change when a run resumes."""
    return inputs_key({key: value for key, value in inputs.items() if key not in ("versions", "threads", "device")})


def _training_key(domain: LocalDomain, settings: TrainingSettings) -> str:
    return inputs_key(expert_inputs(domain, settings))


def expert_inputs(domain: LocalDomain, settings: TrainingSettings) -> dict[str, Any]:
    """Return everything that an expert depends on; what is off is left out, so that other experts are found."""
    dp, answers, name = settings.dp, settings.answers, domain.manifest.name
    lora, train = settings.lora.of(name), training_record(settings.train)
    inputs = {
        "catalog": domain.manifest.catalog_sha256,
        "interactions": domain.manifest.interactions_sha256,
        "name": name,
        "backbone": domain.backbone.sha256,
        "pooling": domain.backbone.pooling,
        "text": domain.text.cache_inputs(),
        "lora": {"rank": lora.rank, "alpha": lora.scaled_alpha, "target_modules": lora.target_modules},
        "train": {key: train[key] for key in train.keys() - _UNUSED[settings.train.negatives]},
        "seed": settings.seed,
        "threads": settings.threads,
        "device": str(domain.backbone.device),
        "precision": domain.backbone.compute.precision,
        "versions": [__version__, torch.__version__],
    }
    if dp.mode != "user":
        inputs["batches"] = BATCHES
    if dp.mode in ("user", "domain-local"):
        inputs["dp"] = dp.model_dump(exclude={"coefficient_clip"})
    if dp.epsilon is not None and answers.number:
        inputs["noise also for"] = [answers.number, answers.batch_size] if dp.mode == "user" else answers.number
    if dp.mode == "user" and dp.epsilon is not None and settings.sums:
        inputs["noise also for sums"] = [asdict(sums) for sums in settings.sums]
    if dp.mode == "user" and dp.epsilon is not None and settings.woven_steps:
        inputs["noise also for weaving"] = settings.woven_steps
    if is_attacker(settings.simulation, name):
        inputs["attack"] = settings.simulation.attack_record()
    if settings.simulation.audited:
        inputs["audit"] = settings.simulation.audit_record()
    return inputs
