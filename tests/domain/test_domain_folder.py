"""Domain folders: atomic writes, exact round trips, and errors that name the file and the defect."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.domain.catalog import (
    Catalog,
    catalog_fingerprint,
    catalog_from_bytes,
    catalog_to_bytes,
    load_catalog,
    make_catalog,
    read_catalog,
    write_catalog,
)
from fedmerge.domain.folder import domain_info, list_domains, write_domain
from fedmerge.domain.interactions import Interactions, interactions_fingerprint, load_interactions, make_interactions
from fedmerge.domain.manifest import Manifest, read_manifest
from fedmerge.errors import DomainError

REPOSITORY = Path(__file__).resolve().parents[2]


def small_catalog(name: str = "tea", prefix: str = "") -> Catalog:
    """Four items: only the first has all attributes, the last has no text."""
    attributes = {
        "title": (f"{prefix}Sencha", "Assam, née 'Ásám'", "Oolong", ""),
        "brand": ("Fukamushi", "", "", ""),
        "category": ("Tea", "", "Tea", ""),
    }
    return make_catalog(name, ("a1", "b2", "c3", "d4"), attributes)


def small_interactions() -> Interactions:
    """Three users: "one" is too short to be evaluated, "four" repeats item 0 twice; item 3 has no interactions."""
    return make_interactions(("zoe", "one", "four"), ([2, 0, 1], [1], [0, 0, 2, 0]))


def write_small(folder: Path, *, overwrite: bool = False, prefix: str = "") -> Manifest:
    """Write the small domain to the folder."""
    return write_domain(
        folder,
        small_catalog(folder.name, prefix),
        small_interactions(),
        public_catalog=True,
        synthetic=True,
        source="by hand",
        overwrite=overwrite,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A written small domain."""
    write_small(tmp_path / "tea")
    return tmp_path / "tea"


