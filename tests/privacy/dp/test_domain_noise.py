"""Noise for a whole domain, and the statement of what a run spent."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import merges_of
from scipy import stats

from fedmerge.adapter import Adapter, LoraModule
from fedmerge.config import DP, ExperimentConfig, from_flat
from fedmerge.errors import ClientError, LayoutMismatchError
from fedmerge.files import seal
from fedmerge.mergerec.objective import MergeRecSettings
from fedmerge.mergerec.variants import learned_settings, learned_variants
from fedmerge.privacy.dp.accountant import calibrate_noise, spent_epsilon
from fedmerge.privacy.dp.agreement import check_spent, largest_product
from fedmerge.privacy.dp.domain_noise import (
    add_noise,
    add_noise_to_answer,
    average_with_noise,
    clip_factor,
    domain_noise,
    domain_record,
)
from fedmerge.privacy.dp.releases import Release, coefficient_messages
from fedmerge.privacy.dp.replacement import replaced_epsilon
from fedmerge.privacy.dp.statement import privacy_statement, statement_text
from fedmerge.runs.dp_spent import EVERY_DOMAIN, spent_by_domain
from fedmerge.seeding import generator


def adapter(seed: int, rank: int = 2, scale: float = 1.0, out: int = 40, width: int = 30) -> Adapter:
    drawn = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: LoraModule(
                scale * torch.randn(rank, width, generator=drawn), scale * torch.randn(out, rank, generator=drawn), 2.0
            )
            for name in ("layer.0.query", "layer.1.query")
        }
    )


def flat(of: Adapter) -> torch.Tensor:
    """All factors end to end."""
    return torch.cat([part.flatten() for m in of.modules.values() for part in (m.lora_A, m.lora_B)]).double()


def product(of: Adapter) -> torch.Tensor:
    """All updates end to end."""
    return torch.cat([module.delta_weight().flatten() for module in of.modules.values()]).double()


def test_local_clips_the_distance_from_the_start_over_all_factors() -> None:
    start = adapter(0)
    near, far = (add_noise(adapter(1), start, clip, 0.0, generator(0, "t")) for clip in (1e6, 0.5))
    torch.testing.assert_close(flat(near), flat(adapter(1)), rtol=1e-4, atol=1e-4)
    moved = flat(far) - flat(start)
    assert 0.499 < float(moved.norm()) <= 0.5
    assert float(torch.nn.functional.cosine_similarity(moved, flat(adapter(1)) - flat(start), dim=0)) > 1 - 1e-6


def test_an_answer_is_clipped_and_noised_for_twice_the_clip_norm() -> None:
    answers = [torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)) * 100 for seed in (1, 2)]
    clipped = [add_noise_to_answer(answer, 0.5, 0.0, generator(0, "t")) for answer in answers]
    assert all(0.499 < float(each.norm()) <= 0.5 for each in clipped)
    assert float((clipped[0] - clipped[1]).norm()) <= 1.0
    small = answers[0] / 1e4
    torch.testing.assert_close(add_noise_to_answer(small, 0.5, 0.0, generator(0, "t")), small, rtol=1e-5, atol=0)
    many = add_noise_to_answer(torch.zeros(20000), 0.5, 3.0, generator(0, "t")).double()
    assert stats.kstest(many, "norm", args=(0, 3.0 * 2 * 0.5)).pvalue > 1e-3
    broken = add_noise_to_answer(torch.tensor([math.inf, 1.0]), 0.5, 1.0, generator(0, "t"))
    torch.testing.assert_close(broken, add_noise_to_answer(torch.zeros(2), 0.5, 1.0, generator(0, "t")))  # says nothing


LOCAL = {"dp.mode": "domain-local", "dp.epsilon": 5.0, "dp.delta": 1e-5, "dp.accountant": "rdp"}
THROUGH = {"privacy.policy": "catalog-private", "merge.methods": "average,mergerec,adamerging", "mergerec.steps": 7}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 7 + 2 * 500),
        ({"mergerec.granularities": "domain,layer", "adamerging.steps": 3}, 2 * 7 + 2 * 3),
        ({"mergerec.preset": "paper", "mergerec.steps": 100, "merge.methods": "mergerec"}, 100),
        ({"mergerec.preset": "paper", "merge.methods": "mergerec"}, 7),
        ({"through_clients.mode": "local-steps", "through_clients.local_steps": 3, "adamerging.steps": 3}, 3 + 2),
        ({"merge.methods": "average"}, 0),
        ({"until": "train"}, 0),
        ({"privacy.policy": "adapter+catalog"}, 0),
    ],
)
def test_the_noise_is_chosen_for_the_adapter_and_all_answers(changes: dict[str, object], expected: int) -> None:
    config = from_flat({**LOCAL, **THROUGH, **changes})
    assert coefficient_messages(config) == expected
    if expected and config.through_clients.mode == "exact":  # one message a step
        variants = [of for name in config.merge.methods[-2:] if name != "average" for of in learned(config, name)]
        assert sum(variant.steps for variant in variants) == expected
    noise = domain_noise(config)
    assert spent_epsilon([Release(noise, 1.0, 1 + expected)], 1e-5, "rdp") <= 5.0
    assert spent_epsilon([Release(0.99 * noise, 1.0, 1 + expected)], 1e-5, "rdp") > 5.0


def learned(config: ExperimentConfig, method: str) -> list[MergeRecSettings]:
    variants = learned_variants(method, config.mergerec, config.adamerging, config.through_clients)
    return [learned_settings(variant, config.mergerec, config.adamerging, config.seed) for variant in variants]


def test_of_what_is_not_finite_noise_alone_leaves() -> None:
    start, broken = adapter(0), adapter(1)
    next(iter(broken.modules.values())).lora_A[0, 0] = math.inf
    noised, alone = (add_noise(each, start, 0.5, 1.0, generator(0, "t")) for each in (broken, start))
    torch.testing.assert_close(flat(noised), flat(alone))


def test_two_domains_in_one_place_are_at_most_twice_the_clip_norm_apart() -> None:
    start = adapter(0)
    clipped = [flat(add_noise(adapter(s, scale=9.0), start, 0.5, 0.0, generator(0, "t"))) for s in (1, 2)]
    assert float((clipped[0] - clipped[1]).norm()) <= 1.0


def test_the_noise_of_the_local_mechanism_is_gaussian_with_twice_the_clip_norm() -> None:
    start = adapter(0)
    noise = (flat(add_noise(start, start, 0.5, 3.0, generator(0, "t"))) - flat(start)).numpy()
    assert noise.std() == pytest.approx(3.0, rel=0.1)
    assert stats.kstest(noise / 3.0, "norm").pvalue > 1e-4


def test_the_local_mechanism_refuses_another_start() -> None:
    with pytest.raises(LayoutMismatchError):
        add_noise(adapter(1), adapter(0, rank=3), 1.0, 1.0, generator(0, "t"))


def test_central_without_noise_is_the_average_of_the_clipped_updates() -> None:
    adapters = {"a": adapter(1), "b": adapter(2, scale=3.0), "c": adapter(3, scale=0.01)}
    clip = 5.0
    merged = average_with_noise(adapters, clip, 0.0, 6, generator(0, "t"))
    expected = torch.zeros_like(product(merged))
    for each in adapters.values():
        update = product(each)
        expected += update * min(1.0, clip / float(update.norm())) / 3
    torch.testing.assert_close(product(merged), expected, rtol=1e-4, atol=1e-5)


def test_one_domain_moves_the_central_sum_by_at_most_the_clip_norm_and_the_noise_is_over_it() -> None:
    adapters = {name: adapter(seed, scale=4.0) for seed, name in enumerate("abc")}
    wide = 30  # full rank: nothing is cut
    whole = 3 * product(average_with_noise(adapters, 5.0, 0.0, wide, generator(0, "t")))
    without = 2 * product(average_with_noise({n: adapters[n] for n in "ab"}, 5.0, 0.0, wide, generator(0, "t")))
    assert float((whole - without).norm()) <= 5.0 * (1 + 1e-4)
    noised = 3 * product(average_with_noise(adapters, 5.0, 2.0, wide, generator(0, "t")))
    noise = (noised - whole).numpy()
    assert noise.std() == pytest.approx(10.0, rel=0.05)
    assert stats.kstest(noise / 10.0, "norm").pvalue > 1e-4


def test_an_update_that_is_not_finite_counts_for_nothing() -> None:
    assert clip_factor([torch.tensor([math.nan, 1.0])], 1.0) == 0.0
    assert clip_factor([torch.tensor([0.0])], 1.0) == pytest.approx(1.0, abs=1e-5)


def central_config(**changes: Any) -> ExperimentConfig:
    flat = {"dp.mode": "domain-central", "merge.methods": "average", "lora.rank": 2, "dp.randomness": "seeded"}
    return from_flat({**flat, "dp.noise_multiplier": 4.0, "dp.delta": 1e-4, **changes})


def test_the_merge_of_a_run_is_noised_and_says_so() -> None:
    adapters = {"a": adapter(1), "b": adapter(2)}
    (plain,) = merges_of(None, adapters, {}, from_flat({"merge.methods": "average"}))
    (noised,) = merges_of(None, adapters, {}, central_config())
    assert noised.label == plain.label == "average"
    assert noised.provenance.to_dict()["privacy"]["noise_multiplier"] == 4.0
    assert plain.provenance.privacy is None
    assert all(module.rank == 2 for module in noised.adapter.modules.values())
    assert float((product(noised.adapter) - product(plain.adapter)).norm()) > float(product(plain.adapter).norm())


# The statement

RECORD = {
    "unit": "user",
    "noise_multiplier": 1.0,
    "clip": 1.0,
    "sample_rate": 0.1,
    "num_units": 600,
    "steps": 10,
    "randomness": "system",
}
USER = DP(mode="user", noise_multiplier=1.0, delta=1e-5, accountant="rdp")


def test_the_rounds_of_a_domain_add_up_and_domains_do_not() -> None:
    statement = privacy_statement(USER, {"books": [RECORD, {**RECORD, "steps": 20}], "toys": [RECORD]}, True)
    expected = spent_epsilon([Release(1.0, 0.1, 30)], 1e-5, "rdp")
    assert statement["domains"]["books"]["epsilon"] == pytest.approx(expected, abs=1e-9)
    assert statement["domains"]["toys"]["epsilon"] < expected
    replaced = replaced_epsilon([Release(1.0, 0.1, 30)], 1e-5)
    assert expected < replaced < spent_epsilon([Release(0.5, 0.1, 30)], 1e-5, "rdp") / 2
    assert statement["domains"]["books"]["epsilon_replaced"] == pytest.approx(replaced, abs=1e-9)
    assert statement["guarantee"]
    assert any("metric sums" in what for what in statement["not_covered"])
    text = statement_text(statement)
    assert f"books: ε = {expected:.3g}, δ = 1e-05" in text
    assert "It holds for what it covers, NOT for the run as a whole" in text
    assert not statement["guarantee_of_run"]
    assert "no early stopping" in text
    json.dumps(statement, allow_nan=False)


def test_heads_are_named_as_not_covered() -> None:
    without = privacy_statement(USER, {"books": [RECORD]}, True)
    statement = privacy_statement(USER, {"books": [RECORD]}, True, heads=True)
    (added,) = (what for what in statement["not_covered"] if what not in without["not_covered"])
    assert added.startswith("heads, trained on all users of a domain without noise")
    assert added in statement_text(statement)


def test_a_run_that_ended_with_its_experts_released_no_sums() -> None:
    statement = privacy_statement(USER, {"books": [RECORD]}, evaluated=False)
    assert not any("metric sums" in what for what in statement["not_covered"])
    assert statement["guarantee_of_run"]
    assert "It holds under these assumptions" in statement_text(statement)


def test_seeded_noise_is_called_no_guarantee() -> None:
    statement = privacy_statement(USER.model_copy(update={"randomness": "seeded"}), {"books": [RECORD]}, True)
    assert not statement["guarantee"]
    assert "THIS GUARANTEES NOTHING: noise and sampling came from the experiment's seed" in statement_text(statement)


def test_no_noise_is_called_no_guarantee() -> None:
    dp = DP(mode="user", noise_multiplier=0.0)
    statement = privacy_statement(dp, {"books": [{**RECORD, "noise_multiplier": 0.0}]}, True)
    assert statement["domains"]["books"]["epsilon"] is None
    assert "THIS GUARANTEES NOTHING: a release had no noise" in statement_text(statement)
    assert "books: ε = ∞" in statement_text(statement)


def test_a_domain_release_counts_replacement_already() -> None:
    dp = DP(mode="domain-local", epsilon=3.0, delta=1e-5, clip=0.5, accountant="rdp")
    record = domain_record(dp, domain_noise(ExperimentConfig(dp=dp)))
    found = privacy_statement(dp, {"books": [record]}, False)["domains"]["books"]
    assert found["epsilon"] == found["epsilon_replaced"]
    assert 2.95 < found["epsilon"] <= 3.0
    assert record["unit"] == "domain"


CENTRAL = from_flat(
    {"dp.mode": "domain-central", "dp.noise_multiplier": 1.0, "dp.delta": 1e-5, "merge.methods": "average"}
)
AGREED: dict[str, Any] = {
    "dp.mode": "user",
    "dp.noise_multiplier": 1.0,
    "dp.delta": 1e-5,
    "train.negatives": "catalog",
    "train.batch_size": 60,
    "train.max_steps": 10,
}


@pytest.mark.parametrize(
    ("reported", "message"),
    [
        (None, "'user'.*'privacy'"),
        ({**RECORD, "clip": 2.0}, r"clip.* 2\.0 .* 1\.0"),
        ({**RECORD, "unit": "domain"}, "unit.* 'domain' .*'user'"),
        ({**RECORD, "randomness": "seeded"}, "randomness.* 'seeded' .*'system'"),
        ({**RECORD, "noise_multiplier": "much"}, "noise_multiplier.* 'much'"),
        ({**RECORD, "noise_multiplier": 0.001}, r"noise_multiplier.* 0\.001 .* 1\.0"),
        ({**RECORD, "noise_multiplier": 10**400}, "noise_multiplier.* 1000"),
        ({**RECORD, "noise_multiplier": math.nan}, "noise_multiplier.* nan"),
        ({**RECORD, "sample_rate": 0}, r"sample_rate.* 0 .* 0\.1"),
        ({**RECORD, "sample_rate": 0.2}, r"sample_rate.* 0\.2 .* 0\.1"),
        ({**RECORD, "steps": 10**9}, "steps.* 1000000000 .* 10"),
        ({**RECORD, "steps": 10.0}, r"steps.* 10\.0 .* 10"),
        ({**RECORD, "steps": True}, "steps.* True .* 10"),
        ({**RECORD, "num_units": 601, "sample_rate": 60 / 601}, " 601 users.* 1 to 600"),
        ({**RECORD, "num_units": 0}, " 0 users"),
        ({**RECORD, "num_units": 600.0}, " 600.0 users"),
        ({"x": 1}, " None users"),
    ],
)
def test_a_client_that_says_something_else_than_was_agreed_is_refused(reported: Any, message: str) -> None:
    with pytest.raises(ClientError, match=f"domain books: .*{message}"):
        check_spent("books", from_flat(AGREED), reported, 600)


def test_what_was_agreed_is_taken() -> None:
    config = from_flat(AGREED)
    check_spent("books", config, RECORD, 600)
    check_spent(
        "books", config, {**RECORD, "num_units": 500, "sample_rate": 0.12}, 600
    )  # users with one item do not train
    check_spent("books", from_flat({}), None, 600)
    rounds = from_flat({**AGREED, "rounds.rule": "fedit", "rounds.number": 3})
    for number, steps in enumerate((3, 3, 4), start=1):
        check_spent("books", rounds, {**RECORD, "steps": steps}, 600, number)
    with pytest.raises(ClientError, match=r"steps.* 10 .* 3"):
        check_spent("books", rounds, RECORD, 600, 1)


def test_the_noise_of_an_epsilon_is_the_one_that_meets_it() -> None:
    flat = {**AGREED, "dp.noise_multiplier": "none", "dp.epsilon": 2.0, "dp.accountant": "rdp"}
    noise = calibrate_noise(2.0, 1e-5, ((0.1, 10),), "rdp")
    check_spent("books", from_flat(flat), {**RECORD, "noise_multiplier": noise}, 600)
    for factor in (0.9, 1.1):
        with pytest.raises(ClientError, match="noise_multiplier"):
            check_spent("books", from_flat(flat), {**RECORD, "noise_multiplier": factor * noise}, 600)
    local = from_flat({"dp.mode": "domain-local", "dp.noise_multiplier": 4.0, "dp.delta": 1e-5})
    check_spent("books", local, domain_record(local.dp, 4.0), 600)
    with pytest.raises(ClientError, match=r"noise_multiplier.* 0\.001 .* 4\.0"):
        check_spent("books", local, domain_record(local.dp, 0.001), 600)


@pytest.mark.long
def test_the_statement_says_where_rdp_had_to_count() -> None:
    dp = DP(mode="user", noise_multiplier=0.01, delta=1e-5)
    statement = privacy_statement(dp, {"books": [{**RECORD, "noise_multiplier": 0.01, "steps": 60}]}, False)
    assert statement["domains"]["books"]["accountant"] == "rdp"
    assert "too large a grid: books." in statement_text(statement)


def test_a_runs_releases_are_found_wherever_they_were_made(tmp_path: Path) -> None:
    reports: dict[str, dict[str, Any]] = {
        "adapters/books": {"privacy": RECORD},
        "adapters/toys": {"privacy": None},
        "adapters/.books.partial": {"privacy": RECORD},
    }
    for path, reported in reports.items():
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "training.json").write_text(json.dumps(seal(reported)))
    (tmp_path / "rounds").mkdir()
    clients = {"coffee": {"privacy": RECORD}}
    for number in (1, 2):
        (tmp_path / "rounds" / f"{number}.json").write_text(json.dumps(seal({"clients": clients})))
    (tmp_path / "merged" / "average").mkdir(parents=True)
    (tmp_path / "merged" / "average" / "provenance.json").write_text(json.dumps(seal({"privacy": RECORD})))
    found = spent_by_domain(tmp_path, from_flat(AGREED))
    assert {domain: len(releases) for domain, releases in found.items()} == {"books": 1, "coffee": 2}
    assert spent_by_domain(tmp_path, CENTRAL) == {EVERY_DOMAIN: [RECORD]}


def test_what_clients_say_counts_for_nothing_where_the_server_adds_the_noise(tmp_path: Path) -> None:
    for path, reported in {"adapters/books/training.json": {"x": 1}, "merged/average/provenance.json": RECORD}.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(json.dumps(seal({"privacy": reported})))
    statement = privacy_statement(CENTRAL.dp, spent_by_domain(tmp_path, CENTRAL), True)
    assert statement["domains"].keys() == {EVERY_DOMAIN}


@pytest.mark.parametrize("rank", [1, 2, 8, 64])
def test_products_of_noise_stay_within_the_range_that_is_asked_for(rank: int) -> None:
    rng = np.random.default_rng(0)
    sums = np.concatenate([(rng.standard_normal((2, 50_000, rank)).prod(axis=0)).sum(axis=1) for _ in range(4)])
    beyond = np.abs(sums) > largest_product(rank, 1e-3)
    assert 0 < beyond.mean() <= 1e-3
    assert not (np.abs(sums) > largest_product(rank, 1e-10)).any()
