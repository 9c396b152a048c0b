"""The MergeRec layout: content, order, and errors that name the file and the defect."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from source_tables import Files, small_source, write_source

from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.folder import domain_info, list_domains
from fedmerge.domain.importers.mergerec import import_mergerec
from fedmerge.domain.interactions import load_interactions
from fedmerge.domain.splits import evaluation_examples
from fedmerge.errors import DomainError


def test_a_small_source_is_imported_as_by_hand(tmp_path: Path) -> None:
    manifest = import_mergerec(write_source(tmp_path / "src" / "Tiny", small_source()), tmp_path / "domains")
    folder = tmp_path / "domains" / "Tiny"
    assert (manifest.name, manifest.num_items, manifest.num_users, manifest.num_interactions) == ("Tiny", 3, 3, 10)
    assert (manifest.public_catalog, manifest.catalog_source) == (False, "interactions")
    assert not manifest.synthetic
    assert str(tmp_path) not in manifest.source
    catalog, interactions = load_catalog(folder), load_interactions(folder)
    assert catalog.item_ids == ("B1", "B2", "B3")
    assert catalog.attributes == {
        "title": ("One", "Two", "Three"),
        "brand": ("", "Acme", ""),
        "category": ("C", "", ""),
    }
    assert interactions.user_ids == ("ann", "bob", "zed")
    assert [interactions.sequence(u).tolist() for u in range(3)] == [[0, 1, 2], [1, 0, 2], [2, 2, 0, 1]]
    # leave-one-out gives back val and test, and takes them from train for bob, who has neither
    assert evaluation_examples(interactions, "valid", None, 0).targets.tolist() == [1, 0, 0]
    assert evaluation_examples(interactions, "test", None, 0).targets.tolist() == [2, 2, 1]


def test_a_name_can_be_given_and_an_existing_domain_needs_overwrite(tmp_path: Path) -> None:
    src = write_source(tmp_path / "with space", small_source())
    with pytest.raises(DomainError, match="'with space'"):
        import_mergerec(src, tmp_path / "domains")
    settings: dict[str, Any] = {"public_catalog": True, "catalog_source": "given"}
    first = import_mergerec(src, tmp_path / "domains", name="tiny", **settings)
    assert (first.public_catalog, first.catalog_source) == (True, "given")
    with pytest.raises(DomainError, match="domains/tiny: "):
        import_mergerec(src, tmp_path / "domains", name="tiny")
    assert import_mergerec(src, tmp_path / "domains", name="tiny", overwrite=True, **settings) == first
    assert list_domains(tmp_path / "domains") == ("tiny",)


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    src = write_source(tmp_path / "Tiny", small_source())
    (src / "val.json").unlink()
    (src / "umap.json").unlink()
    with pytest.raises(DomainError, match=r"Tiny: .*val\.json, umap\.json;"):
        import_mergerec(src, tmp_path / "domains")
    with pytest.raises(DomainError, match=r"nowhere: .*train\.json, val\.json"):
        import_mergerec(tmp_path / "nowhere", tmp_path / "domains")


def edit(stem: str, **entries: object) -> Callable[[Files], object]:
    """Set entries of one file."""
    return lambda files: files[stem].update(entries)


DEFECTS: dict[str, tuple[str, Callable[[Files], object], str]] = {
    "smap gap": ("smap", edit("smap", B3=3), r"3 \('B3'\).* 2 .*0 to 2"),
    "smap repeat": ("smap", edit("smap", B3=1), r"1 \('B3'\).* 2 "),
    "smap from one": ("smap", edit("smap", B1=3), r"1 \('B2'\).* 0 "),
    "smap text": ("smap", edit("smap", B3="2"), r"'B3' .*'2'"),
    "smap boolean": ("smap", edit("smap", B2=True), r"'B2' .*True"),
    "smap empty": ("smap", lambda f: f["smap"].clear(), r"smap\.json"),
    "smap list": ("smap", lambda f: f.update(smap=["B1"]), r"\['B1'\]"),
    "smap empty id": ("smap", lambda f: f.update(smap={"": 0}, meta_data={"": f["meta_data"]["B1"]}), r"'Tiny'.* 0 "),
    "umap gap": ("umap", edit("umap", bob=7), r"2 \('zed'\).* 1 "),
    "no meta": ("meta_data", lambda f: f["meta_data"].pop("B2"), r"1 items of smap\.json .*'B2'"),
    "meta null": ("meta_data", edit("meta_data", B1=None), r"'B1' .*None"),
    "meta NaN": ("meta_data", lambda f: f["meta_data"]["B2"].update(brand=float("nan")), r"'B2' .*nan"),
    "meta key": ("meta_data", lambda f: f["meta_data"]["B2"].pop("brand"), r"'B2' .*title, brand, category"),
    "item too large": ("train", edit("train", **{"0": [0, 3]}), r"'0' .*\[0, 3\].* 0 to 2"),
    "item negative": ("val", edit("val", **{"0": [-1]}), r"'0' .*\[-1\].* 0 to 2"),
    "item NaN": ("test", edit("test", **{"0": [float("nan")]}), r"'0' .*\[nan\]"),
    "item float": ("train", edit("train", **{"0": [1.0]}), r"'0' .*\[1\.0\]"),
    "item boolean": ("train", edit("train", **{"0": [True]}), r"'0' .*\[True\]"),
    "item alone": ("test", edit("test", **{"0": 2}), r"'0' .* 2, "),
    "null items": ("train", edit("train", **{"0": None}), r"'0' .*None"),
    "unknown user": ("val", edit("val", **{"3": [0]}), r"'3' .*umap\.json.* 0 to 2"),
    "odd user": ("val", edit("val", **{"01": [0]}), r"'01' .*umap\.json"),
    "two targets": ("test", edit("test", **{"0": [1, 2]}), r"'0' .* 2 items.*train\.json"),
    "user without items": ("umap", lambda f: f["train"].pop("1"), r"1 users .*train, val, test.*user 1"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_an_error_with_file_and_values_and_writes_nothing(tmp_path: Path, defect: str) -> None:
    stem, change, message = DEFECTS[defect]
    files = small_source()
    change(files)
    src = write_source(tmp_path / "Tiny", files)
    with pytest.raises(DomainError, match=message) as error:
        import_mergerec(src, tmp_path / "domains")
    if defect != "smap empty id":  # found by the catalog, which does not know the file
        assert str(error.value).startswith(str(src / f"{stem}.json"))
    assert not (tmp_path / "domains").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": [0], "1": [', "JSON .*line 1"),
        ('{"0": [0], "0": [1]}', "'0' .*2"),
        (b"\xff\xfe\xfa", "JSON"),
        ("[" * 200_000, "JSON"),
    ],
    ids=["truncated", "repeated key", "not text", "nested too deeply"],
)
def test_a_file_that_is_not_one_json_object_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    src = write_source(tmp_path / "Tiny", small_source())
    (src / "train.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DomainError, match=rf"train\.json: .*{message}"):
        import_mergerec(src, tmp_path / "domains")


@pytest.mark.data
@pytest.mark.skipif("FEDMERGE_TEST_DATA" not in os.environ, reason="needs FEDMERGE_TEST_DATA, a folder of real domains")
@pytest.mark.parametrize(
    ("name", "counts", "num_split_users"),
    [  # counts: users, items, interactions
        ("Beauty", (22363, 12101, 198502), 22363),
        ("Pantry", (14180, 4968, 137769), 14178),
        ("Toys", (19412, 11924, 167597), 19412),
    ],
)
def test_real_domains_have_the_published_counts_and_splits(
    tmp_path: Path, name: str, counts: tuple[int, int, int], num_split_users: int
) -> None:
    src = Path(os.environ["FEDMERGE_TEST_DATA"]) / name
    manifest = import_mergerec(src, tmp_path)
    assert (manifest.num_users, manifest.num_items, manifest.num_interactions) == counts
    assert ("Every item lacks a category." in domain_info(tmp_path / name).problems) == (name == "Pantry")
    interactions = load_interactions(tmp_path / name)
    for split, file_name in (("valid", "val.json"), ("test", "test.json")):
        published = json.loads((src / file_name).read_text())
        examples = evaluation_examples(interactions, split, None, 0)  # type: ignore[arg-type]  # a loop over literals
        ours = dict(zip(examples.users.tolist(), examples.targets.tolist(), strict=True))
        assert len(published) == num_split_users
        assert all(ours[int(user)] == item for user, [item] in published.items())
