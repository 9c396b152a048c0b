"""The files of `make docs` are up to date."""

from pathlib import Path

import pytest

from fedmerge.report.docs.generated import generated_texts, with_table

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_generated_text_is_up_to_date() -> None:
    stale = [path for path, text in generated_texts(REPOSITORY).items() if (REPOSITORY / path).read_text() != text]
    assert stale == [], "run `make docs`"


def test_a_table_is_replaced_between_its_marks_and_nowhere_else() -> None:
    page = "a\n<!-- t: written by make docs -->\nold\n<!-- end of t -->\nb\n"
    assert with_table(page, "t", "new\n") == page.replace("old", "new")
    with pytest.raises(ValueError, match="'u'"):
        with_table(page, "u", "new\n")
