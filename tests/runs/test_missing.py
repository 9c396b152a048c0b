"""Which domains are missing from a run, and why: from the records of the run, also those of older versions."""

from pathlib import Path
from typing import Any

import pytest

from fedmerge.errors import RunDirError
from fedmerge.files import write_json
from fedmerge.runs.overview.missing import find_merged, find_missing

NAMED = ("books", "coffee", "music", "toys", "camping", "garden")
CLIENTS: dict[str, Any] = {
    "participants": {"books": {}, "camping": {}, "music": {}},
    "excluded": {"toys": "train: no answer", "garden (node 7)": "another version", "coffee": "evaluate failed"},
    "excluded_in_phase": {"toys": "train", "garden (node 7)": "gather", "coffee": "validation"},
}


def test_each_missing_domain_has_its_reason(tmp_path: Path) -> None:
    write_json(tmp_path / "experts.json", {"books": "a", "coffee": "b", "music": "c"})
    write_json(tmp_path / "admission.json", {"action": "exclude", "failed": {"music": "too large"}})
    clients = {**CLIENTS, "absent": {"garden": "the only node that claimed to be it was excluded"}}
    assert find_missing(tmp_path, clients, NAMED) == {
        "garden": "absent: the only node that claimed to be it was excluded",
        "music": "not merged, it failed at the admission gate: too large",
        "toys": "excluded in the phase train: train: no answer",
        "garden (node 7)": "excluded in the phase gather: another version",
        "coffee": "excluded in the phase validation: evaluate failed; its expert is still merged",
    }
    assert find_merged(tmp_path) == ("books", "coffee")


def test_without_a_record_of_absence_it_follows_from_the_others(tmp_path: Path) -> None:
    clients = {"participants": {"books": {}}, "excluded": {"garden (node 7)": "another version"}}
    missing = find_missing(tmp_path, clients, ("books", "coffee", "garden"))
    assert missing == {"garden (node 7)": "excluded: another version", "coffee": "absent: it did not take part"}
    assert find_missing(tmp_path, {}, NAMED) == {}  # no client has answered yet
    assert find_merged(tmp_path) == ()


def test_an_expert_that_is_only_flagged_is_not_missing(tmp_path: Path) -> None:
    write_json(tmp_path / "experts.json", {"books": "a"})
    write_json(tmp_path / "admission.json", {"action": "flag", "failed": {"books": "too large"}})
    assert find_missing(tmp_path, {"participants": {"books": {}}}, ("books",)) == {}
    assert find_merged(tmp_path) == ("books",)
    (tmp_path / "admission.json").write_text("{")
    with pytest.raises(RunDirError, match=r"admission\.json"):
        find_missing(tmp_path, {"participants": {"books": {}}}, ("books",))
