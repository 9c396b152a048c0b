"""The parts of a message: names, values and limits, in the order in which it must give them."""

Parts = list[str]


def check_parts(message: str, parts: Parts) -> None:
    """The parts stand in the message, in this order."""
    start = 0
    for part in parts:
        assert part in message[start:], message
        start = message.index(part, start) + len(part)
