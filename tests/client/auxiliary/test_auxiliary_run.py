"""Whole runs with auxiliary losses and augmentations: nothing travels that a plain run does not send."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from in_process import small_experiment

from fedmerge.files import read_json
from sim.local.in_process import run_in_process

pytestmark = pytest.mark.federation

ON = {"train.objectives": "sp=0.1,coserec=0.1", "train.augment": "insert=0.3,substitute=0.1"}


@pytest.mark.parametrize("rounds", [{}, {"rounds.rule": "weighted-average", "rounds.number": 2}], ids=str)
def test_the_ledger_is_that_of_a_plain_run(tmp_path: Path, rounds: dict[str, object]) -> None:
    ledgers = []
    for name, changes in (("plain", {}), ("augmented", ON)):
        common = {"run_id": name, "merge.methods": "average", "head.kind": "local", "head.max_epochs": 1}
        contrast = {"head.contrast": 0.1} if changes else {}
        run_in_process(small_experiment(tmp_path, **common, **rounds, **changes, **contrast))
        rows = pq.read_table(tmp_path / "runs" / name / "exposure.parquet").to_pylist()
        ledgers.append([(row["domain"], row["message"], row["name"], row["shape"]) for row in rows])
    assert sorted(ledgers[0]) == sorted(ledgers[1])
    if not rounds:
        report = read_json(tmp_path / "runs" / "augmented" / "adapters" / "books" / "training.json") or {}
        assert report["auxiliary"]["objectives"] == {"sp-style": 0.1, "coserec-style": 0.1}
        assert report["auxiliary"]["augment"] == {"insert": 0.3, "substitute": 0.1}
        plain = read_json(tmp_path / "runs" / "plain" / "adapters" / "books" / "training.json") or {}
        assert "auxiliary" not in plain
