"""Raw Amazon reviews and metadata of three releases: cores by hand, bad lines, defects of files, and errors."""

import gzip
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from source_tables import bad_rows, sequences

from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.importers.amazon import WITHOUT_TEXT, default_name, import_amazon
from fedmerge.domain.importers.events import LOW_RATING, ImportReport, ImportSettings
from fedmerge.domain.importers.store import OUTSIDE_CORE, REPEATED
from fedmerge.errors import ConfigError, DomainError

Record = dict[str, Any]

# user, item, time: a 2-core of ann, bob, cy and A, B, C; dan has one row, and without him D has one
ROWS = [
    ("ann", "B", 20),
    ("bob", "A", 10),
    ("dan", "D", 5),
    ("ann", "A", 10),
    ("bob", "B", 10),
    ("cy", "C", 3),
    ("cy", "A", 2),
    ("bob", "C", 11),
    ("cy", "D", 1),
    ("cy", "A", 2),
]
CORE = {"ann": ["A", "B"], "bob": ["A", "B", "C"], "cy": ["A", "C"]}
ALL_ITEMS = ("A", "B", "C", "D")


def review(release: str, user: str, item: str, time: int) -> Record:
    if release == "2023":
        return {
            "rating": 5.0,
            "title": "t",
            "text": 'says "user_id"',
            "asin": f"{item}-variant-{user}",
            "parent_asin": item,
            "user_id": user,
            "timestamp": 1000 * time,
            "verified_purchase": True,
        }
    record: Record = {
        "reviewerID": user,
        "asin": item,
        "reviewText": "é, “good”",
        "overall": 5.0,
        "unixReviewTime": time,
    }
    return {**record, "helpful": [0, 1]} if release == "2014" else {**record, "verified": True, "style": {"Size:": "L"}}


def entry(release: str, item: str) -> Record:
    """Return an item's entry with every field that is read."""
    if release == "2014":
        return {
            "asin": item,
            "related": {"also_bought": ["A", "B"]},
            "title": f"It's {item}\n &amp; more",
            "brand": f"Brand {item}",
            "categories": [["Toys", "Games & Puzzles"], ["Other"]],
        }
    if release == "2018":
        return {
            "category": ["Toys", "Games &amp; Puzzles", "</span></span>"],
            "tech1": "",
            "title": f"It's {item} &amp; more",
            "brand": f"\n   Brand {item}",
            "main_cat": "<img src='x'/>",
            "asin": item,
        }
    return {
        "main_category": "Toys",
        "title": f"It's {item} & more",
        "store": "Some store",
        "categories": ["Toys", "Games & Puzzles"],
        "details": {"Brand": f"Brand {item}", "UPC": 1},
        "parent_asin": item,
    }


def lines(records: Sequence[Record | str], literal: bool = False) -> str:
    texts = (r if isinstance(r, str) else repr(r) if literal else json.dumps(r, ensure_ascii=False) for r in records)
    return "".join(f"{text}\n" for text in texts)


def write_source(
    folder: Path, release: str, more_reviews: Sequence[Record | str] = (), entries: Sequence[Record | str] | None = None
) -> tuple[Path, Path]:
    """Write the rows above and an entry for each item, gzip for 2014 and 2018, plain for 2023."""
    folder.mkdir(parents=True, exist_ok=True)
    reviews = lines([*(review(release, *row) for row in ROWS), *more_reviews])
    metadata = lines([entry(release, item) for item in ALL_ITEMS] if entries is None else entries, release == "2014")
    if release == "2023":
        paths = folder / "Toys.jsonl", folder / "meta_Toys.jsonl"
        for path, text in zip(paths, (reviews, metadata), strict=True):
            path.write_text(text, encoding="utf-8")
    else:
        paths = folder / f"reviews_Toys{'_5' * (release == '2018')}.json.gz", folder / "meta_Toys.json.gz"
        for path, text in zip(paths, (reviews, metadata), strict=True):
            path.write_bytes(gzip.compress(text.encode()))
    return paths


