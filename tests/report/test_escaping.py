"""Text that clients choose, in terminals, reports and pages."""

import io
import logging
import re
from pathlib import Path

import numpy as np
import pytest

from fedmerge.escaping import RecordFormatter, one_line, printable
from fedmerge.evaluation.ranks import METRICS
from fedmerge.evaluation.sums import VARIANTS, metric_sums
from fedmerge.report.html.page import element
from fedmerge.report.run.final_report import Evaluated, run_report
from fedmerge.report.tables import ResultRow, results_table

REPOSITORY = Path(__file__).resolve().parents[2]
FORGED = "x\nserved: other\x1b[2J\u202e"
SHOWN = "x served: other\\x1b[2J\\u202e"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text, Zürich, 0.3\u00a0± 0.1", "plain text, Zürich, 0.3\u00a0± 0.1"),
        ("two\nlines", "two\nlines"),
        ("\x1b[31mred\x07\r\x00", "\\x1b[31mred\\x07\\r\\x00"),
        ("\u202eright to left\u2066", "\\u202eright to left\\u2066"),
        ("half a pair \ud800", "half a pair \\ud800"),
    ],
)
def test_control_characters_are_shown_as_escapes(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_one_line_removes_every_kind_of_line_break() -> None:
    assert one_line("a\r\nb\n\n  c\td\u2028e\x0bf\x85g") == "a b c d e f g"
    assert one_line("  indented  stays") == "  indented  stays"
    assert one_line("") == one_line("\n") == ""


def test_a_page_escapes_markup_and_control_characters_in_text_and_attributes() -> None:
    shown = element("td", f"<b>{FORGED}", title=f'"{FORGED}')
    assert shown == ('<td title="&quot;x\nserved: other\\x1b[2J\\u202e">&lt;b&gt;x\nserved: other\\x1b[2J\\u202e</td>')


@pytest.mark.parametrize("table_format", ["plain", "markdown"])
def test_a_name_cannot_add_rows_to_a_table(table_format: str) -> None:
    rows = [ResultRow(FORGED, "train", "average|b", 3, dict.fromkeys(METRICS, 0.5))]
    text = results_table(rows, variant="masked", split="test", table_format=table_format)  # type: ignore[arg-type]  # either
    assert SHOWN in text
    assert "\x1b" not in text
    assert not any(line.startswith("served") for line in text.splitlines())
    assert ("average\\|b" in text) == (table_format == "markdown")


def test_a_reason_cannot_add_lines_to_the_report() -> None:
    ranks = {"backbone": np.array([[1.0] * len(METRICS)] * 3), "average": np.array([[0.5] * len(METRICS)] * 3)}
    sums = {variant: metric_sums(ranks, variant) for variant in VARIANTS}
    report = run_report(
        Evaluated(
            sums={FORGED: sums},
            roles={FORGED: "train"},
            merged=["average"],
            served="average",
            per_domain={FORGED: {"serve": "expert"}},
            excluded={FORGED: FORGED},
            merged_domains=[],
            synthetic=False,
            flagged={FORGED: FORGED},
            dropped={FORGED: {"mean": -0.25}},
        ),
        fallback=False,
    )
    assert "\x1b" not in report
    assert [line for line in report.splitlines() if line.startswith(("served", "selected"))] == [
        "selected on validation; served: average"
    ]
    assert f"excluded: {SHOWN}: {SHOWN}\n" in report
    assert f"flagged, but still merged: {SHOWN}: {SHOWN}\n" in report
    assert f"significantly worse than their own expert on validation: {SHOWN} (-0.2500)\n" in report


def test_no_text_forges_a_record_of_a_log() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RecordFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.Logger("of the test")
    logger.addHandler(handler)
    logger.warning("excluded: %s: %s", "books", "it failed\n09:00:00 excluded: toys: forged\r09:00:01 \x1b[2K\u2028x")
    try:
        raise ValueError("two\n09:00:02 lines")
    except ValueError:
        logger.exception("the run failed")
    lines = stream.getvalue().split("\n")[:-1]
    records = [line for line in lines if not line.startswith("  ")]
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in records] == [
        "excluded: books: it failed",
        "the run failed",
    ]
    assert stream.getvalue().isascii()
    assert not {"\r", "\x1b"} & set(stream.getvalue())


def test_every_log_of_the_product_has_records_that_cannot_be_forged() -> None:
    sources = [path for folder in ("fedmerge", "sim") for path in (REPOSITORY / folder).rglob("*.py")]
    plain = [path for path in sources if "logging.Formatter(" in path.read_text() and path.name != "escaping.py"]
    assert len(sources) > 100
    assert plain == []
