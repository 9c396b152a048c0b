"""JSON lines have the values that Python's parser gives, though DuckDB parses them; a bad line costs no other line."""

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedmerge.domain.importers import source_files
from fedmerge.domain.importers.bad_rows import BadRows
from fedmerge.domain.importers.reading import json_fields
from fedmerge.domain.importers.reading.json_lines import json_lines_table
from fedmerge.domain.importers.reading.table import NUMBER
from fedmerge.domain.importers.source_files import SourceFile

NAMES = ("a", "b/c~d 'e'", "")  # a name may hold what has a meaning in a path to a field
Rows = list[tuple[int, list[str | None]]]
Reasons = dict[str, tuple[int, ...]]


def read(data: bytes, path: Path, names: tuple[str, ...] = NAMES) -> tuple[Rows, Reasons]:
    path.write_bytes(data)
    table = json_lines_table(SourceFile(path), 1)
    rows = [(row[NUMBER], [row[name] for name in names]) for batch in table.batches(names) for row in batch.to_pylist()]
    return rows, {reason.text: reason.first for reason in table.bad.report(0).bad}


def slow(data: bytes) -> tuple[Rows, Reasons]:
    """Parse line by line with Python."""
    rows: Rows = []
    bad: dict[str, list[int]] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError:
            bad.setdefault("not UTF-8 text", []).append(number)
        except ValueError:
            bad.setdefault("not JSON", []).append(number)
        else:
            if isinstance(record, dict):
                rows.append((number, [value_of(record.get(name)) for name in NAMES]))
            else:
                bad.setdefault("not an object", []).append(number)
    return rows, {reason: tuple(numbers[:5]) for reason, numbers in bad.items()}


def value_of(value: Any) -> str | None:
    if value is None or isinstance(value, dict) or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, list):
        return " ".join(text for part in value if (text := value_of(part)))
    return str(value).encode("utf-8", "replace").decode()


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**53, 2**70)
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", 'q"q', "\\", "[1]", "true", "1e5", "\x00", "\U0001f600"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)
objects = st.dictionaries(st.sampled_from([*NAMES, "A", "z"]), values, max_size=4)
good_lines = st.tuples(objects, st.booleans()).map(
    lambda made: json.dumps(made[0], ensure_ascii=made[1]).encode("utf-8", "surrogatepass")
)
other_lines = st.sampled_from(
    [b"", b" \t", b"[1]", b"1", b"null", b'{"a": ', b"{'a': 1}", b'{"a": 1} {"a": 2}', b'{"a": "\xff"}', b' {"a":1}\r']
)


@hypothesis_settings(max_examples=20)
@given(lines=st.lists(good_lines | other_lines, max_size=12), block=st.integers(1, 80))
def test_every_line_is_read_as_python_reads_it(
    lines: list[bytes], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = b'{"a": 0}\n' + b"\n".join(lines)  # the first tells it from an array
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_files, "BUFFER_BYTES", block)
        assert read(data, tmp_path_factory.mktemp("json") / "a.jsonl") == slow(data)


def test_only_lines_that_duckdb_refuses_are_parsed_one_by_one() -> None:
    lines = [json.dumps({"a": f"x{at}", "b": at}) for at in range(2000)]
    lines[1500] = "not JSON"
    parse, bad = Mock(wraps=json_fields.parse_object), BadRows("a.jsonl", "line", 1)
    [batch] = json_fields.read_fields(["\n".join(lines).encode()], ["a", "b"], bad, parse)
    assert (len(batch), bad.count, parse.call_count) == (1999, 1, 1)
    assert batch.column("a")[:2].to_pylist() == ['"x0"', '"x1"']


def test_what_a_tolerant_parser_reads_is_stated(tmp_path: Path) -> None:
    """A comma after the last field is passed over, and of a repeated field the first value counts."""
    found, bad = read(b'{"a": 1, "b": 2,}\n{"a": 1, "a": 2, "b": 3}', tmp_path / "a.jsonl", ("a",))
    assert found == [(1, ["1"]), (2, ["1"])]
    assert bad == {}
