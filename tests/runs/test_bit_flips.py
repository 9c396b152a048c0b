"""A flipped bit of a file that a run reads back is noticed, in every kind of file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.errors import FedMergeError, RunDirError
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import VARIANTS, metric_sums
from fedmerge.federated.rounds import GlobalState
from fedmerge.files import append_line, read_json, read_lines, read_sealed, seal, write_json
from fedmerge.runs import checkpoints, dp_spent, round_checkpoints, secure_sums
from fedmerge.runs.folder import ADMISSION

FLIPS = {"sums": 600}  # others: 150


@dataclass(frozen=True)
class Kept:
    """A file that is written, and what reading gives; None if the file counts as absent."""

    file: Path
    read: Callable[[], Any]


def sums(folder: Path) -> Kept:
    rng = np.random.default_rng(0)
    outcomes = {method: rng.random((30, len(METRICS))) for method in ("average", "expert")}
    checkpoints.write_sums(folder, "valid", "books", {variant: metric_sums(outcomes, variant) for variant in VARIANTS})

    def read() -> Any:
        found = checkpoints.read_sums(folder, "valid").get("books")
        return found and {variant: of_variant.to_dict() for variant, of_variant in found.items()}

    return Kept(folder / "validation" / "books.json", read)


def lines_of_releases(folder: Path) -> Kept:
    for number in (1, 2, 3):
        privacy = {"epsilon": 1.25, "noise_multiplier": 1.5 + number}
        dp_spent.note_release(folder, "books", number, f"{number}" * 64, privacy)
    return Kept(folder / dp_spent.RELEASED, lambda: list(read_lines(folder / dp_spent.RELEASED)))


def revealed(folder: Path) -> Kept:
    secure_sums.note_reveal(folder, 1, {"books": {"privacy": {"epsilon": 1.5}}}, ["books"])
    return Kept(folder / secure_sums.REVEALED, lambda: secure_sums.revealed_reports(folder))


def last_round(folder: Path) -> Kept:
    round_checkpoints.write_members(folder, ["books"])
    adapter = Adapter({"encoder.query": LoraModule(torch.ones(2, 3), torch.ones(3, 2), 0.5)})
    state = GlobalState(1, adapter, {"books": adapter})
    round_checkpoints.write_state(folder, state, {"books": {"steps": 3}}, 1.0)

    def read() -> Any:
        found = round_checkpoints.read_state(folder)
        return found and {name: (m.lora_A.tolist(), m.lora_B.tolist()) for name, m in found.adapter.modules.items()}

    return Kept(folder / "rounds" / "1.safetensors", read)


def round_record(folder: Path) -> Kept:
    last_round(folder)
    return Kept(folder / "rounds" / "1.json", lambda: round_checkpoints.round_records(folder))


def members(folder: Path) -> Kept:
    round_checkpoints.write_members(folder, ["books", "toys"])
    return Kept(folder / "rounds" / "members.json", lambda: round_checkpoints.read_members(folder))


def sample(folder: Path) -> Kept:
    round_checkpoints.write_members(folder, ["books", "toys"])
    round_checkpoints.write_sample(folder, 3, ["toys"])
    return Kept(folder / "rounds" / "drawn.json", lambda: round_checkpoints.read_sample(folder, 3))


def gate(folder: Path) -> Kept:
    write_json(folder / ADMISSION, seal({"action": "exclude", "failed": {"books": "its norm"}}))
    return Kept(folder / ADMISSION, lambda: checkpoints.read_excluded_experts(folder))


KINDS = [sums, lines_of_releases, revealed, last_round, round_record, members, sample, gate]


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, kind: Callable[[Path], Kept]) -> None:
    kept = kind(tmp_path)
    whole, expected = kept.file.read_bytes(), kept.read()
    assert expected
    rng = np.random.default_rng(24)
    bits = 8 * len(whole)
    noticed = 0
    flips = min(FLIPS.get(kind.__name__, 150), bits)
    for bit in rng.choice(bits, flips, replace=False).tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        kept.file.write_bytes(flipped)
        try:
            found = kept.read()
        except FedMergeError:
            found = None
        assert found is None or found == expected, f"bit {bit}"
        noticed += found is None
    assert noticed > 0.9 * flips  # the others change nothing that is read
    kept.file.write_bytes(whole)
    assert kept.read() == expected


def test_a_line_cut_short_is_skipped_and_a_changed_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, {"a": 1})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert list(read_lines(path)) in ([], [{"a": 1}])
        append_line(path, {"a": 2})
        assert list(read_lines(path))[-1] == {"a": 2}
    path.write_bytes(whole.replace(b'"a": 1', b'"a": 3'))
    with pytest.raises(RunDirError) as caught:
        list(read_lines(path))
    assert str(path) in str(caught.value)
    assert "line 2" in str(caught.value)


def test_a_seal_is_verified_where_it_stands_and_demanded_of_state(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, seal({"a": [1.5, None], "b": {"1": "ü"}}))
    assert read_json(path) == read_sealed(path) == {"a": [1.5, None], "b": {"1": "ü"}}
    path.write_text(path.read_text().replace("1.5", "1.7"))
    for read in (read_json, read_sealed):
        with pytest.raises(RunDirError) as caught:
            read(path)
        assert str(path) in str(caught.value)
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    with pytest.raises(RunDirError):
        read_sealed(path)
    assert read_sealed(tmp_path / "absent.json") is None
