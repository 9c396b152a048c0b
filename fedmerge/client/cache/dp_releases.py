"""The DP releases of a client in a run, cached on its own disk: its expert, its rounds, its answers on coefficients.

The noise is calibrated for one expert, for the rounds of the configuration, and for the messages about merging
coefficients, each released once. So a repeated request, for example after a kill, gets the same release again, and a
different request for the same release is refused.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.cache.folders import fill_folder, inputs_key
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.dp_sgd import check_user_dp
from fedmerge.client.training.expert import training_record
from fedmerge.client.training.round import RoundTask
from fedmerge.client.training.settings import TrainingSettings, WeaveTask
from fedmerge.config import DP, ExperimentConfig
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import FedMergeError, PolicyError
from fedmerge.files import make_folder, read_sealed, seal, write_json
from fedmerge.mergerec.variants import learned_variant
from fedmerge.privacy.dp.accountant import agreed_noise
from fedmerge.privacy.dp.domain_noise import add_noise_to_answer, noise_like
from fedmerge.privacy.dp.randomness import source
from fedmerge.privacy.dp.releases import (
    Counted,
    coefficient_messages,
    domain_releases,
    metric_releases,
    noisy_answers,
    sample_rate,
    user_releases,
    woven_steps,
)
from fedmerge.privacy.dp.releases import Release as Mechanism

logger = logging.getLogger(__name__)
Made = TypeVar("Made")

REPORT_FILE = "training.json"
_ANSWERS_DEPEND_ON = ("text", "mergerec", "adamerging", "through_clients", "dp", "simulation")


@dataclass(frozen=True)
class Release:
    """A released expert or round: the noisy adapter, and the report of its training."""

    adapter: Adapter
    report: Mapping[str, Any]


@dataclass(frozen=True)
class CoefficientMessage:
    """The request of a message about merging coefficients.

    Attributes:
        label: label of the merge whose coefficients are learned.
        cohort_sha256: hash of the cohort's adapters.
        step: number of the first step, from 0.
        num_steps: local steps to make; 0 asks for a gradient.
        coefficients, students: the points to compute at, as nested lists.
        users: the client's pseudo-users of the step; empty if the client draws them itself.
    """

    label: str
    cohort_sha256: str
    step: int
    num_steps: int
    coefficients: list[Any]
    students: list[Any]
    users: list[int]


def check_round_is_counted(domain: str, task: RoundTask, num_rounds: int, run_id: str | None) -> None:
    """Refuse a round for which the noise is not calibrated, and a run whose releases cannot be counted.

    Args:
        domain: the client's domain.
        task: the requested round.
        num_rounds: rounds of the configuration.
        run_id: name of the run.

    Raises:
        PolicyError: states the request and the expected rounds.
    """
    _check_run_id(domain, run_id)
    if task.num_rounds != num_rounds or not 1 <= task.number <= num_rounds:
        raise PolicyError(
            f"domain {domain}: the server asks for round {task.number} of {task.num_rounds}, but the noise is "
            f"calibrated for {num_rounds} rounds (rounds.number), each released once. Use one configuration everywhere."
        )


def release_round_once(
    domain: LocalDomain, settings: TrainingSettings, folder: Path, task: RoundTask, train: Callable[[], Release]
) -> Release:
    """Return the release of a round: the cached one, or a new one that is cached before it is sent.

    Args:
        domain: the client's domain.
        settings: settings of the training; with data and task they identify the release.
        folder: :func:`releases_folder` of the run.
        task: the round.
        train: makes the release.

    Raises:
        PolicyError: the round was released for another request, or the cached release is damaged.
        ClientError: it cannot be cached.
    """
    what = f"domain {domain.manifest.name}: round {task.number} of this run"
    return _release_adapter_once(domain, folder / str(task.number), what, _round_key(domain, settings, task), train)


def release_expert_once(domain: LocalDomain, folder: Path, key: str, train: Callable[[], Release]) -> Release:
    """Return the released expert of a run: the cached one, or a new one that is cached before it is sent.

    Args:
        domain: the client's domain.
        folder: :func:`released_expert_folder` of the run.
        key: key of the inputs of the expert, apart from the machine that trains it.
        train: makes the release.

    Raises:
        PolicyError: the run has released another expert, or the cached one is damaged.
        ClientError: it cannot be cached.
    """
    what = f"domain {domain.manifest.name}: the expert of this run"
    return _release_adapter_once(domain, folder, what, key, train)


def release_woven_once(
    domain: LocalDomain,
    cache_dir: str,
    run_id: str | None,
    task: WeaveTask,
    most: int,
    key: str,
    train: Callable[[], Release],
) -> Release:
    """Return the adapter that a client continued in a pass: the cached one, or a new one that is cached.

    Args:
        domain: the client's domain.
        cache_dir, run_id: as for :func:`releases_folder`.
        task: the request.
        most: number of passes that the noise is calibrated for.
        key: key of the inputs of the training, apart from the machine that trains.
        train: makes the release.

    Raises:
        PolicyError: another pass than those, the pass was released for another request, or it is damaged.
        ClientError: it cannot be cached.
    """
    name = domain.manifest.name
    _check_run_id(name, run_id)
    if not 1 <= task.number <= most:
        raise PolicyError(
            f"domain {name}: the server asks for pass {task.number} of weaving, but the noise is calibrated for {most} "
            "(weave.schedule, weave.sources), each released once. Use one configuration everywhere."
        )
    folder = releases_folder(cache_dir, run_id, name) / f"woven-{task.number}"
    return _release_adapter_once(domain, folder, f"domain {name}: pass {task.number} of weaving", key, train)


def releases_folder(cache_dir: str, run_id: str | None, domain: str) -> Path:
    """Return the folder of a client's releases in a run."""
    return Path(cache_dir).expanduser() / "released" / f"{domain}-{inputs_key({'run': run_id})}"


