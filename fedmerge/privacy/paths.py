"""What a client says of its errors, without the places on its disk: names of folders tell of people and machines."""

import re
from collections.abc import Iterable
from pathlib import Path

# A slash or ~/ that begins a word, up to the last slash of it; addresses (https://…) do not begin so.
_PATH = re.compile(r"(?<![\w.:/~…])~?/(?:[^\s'\",;:()\[\]/]*/)*")


def without_paths(text: str, own: Iterable[str] = ()) -> str:
    """The text with every absolute path cut down to its last part: ``…/interactions.parquet``.

    Args:
        text: an error message.
        own: folders known to be this machine's; found whole, even where their names hold blanks.

    >>> without_paths("domain books: /home/anna/shop/books/catalog.parquet is damaged")
    'domain books: …/catalog.parquet is damaged'
    """
    folders = {str(Path(path).expanduser()) for path in own if path} | {str(Path.home()), *own}
    folders |= {str(Path(folder).resolve()) for folder in folders if Path(folder).is_absolute()}
    for folder in sorted(folders, key=len, reverse=True):
        if folder.startswith(("/", "~")) and folder.strip("/~"):
            text = text.replace(f"{folder}/", "/").replace(folder, f"…/{Path(folder).name}")
    return _PATH.sub("…/", text)
