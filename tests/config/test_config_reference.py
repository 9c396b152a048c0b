"""The reference of the settings documents every key."""

from fedmerge.config import ExperimentConfig, to_flat
from fedmerge.report.docs.config_reference import config_reference


def test_every_key_has_a_row_with_its_values_default_and_meaning() -> None:
    rows = [line.split(" | ") for line in config_reference().splitlines() if line.startswith("| `")]
    keys = [row[0].strip("|` ") for row in rows]
    assert sorted(keys) == sorted(to_flat(ExperimentConfig()))
    assert all(len(row) == 4 and all(cell.strip(" |`") for cell in row) for row in rows)


def test_a_row_has_bounds_alternatives_and_none() -> None:
    text = config_reference()
    for row in (
        "| `train.learning_rate` | number, > 0, ≤ 1 | `0.001` | ",
        '| `train.max_minutes` | number, > 0 or `none` | `"none"` | ',
        "| `privacy.policy` | `adapter+catalog`, `adapter`, `catalog-private`, `aggregate-only` | ",
        "| `merge.methods` | list (not empty): `average`, `task-arithmetic`, ",
        "| `evaluation.fallback` | `true`, `false` | `true` | ",
        "| `seed` | integer, ≥ 0, < 2147483648 | `0` | ",
    ):
        assert row in text
