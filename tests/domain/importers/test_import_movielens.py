"""The three layouts of MovieLens, as folders and as archives, and errors."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from source_tables import bad_rows, sequences

from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.importers.events import LOW_RATING, ImportSettings
from fedmerge.domain.importers.movielens import import_movielens
from fedmerge.errors import DomainError

Files = dict[str, bytes]


def flags(*genres: int) -> str:
    return "|".join(str(int(number in genres)) for number in range(3))


ML_100K: Files = {
    "u.data": b"2\t10\t3\t900\n1\t30\t5\t800\n2\t20\t4\t700\n1\t10\t2\t800\n",
    "u.genre": b"unknown|0\nAction|1\nFilm-Noir|2\n\n",
    "u.item": "\n".join(
        [
            f"10|Toy Story (1995)|01-Jan-1995||http://x|{flags(1, 2)}",
            f"20|Misérables, Les (1995)|01-Jan-1995||http://y|{flags(0)}",
            f"30|Never (1990)|||http://z|{flags()}",
            f"40|Unseen (1990)|||http://z|{flags(1)}",
        ]
    ).encode("latin-1"),
    "README": b"",
}
ML_1M: Files = {
    "ratings.dat": b"2::10::3::900\n1::30::5::800\n2::20::4::700\n1::10::2::800\n",
    "movies.dat": "\n".join(
        [
            "10::Toy Story (1995)::Action|Film-Noir",
            "20::Misérables, Les (1995)::unknown",
            "30::Never (1990)::(no genres listed)",
            "40::Unseen (1990)::Action",
        ]
    ).encode("latin-1"),
    "users.dat": b"1::F::1::10::48067\n",
}
ML_32M: Files = {
    "ratings.csv": b"userId,movieId,rating,timestamp\n2,10,3.0,900\n1,30,5.0,800\n2,20,4.0,700\n1,10,2.5,800\n",
    "movies.csv": (
        b"movieId,title,genres\r\n10,Toy Story (1995),Action|Film-Noir\r\n"
        + '20,"Misérables, Les (1995)",unknown\r\n'.encode()
        + b"30,Never (1990),(no genres listed)\r\n40,Unseen (1990),Action\r\n"
    ),
    "tags.csv": b"",
}
LAYOUTS = {"ml-100k": ML_100K, "ml-1m": ML_1M, "ml-32m": ML_32M}


def write_release(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def write_archive(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"{path.stem}/{name}", data)
        archive.writestr(f"__MACOSX/{path.stem}/ratings.csv", b"")
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_imported_as_by_hand(tmp_path: Path, layout: str) -> None:
    report = import_movielens(write_release(tmp_path / layout, LAYOUTS[layout]), tmp_path / "domains")
    folder = tmp_path / "domains" / layout
    assert report.manifest.source == f"MovieLens, layout of {layout}, {layout!r}"
    assert [(file.num_rows, file.num_bad) for file in report.files] == [(4, 0), (4, 0)]
    # user 1 rated two movies in the same second, so the order of the file counts
    assert sequences(folder) == {"2": ["20", "10"], "1": ["30", "10"]}
    catalog = load_catalog(folder)
    assert catalog.item_ids == ("10", "20", "30", "40")
    assert catalog.attributes == {
        "title": ("Toy Story (1995)", "Misérables, Les (1995)", "Never (1990)", "Unseen (1990)"),
        "brand": ("", "", "", ""),
        "category": ("Action Film-Noir", "unknown", "", "Action"),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_archive_gives_the_same_domain_as_a_folder(tmp_path: Path, layout: str) -> None:
    folder = import_movielens(write_release(tmp_path / "x" / layout, LAYOUTS[layout]), tmp_path / "d").manifest
    path = write_archive(tmp_path / f"{layout}.zip", LAYOUTS[layout])
    with pytest.raises(DomainError, match=f"d/{layout}: "):
        import_movielens(path, tmp_path / "d")
    archive = import_movielens(path, tmp_path / "d", ImportSettings(overwrite=True)).manifest
    assert archive.name == layout
    assert archive.catalog_sha256 == folder.catalog_sha256
    assert archive.interactions_sha256 == folder.interactions_sha256


def test_the_movies_of_ml_10m_are_utf8(tmp_path: Path) -> None:
    files = {**ML_1M, "movies.dat": ML_1M["movies.dat"].decode("latin-1").encode()}
    import_movielens(write_release(tmp_path / "ml-10m", files), tmp_path / "d")
    assert load_catalog(tmp_path / "d" / "ml-10m").attributes["title"][1] == "Misérables, Les (1995)"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_min_rating_and_k_core_select_rows(tmp_path: Path, layout: str) -> None:
    src = write_release(tmp_path / layout, LAYOUTS[layout])
    report = import_movielens(src, tmp_path / "d", ImportSettings(name="rated", min_rating=4))
    assert report.dropped == {LOW_RATING: 2}
    assert sequences(tmp_path / "d" / "rated") == {"2": ["20"], "1": ["30"]}
    assert import_movielens(src, tmp_path / "d", ImportSettings(name="core", k_core=1)).manifest.num_items == 3
    settings = ImportSettings(name="all", k_core=1, keep_all_items=True)
    manifest = import_movielens(src, tmp_path / "d", settings).manifest
    # Only movies.dat lists movies that nobody rated; the others' items were chosen by users.
    assert (manifest.num_items, manifest.catalog_source) == (4, "given" if layout == "ml-1m" else "interactions")
    with pytest.raises(DomainError, match=r" 4 rows.* 0 bad, 4 outside the k-core"):
        import_movielens(src, tmp_path / "d", ImportSettings(name="none", k_core=2))


def test_bad_rows_are_reported_with_line_and_reason(tmp_path: Path) -> None:
    files = {
        "ratings.dat": ML_1M["ratings.dat"] + b"3::10::3\n3::99::3::5\n::10::3::5\n\n3::10::x::5\n3::10::4::now\n",
        "movies.dat": ML_1M["movies.dat"] + b"\n10::Again::Action\n::No id::Action\n50::Title\n",
    }
    src = write_release(tmp_path / "ml", files)
    report = import_movielens(src, tmp_path / "d", ImportSettings(max_bad_share=0.6, min_rating=1))
    assert bad_rows(report) == {
        "wrong number of fields separated by '::'": (1, (5,)),
        "the item is not in the catalog": (1, (6,)),
        "no user": (1, (7,)),
        "the rating is not a number": (1, (9,)),
        "the time is not a number": (1, (10,)),
    }
    assert bad_rows(report, 1) == {
        "the movie has a row already": (1, (5,)),
        "no movie id": (1, (6,)),
        "wrong number of fields separated by '::'": (1, (7,)),
    }


def without(name: str) -> Callable[[Files], Files]:
    return lambda files: {other: data for other, data in files.items() if other != name}


def replaced(name: str, data: bytes) -> Callable[[Files], Files]:
    return lambda files: {**files, name: data}


@pytest.mark.parametrize(
    ("files", "change", "message"),
    [
        (ML_1M, without("movies.dat"), r"ml: .*u\.data, u\.item, u\.genre"),
        (ML_100K, without("u.genre"), r"u\.genre or ratings\.dat, movies\.dat or ratings\.csv, movies\.csv"),
        (ML_1M, lambda files: {**files, **ML_32M}, "ml-1m, ml-32m"),
        (ML_1M, replaced("movies.dat", b""), r"movies\.dat: "),
        (ML_1M, replaced("movies.dat", b"\n"), r"movies\.dat: "),
        (ML_1M, replaced("ratings.dat", b"1,2,3,4\n"), r"ratings\.dat: 1 of the 1 rows"),
        (ML_32M, replaced("movies.csv", b"id,title\n"), r"movies\.csv: .*'id', 'title'.*'movieId', 'genres'"),
        (ML_32M, replaced("ratings.csv", b"userId;x\n"), r"ratings\.csv: .*'userId;x'.*'userId', .*delimiter"),
        (ML_32M, replaced("movies.csv", b"movieId,title,genres\n1,\xe9,x\n"), r"movies\.csv: line 2 .*utf-8"),
        (ML_100K, replaced("u.genre", b"Action\n"), r"u\.genre: 1 of the 1 rows.* 0 %"),
        (ML_100K, replaced("u.genre", b"Action|1\n"), r"u\.item: 4 of the 4 rows.*fields"),
    ],
)
def test_a_defect_is_refused_and_nothing_is_written(
    tmp_path: Path, files: Files, change: Callable[[Files], Files], message: str
) -> None:
    src = write_release(tmp_path / "ml", change(files))
    with pytest.raises(DomainError, match=message):
        import_movielens(src, tmp_path / "domains")
    assert not (tmp_path / "domains").exists()


def test_an_unreadable_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DomainError, match="gone: "):
        import_movielens(tmp_path / "gone", tmp_path / "d")
    path = write_archive(tmp_path / "ml.zip", ML_32M)
    data = path.read_bytes()
    path.write_bytes(data[:-30])
    with pytest.raises(DomainError, match=r"ml\.zip: .*zip"):
        import_movielens(path, tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "stored.zip", "w") as archive:
        for name, content in ML_32M.items():
            archive.writestr(name, content)
    damaged = (tmp_path / "stored.zip").read_bytes().replace(b"2,10,3.0,900", b"2,10,3.0,901")
    (tmp_path / "stored.zip").write_bytes(damaged)
    with pytest.raises(DomainError, match=r"stored\.zip:ratings\.csv: .*Bad CRC"):
        import_movielens(tmp_path / "stored.zip", tmp_path / "d")
    assert not (tmp_path / "d").exists()
