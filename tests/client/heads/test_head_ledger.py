"""A whole run with heads: every array and value that left the clients, by name and size."""

from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from flwr.app import Array, Context, Message
from in_process import small_experiment

from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.interactions import load_interactions
from sim.app.messages import records
from sim.local.in_process import answer_honestly, run_in_process

pytestmark = pytest.mark.federation

HEADS = {
    "head.kind": "local",
    "head.vectors": "merge,expert",
    "head.hidden_size": 6,
    "head.max_epochs": 2,
    "merge.methods": "average",
    "privacy.min_users": 5,
}


def test_nothing_of_a_head_leaves_in_a_whole_run(tmp_path: Path) -> None:
    config = small_experiment(tmp_path, **HEADS)
    texts, shapes = list[str](), set[tuple[int, ...]]()

    def answer(message: Message, context: Context) -> Message | None:
        reply = answer_honestly(message, context)
        assert reply is not None
        if message.metadata.message_type != records.CATALOG:
            for record in reply.content.values():
                texts.extend(str(value) for value in record.values() if not isinstance(value, Array))
        arrays = reply.content.array_records.values()
        shapes.update(tuple(array.shape) for record in arrays for array in record.values())
        return reply

    run_in_process(config, answer)
    # The ledger: what a run without heads sends, and one value in answer to train.head.
    names = defaultdict(set)
    for row in pq.read_table(tmp_path / "runs" / "run" / "exposure.parquet").to_pylist():
        names[row["message"]].add((row["name"], row["shape"]))
    assert names.keys() == {"query.describe", "train", "train.head", "evaluate"}
    assert names["train.head"] == {("facts.heads", "")}
    assert names["evaluate"] == {("facts.masked", ""), ("facts.unmasked", "")}
    # Arrays are the factors of adapters: no axis of items (25), none of a head's width (6).
    assert shapes == {(2, 32), (32, 2)}
    for name in config.domains.train:
        folder = tmp_path / "domains" / name
        for private in (*load_catalog(folder).item_ids, *load_interactions(folder).user_ids):
            assert not [text for text in texts if f'"{private}"' in text]
        assert list((tmp_path / "cache" / "heads").glob(f"{name}-*/model.safetensors"))
