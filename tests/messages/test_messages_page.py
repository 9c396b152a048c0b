"""docs/messages.md lists every message and every field of the records."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import metric_sums
from fedmerge.privacy.secagg.state import Advertisement
from fedmerge.privacy.signatures import Signature
from sim.app.messages import records, secure_sum
from sim.app.messages.records import training

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "messages.md").read_text(encoding="utf-8")
MESSAGES = {
    value
    for module in (records, secure_sum)
    for name, value in vars(module).items()
    if name.isupper()
    and isinstance(value, str)
    and (value.startswith(("query.", "train.")) or value in ("train", "evaluate"))
}


def test_every_message_has_a_row() -> None:
    assert len(MESSAGES) == 16
    assert {line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")} == MESSAGES


@pytest.mark.parametrize(
    "record",
    [
        records.Description,
        records.RoundRequest,
        records.EvaluationRequest,
        records.GradientRequest,
        records.HeadRequest,
        records.LayerMapRequest,
        records.PersonalRequest,
        records.SimilarityRequest,
        records.WeaveRequest,
        Advertisement,
        Signature,
    ],
)
def test_every_field_of_a_record_is_listed(record: Any) -> None:
    names = [field.name for field in fields(record)]
    assert [name for name in names if f"`{name}`" not in PAGE and f"`signature.{name}`" not in PAGE] == []


def test_every_entry_of_metric_sums_is_listed() -> None:
    sums = metric_sums({"backbone": np.zeros((2, len(METRICS)))}, "masked")
    assert [key for key in sums.to_dict() if f"`{key}`" not in PAGE] == []


def test_every_entry_of_a_training_report_is_listed() -> None:
    fields_of_reports = [*training.REPORT_FIELDS, *records.HEAD_REPORT_FIELDS]
    assert [key for key in fields_of_reports if f"`{key}`" not in PAGE] == []
