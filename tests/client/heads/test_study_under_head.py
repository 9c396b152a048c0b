"""The study of adapters trained under a head, on a tiny domain."""

from dataclasses import replace
from pathlib import Path

import study_adapter_under_head
from in_process import small_experiment

from fedmerge.adapter import is_zero
from fedmerge.bench.ranking import backbone_of
from fedmerge.client.local_domain import open_domain
from fedmerge.client.training.batches import training_batches
from fedmerge.client.training.loop import Attached, Budget, Recipe, Schedule, Step, fit
from fedmerge.files import read_json
from fedmerge.sequence.model import SequenceModel, SequenceSettings


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


def test_training_under_a_head_changes_the_adapter(tmp_path: Path) -> None:
    """Whatever validation says: the adapter of the last step is compared."""
    experiment = small_experiment(tmp_path)
    backbone = backbone_of(experiment.backbone, experiment.runtime)
    domain = open_domain(Path(experiment.domains.root) / "beauty", backbone, experiment.text)
    settings = replace(SequenceSettings(), inputs="text")
    head = SequenceModel(len(domain.catalog), settings, domain.backbone_item_vectors)
    batches = training_batches(domain.training_sequences, experiment.train, 0, "beauty")

    def init(attached: Attached, first: int) -> Step:
        of_users = (batch for batch, _ in batches)
        return study_adapter_under_head.under_head_steps(
            domain, head, of_users, experiment.train, attached, lambda: 0.0
        )

    recipe = Recipe("beauty", init, Schedule(1e-3, 0, Budget(max_steps=2)))
    assert not is_zero(fit(recipe, backbone, experiment.lora, 0).adapter)
