"""Differential privacy by user: gradients against one user at a time, clipping, sampling, noise, training."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import attached_lora, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import expert_of
from peft import PeftModel
from scipy import stats

from fedmerge.adapter import adapter_sha256
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.by_mode import train_adapter, train_private_expert
from fedmerge.client.training.dp_sgd import (
    Records,
    UserPlan,
    add_noise,
    clip_factors,
    clipped_sum,
    poisson_records,
    private_steps,
    user_gradients,
    user_plan,
)
from fedmerge.client.training.loop import Attached
from fedmerge.client.training.losses import catalog_softmax
from fedmerge.client.training.plain_sgd import item_refresh_is_due
from fedmerge.client.training.settings import training_settings
from fedmerge.config import DP, ExperimentConfig, Lora, Text, Train, from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import embed_batch, encode, tokens_at_once
from fedmerge.encoder.text import pack_sequences
from fedmerge.errors import DomainError
from fedmerge.privacy.dp.randomness import SystemSource
from fedmerge.privacy.dp.releases import NoisyAnswers, Release
from fedmerge.seeding import generator

LORA = Lora(rank=2, alpha=4, target_modules=("query", "value"))
TRAIN = Train(negatives="catalog", batch_size=8, max_steps=3, warmup_steps=1, validate_every_steps=2, samples="last")
PLAN = UserPlan(1.0, 0.5, 0.5, 16, 3, "seeded")
TEMPERATURE = 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    demo = generate_domain("toys", num_users=24, num_items=25)
    folder = tmp_path_factory.mktemp("domains") / "toys"
    write_domain(folder, demo.catalog, demo.interactions, public_catalog=True, synthetic=True, source="test")
    return folder


@pytest.fixture(scope="module")
def toys(folder: Path, backbone: Backbone) -> LocalDomain:
    return open_domain(folder, backbone, Text(max_attribute_tokens=6, max_items=3, max_tokens=48))


@pytest.fixture
def model(toys: LocalDomain) -> Iterator[PeftModel]:
    with attached_lora(toys.backbone, LORA) as attached:
        yield attached


def records_of(domain: LocalDomain, users: list[int]) -> Records:
    sequences = [domain.training_sequences[user] for user in users]
    return Records([s[:-1] for s in sequences], np.array([s[-1] for s in sequences], dtype=np.int64))


def one_by_one(domain: LocalDomain, model: PeftModel, records: Records, items: torch.Tensor) -> torch.Tensor:
    """Return every user's gradient, (b, P), by plain autograd, one user at a time, in the order of the records."""
    found = []
    for history, target in zip(records.histories, records.targets, strict=True):
        text = domain.text
        packed = pack_sequences(domain.table, [history], domain.backbone.special, text.max_items, text.max_tokens)
        loss = catalog_softmax(embed_batch(domain.backbone, packed), items, torch.tensor([target]), TEMPERATURE)
        gradients = torch.autograd.grad(loss.sum(), trained(model))
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(found)


# Gradients by user


def test_catalog_softmax_by_hand_and_no_gradient_through_the_items() -> None:
    users = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    losses = catalog_softmax(users, items, torch.tensor([0, 0]), temperature=0.5)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))], rel=1e-6)
    losses.sum().backward()  # type: ignore[no-untyped-call]  # of PyTorch
    assert users.grad is not None
    assert items.grad is None


