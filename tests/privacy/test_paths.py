"""Messages of a client never reveal the paths of its files."""

from pathlib import Path

import pytest

from fedmerge.privacy.paths import without_paths


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("/home/anna/shop/books/catalog.parquet: damaged", "…/catalog.parquet: damaged"),
        ("expert is not in /var/cache/experts/books-0f. Keep", "expert is not in …/books-0f. Keep"),
        ("cannot open '/a/b/c' or \"/d/e\" (/f/g/h)", "cannot open '…/c' or \"…/e\" (…/h)"),
        ("~/data/books and ~/x", "…/books and …/x"),
        ("/data/", "…/"),
        ("see https://flower.ai/docs/x and 3/4 of a/b/c", "see https://flower.ai/docs/x and 3/4 of a/b/c"),
        ("float32 of shape (2, 32), ndcg@10", "float32 of shape (2, 32), ndcg@10"),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, result: str) -> None:
    assert without_paths(text) == result


def test_known_folders_are_found_whole_even_with_blanks() -> None:
    folder = "/home/anna smith/our shop"
    text = f"{folder}/books/catalog.parquet is damaged; {folder}: no such folder"
    assert without_paths(text, [folder]) == "…/catalog.parquet is damaged; …/our shop: no such folder"


def test_the_home_folder_is_always_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna smith")
    assert without_paths(f"{Path.home()}/x/y is gone") == "…/y is gone"


@pytest.mark.parametrize("own", ["", "demo", ".", "/", "~", "sentence-transformers/all-MiniLM-L6-v2"])
def test_settings_that_name_no_folder_change_nothing(own: str) -> None:
    text = "the demo needs sentence-transformers/all-MiniLM-L6-v2. Install it."
    assert without_paths(text, [own]) == text
