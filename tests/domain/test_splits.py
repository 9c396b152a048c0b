"""Leave-one-out by hand, its laws, and the sample of evaluated users."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.domain.interactions import Interactions, make_interactions
from fedmerge.domain.splits import Examples, evaluation_examples, train_sequences
from fedmerge.errors import ConfigError, DomainError


def many_users(num_users: int = 200) -> Interactions:
    """Return interactions in which user u has u % 7 + 1 items."""
    return make_interactions(
        [f"u{u}" for u in range(num_users)], [[(u + i) % 50 for i in range(u % 7 + 1)] for u in range(num_users)]
    )


def as_lists(examples: Examples) -> tuple[list[int], list[list[int]], list[int]]:
    """Return users, histories and targets as plain lists."""
    return examples.users.tolist(), [h.tolist() for h in examples.histories], examples.targets.tolist()


def test_three_users_by_hand() -> None:
    interactions = make_interactions(("long", "short", "just"), ([5, 6, 7, 8, 5], [1, 2], [4, 3, 4]))
    assert [s.tolist() for s in train_sequences(interactions)] == [[5, 6, 7], [1, 2], [4]]
    assert as_lists(evaluation_examples(interactions, "valid", None, 0)) == ([0, 2], [[5, 6, 7], [4]], [8, 3])
    assert as_lists(evaluation_examples(interactions, "test", None, 0)) == ([0, 2], [[5, 6, 7, 8], [4, 3]], [5, 4])


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=12))
def test_train_valid_and_test_make_up_each_evaluated_sequence(sequences: list[list[int]]) -> None:
    interactions = make_interactions([str(u) for u in range(len(sequences))], sequences)
    train = train_sequences(interactions)
    long = [u for u, sequence in enumerate(sequences) if len(sequence) >= 3]
    if not long:
        with pytest.raises(DomainError, match=rf"'test': .* {len(sequences)} users .* 3 "):
            evaluation_examples(interactions, "test", None, 0)
        return
    valid, test = (evaluation_examples(interactions, split, None, 0) for split in ("valid", "test"))
    assert valid.users.tolist() == test.users.tolist() == long
    for row, user in enumerate(long):
        assert valid.histories[row].tolist() == train[user].tolist()
        assert test.histories[row].tolist() == [*train[user].tolist(), int(valid.targets[row])]
        assert [*test.histories[row].tolist(), int(test.targets[row])] == sequences[user]
    for user in set(range(len(sequences))) - set(long):
        assert train[user].tolist() == sequences[user]


def test_a_sample_is_sorted_unique_and_consistent_with_all_users() -> None:
    interactions = many_users()
    everyone = evaluation_examples(interactions, "test", None, 3)
    sample = evaluation_examples(interactions, "test", 40, 3)
    assert len(everyone) > 100
    assert len(sample) == 40
    assert (np.diff(sample.users) > 0).all()
    assert set(sample.users) <= set(everyone.users)
    rows = np.searchsorted(everyone.users, sample.users)
    assert sample.targets.tolist() == everyone.targets[rows].tolist()
    assert [h.tolist() for h in sample.histories] == [everyone.histories[row].tolist() for row in rows]
    assert [str(a.dtype) for a in (sample.users, sample.targets, sample.histories[0])] == ["int64", "int64", "int32"]


def test_a_sample_depends_only_on_seed_and_split() -> None:
    users = evaluation_examples(many_users(), "test", 40, 3).users.tolist()
    np.random.seed(99)  # the global generator must not matter
    assert evaluation_examples(many_users(), "test", 40, 3).users.tolist() == users
    assert evaluation_examples(many_users(), "test", 40, 4).users.tolist() != users
    assert evaluation_examples(many_users(), "valid", 40, 3).users.tolist() != users


def test_a_sample_of_at_least_all_users_is_all_users() -> None:
    everyone = evaluation_examples(many_users(), "valid", None, 0).users.tolist()
    assert evaluation_examples(many_users(), "valid", len(everyone), 0).users.tolist() == everyone
    assert evaluation_examples(many_users(), "valid", 10**6, 0).users.tolist() == everyone


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_users .*0.* 1"):
        evaluation_examples(many_users(), "test", 0, 0)
    with pytest.raises(ConfigError, match=r"'train'.*\['test', 'valid'\]"):
        evaluation_examples(many_users(), "train", None, 0)  # type: ignore[arg-type]  # as a caller without mypy may
