"""A sample of the domains a step: an unbiased gradient, lazy Adam, memory, bytes of before, and resuming."""

import copy
from dataclasses import replace
from itertools import combinations
from typing import Literal

import numpy as np
import pytest
import torch
from adapters import Lent, layout_of, merges_of, random_adapter
from backbones import tiny_bert

import fedmerge as fm
from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.errors import ConfigError, MergeError
from fedmerge.mergerec.coefficients import optimise
from fedmerge.mergerec.learn import draw_domains, learn_coefficients
from fedmerge.mergerec.objective import MergeRecSettings
from fedmerge.mergerec.pseudo_users import PseudoDomain
from fedmerge.mergerec.vectors import RunningMerge, StreamedVectors, merge_vectors, merged_forward
from fedmerge.merging.candidate import Candidate
from fedmerge.merging.stack import linear_merge, stack_adapters, survey_adapters

NAMES = ("books", "coffee", "pets", "tents", "toys")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(str(tiny_bert(tmp_path_factory.mktemp("bert"))), "mean", resolve_compute("cpu", "float32"))


@pytest.fixture(scope="module")
def experts(bert: Backbone) -> dict[str, Adapter]:
    return {name: random_adapter(layout_of(bert), 1 + k % 3, 0.5 + k, k) for k, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def domains(bert: Backbone, experts: dict[str, Adapter]) -> dict[str, PseudoDomain]:
    made = {}
    for seed, (name, expert) in enumerate(experts.items()):
        rng = np.random.default_rng(seed)
        texts = [np.array([2, *rng.integers(5, 40, rng.integers(1, 6)), 3], dtype=np.int32) for _ in range(8)]
        with applied(bert, expert):
            vectors = encode(bert, texts)
        made[name] = PseudoDomain(name, texts, vectors, texts, vectors)
    return made


def streamed(adapters: dict[str, Adapter] | Lent) -> StreamedVectors:
    layout = survey_adapters(adapters)
    return StreamedVectors(layout.domains, layout.groups, layout.group_of, adapters)


@pytest.mark.parametrize("shape", [(5,), (5, 2)], ids=["domain", "layer"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_mean_over_all_samples_is_the_full_gradient(
    bert: Backbone, experts: dict[str, Adapter], shape: tuple[int, ...], size: int
) -> None:
    double = replace(bert, model=copy.deepcopy(bert.model).double())
    tokens = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()

    def gradient(vectors: object) -> torch.Tensor:
        coefficients = values.clone().requires_grad_()
        with merged_forward(double, vectors, coefficients):  # type: ignore[arg-type]  # a stack, or a sample
            hidden = double.model(input_ids=tokens).last_hidden_state
        (found,) = torch.autograd.grad((hidden * hidden.roll(1, dims=1)).sin().sum(), [coefficients])
        assert found.dtype == torch.float64
        return found

    full = gradient(stack_adapters(experts))
    running = RunningMerge(streamed(experts), bert.compute.device)
    estimates = []
    for rows in combinations(range(len(NAMES)), size):
        estimate = gradient(running.at(values, rows)) * len(NAMES) / size
        assert not estimate[[row for row in range(len(NAMES)) if row not in rows]].any()
        estimates.append(estimate)
    mean = torch.stack(estimates).mean(dim=0)
    assert torch.linalg.norm(mean - full) <= 1e-12 * torch.linalg.norm(full)
    assert max(float(torch.linalg.norm(each - full)) for each in estimates) > 0.1 * float(torch.linalg.norm(full))


@pytest.mark.parametrize(("num_domains", "size"), [(5, 2), (6, 3), (4, 1), (7, 6)])
def test_every_domain_is_drawn_equally_often(num_domains: int, size: int) -> None:
    settings = MergeRecSettings(steps=num_domains // size * 600, domains_per_step=size)
    drawn = draw_domains(num_domains, settings)
    assert drawn is not None
    assert drawn.shape == (settings.steps, size)
    assert all(len({*rows}) == size for rows in drawn.tolist())
    epochs = drawn.reshape(600, -1)
    assert all(len({*rows}) == len(rows) for rows in epochs.tolist())  # no domain twice in an epoch
    shares = np.bincount(drawn.ravel(), minlength=num_domains) / len(drawn)
    assert np.abs(shares - size / num_domains).max() < 0.05
    for also in (num_domains, num_domains + 1, None):
        assert draw_domains(num_domains, replace(settings, domains_per_step=also)) is None


def test_the_running_merge_is_the_merge_at_the_current_coefficients(experts: dict[str, Adapter]) -> None:
    running, stack = RunningMerge(streamed(experts), torch.device("cpu")), stack_adapters(experts)
    rng = torch.Generator().manual_seed(0)
    values = torch.zeros(5, 2)
    for rows in ((), (1, 3), (0, 4), (0, 4), (2,)):
        found = running.at(values, rows).merge
        for name, module in linear_merge(stack, values).modules.items():
            torch.testing.assert_close(found[name].float(), module.delta_weight(), atol=1e-5, rtol=1e-5)
        values = values.clone()
        values[list(rows)] += torch.randn(len(rows), 2, generator=rng)
    values += 1  # those of every domain, as no step does
    found = running.at(values).merge
    for name, module in linear_merge(stack, values).modules.items():
        torch.testing.assert_close(found[name].float(), module.delta_weight(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prior", [0.0, 0.3])
def test_lazy_adam_with_all_domains_is_adam(prior: float) -> None:
    start, target = torch.linspace(-1, 1, 10).reshape(5, 2), torch.linspace(2, -3, 10).reshape(5, 2)

    def gradient(step: int, coefficients: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return (coefficients.detach() - target) * (1 + step % 3), {"total": 0.0}

    def trajectory(sampled: np.ndarray | None) -> torch.Tensor:
        return optimise(
            "test", start, gradient, steps=40, learning_rate=0.1, prior_weight=prior, sampled=sampled
        ).trajectory

    every = np.stack([np.random.default_rng(step).permutation(5) for step in range(40)])
    torch.testing.assert_close(trajectory(every), trajectory(None), atol=1e-6, rtol=1e-6)


def test_a_step_moves_the_sampled_domains_alone_and_as_far_as_adam_does(
    bert: Backbone, experts: dict[str, Adapter], domains: dict[str, PseudoDomain]
) -> None:
    settings = MergeRecSettings(steps=7, domains_per_step=2, learning_rate=0.01, batch_size=4)
    learned = learn_coefficients(bert, streamed(experts), domains, settings)
    drawn = draw_domains(5, settings)
    assert drawn is not None
    moved = learned.trajectory.diff(dim=0)
    seen: set[int] = set()
    for step, rows in enumerate(drawn.tolist()):
        others = [row for row in range(5) if row not in rows]
        assert not moved[step][others].any()
        first = [row for row in rows if row not in seen]  # Adam's first step is as long as its learning rate
        assert moved[step][first].abs().flatten().tolist() == pytest.approx([0.01] * 2 * len(first), rel=1e-2)
        seen.update(rows)
    assert len(learned.history) == 7
    again = learn_coefficients(bert, streamed(experts), domains, settings)
    assert torch.equal(again.trajectory, learned.trajectory)


def test_a_sample_of_all_domains_has_the_bytes_of_before(
    bert: Backbone, experts: dict[str, Adapter], domains: dict[str, PseudoDomain]
) -> None:
    stack, settings = stack_adapters(experts), MergeRecSettings(steps=3, batch_size=4)
    before = learn_coefficients(bert, stack, domains, settings)
    for size in (5, 8):
        same = learn_coefficients(bert, stack, domains, replace(settings, domains_per_step=size))
        assert torch.equal(same.trajectory, before.trajectory)


@pytest.mark.parametrize("loss", ["kd", "rec+kd"])
def test_memory_holds_the_sample_and_not_all_adapters(
    bert: Backbone, experts: dict[str, Adapter], domains: dict[str, PseudoDomain], loss: str
) -> None:
    lent = Lent(NAMES, experts.__getitem__)
    settings = MergeRecSettings(
        loss=loss, steps=6, domains_per_step=1, batch_size=4, select_every=3, refresh_every=2, prior_weight=0.1
    )
    learned = learn_coefficients(bert, streamed(lent), domains, settings)
    assert lent.most <= 3  # the first, the latest, and the next one
    adapter = merge_vectors(streamed(lent), learned.coefficients)
    assert lent.most <= 3
    assert adapter_sha256(adapter) == adapter_sha256(linear_merge(stack_adapters(experts), learned.coefficients))


def test_what_cannot_be_sampled_is_refused(
    bert: Backbone, experts: dict[str, Adapter], domains: dict[str, PseudoDomain]
) -> None:
    with pytest.raises(ConfigError, match=r"domains_per_step = 2 .*'ties'.*'task-vectors'"):
        MergeRecSettings(domains_per_step=2, initialisation="ties")
    with pytest.raises(ConfigError, match=r"domains_per_step: .*0, .*at least 1, or None"):
        MergeRecSettings(domains_per_step=0)
    sampled = MergeRecSettings(steps=1, domains_per_step=2)
    for vectors, settings in ((stack_adapters(experts), sampled), (streamed(experts), MergeRecSettings(steps=1))):
        with pytest.raises(ConfigError, match=r"of 5 domains, .*StreamedVectors"):
            learn_coefficients(bert, vectors, domains, settings)
    with pytest.raises(MergeError, match=r"RunningMerge\.at"), merged_forward(bert, streamed(experts), torch.ones(5)):
        pass
    with pytest.raises(ConfigError, match=r"domains_per_step = 2 samples domains at the server"):
        from_flat(
            {
                "privacy.policy": "catalog-private",
                "mergerec.domains_per_step": 2,
                "domains.train": "books,tents,toys",
                "domains.unseen": "",
                "merge.methods": "mergerec",
            }
        )


def catalogs() -> dict[str, Catalog]:
    titles = [f"{word} {number}" for number in range(4) for word in ("red tent", "blue book")]
    return {
        name: Catalog(
            name, tuple(map(str, range(8))), {"title": tuple(f"{name} {title}" for title in titles)}, "0" * 64
        )
        for name in NAMES
    }


def test_the_python_api_samples_too(bert: Backbone, experts: dict[str, Adapter]) -> None:
    model = fm.merge_learned(experts, catalogs(), bert, granularity="domain", steps=1, domains_per_step=2)
    found = [value for _, value in sorted(model.provenance["coefficients"].items())]
    assert sum(value != pytest.approx(5**-0.5, abs=1e-6) for value in found) == 2


class Killed(Exception):
    pass


@pytest.mark.parametrize("granularity", ["domain", "layer"])
def test_a_killed_merge_resumes_to_the_same_bytes(
    bert: Backbone, experts: dict[str, Adapter], granularity: Literal["domain", "layer"]
) -> None:
    config = from_flat(
        {
            "domains.train": ",".join(NAMES),
            "domains.unseen": "",
            "merge.methods": "average,mergerec",
            "mergerec.granularities": granularity,
            "mergerec.steps": 10,
            "mergerec.domains_per_step": 2,
        }
    )
    whole = merges_of(bert, experts, catalogs(), config)
    kept: dict[str, Candidate] = {}

    def die(line: str) -> None:
        if "step 6/10" in line:
            raise Killed

    def keep(candidate: Candidate) -> None:
        kept[candidate.label] = candidate

    with pytest.raises(Killed):
        merges_of(bert, experts, catalogs(), config, die, keep=keep)
    assert list(kept) == ["average"]
    resumed = merges_of(bert, Lent(NAMES, experts.__getitem__), catalogs(), config, finished=kept, keep=keep)
    assert resumed == whole
    assert [adapter_sha256(each.adapter) for each in resumed] == [each.provenance.sha256 for each in whole]
    assert (whole[1].provenance.parameters or {})["domains_per_step"] == 2
