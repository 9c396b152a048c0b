"""Merges of merges against the flat merge: methods, factors, depth, the command, merges of runs, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import merges_of, random_adapter
from run_folders import output, refusal

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import from_flat
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import ConfigError, MergeError
from fedmerge.merging.merge_of_merges import Part, merge_of_merges, part_of
from fedmerge.merging.training_free import merge_adapters

Capsys = pytest.CaptureFixture[str]
LAYOUT = {"encoder.layer.0.query": (12, 20), "encoder.layer.1.query": (12, 20), "dense": (16, 12)}
NAMES = tuple("abcdefg")
GROUPS = {"north": "abc", "south": "de", "east": "f"}


def experts() -> dict[str, Adapter]:
    return {name: random_adapter(LAYOUT, 1 + k % 3, 0.5 + k, k) for k, name in enumerate(NAMES)}


def assert_same(found: Adapter, wanted: Adapter) -> None:
    assert found.modules.keys() == wanted.modules.keys()
    for name, module in wanted.modules.items():
        delta = module.delta_weight()
        assert (found.modules[name].delta_weight() - delta).abs().max() <= 1e-6 * delta.abs().max(), name


def write(folder: Path, adapter: Adapter) -> Path:
    write_adapter(adapter, folder, "some/backbone")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: write(tmp_path / name, expert) for name, expert in experts().items()}


def merge(capsys: Capsys, folders: list[Path], out: Path, *options: Any) -> Path:
    output(capsys, "merge", *options, "--out", out, *folders)
    return out


@pytest.mark.parametrize("of_groups", [("average",), ("task-arithmetic", "--coefficient", 0.4)], ids=str)
@pytest.mark.parametrize("of_all", [("average",), ("task-arithmetic", "--coefficient", 0.7)], ids=str)
def test_a_merge_of_merges_is_the_flat_merge(
    folders: dict[str, Path], tmp_path: Path, capsys: Capsys, of_groups: tuple[Any, ...], of_all: tuple[Any, ...]
) -> None:
    groups = [folders["g"]]  # a single adapter beside merges
    for name, members in GROUPS.items():
        if len(members) == 1:
            groups.append(folders[members])
        else:
            groups.append(
                merge(capsys, [folders[member] for member in members], tmp_path / name, "--method", *of_groups)
            )
    made = merge(capsys, groups, tmp_path / "made", "--of-merges", "--method", *of_all)
    flat = merge(capsys, list(folders.values()), tmp_path / "flat", "--method", *of_all)
    assert_same(read_adapter(made), read_adapter(flat))
    found, wanted = (json.loads((folder / "provenance.json").read_text()) for folder in (made, flat))
    for key in ("method", "domains", "parameters", "coefficients"):
        assert found[key] == wanted[key], key
    factors = {name: part["factor"] for name, part in found["merges"].items()}
    share = 1 / 7 if of_all == ("average",) else 0.7
    assert factors["g"] == pytest.approx(share)
    assert factors["north"] == pytest.approx(share * (3 if of_groups == ("average",) else 1 / 0.4))
    assert found["merges"]["south"]["domains"] == ["d", "e"]
    assert found["sha256"] == adapter_sha256(read_adapter(made))


def test_deep_merges_and_factors_of_domains(folders: dict[str, Path], tmp_path: Path, capsys: Capsys) -> None:
    weighted = ["--method", "average", "--coefficients", "a=2,b=0.5,c=0"]
    low = merge(capsys, [folders[name] for name in "abc"], tmp_path / "low", *weighted)
    middle = merge(capsys, [low, folders["d"]], tmp_path / "middle", "--of-merges", "--method", "average")
    top = merge(capsys, [middle, folders["e"]], tmp_path / "top", "--of-merges", "--method", "average")
    kept = {name: expert for name, expert in experts().items() if name in "abde"}
    flat = merge_adapters(kept, "average", coefficients={"a": 2.0, "b": 0.5}).adapter
    assert_same(read_adapter(top), flat)
    assert json.loads((top / "provenance.json").read_text())["coefficients"] == {"a": 2, "b": 0.5, "d": 1, "e": 1}


@pytest.mark.parametrize("rank", [2, "exact"])
def test_the_rank_is_bounded(rank: int | str) -> None:
    each = experts()
    groups = {group: {name: each[name] for name in members} for group, members in GROUPS.items()}
    merges = {group: merge_adapters(members, "average").adapter for group, members in groups.items()}
    parts = {
        group: Part(dict.fromkeys(members, ""), dict.fromkeys(members, 1.0), len(members))
        for group, members in groups.items()
    }
    made = merge_of_merges(merges, parts, "average", output_rank=rank)  # type: ignore[arg-type]  # parametrised
    flat = merge_adapters({name: each[name] for name in "abcdef"}, "average", output_rank=rank)  # type: ignore[arg-type]
    assert_same(made.adapter, flat.adapter)
    for name, module in made.adapter.modules.items():
        assert module.rank <= (2 if rank == 2 else min(LAYOUT[name]))
        assert made.residuals[name] == pytest.approx(flat.residuals[name], abs=1e-5)
    assert (max(made.residuals.values()) > 0.1) == (rank == 2)


def test_merges_of_runs_are_parts(tmp_path: Path) -> None:
    each = experts()

    def candidates(members: str) -> list[Any]:
        names = ",".join(members)
        flat = {"domains.train": names, "domains.unseen": "", "merge.methods": "average,task-arithmetic,ties"}
        return merges_of(None, {name: each[name] for name in members}, {}, from_flat(flat))

    for number in (0, 2):  # the average, and one of task arithmetic
        made = {group: candidates(members)[number] for group, members in (("one", "abc"), ("two", "defg"))}
        parts = {group: part_of(group, made[group].provenance, "") for group in made}
        method = made["one"].method
        found = merge_of_merges({group: made[group].adapter for group in made}, parts, method, coefficient=0.4)
        assert_same(found.adapter, merge_adapters(each, method, **found.parameters).adapter)  # type: ignore[arg-type]
        assert found.provenance({}, None).domains == {name: adapter_sha256(each[name]) for name in each}
    with pytest.raises(MergeError, match=r"north was merged by ties, expected average or task-arithmetic"):
        part_of("north", candidates("abc")[-1].provenance, "")


def test_what_is_not_the_flat_merge_is_refused(folders: dict[str, Path], tmp_path: Path, capsys: Capsys) -> None:
    def group(name: str, members: str, *options: Any) -> Path:
        return merge(capsys, [folders[member] for member in members], tmp_path / name, *options)

    north, south = group("north", "abc", "--method", "average"), group("south", "cd", "--method", "average")
    small = group("small", "de", "--method", "average", "--output-rank", 1)
    ties = group("ties", "de", "--method", "ties")
    new, of_merges = tmp_path / "new", ("merge", "--of-merges", "--out", tmp_path / "new")
    average = ("--method", "average")
    assert "north and south both hold the adapter of 'c'" in refusal(capsys, *of_merges, *average, north, south)
    assert "small was compressed to rank 1 and lost 0." in refusal(capsys, *of_merges, *average, north, small)
    assert "ties was merged by ties" in refusal(capsys, *of_merges, *average, north, ties)
    assert "found method 'ties'" in refusal(capsys, *of_merges, "--method", "ties", north, folders["g"])
    for options in (average, ()):
        given = ("--coefficients", "1,2") if options else ()
        assert "takes --method average" in refusal(capsys, *of_merges, *options, *given, north, folders["g"])
    assert not new.exists()
    with pytest.raises(ConfigError, match=r"'dare', expected average or task-arithmetic"):
        merge_of_merges({}, {}, "dare")


def test_the_inputs_stay_as_they_are() -> None:
    each = {name: expert for name, expert in experts().items() if name in "ab"}
    before = {name: adapter_sha256(expert) for name, expert in each.items()}
    parts = {name: part_of(name, None, before[name]) for name in each}
    made = merge_of_merges(each, parts, "average")
    assert torch.isfinite(next(iter(made.adapter.modules.values())).lora_A).all()
    assert {name: adapter_sha256(expert) for name, expert in each.items()} == before