def settings(**changes: Any) -> ImportSettings:
    return ImportSettings(**{"k_core": 2, **changes})


@pytest.mark.parametrize("release", ["2014", "2018", "2023"])
def test_a_release_is_recognised_and_imported_as_by_hand(tmp_path: Path, release: str) -> None:
    report = import_amazon(*write_source(tmp_path / "raw", release), tmp_path / "domains", settings())
    folder = tmp_path / "domains" / "Toys"
    assert report.manifest.source.startswith(f"Amazon {release}, 2-core of ")
    assert str(tmp_path) not in report.manifest.source
    assert report.dropped == {OUTSIDE_CORE: 2, REPEATED: 1}
    assert report.manifest.num_interactions == 7
    assert sequences(folder) == CORE
    catalog = load_catalog(folder)
    assert catalog.item_ids == ("B", "A", "C")  # in the order of their first review
    assert catalog.attributes == {
        "title": ("It's B & more", "It's A & more", "It's C & more"),
        "brand": ("Brand B", "Brand A", "Brand C"),
        "category": ("Toys Games & Puzzles",) * 3,
    }


def test_the_default_name_is_the_category() -> None:
    names = ("reviews_Beauty_5.json.gz", "Prime_Pantry_5.json.gz", "All_Beauty.jsonl", "Toys_and_Games.json")
    assert [default_name(Path("x") / name) for name in names] == [
        "Beauty",
        "Prime_Pantry",
        "All_Beauty",
        "Toys_and_Games",
    ]


def test_an_import_can_be_repeated(tmp_path: Path) -> None:
    source = write_source(tmp_path, "2014")
    first = import_amazon(*source, tmp_path / "d", settings()).manifest
    with pytest.raises(DomainError, match="d/Toys: "):
        import_amazon(tmp_path / "gone" / "Toys.json", source[1], tmp_path / "d", settings())
    assert import_amazon(*source, tmp_path / "d", settings(overwrite=True)).manifest == first
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in source:
        (plain / path.name).write_bytes(gzip.decompress(path.read_bytes()))  # recognised by its bytes, not its name
    other = import_amazon(plain / source[0].name, plain / source[1].name, tmp_path / "e", settings()).manifest
    assert (other.catalog_sha256, other.interactions_sha256) == (first.catalog_sha256, first.interactions_sha256)


def test_items_without_metadata_or_text_are_left_out_and_the_core_is_recomputed(tmp_path: Path) -> None:
    empty = {"asin": "C", "title": "  ", "brand": "", "category": [], "main_cat": ""}
    entries = [entry("2018", "A"), entry("2018", "B"), empty, {**entry("2018", "A"), "title": "A second entry"}]
    report = import_amazon(
        *write_source(tmp_path, "2018", entries=entries), tmp_path / "d", settings(max_bad_share=0.2)
    )
    # without the two rows of C, cy has one row left
    assert report.dropped == {OUTSIDE_CORE: 3, REPEATED: 1, WITHOUT_TEXT: 2}
    assert sequences(tmp_path / "d" / "Toys") == {"ann": ["A", "B"], "bob": ["A", "B"]}
    assert load_catalog(tmp_path / "d" / "Toys").attributes["title"] == ("It's B & more", "It's A & more")
    report = import_amazon(
        *write_source(tmp_path, "2018", entries=entries[:2]),
        tmp_path / "d",
        settings(name="all"),
        keep_items_without_text=True,
    )
    assert sequences(tmp_path / "d" / "all") == CORE
    assert load_catalog(tmp_path / "d" / "all").attributes["title"][2] == ""


