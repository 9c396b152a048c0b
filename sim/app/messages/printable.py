"""Text from clients, made safe for logs, reports and terminals."""

INDENT = "    "  # of a text's further lines, so that no client can forge a line of the log


def printable(text: str, longest: int) -> str:
    """Escape control characters, indent further lines, and cut a text to a length.

    Args:
        text: from a client.
        longest: number of characters that are shown; a cut text ends in ``…``.
    """
    shown = "".join(
        c if c.isprintable() else f"\n{INDENT}" if c == "\n" else c.encode("unicode_escape").decode()
        for c in text[:longest]
    )
    return shown if len(text) <= longest else f"{shown} …"
