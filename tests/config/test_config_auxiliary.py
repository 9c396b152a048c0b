"""Settings of auxiliary losses and augmentations: parsed, canonical, refused with a remedy."""

from typing import Any

import pytest

from fedmerge.config import Train, from_flat
from fedmerge.errors import ConfigError


def test_lists_are_read_in_a_fixed_order_and_without_what_is_off() -> None:
    train = from_flat({"train.objectives": "coserec=0.3, sp=0.1, mip=0", "train.augment": "substitute=.1,insert=0.3"})
    assert list(train.train.objective_weights.items()) == [("sp", 0.1), ("coserec", 0.3)]
    assert list(train.train.augment_rates.items()) == [("insert", 0.3), ("substitute", 0.1)]
    assert train.train.auxiliary_record().keys() == {"objectives", "views", "augment", "augment_share"}
    assert Train().auxiliary_record() == {}


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({"train.objectives": "aap=0.1"}, ["objectives has 'aap=0.1'", "sp, mip, map, coserec, attribute-dropout"]),
        ({"train.objectives": "sp"}, ["objectives has 'sp'", "NAME=NUMBER"]),
        ({"train.objectives": "sp=-1"}, ["objectives has 'sp=-1'", "between 0 and 10"]),
        ({"train.objectives": "sp=nan"}, ["objectives has 'sp=nan'"]),
        ({"train.objectives": "sp=0.1,sp=0.2"}, ["objectives has sp more than once"]),
        ({"train.objectives": "coserec=0.1", "train.views": ""}, ["views names no augmentation", "insert=0.4"]),
        ({"train.augment": "insert=1.5"}, ["augment has 'insert=1.5'", "between 0 and 1"]),
        ({"train.views": "shuffle=0.5"}, ["views has 'shuffle=0.5'", "crop, mask, reorder, insert, substitute"]),
        ({"head.contrast": 0.1, "head.views": ""}, ["contrast is on", "set contrast = 0"]),
        ({"head.views": "crop=2"}, ["views has 'crop=2'"]),
        (
            {
                "train.objectives": "sp=0.1,attribute-dropout=0.1",
                "train.negatives": "catalog",
                "dp.mode": "user",
                "dp.epsilon": 8.0,
                "dp.delta": 1e-5,
            },
            ["dp.mode = 'user'", "train.objectives has sp:", "train.augment"],
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_the_remedy(flat: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        from_flat(flat)
    for part in expected:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "flat", [{"train.objectives": "attribute-dropout=0.1"}, {"train.augment": "insert=0.3,crop=0.6"}], ids=str
)
def test_what_reads_one_user_or_none_goes_with_privacy_by_user(flat: dict[str, Any]) -> None:
    by_user = {"train.negatives": "catalog", "dp.mode": "user", "dp.epsilon": 8.0, "dp.delta": 1e-5}
    assert from_flat({**flat, **by_user}).dp.mode == "user"
