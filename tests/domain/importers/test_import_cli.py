"""``fedmerge data import``: output, exit codes, and one line per error."""

from pathlib import Path

import pytest
from source_tables import sequences
from test_import_amazon import CORE, write_source
from test_import_movielens import ML_32M, write_archive
from test_import_tables import INTERACTIONS, write_parquet, write_tables

from fedmerge.cli import main
from fedmerge.domain.manifest import read_manifest

Capture = pytest.CaptureFixture[str]


def fedmerge(capsys: Capture, *arguments: str | Path) -> tuple[int, list[str], list[str]]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


def test_csv(tmp_path: Path, capsys: Capture) -> None:
    rows, items = write_tables(tmp_path, INTERACTIONS.replace(",", "\t").replace("user_id", "who") + "x\ti9\t5\t1\n")
    items.write_text(items.read_text().replace("Two\twords", "Two words").replace(",", "\t").replace('"', ""))
    items.write_text("item_id\tname\n" + "".join(f"i{n}\tItem {n}\n" for n in range(1, 5)))
    command = ("data", "import", "csv", tmp_path / "d", "--interactions", rows, "--catalog", items)
    options = ("--user-column", "who", "--title-column", "name", "--delimiter", "tab", "--name", "mine")
    code, out, err = fedmerge(capsys, *command, *options)
    assert (code, out) == (1, [])
    assert len(err) == 1
    assert err[0].startswith(f"fedmerge: {rows}: 1 of the 7 rows ")
    assert "(1: line 8)" in err[0]
    assert not (tmp_path / "d").exists()
    with pytest.raises(SystemExit):  # removed: private is the default
        main([str(argument) for argument in (*command, *options, "--private-catalog")])
    assert all(flag in capsys.readouterr().err for flag in ["--private-catalog: removed"])
    code, out, err = fedmerge(capsys, *command, *options, "--max-bad-share", "0.2")
    assert code == 0
    assert [line.split(" the rows of ")[0] for line in err] == ["fedmerge: WARNING: 14 % of"] * 2  # lost, repeated
    assert out == [
        f"{tmp_path / 'd' / 'mine'}: 2 users, 4 items, 5 interactions",
        "  left out of 7 rows: 1 the same user, item and time as an earlier row",
        f"  {rows}: 1 bad of 7 rows:",
        "    the item is not in the catalog (1: line 8)",
    ]
    manifest = read_manifest(tmp_path / "d" / "mine")
    assert (manifest.public_catalog, manifest.catalog_source) == (False, "given")
    code, out, err = fedmerge(capsys, *command, *options)
    assert code == 1
    assert f"{tmp_path}/d/mine: " in err[0]
    assert fedmerge(capsys, *command, *options, "--max-bad-share", "0.2", "--overwrite", "--public-catalog")[0] == 0
    assert read_manifest(tmp_path / "d" / "mine").public_catalog
    again = (*command, *options, "--max-bad-share", "0.2", "--overwrite", "--k-core", "1")
    for flags, source in {(): "interactions", ("--keep-all-items",): "given"}.items():
        assert fedmerge(capsys, *again, *flags)[0] == 0
        assert read_manifest(tmp_path / "d" / "mine").catalog_source == source
        assert fedmerge(capsys, *again, *flags, "--catalog-source", "given")[0] == 0
        assert read_manifest(tmp_path / "d" / "mine").catalog_source == "given"


def test_parquet(tmp_path: Path, capsys: Capture) -> None:
    data = {"user_id": ["a", "a"], "item_id": [1, 2], "day": [2, 1], "stars": [5, 1]}
    rows, items = write_parquet(tmp_path, data)
    command = ("data", "import", "parquet", tmp_path / "d", "--interactions", rows, "--catalog", items)
    code, out, err = fedmerge(capsys, *command, "--time-column", "day")
    assert (code, err, out) == (0, [], [f"{tmp_path / 'd' / 'shop'}: 1 users, 3 items, 2 interactions"])
    assert sequences(tmp_path / "d" / "shop") == {"a": ["2", "1"]}
    rated = ("--time-column", "day", "--rating-column", "stars", "--min-rating", "3", "--name", "rated")
    assert fedmerge(capsys, *command, *rated)[1][0].endswith("rated: 1 users, 3 items, 1 interactions")


def test_amazon(tmp_path: Path, capsys: Capture) -> None:
    reviews, metadata = write_source(tmp_path / "raw", "2018")
    command = ("data", "import", "amazon", tmp_path / "d", "--reviews", reviews, "--metadata", metadata)
    code, out, err = fedmerge(capsys, *command)
    assert (code, out) == (1, [])
    assert "0 bad, 10 outside the k-core" in err[0]  # the 5-core is the default
    code, out, err = fedmerge(capsys, *command, "--k-core", "2")
    assert (code, err) == (0, [])
    assert out == [
        f"{tmp_path / 'd' / 'Toys'}: 3 users, 3 items, 7 interactions",
        "  left out of 10 rows: 2 outside the k-core, 1 the same user, item and time as an earlier row",
    ]
    assert sequences(tmp_path / "d" / "Toys") == CORE
    metadata.write_bytes(b"")
    assert "meta_Toys.json.gz: " in fedmerge(capsys, *command, "--k-core", "2", "--overwrite")[2][0]
    assert sequences(tmp_path / "d" / "Toys") == CORE


def test_movielens(tmp_path: Path, capsys: Capture) -> None:
    path = write_archive(tmp_path / "ml-tiny.zip", ML_32M)
    code, out, err = fedmerge(capsys, "data", "import", "movielens", path, tmp_path / "d", "--min-rating", "3")
    assert (code, err) == (0, [])
    assert out == [
        f"{tmp_path / 'd' / 'ml-tiny'}: 2 users, 4 items, 3 interactions",
        "  left out of 4 rows: 1 rated below the minimum",
    ]
    code, out, err = fedmerge(capsys, "data", "import", "movielens", path, tmp_path / "d", "--k-core", "0")
    assert (code, out, len(err)) == (1, [], 1)
    assert err[0].startswith("fedmerge: k_core is 0, ")


def test_a_long_import_reports_progress(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmerge.cli.data.imports.SECONDS_BETWEEN_LINES", 0.0)
    text = "user_id,item_id,timestamp\n" + "".join(f"u{n % 100},i1,{n}\n" for n in range(20_000))
    rows, items = write_tables(tmp_path, text)
    code, _, err = fedmerge(capsys, "data", "import", "csv", tmp_path / "d", "--interactions", rows, "--catalog", items)
    assert code == 0
    assert len(err) == 2  # a line for each file
    assert err[0].startswith(f"{rows}: 20,001 rows, ")
    assert "% read" in err[0]
