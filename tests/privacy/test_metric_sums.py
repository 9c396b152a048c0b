"""Metric sums as a client discloses them, against the definition, and against an auditor who subtracts answers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.errors import ClientError
from fedmerge.evaluation.ranks import METRICS, FloatArray, per_user_metrics
from fedmerge.evaluation.sums import (
    MetricSums,
    estimate_mean,
    inexact_sums,
    metric_sums,
    metric_sums_from_dict,
    paired_difference,
)
from fedmerge.privacy.dp.randomness import SystemSource, source
from fedmerge.privacy.metric_sums import (
    ROUNDING,
    STATED_METRICS,
    add_noise_to_sums,
    check_disclosure,
    disclose,
    grid_sums,
    sensitivity,
    suppress,
)

RECALL, MRR = METRICS.index("recall@10"), METRICS.index("mrr")


def outcomes(num_users: int = 400, seed: int = 0, num_items: int = 60) -> dict[str, FloatArray]:
    drawn = np.random.default_rng(seed)
    return {name: per_user_metrics(drawn.integers(1, num_items, num_users)) for name in ("average", "expert", "ties")}


def without(of: dict[str, FloatArray], user: int) -> dict[str, FloatArray]:
    return {name: np.delete(array, user, axis=0) for name, array in of.items()}


def test_exact_sums_give_a_single_user_to_whoever_subtracts() -> None:
    """The reason for the other two: what the auditor did."""
    everyone = outcomes()
    difference = metric_sums(everyone, "unmasked").sums - metric_sums(without(everyone, 7), "unmasked").sums
    for row, of_method in zip(difference, everyone.values(), strict=True):
        assert row == pytest.approx(of_method[7], abs=1e-9)


@pytest.mark.parametrize("min_users", [1, 20, 60])
def test_suppressed_cells_have_enough_hits_and_misses(min_users: int) -> None:
    everyone = outcomes()
    found = suppress(everyone, "unmasked", min_users)
    exact = metric_sums(everyone, "unmasked")
    stated = ~np.isnan(found.sums)
    for p, of_method in enumerate(everyone.values()):
        ranks = np.round(1 / of_method[:, MRR]).astype(int)
        for m, metric in enumerate(METRICS):
            hits = sum(rank <= 10 for rank in ranks)
            enough = hits >= min_users and len(ranks) - hits >= min_users
            assert stated[p, m] == (enough and metric in STATED_METRICS)
    assert np.array_equal(found.sums[stated], np.round(exact.sums[stated]))
    assert found.noise == ROUNDING
    assert (found.methods, found.variant, found.num_users) == (exact.methods, "unmasked", 400)
    assert np.isnan(suppress(everyone, "masked", min_users).sums).all()  # masked - unmasked would be a small cell


def test_suppressed_sums_hold_no_fractions_and_no_products() -> None:
    """A sum of ndcg@10 with all its digits would give the number of users at each rank."""
    sent = suppress(outcomes(), "unmasked", 20).to_dict()
    assert sent["products"] is None
    assert all(value is None or value == round(value) for row in sent["sums"] for value in row)


def test_a_model_that_ranks_one_item_first_counts_no_small_cell() -> None:
    """The auditor's counting query: users who hold out one item; 5 of 400 do."""
    ranks = np.full(400, 50_000)
    ranks[:5] = 1
    of_crafted = {"crafted": per_user_metrics(ranks)}
    assert metric_sums(of_crafted, "unmasked").sums[0, RECALL] == 5
    assert np.isnan(suppress(of_crafted, "unmasked", 20).sums).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), user=st.integers(0, 49), best=st.booleans())
def test_one_user_changes_the_noised_sums_by_at_most_the_sensitivity(seed: int, user: int, best: bool) -> None:
    everyone = outcomes(50, seed)
    if best:  # the worst case: rank 1 under every method
        everyone = {name: np.array(of_method) for name, of_method in everyone.items()}
        for of_method in everyone.values():
            of_method[user] = per_user_metrics(np.array([1]))[0]
    changed = np.linalg.norm(grid_sums(everyone) - grid_sums(without(everyone, user))) / 2**10
    bound = sensitivity(len(everyone))
    assert changed <= bound + 1e-9
    assert not best or changed == pytest.approx(bound)
    assert bound == pytest.approx(math.sqrt(3 * 2))


def test_noised_sums_have_the_stated_noise_and_nothing_else() -> None:
    everyone = outcomes()
    exact = metric_sums(everyone, "unmasked").sums
    columns = [METRICS.index(metric) for metric in STATED_METRICS]
    errors = []
    for seed in range(300):
        found = add_noise_to_sums(everyone, "unmasked", 4.0, source("seeded", seed, "test"))
        assert found.noise == pytest.approx(4.0 * sensitivity(3))
        assert np.isnan(np.delete(found.sums, columns, axis=1)).all()
        errors.append((found.sums - exact)[:, columns])
    drawn = np.array(errors) / found.noise
    assert abs(drawn.mean()) < 0.1  # 1,800 standard normal draws
    assert drawn.std() == pytest.approx(1.0, abs=0.06)
    assert np.isnan(add_noise_to_sums(everyone, "masked", 4.0, source("seeded", 0, "test")).sums).all()
    assert found.to_dict()["products"] is None


