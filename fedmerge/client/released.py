"""The rounds that a client has released with differential privacy by user, on its own disk.

The noise is chosen for the rounds of the configuration, each released once. So a round that is asked for again, as
after a run that was killed, is answered with what was released before, and nothing else is released for it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmerge.client.kept import inputs_key, keep
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.rounds import RoundTask
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.lora import Adapter, adapter_sha256, read_adapter, write_adapter
from fedmerge.errors import FedMergeError, PolicyError

REPORT_FILE = "training.json"


@dataclass(frozen=True)
class Release:
    """What a client sent for a round: the noised adapter, and what it told of its training."""

    adapter: Adapter
    told: Mapping[str, Any]


def check_counted(domain: str, config: ExperimentConfig, task: RoundTask) -> None:
    """Refuse a round that the noise was not chosen for, or of a run that cannot be told from another.

    Raises:
        PolicyError: what was asked, and what is expected.
    """
    if config.run_id is None:
        raise PolicyError(
            f"domain {domain}: dp.mode = 'user' in rounds counts the releases of a run, but run_id is 'none'. Set it, "
            "or use fedmerge run, which does."
        )
    number = config.rounds.number
    if task.num_rounds != number or not 1 <= task.number <= number:
        raise PolicyError(
            f"domain {domain}: asked for round {task.number} of {task.num_rounds}, but its noise is chosen for the "
            f"{number} of rounds.number, and each is released once. Use one configuration everywhere."
        )


def released_once(
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
    name = domain.manifest.name
    run = f"{name}-{inputs_key({'run': config.run_id})}"
    folder = Path(config.cache_dir).expanduser() / "released" / run / str(task.number)
    asked = _asked(domain, config, task)
    if not folder.exists():
        made = train()

        def write(partial: Path) -> None:
            write_adapter(made.adapter, partial, domain.backbone.name)
            record = {"asked": asked, "told": dict(made.told), "sha256": adapter_sha256(made.adapter)}
            (partial / REPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")

        keep(folder, write, folder.exists, f"domain {name}: its round {task.number}")
    try:
        adapter, record = read_adapter(folder), json.loads((folder / REPORT_FILE).read_text())
        same, whole, told = record["asked"] == asked, record["sha256"] == adapter_sha256(adapter), record["told"]
    except (FedMergeError, OSError, LookupError, TypeError, ValueError) as error:
        raise PolicyError(
            f"domain {name}: round {task.number} was released before, but {folder} is damaged "
            f"({type(error).__name__}), and its noise covers one release. Start a new run."
        ) from error
    if not same or not whole:
        found = "from another start or with other settings" if whole else f"but {folder} was changed since"
        raise PolicyError(
            f"domain {name}: round {task.number} of this run was released before, {found}, and its noise covers one "
            "release. Start a new run, with a run_id of its own."
        )
    return Release(adapter, told)


def _asked(domain: LocalDomain, config: ExperimentConfig, task: RoundTask) -> str:
    return inputs_key(
        {
            "task": [task.num_rounds, task.trained, task.proximal],
            "start": adapter_sha256(task.start),
            "base": None if task.base is None else adapter_sha256(task.base),
            "data": [domain.manifest.catalog_sha256, domain.manifest.interactions_sha256],
            "backbone": [domain.backbone.sha256, domain.backbone.pooling],
            "text": config.text.model_dump(),
            "train": config.train.model_dump(),
            "dp": config.dp.model_dump(),
            "audit": config.audit.model_dump(),
            "seed": config.seed,
        }
    )
