"""Check the values in a message: names, counts and limits, in order."""

Parts = list[str]


def check_parts(message: str, parts: Parts) -> None:
    """Assert that the message contains the parts in this order."""
    start = 0
    for part in parts:
        assert part in message[start:], message
        start = message.index(part, start) + len(part)
