"""What a client has released with differential privacy in a run, on its own disk: its expert, rounds, and answers.

The noise is chosen for one expert, for the rounds of the configuration, or for its messages about merging coefficients,
and each is released once. So what is asked for again, as after a run that was killed, is answered with what was
released before, and nothing else is released for it.
"""

import json
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
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft_folder import read_adapter, write_adapter
from fedmerge.errors import FedMergeError, PolicyError
from fedmerge.files import read_json, write_json
from fedmerge.mergerec.variants import learned_variant
from fedmerge.privacy.dp.accountant import agreed_noise
from fedmerge.privacy.dp.domain_noise import add_noise_to_answer, noise_like
from fedmerge.privacy.dp.randomness import source
from fedmerge.privacy.dp.releases import (
    Counted,
    coefficient_messages,
    domain_releases,
    metric_releases,
    sample_rate,
    user_releases,
)

logger = logging.getLogger(__name__)
Made = TypeVar("Made")

REPORT_FILE = "training.json"
_ANSWERS_DEPEND_ON = ("text", "mergerec", "adamerging", "through_clients", "dp", "simulation")


@dataclass(frozen=True)
class Release:
    """What a client sent for a round, or as its expert: the noised adapter, and what it told of its training."""

    adapter: Adapter
    told: Mapping[str, Any]


@dataclass(frozen=True)
class CoefficientMessage:
    """What a message about merging coefficients asks for.

    Attributes:
        label: of the merge whose coefficients are learned.
        cohort_sha256: the cohort's adapters.
        step: the first step, from 0.
        num_steps: that the client makes by itself; 0: it answers with a gradient.
        coefficients, students: where, as nested lists.
        users: the client's pseudo-users of the step; none where it draws itself.
    """

    label: str
    cohort_sha256: str
    step: int
    num_steps: int
    coefficients: list[Any]
    students: list[Any]
    users: list[int]


def check_round_is_counted(domain: str, config: ExperimentConfig, task: RoundTask) -> None:
    """Refuse a round that the noise was not chosen for, or of a run that cannot be told from another.

    Raises:
        PolicyError: what was asked, and what is expected.
    """
    _check_run_id(domain, config)
    number = config.rounds.number
    if task.num_rounds != number or not 1 <= task.number <= number:
        raise PolicyError(
            f"domain {domain}: asked for round {task.number} of {task.num_rounds}, but its noise is chosen for the "
            f"{number} of rounds.number, and each is released once. Use one configuration everywhere."
        )


def release_round_once(
    domain: LocalDomain, config: ExperimentConfig, task: RoundTask, train: Callable[[], Release]
) -> Release:
    """What this client has released for a round of a run: trained now and kept before it is sent, or as it was sent.

    Args:
        domain: the client's own.
        config: what a release depends on, besides data and task; the rounds of one ``run_id`` are counted together.
        task: the round.
        train: what makes the release.

    Raises:
        PolicyError: another release was made for the round, or it is damaged.
        ClientError: it cannot be kept.
    """
    folder = _released(domain.manifest.name, config) / str(task.number)
    what = f"domain {domain.manifest.name}: round {task.number} of this run"
    return _release_adapter_once(domain, folder, what, _asked(domain, config, task), train)


def release_expert_once(
    domain: LocalDomain, config: ExperimentConfig, asked: str, train: Callable[[], Release]
) -> Release:
    """What this client has released as its expert in a run: trained now and kept before it is sent, or as it was sent.

    Args:
        domain: the client's own.
        config: whose ``run_id`` names the run.
        asked: key of all that the expert depends on, but not of where it is trained.
        train: what makes the release.

    Raises:
        PolicyError: another expert was released, or it is damaged.
        ClientError: it cannot be kept.
    """
    what = f"domain {domain.manifest.name}: the expert of this run"
    return _release_adapter_once(domain, released_expert_folder(domain, config), what, asked, train)


