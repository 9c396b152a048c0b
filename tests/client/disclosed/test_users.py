"""The users behind inexact metric sums: the client's own draw, and no two sets that differ by a few users."""

from pathlib import Path

import numpy as np
import pytest

from fedmerge.client.disclosed.users import draw_examples, read_secret, remember_users
from fedmerge.domain.interactions import Interactions, make_interactions
from fedmerge.domain.splits import evaluation_examples
from fedmerge.errors import PolicyError

SECRET = bytes(range(32))


def people(numbers: range, changed: dict[int, list[int]] | None = None) -> Interactions:
    sequences = {number: [number % 7, number % 5, number % 3, number % 11] for number in numbers} | (changed or {})
    return make_interactions([f"user {number}" for number in sequences], list(sequences.values()))


def ids(interactions: Interactions, users: np.ndarray) -> set[str]:
    return {interactions.user_ids[user] for user in users.tolist()}


def test_all_users_are_the_same_as_in_a_public_draw() -> None:
    everyone = people(range(30))
    found, public = draw_examples(everyone, "test", None, SECRET), evaluation_examples(everyone, "test", None, 0)
    assert found.users.tolist() == public.users.tolist()
    assert found.targets.tolist() == public.targets.tolist()
    assert [history.tolist() for history in found.histories] == [history.tolist() for history in public.histories]


def test_the_draw_is_the_clients_own_and_does_not_move() -> None:
    everyone = people(range(300))
    chosen = ids(everyone, draw_examples(everyone, "valid", 50, SECRET).users)
    assert chosen == ids(everyone, draw_examples(everyone, "valid", 50, SECRET).users)
    assert chosen != ids(everyone, draw_examples(everyone, "valid", 50, bytes(32)).users)
    assert chosen < ids(everyone, draw_examples(everyone, "valid", 90, SECRET).users)  # nested
    fewer = people(range(1, 300))  # user 0 has left: at most one place changes hands
    assert len(chosen ^ ids(fewer, draw_examples(fewer, "valid", 50, SECRET).users)) <= 2


def remembered(folder: Path, interactions: Interactions, limit: int | None, split: str = "test") -> None:
    examples = draw_examples(interactions, split, limit, SECRET)  # type: ignore[arg-type]
    remember_users(folder, interactions, examples, split, 20, SECRET)  # type: ignore[arg-type]


def test_a_set_that_differs_by_a_few_users_is_refused(tmp_path: Path) -> None:
    remembered(tmp_path, people(range(100)), None)
    remembered(tmp_path, people(range(100)), None)  # the same
    remembered(tmp_path, people(range(1, 100)), None, "valid")  # other questions about the users
    for other in (people(range(99)), people(range(101)), people(range(100), {3: [1, 2, 3, 4, 5]}), people(range(81))):
        with pytest.raises(PolicyError) as caught:
            remembered(tmp_path, other, None)
        assert "min_users = 20" in str(caught.value)
    with pytest.raises(PolicyError):
        remembered(tmp_path, people(range(100)), 99)
    remembered(tmp_path, people(range(100)), 80)  # differs by twenty
    remembered(tmp_path, people(range(80)), None)
    with pytest.raises(PolicyError):
        remembered(tmp_path, people(range(81)), None)  # is close to the last one


def test_nothing_but_keyed_hashes_is_written(tmp_path: Path) -> None:
    remembered(tmp_path, people(range(100)), None)
    for path in tmp_path.rglob("*.json"):
        assert "user 1" not in path.read_text()


def test_the_secret_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    secret = read_secret(tmp_path / "new")
    assert len(secret) == 32
    assert secret == read_secret(tmp_path / "new")
    assert secret != read_secret(tmp_path / "other")
    assert (tmp_path / "new" / "secret").stat().st_mode & 0o077 == 0
    whole = (tmp_path / "new" / "secret").read_bytes()
    for damaged in (whole[:63], whole[:10] + bytes([whole[10] ^ 1]) + whole[11:], b""):
        (tmp_path / "new" / "secret").write_bytes(damaged)
        with pytest.raises(PolicyError) as caught:
            read_secret(tmp_path / "new")
        assert f"{len(damaged)} bytes" in str(caught.value)


def test_damaged_or_missing_places_disclose_nothing(tmp_path: Path) -> None:
    remembered(tmp_path, people(range(100)), None)
    (path,) = tmp_path.rglob("*.json")
    path.write_text("{")
    with pytest.raises(PolicyError):
        remembered(tmp_path, people(range(50)), None)
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyError):
        read_secret(tmp_path / "file" / "folder")
