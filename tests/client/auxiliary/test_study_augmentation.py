"""The study of augmented histories and auxiliary losses, on tiny domains."""

from pathlib import Path

import pytest
import study_augmentation
from in_process import small_experiment

from fedmerge.bench.ranking import domain_of
from fedmerge.config import to_toml
from fedmerge.domain.splits import evaluation_examples
from fedmerge.files import read_json


def test_reported_users_have_read_nothing(tmp_path: Path) -> None:
    config = small_experiment(tmp_path)
    domain = domain_of(config, "beauty")
    number, examples = study_augmentation.stopping_and_reported(domain, config, 10)
    assert (number, len(examples)) == (15, 10)
    stopping = evaluation_examples(domain.interactions, "valid", number, config.seed)
    assert not {*stopping.users.tolist()} & {*examples.users.tolist()}
    sequences = [domain.interactions.sequence(int(user)) for user in examples.users]
    assert [int(sequence[-2]) for sequence in sequences] == examples.targets.tolist()  # test is never read


@pytest.mark.long
def test_every_row_is_compared_with_the_expert(tmp_path: Path) -> None:
    changes = {"domains.train": "beauty,books", "domains.unseen": ""}
    (tmp_path / "small.toml").write_text(to_toml(small_experiment(tmp_path, **changes)))
    study_augmentation.main([str(tmp_path / "small.toml"), "--out", str(tmp_path / "rows.json")])
    rows = (read_json(tmp_path / "rows.json") or {})["differences"]["unmasked"]
    assert [*rows] == [*study_augmentation.ROWS][1:]
    assert all([*cells] == ["beauty", "books", "mean"] for cells in rows.values())
    assert all(low <= gain <= high for cells in rows.values() for gain, low, high in cells.values())
    reports = [read_json(path / "training.json") or {} for path in (tmp_path / "cache" / "experts").iterdir()]
    assert sorted(report["steps"] for report in reports) == [2] * 6 + [4] * 4
