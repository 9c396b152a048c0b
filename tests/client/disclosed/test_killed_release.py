"""Clients that are killed between any two writes of a release, and two that answer at once: never two noises."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_power_cut import release

from fedmerge.client.disclosed.account import Entry, charge, read_account
from fedmerge.client.disclosed.sums import release_sums_once
from fedmerge.evaluation.ranks import per_user_metrics
from fedmerge.privacy.dp.randomness import source
from fedmerge.privacy.dp.releases import Release
from fedmerge.privacy.metric_sums import disclose

WRITES = ("fsync", "replace", "rename", "mkdir")  # of the standard library, through which everything is written


def expert(place: Path) -> str:
    """Release with noise of the system; like a round, an expert or an answer."""
    return str(release(place, os.urandom(8).hex()))


def sums(place: Path) -> str:
    ranks = per_user_metrics(np.arange(1, 41))
    found = {"average": ranks, "expert": ranks}

    def account(key: str) -> None:
        charge(place, [Entry(key, "monday", "metric sums", "user", Release(4.0, 1.0, 1, replaced=1.0))], None, None)

    def make() -> Any:
        return disclose({"unmasked": found, "masked": found}, "noised", 20, 4.0, source("system", 0))

    sent = release_sums_once(place, "monday", {"split": "test"}, 1, account, make)
    return json.dumps({variant: of_variant.to_dict() for variant, of_variant in sent.items()})


def in_child(work: Callable[[], str]) -> str | None:
    """Return what the work gives in a process of its own; None if it is killed before."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, work().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text or None


def killed_at(number: int, work: Callable[[], str]) -> str | None:
    """Do the work in a process that dies right before its write of this number, or right after it, in turn."""
    count = itertools.count()

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def written(*arguments: Any, **more: Any) -> Any:
            step = next(count)
            if step == number // 2 and number % 2 == 0:
                os._exit(9)
            try:
                return write(*arguments, **more)
            finally:
                if step == number // 2:
                    os._exit(9)

        return written

    def in_this_child() -> str:
        for name in WRITES:
            setattr(os, name, dying(getattr(os, name)))
        return work()

    return in_child(in_this_child)


@pytest.mark.long
@pytest.mark.parametrize("work", [expert, sums])
def test_a_client_that_is_killed_at_any_write_releases_one_noise(work: Callable[[Path], str], tmp_path: Path) -> None:
    """Nothing was sent by a process that died. After it one release follows, and it stays; a limit of one holds."""
    for number in itertools.count():
        place = tmp_path / str(number)
        sent = killed_at(number, lambda place=place: work(place))  # type: ignore[misc]
        first = work(place)
        assert sent in (None, first)
        assert work(place) == first
        assert len(read_account(place)) == (1 if work is sums else 0)
        if sent is not None:
            break
    assert number > 8  # so many places to die at


@pytest.mark.long
@pytest.mark.parametrize("work", [expert, sums])
def test_two_processes_that_answer_at_once_send_the_same(work: Callable[[Path], str], tmp_path: Path) -> None:
    for attempt in range(10):
        place = tmp_path / str(attempt)
        reading, writing = os.pipe()
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                try:
                    os.write(writing, (work(place) + "\n").encode())
                finally:
                    os._exit(0)
            children.append(child)
        os.close(writing)
        with os.fdopen(reading) as answers:
            found = answers.read().splitlines()
        for child in children:
            os.waitpid(child, 0)
        assert len(found) == 3
        assert len(set(found)) == 1
