"""A client's trained experts on its own disk: the same inputs are never trained on twice."""

import json
import shutil
import time
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
from fedmerge.client.training.dp_expert import train_private_expert
from fedmerge.client.training.dp_sgd import plan_record, user_plan
from fedmerge.client.training.expert import TrainingReport, check_can_train, train_expert, training_record
from fedmerge.client.training.loop import Progress
from fedmerge.client.training.poisoning import poisons, train_poisoned_expert
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.encoder.peft_folder import read_adapter, write_adapter
from fedmerge.errors import ClientError, DivergedError
from fedmerge.privacy.dp.domain_noise import add_noise, domain_noise, domain_record
from fedmerge.privacy.dp.randomness import source
from fedmerge.privacy.dp.releases import noised_answers

REPORT_FILE = "training.json"
BATCHES = "equal"  # how users are split into batches; part of the key, so that experts of another split are not reused
_UNUSED = {"in-batch": {"negatives", "item_refresh_steps"}, "catalog": set[str]()}  # so that older experts are found


def load_or_train_expert(
    domain: LocalDomain, config: ExperimentConfig, progress: Progress
) -> tuple[Adapter, dict[str, Any]]:
    """The domain's expert: from disk where the same inputs were trained on before, else trained now and kept.

    What is kept is what was released: with differential privacy the noised adapter, so sending it again spends nothing.
    By user a run has one, whatever versions, threads or device it goes on with: another would be another release.

    Args:
        domain: the client's own.
        config: lora, train, text, seed, runtime and simulation decide what is the same; so do data, backbone, versions,
            precision.
        progress: receives one line now and then.

    Returns:
        The adapter, and :class:`fedmerge.client.training.expert.TrainingReport` as a dict with ``cached`` and
        ``sha256``.

    Raises:
        PolicyError: by user, the run was sent another one, or that is damaged.
    """
    if not _once_a_run(config):
        return _trained(domain, config, progress)
    made_now: list[str] = []

    def make() -> Release:
        adapter, report = _trained(domain, config, progress)
        if not report["cached"]:
            made_now.append(report["sha256"])
        return Release(adapter, report)

    release = release_expert_once(domain, config, _released_for(domain, config), make)
    return release.adapter, {**release.told, "cached": release.told["sha256"] not in made_now}