class BytesOnly(SystemSource):
    """A source whose floating-point numbers must not be used."""

    def standard_normal(self, size: int) -> FloatArray:
        raise AssertionError("floating-point noise")

    random = standard_normal


def test_the_noise_of_the_sums_is_whole_numbers_made_of_whole_numbers() -> None:
    """Floating-point noise has low bits that tell the sum it was added to, and no tail beyond 8.6 deviations."""
    sums = add_noise_to_sums(outcomes(), "unmasked", 0.7, BytesOnly()).sums
    stated = sums[~np.isnan(sums)]
    assert len(stated) == 6
    assert np.array_equal(stated * 2**10, np.round(stated * 2**10))


def test_equal_outcomes_get_noise_of_their_own() -> None:
    ranks = per_user_metrics(np.arange(1, 41))
    found = add_noise_to_sums({"one": ranks, "two": ranks}, "unmasked", 4.0, source("system", 0))
    assert found.sums[0, RECALL] != found.sums[1, RECALL]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), num_items=st.sampled_from([8, 60, 2000]))
def test_intervals_without_products_hold_those_with_products(seed: int, num_items: int) -> None:
    everyone = outcomes(300, seed, num_items)
    exact = metric_sums(everyone, "unmasked")
    bounded = inexact_sums(exact.methods, "unmasked", 300, exact.sums, 1e-9)
    for metric in METRICS:
        wide, narrow = (estimate_mean(sums, "expert", metric) for sums in (bounded, exact))
        assert wide.mean == narrow.mean
        assert wide.standard_error >= narrow.standard_error * (1 - 1e-9)
        wide, narrow = (paired_difference(sums, "expert", "average", metric) for sums in (bounded, exact))
        assert wide.standard_error >= narrow.standard_error * (1 - 1e-9)


def test_intervals_include_the_noise() -> None:
    """Over many draws the 95 % interval of a noised mean holds the mean of all users at least that often."""
    drawn = np.random.default_rng(5)
    everyone = per_user_metrics(drawn.integers(1, 60, 20_000))
    truth = everyone[:, RECALL].mean()
    covered = differing = 0
    for seed in range(200):
        users = {name: everyone[drawn.integers(0, 20_000, 500)] for name in ("one", "two")}
        found = add_noise_to_sums(users, "unmasked", 4.0, source("seeded", seed, "test"))
        mean = estimate_mean(found, "one", "recall@10")
        covered += mean.low <= truth <= mean.high
        difference = paired_difference(found, "one", "two", "recall@10")
        differing += not difference.low <= 0 <= difference.high
    assert covered >= 0.92 * 200
    assert differing <= 0.08 * 200
    sums = inexact_sums(("one",), "unmasked", 500, np.zeros((1, len(METRICS))), 50.0)
    assert estimate_mean(sums, "one", "mrr").standard_error == pytest.approx(50 / 500)


@pytest.mark.parametrize("disclosure", ["exact", "suppressed", "noised"])
def test_what_is_sent_arrives(disclosure: str) -> None:
    sent = disclose({"unmasked": outcomes(), "masked": outcomes(seed=1)}, disclosure, 20, 4.0, source("seeded", 0, "a"))  # type: ignore[arg-type]
    for of_variant in sent.values():
        arrived = metric_sums_from_dict(of_variant.to_dict())
        assert np.array_equal(arrived.sums, of_variant.sums, equal_nan=True)
        assert np.array_equal(arrived.products, of_variant.products, equal_nan=True)
        assert arrived.noise == of_variant.noise
    check_disclosure("books", sent, disclosure, 4.0)  # type: ignore[arg-type]
    for other in {"exact", "suppressed", "noised"} - {disclosure}:
        with pytest.raises(ClientError) as caught:
            check_disclosure("books", sent, other, 4.0)  # type: ignore[arg-type]
        assert "books" in str(caught.value)
        assert other in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": 1.0},  # exact sums that claim noise
        {"products": None},  # no products, no noise
        {"products": None, "noise": -1.0},
        {"products": None, "noise": math.inf},
        {"products": None, "noise": "much"},
        {"products": None, "noise": 1.0, "sums": [[1.0]]},
        {"products": None, "noise": 1.0, "num_users": 0},
        {"sums": [[None] * len(METRICS)] * 3},  # withheld, but exact
    ],
)
def test_impossible_disclosures_are_refused(changes: dict[str, object]) -> None:
    record = metric_sums(outcomes(), "unmasked").to_dict() | changes
    with pytest.raises(ClientError):
        metric_sums_from_dict(record)


def test_a_withheld_mean_is_no_number() -> None:
    sums = suppress(outcomes(), "unmasked", 401)
    assert isinstance(sums, MetricSums)
    assert math.isnan(sums.mean("average", "recall@10"))
    assert sums.metrics_by_method() == {"average": {}, "expert": {}, "ties": {}}
    assert math.isnan(estimate_mean(sums, "average", "recall@10").low)
    assert math.isnan(paired_difference(sums, "expert", "average", "recall@10").low)
