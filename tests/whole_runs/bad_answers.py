"""Clients that answer one type of message wrongly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from in_process import small_experiment

from fedmerge.config import ExperimentConfig
from sim.app.messages import records
from sim.local.in_process import Answer, answer_honestly

DOMAINS = ("beauty", "books", "coffee", "camping")


BAD = "coffee"


def experiment(place: Path, tmp_path: Path, **changes: object) -> ExperimentConfig:
    return small_experiment(place, **{"output_dir": str(tmp_path), "merge.methods": "average", **changes})


Change = Callable[[Message, Message], Message | None]


def bad_client(message_type: str, change: Change, split: str = "") -> Answer:
    """Replace one client's answer to one type of message: question and honest answer -> answer."""

    def answer(message: Message, context: Context) -> Message | None:
        honest = answer_honestly(message, context)
        its_turn = DOMAINS[int(context.node_config["partition-id"])] == BAD
        if not its_turn or message.metadata.message_type != message_type or honest is None:
            return honest
        if split and records.read_evaluation_request(message.content)[0].split != split:
            return honest
        return change(message, honest)

    return answer


def garbage(question: Message, honest: Message) -> Message:
    junk = RecordDict({"junk": ConfigRecord({"a": [1.5, 2.5], "b": b"\x00\xff"})})
    return Message(junk, reply_to=question)


def too_much(question: Message, honest: Message) -> Message:
    honest.content["more"] = ArrayRecord({"x": Array(np.zeros(10**6, dtype=np.float64))})
    return honest


def of_adapter(change: Callable[[dict[str, np.ndarray]], Any]) -> Change:
    def changed(question: Message, honest: Message) -> Message:
        arrays = {name: array.numpy() for name, array in honest.content.array_records["adapter"].items()}
        change(arrays)
        honest.content["adapter"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        return honest

    return changed


def cut(arrays: dict[str, np.ndarray]) -> None:
    name = sorted(arrays)[0]
    arrays[name] = arrays[name][:1]
