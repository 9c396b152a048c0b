"""Error messages without the paths of a client's disk: folder names reveal people and machines."""

import re
from collections.abc import Iterable
from pathlib import Path

_STORAGE = re.compile(r"\b(?:s3|gs|file|memory)://(?:[^\s'\",;:()\[\]/]*/)*")  # an address up to its last slash
# From a slash or ~/ at the start of a word to its last slash; other addresses (https://…) do not match.
_PATH = re.compile(r"(?<![\w.:/~…])~?/(?:[^\s'\",;:()\[\]/]*/)*")


def without_paths(text: str, own: Iterable[str] = ()) -> str:
    """Cut every absolute path and address of storage in a text to its last part: ``…/interactions.parquet``.

    Args:
        text: an error message.
        own: known folders of this machine; these are found even if their names contain spaces.

    >>> without_paths("domain books: /home/anna/shop/books/catalog.parquet is damaged")
    'domain books: …/catalog.parquet is damaged'
    >>> without_paths("s3://anna-private/shops/books: nothing there")
    '…/books: nothing there'
    """
    folders = {str(Path(path).expanduser()) for path in own if path} | {str(Path.home()), *own}
    folders |= {str(Path(folder).resolve()) for folder in folders if Path(folder).is_absolute()}
    for folder in sorted(folders, key=len, reverse=True):
        if folder.startswith(("/", "~")) and folder.strip("/~"):
            text = text.replace(f"{folder}/", "/").replace(folder, f"…/{Path(folder).name}")
    return _PATH.sub("…/", _STORAGE.sub("…/", text))