@pytest.mark.parametrize("release", ["2014", "2018", "2023"])
def test_all_items_of_the_metadata_are_kept_in_their_order(tmp_path: Path, release: str) -> None:
    entries = [entry(release, item) for item in "XACB"] + [{**entry(release, "A"), "title": "A second entry"}]
    lines = entries if release == "2014" else [json.dumps(found) for found in entries]
    source = write_source(tmp_path, release, entries=lines)
    report = import_amazon(*source, tmp_path / "d", settings(keep_all_items=True))
    assert load_catalog(tmp_path / "d" / "Toys").item_ids == ("X", "A", "C", "B")
    assert load_catalog(tmp_path / "d" / "Toys").attributes["title"][1] == "It's A & more"
    assert report.manifest.catalog_source == "given"
    kept = sequences(tmp_path / "d" / "Toys")
    assert {user: kept[user] for user in CORE} == CORE
    assert all(len(items) >= 2 for items in kept.values())
    assert import_amazon(*source, tmp_path / "e", settings()).manifest.catalog_source == "interactions"


def test_of_all_items_those_without_text_are_left_out_unless_they_are_kept(tmp_path: Path) -> None:
    empty = {"asin": "C", "title": "  ", "brand": "", "category": [], "main_cat": ""}
    source = write_source(tmp_path, "2018", entries=[json.dumps(found) for found in (empty, entry("2018", "A"))])
    with pytest.raises(DomainError, match=r"6 of the 10 rows are lost, expected at most 10 %: of an item without"):
        import_amazon(*source, tmp_path / "d", settings(keep_all_items=True, k_core=1))
    report = import_amazon(*source, tmp_path / "d", settings(keep_all_items=True, k_core=1, max_bad_share=0.6))
    assert load_catalog(tmp_path / "d" / "Toys").item_ids == ("A",)
    assert report.dropped[WITHOUT_TEXT] > 0
    settings_ = settings(keep_all_items=True, k_core=1, overwrite=True, max_bad_share=0.6)
    report = import_amazon(*source, tmp_path / "d", settings_, keep_items_without_text=True)
    assert load_catalog(tmp_path / "d" / "Toys").item_ids == ("C", "A")  # B has no metadata: only a review names it
    assert report.manifest.catalog_source == "given"


def one_item(tmp_path: Path, release: str, **fields: Any) -> tuple[str, str, str]:
    """Import an entry of item A; return its title, brand and category."""
    found = {**entry(release, "A"), **fields}
    present = {name: value for name, value in found.items() if value != "absent"}
    source = write_source(tmp_path, release, entries=[present if release == "2014" else json.dumps(present)])
    import_amazon(*source, tmp_path / "d", settings(k_core=1, overwrite=True), keep_items_without_text=True)
    catalog = load_catalog(tmp_path / "d" / "Toys")
    title, brand, category = (
        catalog.attributes[a][catalog.item_ids.index("A")] for a in ("title", "brand", "category")
    )
    return title, brand, category


def test_texts_come_from_the_fields_of_the_release(tmp_path: Path) -> None:
    assert one_item(tmp_path, "2014", title="absent", brand="absent", categories="absent") == ("", "", "")
    assert one_item(tmp_path, "2014", categories=[], title=None) == ("", "Brand A", "")
    assert one_item(tmp_path, "2018", category=[], main_cat="Grocery") == ("It's A & more", "Brand A", "Grocery")
    assert one_item(tmp_path, "2018", title="var aPageStart = (new Date()).getTime();")[0] == ""
    assert one_item(tmp_path, "2018", title="<b>Bold</b>&nbsp;5 < 6 &eacute;\t")[0] == "Bold 5 < 6 é"
    assert one_item(tmp_path, "2018", title="half a pair \ud83d")[0] == "half a pair ?"
    assert one_item(tmp_path, "2023", details={"Color": "red"})[1] == "Some store"
    assert one_item(tmp_path, "2023", details=None, store=None)[1] == ""
    assert one_item(tmp_path, "2023", categories=[], main_category="All Beauty")[2] == "All Beauty"
    assert one_item(tmp_path, "2023", categories=["Toys", 5, None, "Dolls"])[2] == "Toys 5 Dolls"


