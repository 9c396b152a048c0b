"""Text from outside (names, titles, reasons of clients) made safe to show in a terminal, a log, a table or a page."""

import logging
import unicodedata


def printable(text: str) -> str:
    r"""Return the text with control characters shown as escapes; line feeds and spaces of any width stay.

    A client chooses its messages, and a terminal obeys control characters: they can hide lines, forge others, or
    reverse the order of what follows.

    >>> print(printable("red \x1b[31m, reversed \u202e, Zürich"))
    red \x1b[31m, reversed \u202e, Zürich
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character == "\n" or unicodedata.category(character) == "Zs"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def one_line(text: str, longest: int | None = None) -> str:
    """Return the text as a single line: its lines joined by a space, tabs as spaces, control characters as escapes.

    Args:
        text: from outside.
        longest: number of its characters to show, before escapes; a longer text ends in ``…``. None shows all.

    >>> one_line("a reason\\n\\n  of two lines")
    'a reason of two lines'
    >>> one_line("a long reason", longest=6)
    'a long …'
    """
    shown = text if longest is None else text[:longest]
    lines = shown.replace("\t", " ").splitlines()
    line = printable(" ".join(line.strip() for line in lines if line.strip()) if len(lines) > 1 else "".join(lines))
    return line if len(shown) == len(text) else f"{line} …"


class RecordFormatter(logging.Formatter):
    """A formatter whose records cannot be mistaken for one another, whatever text from outside is in them.

    The first line of a record starts with its time, further lines with two spaces; control characters are escapes. So
    no text can forge a record, even where its caller did not make it a single line.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return "\n  ".join(printable(super().format(record)).split("\n"))
