"""Small runs under the policy aggregate-only, and clients that fail in them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from in_process import small_experiment

from fedmerge.adapter import Adapter
from fedmerge.config import ExperimentConfig
from fedmerge.encoder.peft.folder import read_adapter
from sim.app.messages import records
from sim.app.messages import secure_sum as secure_records
from sim.local.in_process import answer_honestly

TRAIN = ("beauty", "books", "camping", "coffee")


STEPS = {
    "advertise": secure_records.ADVERTISE,
    "share": secure_records.SHARE,
    "masked": secure_records.MASKED,
    "unmask": secure_records.UNMASK,
}


def experiment(place: Path, name: str, **changes: object) -> ExperimentConfig:
    flat = {
        "run_id": name,
        "domains.train": ",".join(TRAIN),
        "domains.unseen": "",
        "merge.methods": "average,task-arithmetic",
        "privacy.policy": "aggregate-only",
        "privacy.min_users": 2,
        "evaluation.test_users": 5,
        "evaluation.validation_users": 5,
        "evaluation.baselines": "",
    }
    return small_experiment(place, **flat | {key.replace("__", "."): value for key, value in changes.items()})


def own_disk(place: Path, name: str) -> dict[str, Any]:
    """Give clients their own disk, with the experts of the plain run and no revealed sums."""
    shutil.copytree(place / "cache" / "experts", place / name / "experts")
    return {"cache_dir": str(place / name)}


def run_dir(config: ExperimentConfig) -> Path:
    return Path(config.output_dir) / str(config.run_id)


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: module.delta_weight() for name, module in adapter.modules.items()}


def merged(config: ExperimentConfig, label: str) -> dict[str, torch.Tensor]:
    return deltas(read_adapter(run_dir(config) / "merged" / label))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert float(values.abs().max()) > 0
        torch.testing.assert_close(values, factor * expected[name], rtol=0, atol=1e-6)


def domain_of(context: Context) -> str:
    return TRAIN[int(context.node_config["partition-id"])]


def gone_at(step: str, domain: str) -> Callable[[Message, Context], Message | None]:
    """Return an answer by which one client fails at a step."""

    def answer(message: Message, context: Context) -> Message | None:
        if domain_of(context) == domain and message.metadata.message_type == STEPS[step]:
            return Message(records.error_record("gone", domain), reply_to=message)
        return answer_honestly(message, context)

    return answer


class Killed(BaseException):
    pass