@pytest.mark.parametrize("at_once", [None, 40])
def test_gradients_by_user_equal_those_of_one_user_at_a_time(
    toys: LocalDomain, model: PeftModel, at_once: int | None
) -> None:
    records = records_of(toys, list(range(9)))
    items = encode(toys.backbone, toys.item_sequences)
    with tokens_at_once(at_once):
        groups = list(user_gradients(toys, model, trained(model), records, items, TEMPERATURE))
    assert len(groups) > 4 or not at_once
    found = torch.cat([torch.cat([g.flatten(1) for g in group], dim=1) for group in groups])
    expected = one_by_one(toys, model, records, items)
    lengths = [len(history) for history in records.histories]
    assert found.shape == expected.shape
    for row in found:  # groups are formed by length, so rows come in another order
        assert float((expected - row).norm(dim=1).min() / row.norm()) < 1e-5
    torch.testing.assert_close(found.sum(dim=0), expected.sum(dim=0), rtol=1e-4, atol=1e-5 * float(expected.norm()))
    assert len(set(lengths)) > 1
    assert not any(hasattr(parameter, "grad_sample") for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_users_gradient_does_not_depend_on_other_users(toys: LocalDomain, model: PeftModel) -> None:
    items = encode(toys.backbone, toys.item_sequences)
    alone = clipped_sum(toys, model, trained(model), records_of(toys, [3]), items, TEMPERATURE, 1e9)
    others = clipped_sum(toys, model, trained(model), records_of(toys, [0, 1, 2]), items, TEMPERATURE, 1e9)
    together = clipped_sum(toys, model, trained(model), records_of(toys, [0, 1, 2, 3]), items, TEMPERATURE, 1e9)
    for one, rest, both in zip(alone, others, together, strict=True):
        torch.testing.assert_close(both - rest, one, rtol=1e-3, atol=1e-4)


# Clipping


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    num_users=st.integers(1, 40),
    scale=st.floats(1e-6, 1e6),
    clip=st.floats(1e-3, 1e3),
    bad=st.sampled_from([0.0, math.nan, math.inf]),
)
def test_one_user_more_or_less_changes_the_clipped_sum_by_at_most_the_clip_norm(
    seed: int, num_users: int, scale: float, clip: float, bad: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    spread = torch.exp(4 * torch.randn(num_users, generator=rng))
    gradients = [
        scale * torch.randn(num_users, *shape, generator=rng) * spread.view(-1, *[1] * len(shape))
        for shape in ((3, 5), (4,))
    ]
    if bad:
        gradients[0][0, 0, 0] = bad
    factors = clip_factors(gradients, clip)
    assert bool(factors.isfinite().all())
    clipped = torch.cat([torch.where(factors[:, None] > 0, g.flatten(1), 0.0) for g in gradients], dim=1)
    clipped = clipped * factors[:, None]
    assert float(clipped.double().norm(dim=1).max()) <= clip
    if bad:
        assert factors[0] == 0
    short = torch.cat([g.flatten(1) for g in gradients], dim=1).double().norm(dim=1) < 0.99 * clip
    assert torch.allclose(factors[short & (factors > 0)], torch.tensor(1.0), atol=1e-5)


def test_the_clipped_sum_of_a_domain_moves_by_at_most_the_clip_norm_for_every_user(
    toys: LocalDomain, model: PeftModel
) -> None:
    items, everybody, clip = encode(toys.backbone, toys.item_sequences), list(range(12)), 0.05
    whole = clipped_sum(toys, model, trained(model), records_of(toys, everybody), items, TEMPERATURE, clip)
    moves = []
    for left_out in everybody:
        rest = [user for user in everybody if user != left_out]
        without = clipped_sum(toys, model, trained(model), records_of(toys, rest), items, TEMPERATURE, clip)
        moves.append(
            math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(whole, without, strict=True)))
        )
    assert max(moves) <= clip * (1 + 1e-3)  # padding to another length rounds differently
    assert min(moves) > 0.5 * clip  # all users are clipped here, so the bound is met


# Sampling and noise