def released_expert_folder(domain: LocalDomain, config: ExperimentConfig) -> Path:
    """Where the expert lies that this client has released in a run, if it has."""
    return _released(domain.manifest.name, config) / "expert"


def _release_adapter_once(
    domain: LocalDomain, folder: Path, what: str, asked: str, train: Callable[[], Release]
) -> Release:
    def write(made: Release, folder: Path) -> dict[str, Any]:
        write_adapter(made.adapter, folder, domain.backbone.name)
        return {"told": dict(made.told), "sha256": adapter_sha256(made.adapter)}

    def read(folder: Path, record: Mapping[str, Any]) -> tuple[Release, str]:
        adapter = read_adapter(folder)
        return Release(adapter, record["told"]), adapter_sha256(adapter)

    return _once(folder, what, asked, train, write, read)


def release_answer_once(
    domain: LocalDomain,
    config: ExperimentConfig,
    message: CoefficientMessage,
    compute: Callable[[], torch.Tensor],
    charge: Callable[[float], None] = lambda noise_multiplier: None,
) -> torch.Tensor:
    """What this client has released for a message about coefficients: made and noised now, or as it was sent.

    By domain the answer is clipped. By user it is a sum over users whose parts are clipped already; the noise is added
    to it, and what leaves is divided by the expected number of users who take part.

    Where nothing can be computed, as at coefficients that a server has chosen to that end, noise alone is the answer:
    an error would tell of the data, and could be had as often as it is asked for.

    Args:
        domain: the client's own.
        config: what a release depends on, besides data and message; the answers of one ``run_id`` count together.
        message: what was asked.
        compute: the answer without noise, or that sum, (K,) or (K, G).
        charge: called with the noise multiplier before anything new is released.

    Raises:
        PolicyError: a message that the noise was not chosen for; another answer was given to it, or it is damaged.
        ConfigError: no noise is enough.
        DomainError: by user, a catalog that is not public, or too few users for δ.
        ClientError: it cannot be kept.
    """
    name, dp = domain.manifest.name, config.dp
    _check_run_id(name, config)
    _check_chosen_for(name, config, message)
    num_users = len(domain.training_sequences)
    if dp.mode == "user":
        check_user_dp(domain, dp)
    releases = user_releases(config, num_users) if dp.mode == "user" else domain_releases(config)
    asked = inputs_key(
        {
            "message": asdict(message),
            "data": [domain.manifest.catalog_sha256, domain.manifest.interactions_sha256],
            "backbone": [domain.backbone.sha256, domain.backbone.pooling],
            "config": [getattr(config, key).model_dump() for key in _ANSWERS_DEPEND_ON],
            "seed": config.seed,
            "releases": releases,
        }
    )

    def make() -> torch.Tensor:
        noise = _cached_noise(name, config, releases)
        charge(noise)
        try:
            answer = compute().cpu()
        except Exception:  # of whatever kind: an error would tell of the data
            logger.warning(
                "domain %s: noise alone answers %s, step %d", name, message.label, message.step, exc_info=True
            )
            answer = torch.zeros_like(torch.tensor(message.coefficients))
        drawn = source(dp.randomness, config.seed, "client", name, "coefficients-dp", message.label, message.step)
        if dp.mode == "user":
            expected = sample_rate(config.through_clients.batch_size, num_users) * num_users
            return (answer + noise_like(answer, noise * dp.coefficient_clip, drawn)) / expected
        return add_noise_to_answer(answer, dp.coefficient_clip, noise, drawn)

    def write(made: torch.Tensor, folder: Path) -> dict[str, Any]:
        return {"answer": made.tolist(), "sha256": inputs_key({"answer": made.tolist()})}

    def read(folder: Path, record: Mapping[str, Any]) -> tuple[torch.Tensor, str]:
        return torch.tensor(record["answer"], dtype=torch.float32), inputs_key({"answer": record["answer"]})

    folder = _released(name, config) / f"{inputs_key({'label': message.label})}-{message.step}"
    what = f"domain {name}: the answer about {message.label}, step {message.step},"
    return _once(folder, what, asked, make, write, read)