def test_a_catalog_of_long_texts_that_is_written_can_be_read(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    texts = ["".join(map(chr, draw.integers(97, 123, 16_000))) for _ in range(300)]  # 4 KiB an item is what may travel
    catalog = make_catalog("tea", [str(row) for row in range(300)], {"title": texts})
    write_domain(
        tmp_path / "tea", catalog, small_interactions(), public_catalog=True, synthetic=False, source="by hand"
    )
    assert load_catalog(tmp_path / "tea") == catalog


def change_manifest(folder: Path, **fields: object) -> None:
    """Overwrite fields of the manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(("synthetic", "source"), [(True, "given"), (False, "interactions")])
def test_an_older_manifest_counts_as_made_from_interactions_unless_synthetic(
    folder: Path, synthetic: bool, source: str
) -> None:
    path = folder / "manifest.json"
    fields = json.loads(path.read_text()) | {"synthetic": synthetic}
    del fields["catalog_source"]
    path.write_text(json.dumps(fields))
    assert read_manifest(folder).catalog_source == source


# Round trip


def test_a_domain_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written = write_small(tmp_path / "deep" / "tea")
    folder = tmp_path / "deep" / "tea"
    assert read_manifest(folder) == written
    assert (written.num_items, written.num_users, written.num_interactions) == (4, 3, 8)
    assert load_catalog(folder) == small_catalog()
    interactions = load_interactions(folder)
    assert interactions.user_ids == ("zoe", "one", "four")
    assert [interactions.sequence(u).tolist() for u in range(interactions.num_users)] == [[2, 0, 1], [1], [0, 0, 2, 0]]
    assert interactions.items.dtype == np.int32
    assert interactions.offsets.dtype == np.int64
    assert sorted(os.listdir(folder)) == ["catalog.parquet", "interactions.parquet", "manifest.json"]
    assert os.listdir(tmp_path / "deep") == ["tea"]


@given(
    st.lists(st.tuples(st.text(min_size=1), st.text(), st.text(), st.text()), min_size=1, unique_by=lambda row: row[0])
)
def test_any_text_survives_the_bytes(rows: list[tuple[str, str, str, str]]) -> None:
    item_ids, titles, brands, categories = zip(*rows, strict=True)
    attributes = {"title": titles, "brand": brands, "category": categories}
    try:
        "".join("".join(row) for row in rows).encode()
    except UnicodeEncodeError:  # a lone surrogate is not valid text, but JSON may contain one
        with pytest.raises(DomainError, match="UTF-8"):
            catalog_to_bytes(make_catalog("any", item_ids, attributes))
    else:
        catalog = make_catalog("any", item_ids, attributes)
        assert catalog_from_bytes(catalog_to_bytes(catalog), "any") == catalog


def test_one_catalog_file_reads_back(tmp_path: Path) -> None:
    write_catalog(small_catalog(), tmp_path / "x.parquet")
    assert read_catalog(tmp_path / "x.parquet", "tea") == small_catalog()
    with pytest.raises(DomainError, match=r"y\.parquet: "):
        read_catalog(tmp_path / "y.parquet", "tea")


def test_fingerprints_depend_on_content_and_are_stable_across_versions(folder: Path) -> None:
    pq.write_table(pq.read_table(folder / "catalog.parquet"), folder / "catalog.parquet", compression="none")
    assert load_catalog(folder).sha256 == small_catalog().sha256
    assert small_catalog().sha256.startswith("53d93536a0d93eb8")
    assert interactions_fingerprint(small_interactions()).startswith("eb4626eb3daedbc9")


def test_fingerprints_depend_on_the_boundaries_of_values() -> None:
    empty = {"title": ("", ""), "brand": ("", ""), "category": ("", "")}
    assert catalog_fingerprint(("ab", "c"), empty) != catalog_fingerprint(("a", "bc"), empty)
    assert catalog_fingerprint(("a", "b"), empty) != catalog_fingerprint(("b", "a"), empty)
    two, one = make_interactions(("u", "v"), ([1], [2, 3])), make_interactions(("u", "v"), ([1, 2], [3]))
    assert interactions_fingerprint(two) != interactions_fingerprint(one)


# Isolation


def test_a_catalog_loads_without_interactions_and_without_their_code(folder: Path) -> None:
    (folder / "interactions.parquet").unlink()
    script = (
        "import sys, pathlib; from fedmerge.domain.catalog import load_catalog;"
        "print(len(load_catalog(pathlib.Path(sys.argv[1]))), "
        "[m for m in sys.modules if 'interactions' in m or 'folder' in m])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "4 []"


def test_errors_about_interactions_never_name_a_user(folder: Path) -> None:
    rewrite_interactions(folder, ["secret", "other", "secret"], [0, 1, 2])
    with pytest.raises(DomainError) as error:
        load_interactions(folder)
    assert "secret" not in str(error.value)
    assert "row 2" in str(error.value)


# Damage


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change a Parquet file in place."""
    pq.write_table(change(pq.read_table(path)), path)


def set_column(path: Path, name: str, values: pa.Array) -> None:
    """Replace one column of a Parquet file."""
    rewrite(path, lambda table: table.set_column(table.column_names.index(name), name, values))


def rewrite_interactions(folder: Path, user_ids: list[str], items: list[int]) -> None:
    """Replace all interactions, leaving the manifest as it is."""
    table = pa.table({"user_id": pa.array(user_ids, pa.string()), "item_index": pa.array(items, pa.int32())})
    pq.write_table(table, folder / "interactions.parquet")


def truncate(path: Path) -> None:
    """Keep the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CATALOG_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), r"catalog\.parquet: "),
    "a folder": (lambda p: p.rename(p.with_suffix(".old")).parent.joinpath(p.name).mkdir(), "directory"),
    "empty file": (lambda p: p.write_bytes(b""), " 0 bytes .*Parquet"),
    "truncated": (truncate, r" \d+ bytes .*Parquet"),
    "not Parquet": (lambda p: p.write_text("item_id,title\n" * 100), " 1400 bytes .*Parquet"),
    "one letter": (
        lambda p: set_column(p, "brand", pa.array(["fukamushi", "", "", ""])),
        rf" 4 items.* 4 items.*{small_catalog().sha256[:12]}",
    ),
    "a row fewer": (lambda p: rewrite(p, lambda t: t.slice(0, 3)), " 3 items.* 4 items"),
    "no rows": (lambda p: rewrite(p, lambda t: t.slice(0, 0)), r"catalog\.parquet: "),
    "null": (lambda p: set_column(p, "title", pa.array(["x", None, "z", None])), "'title' .*2 null.*row 1"),
    "same id": (lambda p: set_column(p, "item_id", pa.array(["a", "b", "c", "b"])), "1 and 3"),
    "no id": (lambda p: set_column(p, "item_id", pa.array(["a", "", "c", "d"])), "item 1 "),
    "numbers": (lambda p: set_column(p, "brand", pa.array([1.0, 2.0, 3.0, float("nan")])), "'brand' .*double"),
    "other columns": (
        lambda p: rewrite(p, lambda t: t.drop_columns("brand")),
        r"\['item_id', 'title', 'category'\].*\['item_id', 'title', 'brand', 'category'\]",
    ),
    "bad text": (
        lambda p: set_column(p, "title", pa.array([b"\xff", b"", b"", b""]).cast(pa.string(), safe=False)),
        "Parquet.*UTF8",
    ),
}


@pytest.mark.parametrize("damage", CATALOG_DAMAGE)
def test_a_damaged_catalog_is_an_error_with_file_and_values(folder: Path, damage: str) -> None:
    break_it, message = CATALOG_DAMAGE[damage]
    break_it(folder / "catalog.parquet")
    with pytest.raises(DomainError, match=message) as error:
        load_catalog(folder)
    assert str(error.value).startswith(str(folder / "catalog.parquet"))
    load_interactions(folder)  # the other half does not depend on it


def set_items(values: pa.Array) -> Callable[[Path], object]:
    """Return a change of the item_index column."""
    return lambda path: set_column(path, "item_index", values)


INTERACTIONS_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), r"interactions\.parquet: "),
    "truncated": (truncate, r" \d+ bytes .*Parquet"),
    "one item": (set_items(pa.array([2, 0, 1, 1, 0, 0, 2, 1], pa.int32())), " 3 .* 8 .*eb4626eb3dae"),
    "order": (lambda p: rewrite(p, lambda t: t.take([1, 0, 2, 3, 4, 5, 6, 7])), " 3 .* 8 .*eb4626eb3dae"),
    "a row fewer": (lambda p: rewrite(p, lambda t: t.slice(0, 7)), " 3 .* 7 .* 3 .* 8 "),
    "too large": (set_items(pa.array([2, 0, 4, 1, 0, 0, 9, 0], pa.int32())), " 2 rows.* 4 in row 2.* 0 to 3"),
    "negative": (set_items(pa.array([2, 0, 1, -1, 0, 0, 2, 0], pa.int32())), " 1 rows.* -1 in row 3.* 0 to 3"),
    "null": (set_items(pa.array([2, 0, 1, None, 0, 0, 2, 0], pa.int32())), "'item_index' .*1 null.*row 3"),
    "NaN": (set_items(pa.array([2, 0, 1, float("nan"), 0, 0, 2, 0])), "double.*int32"),
    "int64": (set_items(pa.array([2, 0, 1, 1, 0, 0, 2, 0])), "int64.*int32"),
    "no rows": (lambda p: rewrite(p, lambda t: t.slice(0, 0)), r"interactions\.parquet: "),
    "scattered": (lambda p: rewrite(p, lambda t: t.take([0, 3, 1, 2, 4, 5, 6, 7])), "row 2 "),
}


@pytest.mark.parametrize("damage", INTERACTIONS_DAMAGE)
def test_damaged_interactions_are_an_error_with_file_and_values(folder: Path, damage: str) -> None:
    break_it, message = INTERACTIONS_DAMAGE[damage]
    break_it(folder / "interactions.parquet")
    with pytest.raises(DomainError, match=message) as error:
        load_interactions(folder)
    assert str(error.value).startswith(str(folder / "interactions.parquet"))
    load_catalog(folder)


MANIFEST_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: "),
    "not JSON": (lambda f: truncate(f / "manifest.json"), r"manifest\.json: .*JSON"),
    "not text": (lambda f: (f / "manifest.json").write_bytes(b"\xff{}"), r"manifest\.json: .*JSON"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "JSON list"),
    "later format": (lambda f: change_manifest(f, format=3), " 3, .* 1 or 2"),
    "boolean format": (lambda f: change_manifest(f, format=True), " True, .* 1 or 2"),
    "unknown key": (lambda f: change_manifest(f, colour="red"), r"\['colour'\]"),
    "text for a count": (lambda f: change_manifest(f, num_items="4"), "'num_items' .*'4'.* int"),
    "boolean for a count": (lambda f: change_manifest(f, num_users=True), "'num_users' .*True.* int"),
    "a source of the catalog": (lambda f: change_manifest(f, catalog_source="users"), "'users'.*given, interactions"),
    "a number for a source": (lambda f: change_manifest(f, catalog_source=1), "'catalog_source' is 1"),
    "zero users": (lambda f: change_manifest(f, num_users=0), "'num_users' .*0.* 1"),
    "another name": (lambda f: change_manifest(f, name="coffee"), "'coffee' .*'tea'"),
    "a name that is a path": (lambda f: change_manifest(f, name="../tea"), r"'\.\./tea'"),
    "no folder": (lambda f: f.rename(f.with_name("gone")), "tea: "),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGE)
def test_a_damaged_manifest_is_refused_by_every_reader(folder: Path, damage: str) -> None:
    break_it, message = MANIFEST_DAMAGE[damage]
    break_it(folder)
    for read in (read_manifest, load_catalog, load_interactions, domain_info):
        with pytest.raises(DomainError, match=message):
            read(folder)


def test_received_bytes_are_checked_like_files() -> None:
    data = catalog_to_bytes(small_catalog())
    with pytest.raises(DomainError, match=rf"'tea': {len(data) - 10} bytes .*Parquet"):
        catalog_from_bytes(data[:-10], "tea")
    with pytest.raises(DomainError, match="'a/b'"):
        catalog_from_bytes(data, "a/b")


def test_inconsistent_objects_cannot_be_built() -> None:
    texts = ("", "")
    with pytest.raises(DomainError, match="found 0 attributes"):
        make_catalog("x", ("a", "b"), {})
    with pytest.raises(DomainError, match=r"'x'.* 3\b.* 2\b"):
        make_catalog("x", ("a", "b", "c"), {"title": texts, "brand": texts, "category": texts})
    with pytest.raises(DomainError, match="0 and 1"):
        dataclasses.replace(small_catalog(), item_ids=("a", "a", "c", "d"))
    with pytest.raises(DomainError, match=" 0 users"):
        make_interactions((), ())
    with pytest.raises(DomainError, match=r" 1 sequences.* 2\b"):
        make_interactions(("u", "v"), ([1],))
    with pytest.raises(DomainError, match=r" 1 different ids.* 2 users"):
        make_interactions(("u", "u"), ([1], [2]))
    with pytest.raises(DomainError, match=r" 1 users.*user 1"):
        make_interactions(("u", "v"), ([1], []))
    with pytest.raises(DomainError, match=r"int64\[1\].*int32\[T\]"):
        Interactions(("u",), np.array([1]), np.array([0, 1]))
    with pytest.raises(DomainError, match=r" 0 to 2.* 0 to 1"):
        Interactions(("u",), np.array([1], np.int32), np.array([0, 2]))


# Writing


def test_an_existing_domain_is_replaced_only_when_asked(folder: Path) -> None:
    with pytest.raises(DomainError, match=f"{folder}: .*overwrite"):
        write_small(folder, prefix="New ")
    assert load_catalog(folder) == small_catalog()
    write_small(folder, prefix="New ", overwrite=True)
    assert load_catalog(folder).attributes["title"][0] == "New Sencha"
    assert os.listdir(folder.parent) == ["tea"]


def test_other_files_and_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "tea").mkdir()
    write_small(tmp_path / "tea")  # an empty folder is fine
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "tea")
    for name in ("thesis", "file", "link"):
        with pytest.raises(DomainError, match=f"{tmp_path}/{name}: "):
            write_small(tmp_path / name, overwrite=True)
    assert (tmp_path / "thesis" / "draft.txt").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "tea", "thesis"]


def test_inconsistent_domains_are_not_written(tmp_path: Path) -> None:
    def write(folder: Path, interactions: Interactions) -> None:
        write_domain(folder, small_catalog(), interactions, public_catalog=True, synthetic=True, source="")

    with pytest.raises(DomainError, match=r"coffee: .*'tea'"):
        write(tmp_path / "coffee", small_interactions())
    with pytest.raises(DomainError, match=r" 4 in row 1; .* 0 to 3"):
        write(tmp_path / "tea", make_interactions(("u",), ([0, 4],)))
    assert not os.listdir(tmp_path)


WRITER = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = ["tests/domain", "tests/support", "tests/support/runs", "."]
from test_domain_folder import write_small
if sys.argv[2] == "kill":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends the process in the middle of a write
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # any larger file fails, as on a full disk
write_small(Path(sys.argv[1]), overwrite=True, prefix="New " + "".join(map(str, range(3000))))
"""


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("how", ["full", "kill"])
def test_a_full_disk_or_a_killed_process_leaves_no_half_written_domain(
    tmp_path: Path, how: str, existing: bool
) -> None:
    folder = tmp_path / "tea"
    if existing:
        write_small(folder)
    result = subprocess.run(
        [sys.executable, "-B", "-c", WRITER, str(folder), how],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert list_domains(tmp_path) == (("tea",) if existing else ())
    if existing:
        assert load_catalog(folder) == small_catalog()
        assert load_interactions(folder).num_users == 3
    if how == "kill":
        assert result.returncode == -25, result.stderr  # SIGXFSZ
        assert any(name.startswith(".tea.partial-") for name in os.listdir(tmp_path))  # killed half way
    else:
        assert "[Errno 27]" in result.stderr
        assert os.listdir(tmp_path) == (["tea"] if existing else [])
    write_small(folder, overwrite=True)  # a second attempt succeeds
    assert load_catalog(folder) == small_catalog()


def test_an_interrupted_overwrite_names_the_previous_version(folder: Path) -> None:
    folder.rename(folder.with_name(".tea.previous-0a1b2c3d"))
    with pytest.raises(DomainError, match=r"\.tea\.previous-0a1b2c3d"):
        load_catalog(folder)


# Listing and describing


def test_domains_are_listed_sorted_and_other_folders_ignored(tmp_path: Path) -> None:
    for name in ("toys", "Books", "tea"):
        write_small(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "tea").rename(tmp_path / ".tea.partial-1")
    assert list_domains(tmp_path) == ("Books", "toys")
    with pytest.raises(DomainError, match="nowhere: "):
        list_domains(tmp_path / "nowhere")
    (tmp_path / "toys" / "manifest.json").unlink()
    with pytest.raises(DomainError, match=r"toys/manifest\.json: "):
        list_domains(tmp_path)


def test_domain_info_by_hand(folder: Path) -> None:
    info = domain_info(folder)
    assert (info.min_length, info.median_length, info.max_length) == (1, 3.0, 4)
    assert info.density == 6 / 12  # pairs: zoe 3, one 1, four 2
    assert info.attribute_shares == {"title": 0.75, "brand": 0.25, "category": 0.5}
    assert (info.num_short_users, info.num_unused_items, info.num_repeats) == (1, 1, 2)
    assert info.problems == (
        "1 of 4 items have no text at all: an encoder cannot tell them apart.",
        "1 of 3 users have fewer than 3 interactions; they are not evaluated.",
        "1 of 4 items have no interactions.",
    )


def test_an_attribute_that_every_item_lacks_is_a_problem(tmp_path: Path) -> None:
    catalog = make_catalog("x", ("a",), {"title": ("T",), "brand": ("B",), "category": (" ",)})
    everyone = make_interactions(("u",), ([0, 0, 0],))
    write_domain(tmp_path / "x", catalog, everyone, public_catalog=False, synthetic=True, source="")
    assert domain_info(tmp_path / "x").problems == ("Every item lacks a category.",)
