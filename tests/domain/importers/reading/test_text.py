"""Delimiter, encoding, header and line ends of text are recognised, and a bad line costs no other line."""

import csv
import gzip
import io
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_tables import import_by_command, sequences

from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.importers import source_files
from fedmerge.domain.importers.reading import delimited
from fedmerge.domain.importers.reading.delimited import delimited_table
from fedmerge.domain.importers.reading.table import NUMBER
from fedmerge.domain.importers.source_files import SourceFile

Capture = pytest.CaptureFixture[str]
ROWS = "user_id,item_id,timestamp\nann,1,2\nann,2,1\nbob,1,5\n"
ITEMS = "item_id,title\n1,Café crème\n2,Thé\n"
RIGHT = {"ann": ["2", "1"], "bob": ["1"]}


def write(folder: Path, rows: str | bytes = ROWS, items: str | bytes = ITEMS) -> tuple[Path, Path]:
    paths = folder / "rows.csv", folder / "items.csv"
    for path, text in zip(paths, (rows, items), strict=True):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return paths


ENCODINGS: dict[str, Callable[[str], bytes | str]] = {
    "utf-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16-le without a mark": lambda text: text.encode("utf-16-le"),
    "utf-16-be without a mark": lambda text: text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
    "gzip": lambda text: gzip.compress(text.encode()),
    "lone carriage returns": lambda text: text.replace("\n", "\r").encode(),
    "carriage returns": lambda text: text.replace("\n", "\r\n").encode(),
    "carriage returns in utf-16": lambda text: text.replace("\n", "\r").encode("utf-16"),
    "blank lines": lambda text: ("\n" + text.replace("\n", "\n\n")).encode(),
    "tabs": lambda text: text.replace(",", "\t").encode(),
    "semicolons": lambda text: text.replace(",", ";").encode(),
    "bars": lambda text: text.replace(",", "|").encode(),
    "quotes": lambda text: "".join(
        f'"{line.replace(",", chr(34) + "," + chr(34))}"\n' for line in text.split("\n")[:-1]
    ),
    "quoted tabs": lambda text: '"' + text.strip().replace(",", '"\t"').replace("\n", '"\n"') + '"',
    "a line for Excel": lambda text: "sep=;\r\n" + text.replace(",", ";"),
    "a column of row names": lambda text: "".join(
        f"{'' if not at else f'{at},'}{line}\n" for at, line in enumerate(text.split("\n")[:-1])
    ),
    "a delimiter at the end of rows": lambda text: text.replace("\n", ",\n").replace(",\n", "\n", 1),
    "no last line end": lambda text: text.rstrip("\n"),
}


@pytest.mark.parametrize("form", ENCODINGS)
def test_each_file_has_its_own_form(tmp_path: Path, form: str) -> None:
    for at, tables in enumerate(
        (write(tmp_path, ENCODINGS[form](ROWS)), write(tmp_path, ROWS, ENCODINGS[form](ITEMS)))
    ):
        assert import_by_command(tmp_path / f"shop{at}", *tables) == 0
        assert sequences(tmp_path / f"shop{at}") == RIGHT
        assert load_catalog(tmp_path / f"shop{at}").attributes["title"] == ("Café crème", "Thé")
        write(tmp_path)


def test_a_guessed_encoding_is_said_and_can_be_named(tmp_path: Path, capsys: Capture) -> None:
    tables = write(tmp_path, ROWS, ITEMS.encode("latin-1"))
    assert import_by_command(tmp_path / "shop", *tables) == 0
    assert "items.csv: read as cp1252, which was guessed" in capsys.readouterr().out
    assert load_catalog(tmp_path / "shop").attributes["title"] == ("Café crème", "Thé")
    titles = ITEMS.replace("Café crème", "Кофе").replace("Thé", "Чай")
    tables = write(tmp_path, ROWS, titles.encode("cp1251"))
    assert import_by_command(tmp_path / "b", *tables) == 1
    assert "items.csv: line 2 is not utf-8 text" in capsys.readouterr().err
    assert import_by_command(tmp_path / "b", *tables, "--catalog-encoding", "cp1251") == 0
    assert load_catalog(tmp_path / "b").attributes["title"] == ("Кофе", "Чай")


def test_a_file_without_a_header_gets_column_names(tmp_path: Path, capsys: Capture) -> None:
    tables = write(tmp_path, ROWS.split("\n", 1)[1].replace(",", "\t"), ITEMS.split("\n", 1)[1])
    assert import_by_command(tmp_path / "shop", *tables) == 1
    assert "--column-names" in capsys.readouterr().err
    names = ("--column-names", "user_id,item_id,timestamp", "--catalog-column-names", "item_id, title")
    assert import_by_command(tmp_path / "shop", *tables, *names) == 0
    assert sequences(tmp_path / "shop") == RIGHT
    assert import_by_command(tmp_path / "b", *write(tmp_path), *names) == 0  # a header of these names is one
    assert sequences(tmp_path / "b") == RIGHT


