"""The values that a client caches for secure sums, and its record of the sums that showed them."""

from pathlib import Path

import numpy as np
import pytest
from in_process import small_experiment

from fedmerge.client.cache.secure_sums import (
    cache_values,
    check_same_as_revealed,
    read_cached_values,
    record_revealed,
    sum_key,
)
from fedmerge.errors import ClientError, PolicyError


def test_what_a_client_keeps_for_sums(tmp_path: Path) -> None:
    values = np.arange(5, dtype=np.float32)
    sha256 = cache_values(str(tmp_path), "books", values)
    assert np.array_equal(read_cached_values(str(tmp_path), "books", sha256), values)
    cache_values(str(tmp_path), "books", values + 1)
    with pytest.raises(ClientError, match=r"holds other values than this run trained. Another run of this client"):
        read_cached_values(str(tmp_path), "books", sha256)
    with pytest.raises(ClientError, match=r"domain toys: .*values\.npy, what it adds to the sum, cannot be read"):
        read_cached_values(str(tmp_path), "toys", sha256)
    record_revealed(str(tmp_path), "books", sha256, {"a": 0.5, "b": 0.25, "books": 0.25})
    record_revealed(str(tmp_path), "books", sha256, {"books": 0.25, "b": 0.25, "a": 0.5})  # a sum that was killed
    record_revealed(
        str(tmp_path), "books", sha256, {"books": 0.25, "b": 0.25, "a": 0.5 * (1 + 1e-15)}
    )  # rounded otherwise
    record_revealed(str(tmp_path), "books", "other", {"a": 0.5, "c": 0.25, "books": 0.25})
    for company in ({"a": 0.5, "c": 0.25, "books": 0.25}, {"a": 0.25, "b": 0.5, "books": 0.25}):
        with pytest.raises(PolicyError, match=r"summed before, with a 0\.5, b 0\.25, books 0\.25, and now with a"):
            record_revealed(str(tmp_path), "books", sha256, company)


def test_of_a_run_a_client_shows_one_training(tmp_path: Path) -> None:
    company = {"a": 0.5, "b": 0.25, "books": 0.25}
    config = small_experiment(tmp_path, run_id="run")
    of = [sum_key(config, number) for number in (1, 2)]
    of.append(sum_key(config.model_copy(update={"run_id": "other"}), 1))
    assert len({*of}) == 3
    record_revealed(str(tmp_path), "books", "first", company, of[0])
    record_revealed(str(tmp_path), "books", "first", company, of[0])  # a sum that was killed
    for other in (*of[1:], ""):
        check_same_as_revealed(str(tmp_path), "books", "second", other)
    check_same_as_revealed(str(tmp_path), "toys", "second", of[0])
    for other_company in (company, {"a": 0.5, "c": 0.25, "books": 0.25}):
        with pytest.raises(PolicyError, match=r"domain books: its training came out otherwise than .* remove /"):
            record_revealed(str(tmp_path), "books", "second", other_company, of[0])
    assert sum_key(config.model_copy(update={"run_id": None}), 1) == ""
    for mode in ("user", "domain-local"):  # each release is counted
        noised = config.model_copy(update={"dp": config.dp.model_copy(update={"mode": mode})})
        assert sum_key(noised, 1) == ""