def test_texts_come_in_the_forms_that_copies_of_the_files_have(tmp_path: Path) -> None:
    title = ["Tea &amp; Cups", None, "Set of 2"]
    assert one_item(tmp_path, "2023", title=title)[0] == "Tea & Cups Set of 2"
    assert one_item(tmp_path, "2018", brand=["Acme", "Toys"])[1] == "Acme Toys"
    assert one_item(tmp_path, "2014", categories="Toys")[2] == "Toys"
    assert one_item(tmp_path, "2018", category=float("nan"), main_cat="Toys")[2] == "Toys"
    assert one_item(tmp_path, "2023", title=1984)[0] == "1984"
    assert one_item(tmp_path, "2023", title=0)[0] == "0"
    assert one_item(tmp_path, "2023", details='{"Brand": "Acme", "UPC": 1}')[1] == "Acme"
    assert one_item(tmp_path, "2023", details="{'Brand': 'Acme'}")[1] == "Acme"
    assert one_item(tmp_path, "2023", details=" ")[1] == "Some store"


def test_entities_are_resolved_however_often_they_are_escaped(tmp_path: Path) -> None:
    assert one_item(tmp_path, "2018", title="A &amp;amp; B &amp;amp;amp; C&amp;#39;s")[0] == "A & B & C's"
    assert one_item(tmp_path, "2018", title="AT&T; R&D &nosuch;")[0] == "AT&T; R&D &nosuch;"
    assert one_item(tmp_path, "2018", title="&lt;b&gt;Bold&lt;/b&gt; &lt;3")[0] == "Bold <3"


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("I <3 you, size <M> or <Large>", "I <3 you, size <M> or <Large>"),
        ("sizes <b or c> and a<b", "sizes <b or c> and a<b"),
        ("<Brand New> Cup -> Mug <-", "<Brand New> Cup -> Mug <-"),
        ("x<br/>y<BR>z</span ><p class='a b' id=c>w</P>", "x y z w"),
        ('<a href="x>y">link</a> <img src=x.png />', "link"),
    ],
)
def test_only_tags_of_html_are_removed(tmp_path: Path, title: str, expected: str) -> None:
    assert one_item(tmp_path, "2018", title=title)[0] == expected


def test_a_byte_order_mark_before_either_file_is_skipped(tmp_path: Path) -> None:
    source = write_source(tmp_path, "2023", entries=[json.dumps(entry("2023", item)) for item in ALL_ITEMS])
    expected = import_amazon(*source, tmp_path / "d", settings()).manifest
    for path in source:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    report = import_amazon(*source, tmp_path / "e", settings(max_bad_share=0))
    assert report.manifest == expected
    assert [file.num_bad for file in report.files] == [0, 0]


def test_entries_whose_values_are_no_texts_are_bad_with_the_reason(tmp_path: Path) -> None:
    entries = [
        {**entry("2023", "A"), "title": {"en": "Tea"}},
        {**entry("2023", "B"), "details": "{"},
        {**entry("2023", "C"), "details": [1]},
        {**entry("2023", "D"), "categories": ["Toys", True]},
        entry("2023", "A"),
        {**entry("2023", "X"), "title": {}},  # of an item that is not imported
    ]
    source = write_source(tmp_path, "2023", entries=[json.dumps(found) for found in entries])
    report = import_amazon(*source, tmp_path / "d", settings(k_core=1, max_bad_share=0.7))
    assert bad_rows(report, 1) == {
        "title is not a text or a list of texts": (1, (1,)),
        "details: not JSON": (1, (2,)),
        "details is not an object": (1, (3,)),
        "categories is not a text or a list of texts": (1, (4,)),
    }
    assert load_catalog(tmp_path / "d" / "Toys").item_ids == ("A",)  # a later entry counts
    assert report.dropped[WITHOUT_TEXT] == 6  # B, C and D


