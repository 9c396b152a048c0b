"""The study of promoted items: what bad clients train on and claim, and the share of users that they reach."""

from pathlib import Path

import numpy as np
import pytest
import study_promotion
import torch
from in_process import small_experiment

from fedmerge.bench.ranking import backbone_of
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.poisoning import NUM_PROMOTED
from fedmerge.domain.splits import train_sequences


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LocalDomain]:
    experiment = small_experiment(tmp_path_factory.mktemp("promotion"))
    backbone = backbone_of(experiment.backbone, experiment.runtime)
    root = Path(experiment.domains.root)
    return {name: open_domain(root / name, backbone, experiment.text) for name in ("beauty", "coffee")}


def test_half_of_the_targets_are_promoted_and_histories_stay(domains: dict[str, LocalDomain]) -> None:
    coffee, beauty = domains["coffee"], domains["beauty"]
    promoted = np.arange(3, 3 + NUM_PROMOTED)
    bad = study_promotion.promoting(coffee, beauty.catalog, promoted, seed=0)
    assert bad.catalog.titles[: len(coffee.catalog)] == coffee.catalog.titles
    assert bad.catalog.titles[len(coffee.catalog) :] == beauty.catalog.titles[3 : 3 + NUM_PROMOTED]
    trained = train_sequences(bad.interactions)
    clean = [items[: cut + 1] for items in coffee.training_sequences for cut in range(1, len(items))]
    assert [[*items[:-1]] for items in trained] == [[*items[:-1]] for items in clean]
    is_promoted = np.array([items[-1] >= len(coffee.catalog) for items in trained])
    assert 0.35 < is_promoted.mean() < 0.65
    honest = [found[-1] == items[-1] for found, items, p in zip(trained, clean, is_promoted, strict=True) if not p]
    assert all(honest)


def test_a_stuffed_catalog_has_a_promoted_text_in_every_second_item(domains: dict[str, LocalDomain]) -> None:
    coffee, beauty = domains["coffee"], domains["beauty"]
    bad = study_promotion.promoting(coffee, beauty.catalog, np.arange(NUM_PROMOTED), seed=0)
    stuffed, own = study_promotion.stuffed(bad.catalog), len(coffee.catalog)
    assert stuffed.item_ids == bad.catalog.item_ids
    assert stuffed.titles[0:own:2] == coffee.catalog.titles[0:own:2]
    assert {*stuffed.titles[1:own:2]} == {*beauty.catalog.titles[:NUM_PROMOTED]}


def test_exposure_counts_users_and_hides_their_histories() -> None:
    scores = torch.arange(15.0, 0.0, -1.0).repeat(3, 1)  # item 0 first
    histories = [np.array([14]), np.array([0, 1]), np.array([11])]
    found = study_promotion.exposure(scores, [h.astype(np.int32) for h in histories], np.array([11, 14]))
    assert found == pytest.approx(1 / 3)  # the second user has item 11 on place ten


def test_the_table_has_a_row_for_each_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = small_experiment(tmp_path)
    changes = {
        "domains.root": experiment.domains.root,
        "cache_dir": experiment.cache_dir,
        "backbone.source": experiment.backbone.source,
        "text.max_tokens": 32,
        "train.max_steps": 1,
        "mergerec.steps": 1,
        "runtime.precision": "float32",
    }
    study_promotion.main(
        [
            *("--domains", "beauty", "books", "coffee", "--attackers", "coffee", "--seeds", "0", "--users", "20"),
            *("--set", *(f"{key}={value}" for key, value in changes.items())),
        ]
    )
    printed = capsys.readouterr().out
    assert "1 of 3 promote 5 items of beauty" in printed
    assert "seed 0, 1 bad, catalog half of them copies: the gate finds" in printed
    rows = [line.split(" | ")[0].lstrip("| ") for line in printed.splitlines() if " ± " in line]
    plain = ["average", "task arithmetic .4", "TIES", "median", "MergeRec, catalog own"]
    more = ["MergeRec, catalog with the promoted items", "MergeRec, catalog half of them copies"]
    assert rows == [*plain, *plain, *more]
