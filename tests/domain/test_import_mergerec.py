"""The MergeRec layout: what is imported, in which order, and every defect of the source by file, finding and remedy."""

import json
import os
from collections.abc import Callable
from pathlib import Path

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
    assert manifest.public_catalog
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
    with pytest.raises(DomainError, match="Domain name 'with space'"):
        import_mergerec(src, tmp_path / "domains")
    first = import_mergerec(src, tmp_path / "domains", name="tiny", public_catalog=False)
    assert not first.public_catalog
    with pytest.raises(DomainError, match="a domain of this name exists"):
        import_mergerec(src, tmp_path / "domains", name="tiny")
    assert import_mergerec(src, tmp_path / "domains", name="tiny", overwrite=True, public_catalog=False) == first
    assert list_domains(tmp_path / "domains") == ("tiny",)


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    src = write_source(tmp_path / "Tiny", small_source())
    (src / "val.json").unlink()
    (src / "umap.json").unlink()
    with pytest.raises(DomainError, match=r"no val\.json, umap\.json; expected train\.json"):
        import_mergerec(src, tmp_path / "domains")
    with pytest.raises(DomainError, match=r"nowhere: no train\.json, val\.json"):
        import_mergerec(tmp_path / "nowhere", tmp_path / "domains")


def edit(stem: str, **entries: object) -> Callable[[Files], object]:
    """Set entries of one file."""
    return lambda files: files[stem].update(entries)


DEFECTS: dict[str, tuple[str, Callable[[Files], object], str]] = {
    "smap gap": ("smap", edit("smap", B3=3), r"number 3 \('B3'\) where 2 was expected.*0 to 2.*Number them again"),
    "smap repeat": ("smap", edit("smap", B3=1), r"number 1 \('B3'\) where 2 was expected"),
    "smap from one": ("smap", edit("smap", B1=3), r"number 1 \('B2'\) where 0 was expected"),
    "smap text": ("smap", edit("smap", B3="2"), r"'B3' has number '2', expected an integer"),
    "smap boolean": ("smap", edit("smap", B2=True), r"'B2' has number True, expected an integer"),
    "smap empty": ("smap", lambda f: f["smap"].clear(), r"found no entries"),
    "smap list": ("smap", lambda f: f.update(smap=["B1"]), r"found \['B1'\], expected a JSON object"),
    "smap empty id": ("smap", lambda f: f.update(smap={"": 0}, meta_data={"": f["meta_data"]["B1"]}), r"empty id"),
    "umap gap": ("umap", edit("umap", bob=7), r"number 2 \('zed'\) where 1 was expected"),
    "no meta": ("meta_data", lambda f: f["meta_data"].pop("B2"), r"1 items of smap\.json are missing, first 'B2'.*Add"),
    "meta null": ("meta_data", edit("meta_data", B1=None), r"item 'B1' is None, expected an object"),
    "meta NaN": ("meta_data", lambda f: f["meta_data"]["B2"].update(brand=float("nan")), r"item 'B2' is .*nan"),
    "meta key": ("meta_data", lambda f: f["meta_data"]["B2"].pop("brand"), r"item 'B2' is .*expected .*texts title"),
    "item too large": ("train", edit("train", **{"0": [0, 3]}), r"user '0' has \[0, 3\], expected .* 0 to 2"),
    "item negative": ("val", edit("val", **{"0": [-1]}), r"user '0' has \[-1\], expected .* 0 to 2"),
    "item NaN": ("test", edit("test", **{"0": [float("nan")]}), r"user '0' has \[nan\]"),
    "item float": ("train", edit("train", **{"0": [1.0]}), r"user '0' has \[1\.0\]"),
    "item boolean": ("train", edit("train", **{"0": [True]}), r"user '0' has \[True\]"),
    "item alone": ("test", edit("test", **{"0": 2}), r"user '0' has 2, expected a list"),
    "null items": ("train", edit("train", **{"0": None}), r"user '0' has None, expected a list"),
    "unknown user": ("val", edit("val", **{"3": [0]}), r"user '3' is not in umap\.json, expected 0 to 2"),
    "odd user": ("val", edit("val", **{"01": [0]}), r"user '01' is not in umap\.json"),
    "two targets": ("test", edit("test", **{"0": [1, 2]}), r"user '0' has 2 items, expected one.*train\.json"),
    "user of nothing": ("umap", lambda f: f["train"].pop("1"), r"1 users have no item in train, val, test.*user 1"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_refused_by_file_finding_and_remedy_and_nothing_is_written(tmp_path: Path, defect: str) -> None:
    stem, change, message = DEFECTS[defect]
    files = small_source()
    change(files)
    src = write_source(tmp_path / "Tiny", files)
    with pytest.raises(DomainError, match=message) as error:
        import_mergerec(src, tmp_path / "domains")
    if defect != "smap empty id":  # found by the catalog, which knows no file
        assert str(error.value).startswith(str(src / f"{stem}.json"))
    assert not (tmp_path / "domains").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": [0], "1": [', r"cannot be read as JSON .*line 1"),
        ('{"0": [0], "0": [1]}', r"key '0' occurs 2 times"),
        (b"\xff\xfe\xfa", r"cannot be read as JSON"),
        ("[" * 200_000, r"cannot be read as JSON"),
    ],
    ids=["truncated", "key twice", "not text", "nested without end"],
)
def test_a_file_that_is_not_one_json_object_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    src = write_source(tmp_path / "Tiny", small_source())
    (src / "train.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DomainError, match=rf"train\.json: .*{message}"):
        import_mergerec(src, tmp_path / "domains")


@pytest.mark.data
@pytest.mark.skipif("FEDMERGE_TEST_DATA" not in os.environ, reason="FEDMERGE_TEST_DATA names no folder of real domains")
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
    assert ("No item has a category." in domain_info(tmp_path / name).problems) == (name == "Pantry")
    interactions = load_interactions(tmp_path / name)
    for split, file_name in (("valid", "val.json"), ("test", "test.json")):
        published = json.loads((src / file_name).read_text())
        examples = evaluation_examples(interactions, split, None, 0)  # type: ignore[arg-type]  # a loop over literals
        ours = dict(zip(examples.users.tolist(), examples.targets.tolist(), strict=True))
        assert len(published) == num_split_users
        assert all(ours[int(user)] == item for user, [item] in published.items())