def released_expert_folder(cache_dir: str, run_id: str | None, domain: str) -> Path:
    """Return the folder of the expert that a client releases in a run."""
    return releases_folder(cache_dir, run_id, domain) / "expert"


def _release_adapter_once(
    domain: LocalDomain, folder: Path, what: str, key: str, train: Callable[[], Release]
) -> Release:
    def write(made: Release, folder: Path) -> dict[str, Any]:
        write_adapter(made.adapter, folder, domain.backbone.name)
        return {"report": dict(made.report), "sha256": adapter_sha256(made.adapter)}

    def read(folder: Path, record: Mapping[str, Any]) -> tuple[Release, str]:
        adapter = read_adapter(folder)
        return Release(adapter, record["report"]), adapter_sha256(adapter)

    return _release_once(folder, what, key, train, write, read)


def release_answer_once(
    domain: LocalDomain,
    config: ExperimentConfig,
    message: CoefficientMessage,
    compute: Callable[[], torch.Tensor],
    charge: Callable[[float], None] = lambda noise_multiplier: None,
) -> torch.Tensor:
    """Return the noisy answer to a message about coefficients: the cached one, or a new one.

    By domain the answer is clipped and noise is added. By user the answer is a sum over users whose parts are clipped
    already: noise is added, and the sum is divided by the expected number of users.

    If the answer cannot be computed, for example at coefficients that a server chose for this purpose, the answer is
    noise alone: an error would reveal data, and could be provoked without limit.

    Args:
        domain: the client's domain.
        config: with data and message it identifies the release; the answers of one ``run_id`` are counted together.
        message: the request.
        compute: computes the answer without noise, or that sum, (K,) or (K, G).
        charge: called with the noise multiplier before anything new is released.

    Raises:
        PolicyError: the noise is not calibrated for the message, the message was answered for another request, or the
            cached answer is damaged.
        ConfigError: no noise is enough.
        DomainError: by user, the catalog is not public, or δ is too large for the number of users.
        ClientError: the answer cannot be cached.
    """
    name, dp = domain.manifest.name, config.dp
    _check_run_id(name, config.run_id)
    _check_chosen_for(name, config, message)
    num_users, answers = len(domain.training_sequences), noisy_answers(config)
    if dp.mode == "user":
        check_user_dp(domain, dp)
        releases = user_releases(config.train, answers, num_users, woven_steps(config))
        others = metric_releases(config)
    else:
        releases, others = domain_releases(answers.number), ()
    key = inputs_key(
        {
            "message": asdict(message),
            "data": [domain.manifest.catalog_sha256, domain.manifest.interactions_sha256],
            "backbone": [domain.backbone.sha256, domain.backbone.pooling],
            "config": [getattr(config, section).cache_inputs() for section in _ANSWERS_DEPEND_ON],
            "seed": config.seed,
            "releases": releases,
        }
    )
    run_folder = releases_folder(config.cache_dir, config.run_id, name)

    def make() -> torch.Tensor:
        noise = _cached_noise(run_folder / "noise.json", dp, releases, others)
        charge(noise)
        try:
            answer = compute().cpu()
        except Exception:  # any error would reveal data
            logger.warning(
                "domain %s: the answer to %s, step %d, is noise alone", name, message.label, message.step, exc_info=True
            )
            answer = torch.zeros_like(torch.tensor(message.coefficients))
        drawn = source(dp.randomness, config.seed, "client", name, "coefficients-dp", message.label, message.step)
        if dp.mode == "user":
            expected = sample_rate(answers.batch_size, num_users) * num_users
            return (answer + noise_like(answer, noise * dp.coefficient_clip, drawn)) / expected
        return add_noise_to_answer(answer, dp.coefficient_clip, noise, drawn)

    def write(made: torch.Tensor, folder: Path) -> dict[str, Any]:
        return {"answer": made.tolist(), "sha256": inputs_key({"answer": made.tolist()})}

    def read(folder: Path, record: Mapping[str, Any]) -> tuple[torch.Tensor, str]:
        return torch.tensor(record["answer"], dtype=torch.float32), inputs_key({"answer": record["answer"]})

    folder = run_folder / f"{inputs_key({'label': message.label})}-{message.step}"
    what = f"domain {name}: the answer about {message.label}, step {message.step},"
    return _release_once(folder, what, key, make, write, read)