def test_low_ratings_are_left_out(tmp_path: Path) -> None:
    low = [{**review("2014", "ann", "C", 1), "overall": 3.0}, {**review("2014", "dan", "A", 1), "overall": 3.5}]
    source = write_source(tmp_path, "2014", low)
    report = import_amazon(*source, tmp_path / "d", settings(min_rating=4))
    assert report.dropped[LOW_RATING] == 2
    assert sequences(tmp_path / "d" / "Toys") == CORE


def test_bad_lines_are_reported_with_line_and_reason(tmp_path: Path) -> None:
    good = review("2018", "ann", "A", 10)
    more: list[Record | str] = [
        '{"reviewerID": "ann", "asin": ',  # line 11
        "",
        "[1, 2]",
        "{'reviewerID': 'ann', asin}",
        {**good, "reviewerID": ""},  # 15
        {**good, "reviewerID": 7},
        {k: v for k, v in good.items() if k != "asin"},
        {**good, "asin": " "},
        {**good, "unixReviewTime": "10"},
        {**good, "unixReviewTime": True},  # 20
        {**good, "unixReviewTime": 2**63},
        {**good, "overall": "five"},
        {**good, "overall": float("nan")},
        '{"reviewerID": "\\ud83d", "asin": "A", "unixReviewTime": 1}',
        "[" * 100_000,  # 25
        "truncated at the end",
    ]
    entries: list[Record | str] = [
        *(entry("2018", item) for item in ALL_ITEMS),
        {"title": "no id", "main_cat": ""},
        "<html>",
    ]
    source = write_source(tmp_path, "2018", more, entries)
    report = import_amazon(*source, tmp_path / "d", settings(max_bad_share=0.7, min_rating=1))
    assert bad_rows(report) == {
        "not JSON": (3, (11, 25, 26)),
        "no reviewerID": (3, (15, 16, 24)),
        "no asin": (2, (17, 18)),
        "unixReviewTime is not a whole number": (2, (19, 20)),
        "overall is not a number": (2, (22, 23)),
        "not an object": (1, (13,)),
        "not a Python literal": (1, (14,)),
        "unixReviewTime is out of range": (1, (21,)),
    }
    assert bad_rows(report, 1) == {"no asin": (1, (5,)), "not JSON": (1, (6,))}
    assert (report.files[0].num_rows, report.files[1].num_rows) == (25, 6)
    assert sequences(tmp_path / "d" / "Toys") == CORE
    kept = report.manifest.num_interactions
    assert kept + sum(report.dropped.values()) + report.files[0].num_bad == report.files[0].num_rows


def test_lines_that_are_not_utf8_are_bad(tmp_path: Path) -> None:
    source = write_source(tmp_path, "2023")
    source[0].write_bytes(source[0].read_bytes() + b'{"user_id": "\xe9"}\n')
    report = import_amazon(*source, tmp_path / "d", settings(max_bad_share=0.1))
    assert bad_rows(report) == {"not UTF-8 text": (1, (11,))}


def test_reviews_distinguish_2014_from_2018_where_possible(tmp_path: Path) -> None:
    bare = [{k: v for k, v in review("2014", *row).items() if k != "helpful"} for row in ROWS]
    for release in ("2014", "2018"):
        reviews, metadata = write_source(tmp_path / release, release)
        reviews.write_text(lines(bare))
        report = import_amazon(reviews, metadata, tmp_path / release / "d", settings())
        assert report.manifest.source.startswith("Amazon 2014 or 2018, 2-core")


Change = Callable[[Path, Path], object]


def put(text: str | bytes) -> Change:
    return lambda reviews, metadata: reviews.write_bytes(text if isinstance(text, bytes) else text.encode())


def put_metadata(text: str | bytes) -> Change:
    return lambda reviews, metadata: metadata.write_bytes(text if isinstance(text, bytes) else text.encode())