def test_poisson_sampling_takes_each_user_independently_with_the_same_probability() -> None:
    sequences = [np.arange(2 + user % 5, dtype=np.int32) + 100 * user for user in range(50)]
    rate, draws = 0.3, 2000
    taken = np.zeros((draws, 50))
    for draw in range(draws):
        records = poisson_records(sequences, "random-prefix", rate, generator(0, "test", draw))
        taken[draw, records.targets // 100] = 1
        assert len(set(records.targets // 100)) == len(records.targets)  # one record a user
    sizes = taken.sum(axis=1)
    assert sizes.mean() == pytest.approx(15, abs=4 * math.sqrt(50 * 0.21 / draws))
    assert sizes.var() == pytest.approx(50 * 0.21, rel=0.15)  # binomial: no fixed batch
    assert np.abs(taken.mean(axis=0) - rate).max() < 5 * math.sqrt(0.21 / draws)
    correlations = np.asarray(np.corrcoef(taken.T))[np.triu_indices(50, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(draws)


def test_records_are_prefixes_and_their_next_item() -> None:
    sequence = np.array([5, 6, 7, 8], dtype=np.int32)
    seen = set()
    for draw in range(60):
        records = poisson_records([sequence], "random-prefix", 1.0, generator(1, "test", draw))
        cut = len(records.histories[0])
        assert records.histories[0].tolist() == sequence[:cut].tolist()
        assert records.targets.tolist() == [sequence[cut]]
        seen.add(cut)
    assert seen == {1, 2, 3}
    last = poisson_records([sequence], "last", 1.0, generator(1, "test"))
    assert (last.histories[0].tolist(), last.targets.tolist()) == ([5, 6, 7], [8])


@pytest.mark.parametrize("drawn", [SystemSource(), generator(3, "test")], ids=["system", "seeded"])
def test_noise_is_gaussian_with_the_stated_deviation(drawn: SystemSource) -> None:
    parts = add_noise([torch.ones(40, 500), torch.zeros(3001)], 2.5, drawn)
    values = torch.cat([parts[0].flatten() - 1, parts[1]]).double().numpy() / 2.5
    assert abs(values.mean()) < 5 / math.sqrt(len(values))
    assert values.std() == pytest.approx(1, abs=5 / math.sqrt(2 * len(values)))
    assert stats.kstest(values, "norm").pvalue > 1e-5
    uniform = drawn.random(20001)
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert stats.kstest(uniform, "uniform").pvalue > 1e-5


def test_without_noise_no_number_is_drawn() -> None:
    drawn, untouched = generator(0, "test"), generator(0, "test")
    assert torch.equal(add_noise([torch.ones(3)], 0.0, drawn)[0], torch.ones(3))
    assert drawn.random() == untouched.random()


def test_a_step_divides_the_noised_sum_by_the_expected_number_of_users(toys: LocalDomain, model: PeftModel) -> None:
    plan = replace(PLAN, num_users=len(toys.training_sequences))
    before = [parameter.detach().clone() for parameter in trained(model)]
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    private_steps(toys, Attached(model, trained(model), optimizer), TRAIN, plan, 7, "toys")(0)
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, trained(model), strict=True)])
    with torch.no_grad():
        for parameter, value in zip(trained(model), before, strict=True):
            parameter.copy_(value)
    drawn = generator(7, "client", "toys", "dp", 0)
    records = poisson_records(toys.training_sequences, "last", plan.sample_rate, drawn)
    items = encode(toys.backbone, toys.item_sequences)
    gradients = one_by_one(toys, model, records, items)
    gradients *= (plan.clip / gradients.norm(dim=1)).clamp(max=1)[:, None]
    noise = drawn.standard_normal(gradients.shape[1])
    sums = gradients.sum(dim=0) + plan.noise_multiplier * plan.clip * torch.from_numpy(noise).float()
    torch.testing.assert_close(moved, sums / (plan.sample_rate * plan.num_users), rtol=1e-3, atol=1e-5)


def test_steps_are_computed_in_float32_whatever_the_backbone_computes_in(toys: LocalDomain, model: PeftModel) -> None:
    """In bfloat16 one user more or less would change the rounding of all gradients."""
    lower = replace(toys.backbone, compute=resolve_compute("cpu", "bfloat16"))
    before = [parameter.detach().clone() for parameter in trained(model)]
    made = []
    for domain in (toys, replace(toys, backbone=lower)):
        with torch.no_grad():
            for parameter, value in zip(trained(model), before, strict=True):
                parameter.copy_(value)
        attached = Attached(model, trained(model), torch.optim.SGD(trained(model), lr=1.0))
        private_steps(domain, attached, TRAIN, PLAN, 7, "toys")(0)
        made.append(torch.cat([parameter.detach().flatten() for parameter in trained(model)]))
    assert torch.equal(*made)
    with torch.no_grad():
        vectors = [embed_batch(each, toys.item_sequences[:4]).float() for each in (toys.backbone, lower)]
    assert not torch.equal(*vectors)


# Trainings


def test_items_are_encoded_on_schedule_and_wherever_a_training_can_resume() -> None:
    settings = TRAIN.model_copy(update={"item_refresh_steps": 3, "validate_every_steps": 5})
    assert [step for step in range(12) if item_refresh_is_due(settings, step)] == [0, 3, 5, 8, 10]


def test_an_interrupted_private_training_resumes_to_the_same_adapter(toys: LocalDomain, tmp_path: Path) -> None:
    plan = replace(PLAN, num_users=len(toys.training_sequences))
    whole, report = train_private_expert(toys, LORA, TRAIN, 0, plan)
    assert (report.steps, report.validation_users, report.validations) == (3, 0, ())
    checkpoint = tmp_path / "checkpoint.safetensors"
    lines: list[str] = []

    def interrupt(line: str) -> None:
        lines.append(line)
        if checkpoint.exists():
            raise KeyboardInterrupt

    settings = TRAIN.model_copy(update={"validate_every_steps": 1})
    with pytest.raises(KeyboardInterrupt):
        train_private_expert(toys, LORA, settings, 0, plan, interrupt, checkpoint)
    again, _ = train_private_expert(toys, LORA, settings, 0, plan, lines.append, checkpoint)
    alone, _ = train_private_expert(toys, LORA, settings, 0, plan)
    assert any("resuming at step 1" in line for line in lines)
    assert adapter_sha256(again) == adapter_sha256(alone)
    assert adapter_sha256(whole) != adapter_sha256(train_private_expert(toys, LORA, TRAIN, 1, plan)[0])


def test_system_randomness_never_repeats(toys: LocalDomain) -> None:
    plan = replace(PLAN, num_users=len(toys.training_sequences), randomness="system", steps=1)
    hashes = {adapter_sha256(train_private_expert(toys, LORA, TRAIN, 0, plan)[0]) for _ in range(2)}
    assert len(hashes) == 2


def test_train_adapter_returns_the_privacy_record(toys: LocalDomain) -> None:
    config = dp_config(**{"dp.noise_multiplier": 1.5, "dp.delta": 1e-4})
    _, report, spent = train_adapter(toys, training_settings(config))
    assert spent is not None
    assert report.steps == spent["steps"] == 2
    assert (spent["unit"], spent["noise_multiplier"], spent["num_units"]) == ("user", 1.5, 24)
    assert spent["sample_rate"] == pytest.approx(8 / 24)


def test_cached_experts_are_found_and_other_noise_trains_again(toys: LocalDomain, tmp_path: Path) -> None:
    """A setting that is off is not part of the key; every setting that changes the adapter is."""
    plain: dict[str, object] = {
        "cache_dir": str(tmp_path),
        "dp.mode": "none",
        "train.negatives": "in-batch",
        "train.max_steps": 1,
    }
    keys: list[dict[str, object]] = [
        {},
        {"train.item_refresh_steps": 3},
        {"simulation.held_out_users": 0.5},
        {"train.negatives": "catalog"},
        {"train.negatives": "catalog", "train.item_refresh_steps": 3},
    ]
    told = [expert_of(toys, from_flat({**plain, **changes}), lambda line: None)[1]["cached"] for changes in keys]
    assert told == [False, True, False, False, False]
    noise = {**plain, "train.negatives": "catalog", "dp.mode": "user", "dp.randomness": "system", "dp.delta": 1e-3}
    sent = [
        expert_of(toys, from_flat({**noise, "dp.noise_multiplier": sigma}), lambda line: None)[1]
        for sigma in (1.0, 1.0, 2.0)
    ]
    assert [report["cached"] for report in sent] == [False, True, False]
    assert sent[0]["sha256"] == sent[1]["sha256"]  # the same release, not a second one


# Refusals


def dp_config(**changes: object) -> ExperimentConfig:
    flat = {
        "dp.mode": "user",
        "train.negatives": "catalog",
        "train.batch_size": 8,
        "train.max_steps": 2,
        "lora.rank": 2,
    }
    return from_flat({**flat, "dp.randomness": "seeded", **changes})


def plan_inputs(delta: float) -> tuple[Train, DP, NoisyAnswers, tuple[Release, ...]]:
    return TRAIN, DP(mode="user", noise_multiplier=1.0, delta=delta), NoisyAnswers(0, 1), ()


def test_a_catalog_that_is_not_public_cannot_give_negatives(toys: LocalDomain) -> None:
    private = replace(toys, manifest=replace(toys.manifest, public_catalog=False))
    with pytest.raises(DomainError, match=r"toys.*dp\.mode = 'user'.*public_catalog = false"):
        user_plan(private, *plan_inputs(1e-4))


def test_a_catalog_that_users_decided_cannot_give_negatives(toys: LocalDomain) -> None:
    decided = replace(toys, manifest=replace(toys.manifest, catalog_source="interactions"))
    with pytest.raises(DomainError, match=r"domain toys: dp.mode = 'user' .*'interactions'.*--catalog-source given"):
        user_plan(decided, *plan_inputs(1e-4))
    assert toys.manifest.catalog_source == "given"  # generated


def test_a_delta_that_allows_a_user_to_be_published_is_refused(toys: LocalDomain) -> None:
    with pytest.raises(DomainError, match=r"toys.*dp\.delta = 0\.05.*\b24\b.*0\.042"):
        user_plan(toys, *plan_inputs(0.05))