def _release_once(
    folder: Path,
    what: str,
    key: str,
    make: Callable[[], Made],
    write: Callable[[Made, Path], dict[str, Any]],
    read: Callable[[Path, Mapping[str, Any]], tuple[Made, str]],
) -> Made:
    """Return the release cached in a folder, after making it if it is missing; of several processes the first one wins.

    Args:
        folder: folder of the release.
        what: subject of error messages.
        key: key of everything that the release depends on.
        make: makes the release.
        write: writes it into a folder and returns the record, with its hash as ``sha256``.
        read: reads it: (folder, record) -> the release and its hash as found.
    """
    if not folder.exists():
        made = make()

        def fill(partial: Path) -> None:
            record = {"key": key, **write(made, partial)}
            write_json(partial / REPORT_FILE, seal(record))

        fill_folder(folder, fill, folder.exists, what)
    try:
        record = read_sealed(folder / REPORT_FILE) or {}
        release, sha256 = read(folder, record)
        same_key, whole = record["key"] == key, record["sha256"] == sha256
    except (FedMergeError, OSError, LookupError, TypeError, ValueError) as error:
        raise PolicyError(
            f"{what} was released before, but {folder} is damaged ({type(error).__name__}), and the noise covers one "
            "release. Start a new run."
        ) from error
    if not same_key or not whole:
        found = "for another request or with other settings" if whole else f"but {folder} was changed since"
        raise PolicyError(
            f"{what} was released before, {found}, and the noise covers one release. Start a new run with its own "
            "run_id."
        )
    return release


def _cached_noise(path: Path, dp: DP, releases: tuple[Counted, ...], others: tuple[Mechanism, ...]) -> float:
    """Return the noise multiplier of the run, calibrated once: a new process may answer each message."""
    key = inputs_key({"dp": dp.model_dump(), "releases": releases, "others": [asdict(other) for other in others]})
    try:
        cached = read_sealed(path) or {}
        if cached["key"] == key:
            return float(cached["noise_multiplier"])
    except (FedMergeError, LookupError, TypeError, ValueError):
        pass
    noise = agreed_noise(dp, releases, others)
    with suppress(OSError, FedMergeError):  # without the file the next process calibrates again
        make_folder(path.parent)
        write_json(path, seal({"key": key, "noise_multiplier": noise}))
    return noise


def _check_chosen_for(name: str, config: ExperimentConfig, message: CoefficientMessage) -> None:
    """Refuse a message that is not among :func:`fedmerge.privacy.dp.releases.coefficient_messages`."""
    method = learned_variant(message.label, config.mergerec, config.adamerging, config.through_clients).method
    steps = config.adamerging.steps if method == "adamerging" else config.mergerec.steps
    local = config.through_clients.local_steps if config.through_clients.mode == "local-steps" else 0
    expected = min(local, steps - message.step)
    begins = 0 <= message.step < steps and message.step % (local or 1) == 0
    asked_for = method in config.merge.methods and coefficient_messages(config) > 0
    if not asked_for or not begins or message.num_steps != expected:
        raise PolicyError(
            f"domain {name}: the server asks for {message.num_steps} steps of {message.label} from step "
            f"{message.step}, but the noise is calibrated for {coefficient_messages(config)} messages: "
            f"{', '.join(config.merge.methods)}, {steps} steps, {local or 1} a message. Use one configuration "
            "everywhere."
        )


def _check_run_id(domain: str, run_id: str | None) -> None:
    if run_id is None:
        raise PolicyError(
            f"domain {domain}: releases with noise are counted by run, but run_id is 'none'. Set run_id, or use "
            "fedmerge run, which sets it."
        )


def _round_key(domain: LocalDomain, settings: TrainingSettings, task: RoundTask) -> str:
    return inputs_key(
        {
            "task": [task.num_rounds, task.trained, task.proximal],
            "start": adapter_sha256(task.start),
            "base": None if task.base is None else adapter_sha256(task.base),
            "data": [domain.manifest.catalog_sha256, domain.manifest.interactions_sha256],
            "backbone": [domain.backbone.sha256, domain.backbone.pooling],
            "text": domain.text.cache_inputs(),
            "train": training_record(settings.train),
            "dp": settings.dp.model_dump(exclude={"coefficient_clip"}),
            "audit": settings.simulation.audit_record(),
            "seed": settings.seed,
        }
    )