def _trained(domain: LocalDomain, config: ExperimentConfig, progress: Progress) -> tuple[Adapter, dict[str, Any]]:
    folder = _folder(domain, config)
    if kept := _read_cached(folder):
        progress(f"{domain.manifest.name}: expert of an earlier run with the same inputs taken from {folder}")
        return kept[0], {**kept[1], "cached": True}
    shutil.rmtree(folder, ignore_errors=True)  # damaged, if there is anything
    checkpoint = folder.with_name(f"{folder.name}.checkpoint.safetensors")
    adapter, training, spent = train_adapter(domain, config, progress, checkpoint)
    report = {**asdict(training), "sha256": adapter_sha256(adapter), "privacy": spent}
    for validation in report["validations"][:1]:
        validation["loss"] = None  # nothing was trained on yet; JSON has no NaN

    def write(expert: Path) -> None:
        write_adapter(adapter, expert, domain.backbone.name)
        (expert / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")

    fill_folder(folder, write, lambda: _read_cached(folder) is not None, f"domain {domain.manifest.name}: its expert")
    checkpoint.unlink(missing_ok=True)
    adapter, report = _read_cached(folder) or (adapter, report)  # another process may have been faster
    return adapter, {**report, "cached": False}


def train_adapter(
    domain: LocalDomain,
    config: ExperimentConfig,
    progress: Progress = lambda line: None,
    checkpoint: Path | None = None,
) -> tuple[Adapter, TrainingReport, Mapping[str, Any] | None]:
    """Train by ``dp.mode``; with what was spent of a user or of the domain, if anything counts it.

    Raises:
        DomainError, ClientError, ConfigError: what the domain or its data do not allow.
    """
    dp, name, lora = config.dp, domain.manifest.name, config.lora.of(domain.manifest.name)
    if dp.mode == "user":
        check_can_train(domain)
        plan = user_plan(domain, config)
        progress(f"{name}: differential privacy by user, noise multiplier {plan.noise_multiplier:.3f}")
        adapter, report = train_private_expert(domain, lora, config.train, config.seed, plan, progress, checkpoint)
        return adapter, report, plan_record(plan)
    if poisons(config, name):
        return *train_poisoned_expert(domain, config, checkpoint, progress), None
    if dp.mode == "domain-local":
        return _noised_expert(domain, config, progress, checkpoint)
    return *train_expert(domain, lora, config.train, config.seed, progress, checkpoint), None


def _noised_expert(
    domain: LocalDomain, config: ExperimentConfig, progress: Progress, checkpoint: Path | None
) -> tuple[Adapter, TrainingReport, Mapping[str, Any]]:
    """An expert that was clipped and noised; of its training nothing is told but how long it took."""
    dp, name, lora = config.dp, domain.manifest.name, config.lora.of(domain.manifest.name)
    started = time.monotonic()
    start = fresh_adapter(domain.backbone, lora, config.seed)
    try:
        adapter, _ = train_expert(domain, lora, config.train, config.seed, progress, checkpoint)
    except DivergedError as error:
        progress(f"{error} Noise alone is sent.")  # that it diverged tells of data, too
        adapter = start
    noise = domain_noise(config)
    drawn = source(dp.randomness, config.seed, "client", name, "domain-dp")
    report = TrainingReport(0, 0, "not told", time.monotonic() - started, 0, ())
    return add_noise(adapter, start, dp.clip, noise, drawn), report, domain_record(dp, noise)


def load_expert(
    domain: LocalDomain,
    config: ExperimentConfig,
    sha256: str | None,
    received: Callable[[Adapter], str] = adapter_sha256,
) -> Adapter:
    """The expert that this client trained before; by its hash where it was shipped, None where it never was.

    Args:
        domain: the client's own.
        config: as for :func:`load_or_train_expert`.
        sha256: what the server knows it by.
        received: expert -> the hash of what arrives of it, where it does not travel as it is.

    Raises:
        ClientError: it is no longer on this client's disk.
    """
    folder = released_expert_folder(domain, config)
    if not _once_a_run(config) or not folder.exists():
        folder = _folder(domain, config)
    kept = _read_cached(folder)
    if kept is None or sha256 not in (None, received(kept[0])):
        raise ClientError(
            f"domain {domain.manifest.name}: its expert {(sha256 or '')[:12]} is not in {folder}. "
            "Keep cache_dir between training and evaluation."
        )
    return kept[0]


def _read_cached(folder: Path) -> tuple[Adapter, dict[str, Any]] | None:
    """An expert on disk with its report, if it is there and whole."""
    try:
        adapter, report = read_adapter(folder), json.loads((folder / REPORT_FILE).read_text())
        return (adapter, report) if adapter_sha256(adapter) == report["sha256"] else None
    except (OSError, ValueError, KeyError):
        return None


def _folder(domain: LocalDomain, config: ExperimentConfig) -> Path:
    experts = Path(config.cache_dir).expanduser() / "experts"
    return experts / f"{domain.manifest.name}-{_training_key(domain, config)}"


def _once_a_run(config: ExperimentConfig) -> bool:
    return config.dp.mode == "user" and config.run_id is not None


def _released_for(domain: LocalDomain, config: ExperimentConfig) -> str:
    """Key of what an expert is trained on and how; where it is trained may change between a kill and a resume."""
    inputs = _training_inputs(domain, config)
    return inputs_key({key: value for key, value in inputs.items() if key not in ("versions", "threads", "device")})


def _training_key(domain: LocalDomain, config: ExperimentConfig) -> str:
    return inputs_key(_training_inputs(domain, config))


def _training_inputs(domain: LocalDomain, config: ExperimentConfig) -> dict[str, Any]:
    lora, train = config.lora.of(domain.manifest.name), training_record(config.train)
    inputs = {
        "catalog": domain.manifest.catalog_sha256,
        "interactions": domain.manifest.interactions_sha256,
        "name": domain.manifest.name,
        "backbone": domain.backbone.sha256,
        "pooling": domain.backbone.pooling,
        "text": config.text.model_dump(),
        "lora": {"rank": lora.rank, "alpha": lora.alpha, "target_modules": lora.target_modules},
        "train": {key: train[key] for key in train.keys() - _UNUSED[config.train.negatives]},
        "seed": config.seed,
        "threads": config.runtime.threads_per_client,
        "device": str(domain.backbone.device),
        "precision": domain.backbone.compute.precision,
        "versions": [__version__, torch.__version__],
    }
    if config.dp.mode != "user":
        inputs["batches"] = BATCHES
    if config.dp.mode in ("user", "domain-local"):
        inputs["dp"] = config.dp.model_dump(exclude={"coefficient_clip"})
    if config.dp.epsilon is not None and (number := noised_answers(config)):
        of_users = config.dp.mode == "user"
        inputs["noise also for"] = [number, config.through_clients.batch_size] if of_users else number
    if poisons(config, domain.manifest.name):
        inputs["attack"] = config.simulation.attack_record()
    if config.simulation.audited:
        inputs["audit"] = config.simulation.audit_record()
    return inputs
