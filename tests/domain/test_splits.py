"""Leave-one-out by hand, its laws, and the draw of evaluated users."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.domain.interactions import Interactions, make_interactions
from fedmerge.domain.splits import Examples, evaluation_examples, train_sequences
from fedmerge.errors import ConfigError, DomainError


def many_users(num_users: int = 200) -> Interactions:
    """User u owns u % 7 + 1 items."""
    return make_interactions(
        [f"u{u}" for u in range(num_users)], [[(u + i) % 50 for i in range(u % 7 + 1)] for u in range(num_users)]
    )


def as_lists(examples: Examples) -> tuple[list[int], list[list[int]], list[int]]:
    """Users, histories and targets as plain lists."""
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
        with pytest.raises(DomainError, match=rf"none of {len(sequences)} users has 3 interactions"):
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


def test_a_draw_is_sorted_without_repeats_and_says_what_all_users_say() -> None:
    interactions = many_users()
    everyone = evaluation_examples(interactions, "test", None, 3)
    drawn = evaluation_examples(interactions, "test", 40, 3)
    assert len(everyone) > 100
    assert len(drawn) == 40
    assert (np.diff(drawn.users) > 0).all()
    assert set(drawn.users) <= set(everyone.users)
    rows = np.searchsorted(everyone.users, drawn.users)
    assert drawn.targets.tolist() == everyone.targets[rows].tolist()
    assert [h.tolist() for h in drawn.histories] == [everyone.histories[row].tolist() for row in rows]
    assert [str(a.dtype) for a in (drawn.users, drawn.targets, drawn.histories[0])] == ["int64", "int64", "int32"]


def test_a_draw_depends_on_seed_and_split_alone() -> None:
    users = evaluation_examples(many_users(), "test", 40, 3).users.tolist()
    np.random.seed(99)  # the global generator must not matter
    assert evaluation_examples(many_users(), "test", 40, 3).users.tolist() == users
    assert evaluation_examples(many_users(), "test", 40, 4).users.tolist() != users
    assert evaluation_examples(many_users(), "valid", 40, 3).users.tolist() != users


def test_a_draw_of_at_least_everyone_takes_everyone() -> None:
    everyone = evaluation_examples(many_users(), "valid", None, 0).users.tolist()
    assert evaluation_examples(many_users(), "valid", len(everyone), 0).users.tolist() == everyone
    assert evaluation_examples(many_users(), "valid", 10**6, 0).users.tolist() == everyone


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_users is 0, expected at least 1"):
        evaluation_examples(many_users(), "test", 0, 0)
    with pytest.raises(ConfigError, match=r"split is 'train', expected one of \['test', 'valid'\]"):
        evaluation_examples(many_users(), "train", None, 0)  # type: ignore[arg-type]  # what a caller without mypy does