def test_a_long_field_that_is_not_read_costs_nothing(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    for text in ("x" * 3_000_000, '"' + "long, " * 300_000 + '"'):
        items = f"item_id,title,description\n1,One,{text}\n2,Two,short\n"
        assert import_by_command(tmp_path / "shop", *write(tmp_path, ROWS, items), "--overwrite") == 0
        assert load_catalog(tmp_path / "shop").item_ids == ("1", "2")
    assert csv.field_size_limit() == before


def test_atomic_files_of_recbole(tmp_path: Path) -> None:
    rows, items = tmp_path / "ml.inter", tmp_path / "ml.item"
    rows.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t5\t4\t9e8\n1\t6\t2\t8e8\n")
    items.write_text("item_id:token\tmovie_title:token_seq\tclass:token_seq\n5\tToy Story\tComedy\n6\tHeat\tCrime\n")
    options = ("--title-column", "movie_title", "--category-column", "class", "--rating-column", "rating")
    assert import_by_command(tmp_path / "shop", rows, items, *options, "--min-rating", "1") == 0
    assert sequences(tmp_path / "shop") == {"1": ["6", "5"]}
    assert load_catalog(tmp_path / "shop").attributes["title"] == ("Toy Story", "Heat")


def test_a_stray_quote_costs_one_line(tmp_path: Path, capsys: Capture) -> None:
    lines = [f"u{at},1,{at}\n" for at in range(1000)]
    lines[10] = 'u10,"1,10\n'  # line 12: its quote is closed by that of line 902
    lines[900] = 'u900,1",900\n'
    lines[950] = 'u950,"1,950\n'  # never closed
    tables = write(tmp_path, "user_id,item_id,timestamp\n" + "".join(lines))
    assert import_by_command(tmp_path / "shop", *tables) == 0
    assert set(sequences(tmp_path / "shop")) == {f"u{at}" for at in range(1000)} - {"u10", "u900", "u950"}
    out = capsys.readouterr().out
    assert "a quote is not closed (1: line 12)" in out
    assert "(1: line 952)" in out


def values_of(text: str, path: Path) -> tuple[list[tuple[int, str, str]], dict[str, tuple[int, ...]]]:
    path.write_bytes(text.encode())
    table = delimited_table(SourceFile(path), ["a", "b"], 1)
    rows = [(row[NUMBER], row["a"], row["b"]) for batch in table.batches(["a", "b"]) for row in batch.to_pylist()]
    reasons = table.bad.report(0).bad
    return rows, {reason.text: reason.first for reason in reasons}


@given(seed=st.integers(0, 10**9))
def test_both_parsers_read_what_the_csv_module_reads(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng = random.Random(seed)
    records = [[str(rng.choice(["", "x", "1.5", 'q"q', "é", "a,b", "two\nlines"])) for _ in range(3)] for _ in range(9)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=rng.choice(["\n", "\r\n"]))
    writer.writerow(["a", "b", "c"])
    writer.writerows(records)
    folder = tmp_path_factory.mktemp("csv")
    rows, bad = values_of(text.getvalue(), folder / "a.csv")
    assert [row[1:] for row in rows] == [(record[0], record[1]) for record in records]
    assert bad == {}
    numbers = [2]
    for record in records:
        numbers.append(numbers[-1] + 1 + sum(value.count("\n") for value in record))
    assert [row[0] for row in rows] == numbers[:-1]


@given(
    text=st.text(st.sampled_from('a,"\n\r'), max_size=40).map(lambda text: text.replace('a"', 'a,"')),
    block=st.integers(1, 30),
)
def test_regular_records_are_those_of_the_csv_module(
    text: str, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_files, "BUFFER_BYTES", block)
        fast = values_of(f"a,b\n{text}", path)
        patch.setattr(delimited, "_regular_records", lambda *_: None)
        assert fast == values_of(f"a,b\n{text}", path)


def test_quoted_values_do_not_make_a_file_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files, "BUFFER_BYTES", 1000)  # so that values go on in the next block
    monkeypatch.setattr(csv, "reader", (reader := Mock(wraps=csv.reader)))
    rows = [(f"x{at}", 'say ""hi"",\nor\n\n"" ""') for at in range(1000)]
    found, bad = values_of("a,b\n" + "".join(f'"{a}","{b}"\r\n' for a, b in rows), tmp_path / "a.csv")
    assert [row[1:] for row in found] == [(a, b.replace('""', '"')) for a, b in rows]
    assert [row[0] for row in found] == list(range(2, 4002, 4))
    assert bad == {}
    assert reader.call_count < 60  # one value of most blocks


def test_line_numbers_and_bad_lines_do_not_depend_on_quotes(tmp_path: Path) -> None:
    lines = [f"x{at},y\n" for at in range(30)]
    lines[7], lines[20] = "only one\n", "one,two,three\n"
    plain = values_of("a,b\n" + "".join(lines), tmp_path / "a.csv")
    quoted = values_of("a,b\n" + "".join(lines).replace("y", '"y"'), tmp_path / "b.csv")
    assert plain == quoted
    assert plain[1] == {"the number of columns differs from the header": (9, 22)}
    assert plain[0][7:9] == [(10, "x8", "y"), (11, "x9", "y")]


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    _, items = write(tmp_path)
    pipe = tmp_path / "rows.fifo"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(ROWS,))
    writer.start()
    assert import_by_command(tmp_path / "shop", pipe, items) == 0
    writer.join()
    assert sequences(tmp_path / "shop") == RIGHT