def _once(
    folder: Path,
    what: str,
    asked: str,
    make: Callable[[], Made],
    write: Callable[[Made, Path], dict[str, Any]],
    read: Callable[[Path, Mapping[str, Any]], tuple[Made, str]],
) -> Made:
    """A release from its folder, made before where it is not there; of several processes the first one's stays.

    Args:
        folder: of the release.
        what: for messages.
        asked: key of all that it depends on.
        make: makes it.
        write: puts it into a folder; what is recorded beside ``asked``, with its hash as ``sha256``.
        read: folder, record -> the release and its hash as found.
    """
    if not folder.exists():
        made = make()

        def fill(partial: Path) -> None:
            record = {"asked": asked, **write(made, partial)}
            (partial / REPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")

        fill_folder(folder, fill, folder.exists, what)
    try:
        record = json.loads((folder / REPORT_FILE).read_text())
        release, sha256 = read(folder, record)
        same, whole = record["asked"] == asked, record["sha256"] == sha256
    except (FedMergeError, OSError, LookupError, TypeError, ValueError) as error:
        raise PolicyError(
            f"{what} was released before, but {folder} is damaged ({type(error).__name__}), and its noise covers one "
            "release. Start a new run."
        ) from error
    if not same or not whole:
        found = "for another request or with other settings" if whole else f"but {folder} was changed since"
        raise PolicyError(
            f"{what} was released before, {found}, and its noise covers one release. Start a new run, with a run_id of "
            "its own."
        )
    return release


def _cached_noise(name: str, config: ExperimentConfig, releases: tuple[Counted, ...]) -> float:
    """The noise multiplier of the run, found once: each message may be worked on by a process of its own."""
    path = _released(name, config) / "noise.json"
    others = metric_releases(config) if config.dp.mode == "user" else ()
    key = inputs_key(
        {"dp": config.dp.model_dump(), "releases": releases, "others": [asdict(other) for other in others]}
    )
    try:
        kept = read_json(path) or {}
        if kept["for"] == key:
            return float(kept["noise_multiplier"])
    except (FedMergeError, LookupError, TypeError, ValueError):
        pass
    found = agreed_noise(config.dp, releases, others)
    with suppress(OSError, FedMergeError):  # then it is found again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"for": key, "noise_multiplier": found})
    return found


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
            f"domain {name}: asked for {message.num_steps} steps of {message.label} from step {message.step}, but its "
            f"noise is chosen for {coefficient_messages(config)} messages: {', '.join(config.merge.methods)}, {steps} "
            f"steps, {local or 1} a message. Use one configuration everywhere."
        )


def _check_run_id(domain: str, config: ExperimentConfig) -> None:
    if config.run_id is None:
        raise PolicyError(
            f"domain {domain}: dp.mode = '{config.dp.mode}' counts the releases of a run, but run_id is 'none'. Set "
            "it, or use fedmerge run, which does."
        )


def _released(name: str, config: ExperimentConfig) -> Path:
    run = f"{name}-{inputs_key({'run': config.run_id})}"
    return Path(config.cache_dir).expanduser() / "released" / run


def _asked(domain: LocalDomain, config: ExperimentConfig, task: RoundTask) -> str:
    return inputs_key(
        {
            "task": [task.num_rounds, task.trained, task.proximal],
            "start": adapter_sha256(task.start),
            "base": None if task.base is None else adapter_sha256(task.base),
            "data": [domain.manifest.catalog_sha256, domain.manifest.interactions_sha256],
            "backbone": [domain.backbone.sha256, domain.backbone.pooling],
            "text": config.text.model_dump(),
            "train": training_record(config.train),
            "dp": config.dp.model_dump(exclude={"coefficient_clip"}),
            "audit": config.simulation.audit_record(),
            "seed": config.seed,
        }
    )
