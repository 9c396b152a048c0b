"""The values that a client caches for secure sums, and its record of the sums that revealed them."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from in_process import small_experiment

from fedmerge.client.cache.secure_sums import (
    cache_values,
    check_same_as_revealed,
    read_cached_values,
    record_answered,
    record_revealed,
    sum_key,
)
from fedmerge.errors import ClientError, PolicyError


def test_values_are_cached_and_revealed_in_one_sum_only(tmp_path: Path) -> None:
    cache, values = str(tmp_path), np.arange(5, dtype=np.float32)
    sha256 = cache_values(cache, "books", values)
    assert np.array_equal(read_cached_values(cache, "books", sha256), values)
    cache_values(cache, "books", values + 1)
    with pytest.raises(ClientError, match=rf"books.*{tmp_path}.*cache_dir"):
        read_cached_values(cache, "books", sha256)
    with pytest.raises(ClientError, match=r"toys.*values\.npy.*cache_dir"):
        read_cached_values(cache, "toys", sha256)
    record_revealed(cache, "books", sha256, {"a": 0.5, "b": 0.25, "books": 0.25}, 8.0)
    record_revealed(cache, "books", sha256, {"books": 0.25, "b": 0.25, "a": 0.5}, 8.0)  # a killed sum is repeated
    rounded = {"books": 0.25, "b": 0.25, "a": 0.5 * (1 + 1e-15)}
    record_revealed(cache, "books", sha256, rounded, 8.0)
    record_revealed(cache, "books", "other", {"a": 0.5, "c": 0.25, "books": 0.25}, 8.0)
    for other in ({"a": 0.5, "c": 0.25, "books": 0.25}, {"a": 0.25, "b": 0.5, "books": 0.25}):
        with pytest.raises(PolicyError, match=rf"books.*a 0\.5, b 0\.25, books 0\.25.*a {other['a']}.*{sha256}\.json"):
            record_revealed(cache, "books", sha256, other, 8.0)
    with pytest.raises(PolicyError, match=rf"books.*range of 8;.* 4\..*{sha256}\.json"):
        record_revealed(cache, "books", sha256, rounded, 4.0)


def test_a_damaged_record_of_a_reveal_ends_all_sums(tmp_path: Path) -> None:
    parts, folder = {"a": 0.5, "b": 0.25, "books": 0.25}, tmp_path / "sums" / "books" / "revealed"
    record_revealed(str(tmp_path), "books", "sha", parts, 8.0, "key")
    for name in ("sha.json", "run-key.json"):
        whole = (folder / name).read_text()
        for damaged in (whole.replace("sha", "shb").replace("0.25", "0.35"), whole[:-9], json.dumps(parts)):
            (folder / name).write_text(damaged)
            with pytest.raises(PolicyError, match=rf"books.*{name}"):
                record_revealed(str(tmp_path), "books", "sha", parts, 8.0, "key")
        (folder / name).write_text(whole)
    record_revealed(str(tmp_path), "books", "sha", parts, 8.0, "key")


def test_values_with_a_damaged_header_are_an_error_of_ours(tmp_path: Path) -> None:
    sha256 = cache_values(str(tmp_path), "books", np.ones(3, dtype=np.float32))
    path = tmp_path / "sums" / "books" / "values.npy"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with suppress(ClientError):  # a flipped space of the header's padding does no harm
            assert np.array_equal(read_cached_values(str(tmp_path), "books", sha256), np.ones(3))


def test_a_session_gets_one_answer(tmp_path: Path) -> None:
    for domain, digest in (("books", b"one"), ("books", b"two"), ("toys", b"one")):
        record_answered(str(tmp_path), domain, digest)
    with pytest.raises(PolicyError, match="books"):
        record_answered(str(tmp_path), "books", b"one")
    (tmp_path / "file").touch()
    with pytest.raises(ClientError, match=rf"{tmp_path}/file/sums"):
        record_answered(str(tmp_path / "file"), "books", b"one")


def test_a_run_reveals_one_training(tmp_path: Path) -> None:
    cache, parts = str(tmp_path), {"a": 0.5, "b": 0.25, "books": 0.25}
    dp = small_experiment(tmp_path).dp
    keys = [sum_key(dp, "run", 1), sum_key(dp, "run", 2), sum_key(dp, "other", 1)]
    assert len({*keys}) == 3
    record_revealed(cache, "books", "first", parts, 8.0, keys[0])
    record_revealed(cache, "books", "first", parts, 8.0, keys[0])  # a killed sum is repeated
    for other in (*keys[1:], ""):
        check_same_as_revealed(cache, "books", "second", other)
    check_same_as_revealed(cache, "toys", "second", keys[0])
    for of_sum in (parts, {"a": 0.5, "c": 0.25, "books": 0.25}):
        with pytest.raises(PolicyError, match=rf"books.*{tmp_path}.*run-{keys[0]}\.json"):
            record_revealed(cache, "books", "second", of_sum, 8.0, keys[0])
    assert sum_key(dp, None, 1) == ""
    for mode in ("user", "domain-local"):  # each release is counted
        assert sum_key(dp.model_copy(update={"mode": mode}), "run", 1) == ""