DEFECTS: dict[str, tuple[str, Change, str]] = {
    "no reviews": ("reviews", lambda reviews, _: reviews.unlink(), r"reviews_Toys_5\.json\.gz: "),
    "no metadata": ("metadata", lambda _, metadata: metadata.unlink(), r"meta_Toys\.json\.gz: "),
    "truncated": (
        "reviews",
        lambda reviews, _: reviews.write_bytes(reviews.read_bytes()[:-30]),
        r"line \d+",
    ),
    "truncated metadata": (
        "metadata",
        lambda _, metadata: metadata.write_bytes(metadata.read_bytes()[:-9]),
        r"line \d+",
    ),
    "empty": ("reviews", put(""), r"reviews_Toys_5\.json\.gz: "),
    "other fields": (
        "reviews",
        put('{"user": "u", "item": "i", "time": 1}\n'),
        "line 1 .*user, item, time.*reviewerID, asin, unixReviewTime",
    ),
    "no time": (
        "reviews",
        put('{"reviewerID": "u", "asin": "i"}\n'),
        "line 1 .*reviewerID, asin",
    ),
    "metadata as reviews": (
        "reviews",
        put(lines([entry("2018", "A")])),
        "line 1 .*category, tech1, title",
    ),
    "reviews as metadata": (
        "metadata",
        put_metadata(lines([review("2018", *ROWS[0])])),
        "line 1 .*reviewerID, asin",
    ),
    "other metadata": (
        "metadata",
        put_metadata('{"id": 1, "name": 2}'),
        "line 1 .*id, name",
    ),
    "2014 metadata": (
        "metadata",
        put_metadata(lines([entry("2014", "A")], literal=True)),
        "2014.*2018",
    ),
    "2023 metadata": (
        "metadata",
        put_metadata(lines([entry("2023", "A")])),
        "2023.*2018",
    ),
    "2023 reviews": (
        "metadata",
        put(lines([review("2023", *row) for row in ROWS])),
        "2018.*2023",
    ),
    "an array": (
        "reviews",
        put(json.dumps([review("2018", *row) for row in ROWS])),
        "1 of the 1 rows.*object",
    ),
    "other category": (
        "metadata",
        put_metadata(lines([entry("2018", "Z")])),
        " 3 .*items",
    ),
    "too many bad": (
        "reviews",
        put(lines([*(review("2018", *row) for row in ROWS), "{"])),
        r"1 of the 11 rows.* 1 %.*JSON \(1: line 11\)",
    ),
    "no core": (
        "reviews",
        put(lines([review("2018", *row) for row in ROWS[:3]])),
        " 3 rows.* 0 bad, 3 outside the k-core",
    ),
    "no text": (
        "reviews",
        put_metadata(lines([{"asin": "A", "main_cat": "", "title": ""}])),
        " 10 rows.* 0 bad, 2 outside the k-core, 1 the same user.*, 7 of an item without",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_an_error_with_file_and_values_and_writes_nothing(tmp_path: Path, defect: str) -> None:
    stem, change, message = DEFECTS[defect]
    reviews, metadata = write_source(tmp_path / "raw", "2018")
    change(reviews, metadata)
    with pytest.raises(DomainError, match=message) as error:
        import_amazon(reviews, metadata, tmp_path / "domains", settings())
    assert str(error.value).startswith(str(reviews if stem == "reviews" else metadata))
    assert not re.search(r"\b(ann|bob|cy|dan)\b", str(error.value))
    assert not (tmp_path / "domains").exists()


def test_k_core_is_required(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="k_core"):
        import_amazon(*write_source(tmp_path, "2014"), tmp_path / "d", ImportSettings())


def test_entries_of_other_items_are_not_parsed(tmp_path: Path) -> None:
    """Parsing the literals of 2014 is slow, and most items are outside the core."""
    entries: list[Record | str] = [entry("2014", "A"), "{'asin': 'Z', broken", entry("2014", "B"), entry("2014", "C")]
    report: ImportReport = import_amazon(*write_source(tmp_path, "2014", entries=entries), tmp_path / "d", settings())
    assert report.files[1].bad == ()
    assert report.files[1].num_rows == 4
    assert sequences(tmp_path / "d" / "Toys") == CORE
