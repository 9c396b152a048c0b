"""The study of adapters trained under a head, on a tiny domain."""

from pathlib import Path

import study_adapter_under_head
from in_process import small_experiment

from fedmerge.files import read_json


def test_both_adapters_are_trained_and_have_the_same_rows(tmp_path: Path) -> None:
    experiment = small_experiment(tmp_path)
    changes = {
        "backbone.source": experiment.backbone.source,
        "text.max_tokens": 32,
        "lora.rank": 2,
        "lora.alpha": 4,
        "train.batch_size": 10,
        "train.validate_every_steps": 2,
        "runtime.precision": "float32",
        "runtime.threads_per_client": 1,
    }
    study_adapter_under_head.main(
        [
            *(str(tmp_path / "domains" / "beauty"), "--cpu-minutes", "0.005", "--head-epochs", "1"),
            *("--out", str(tmp_path / "rows.json"), "--set", *(f"{key}={value}" for key, value in changes.items())),
        ]
    )
    rows = read_json(tmp_path / "rows.json")["rows"]
    assert [*rows] == ["backbone", "today", "under the head"]
    assert all({*row} == {"cpu_seconds", "head", "text", "recent items", "fused"} for row in rows.values())
    assert all(0 <= row["fused"] <= 1 for row in rows.values())
    assert all(rows[name]["cpu_seconds"] > rows["backbone"]["cpu_seconds"] for name in ("today", "under the head"))
