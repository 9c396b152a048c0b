"""MergeRec: losses by hand, a dense float64 oracle, draws, determinism, convergence, refusals."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter, random_adapters
from backbones import tiny_bert, tiny_roberta

from fedmerge import config
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import ATTRIBUTES, Catalog
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.encode import embed_batch, encode
from fedmerge.encoder.lora import Adapter, adapter_sha256, applied
from fedmerge.encoder.text import build_token_table
from fedmerge.errors import ConfigError, DomainError, LayoutMismatchError, MergeError
from fedmerge.merging.stack import linear_merge, stack_adapters
from fedmerge.server.collaborative import (
    PAPER,
    CollaborativeSettings,
    batch_losses,
    collaborative_losses,
    draw_pseudo_users,
    learn_coefficients,
    merged_forward,
)
from fedmerge.server.pseudo_users import PseudoDomain, one_item_domain

SIZES = {"books": 7, "tents": 9, "toys": 12}


@pytest.fixture(scope="module", params=[(tiny_bert, "mean"), (tiny_roberta, "cls")], ids=["bert", "roberta"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    build, pooling = request.param
    return load_backbone(str(build(tmp_path_factory.mktemp("backbone"))), pooling, resolve_compute("cpu", "float32"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(str(tiny_bert(tmp_path_factory.mktemp("bert"))), "mean", resolve_compute("cpu", "float32"))


def random_sequences(name: str) -> list[np.ndarray]:
    rng = np.random.default_rng(len(name))
    lengths = rng.integers(1, 6, SIZES[name])
    return [np.array([2, *rng.integers(5, 40, length), 3], dtype=np.int32) for length in lengths]


def pseudo_domains(backbone: Backbone, adapters: dict[str, Adapter]) -> dict[str, PseudoDomain]:
    domains = {}
    for name, adapter in adapters.items():
        with applied(backbone, adapter):
            domains[name] = PseudoDomain(name, random_sequences(name), encode(backbone, random_sequences(name)))
    return domains


# ---- an oracle written from the paper: dense weights, float64, one pseudo-user at a time


def dense_vectors(
    backbone: Backbone,
    adapters: dict[str, Adapter],
    coefficients: Callable[[str, str], torch.Tensor | float],
    sequences: list[np.ndarray],
) -> torch.Tensor:
    """(n, d) vectors of θ₀ + Σ_k w_k Δ_k; ``coefficients(domain, module)`` gives w."""
    model = copy.deepcopy(backbone.model).double()
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    for module in next(iter(adapters.values())).modules:
        for domain, adapter in adapters.items():
            lora = adapter.modules[module]
            delta = lora.scaling * lora.lora_B.double() @ lora.lora_A.double()
            parameters[f"{module}.weight"] = parameters[f"{module}.weight"] + coefficients(domain, module) * delta
    vectors = []
    for sequence in sequences:
        ids = torch.tensor(sequence[None, :].astype(np.int64))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        hidden = torch.func.functional_call(model, parameters, kwargs=inputs).last_hidden_state[0]
        pooled = hidden.mean(dim=0) if backbone.pooling == "mean" else hidden[0]
        vectors.append(pooled / pooled.norm())
    return torch.stack(vectors)


def oracle_losses(
    student: list[torch.Tensor], teacher: list[torch.Tensor], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean L_rec and L_kd over pseudo-users, each with logits over its own catalog."""
    rec, kd = [], []
    for z, s in zip(student, teacher, strict=True):
        rec.append(torch.log(torch.exp(z).sum()) - z[int(torch.argmax(s))])
        p, q = torch.softmax(s / temperature, dim=0), torch.softmax(z / temperature, dim=0)
        kd.append(temperature**2 * (p * (torch.log(p) - torch.log(q))).sum())
    return torch.stack(rec).mean(), torch.stack(kd).mean()


@pytest.mark.parametrize("layer_wise", [False, True], ids=["domain", "layer"])
def test_loss_and_gradient_equal_the_dense_oracle(backbone: Backbone, layer_wise: bool) -> None:
    adapters = random_adapters(layout_of(backbone))
    stack, domains = stack_adapters(adapters), pseudo_domains(backbone, adapters)
    names = stack.domains
    drawn_domains, drawn_items = np.array([0, 2, 1, 2, 0, 2]), np.array([3, 11, 0, 5, 6, 5])
    values = np.random.default_rng(1).uniform(0.1, 0.6, (3, len(stack.groups)) if layer_wise else (3,))
    initial = torch.full(values.shape, 0.2)

    with applied(backbone, linear_merge(stack, initial)):
        students = [encode(backbone, domains[name].sequences) for name in names]
    coefficients = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    with merged_forward(backbone, stack, coefficients):
        sequences = [domains[names[k]].sequences[i] for k, i in zip(drawn_domains, drawn_items, strict=True)]
        users = embed_batch(backbone, sequences)
    teachers = [domains[name].teacher_items for name in names]
    rec, kd = batch_losses(users, drawn_domains, drawn_items, teachers, students, temperature=0.05)
    (gradient,) = torch.autograd.grad(rec + 1000 * kd, [coefficients])

    exact = torch.tensor(values, requires_grad=True)

    def coefficient(domain: str, module: str) -> torch.Tensor:
        row = exact[names.index(domain)]
        return row[stack.group_of[module]] if layer_wise else row

    E, E_hat = [], []
    for name in names:
        catalog = random_sequences(name)
        E.append(dense_vectors(backbone, {name: adapters[name]}, lambda *_: 1.0, catalog).detach())
        E_hat.append(dense_vectors(backbone, adapters, lambda *_: 0.2, catalog).detach())
    exact_users = dense_vectors(backbone, adapters, coefficient, sequences)
    z = [E_hat[k] @ user for k, user in zip(drawn_domains, exact_users, strict=True)]
    s = [E[k] @ E[k][i] for k, i in zip(drawn_domains, drawn_items, strict=True)]
    exact_rec, exact_kd = oracle_losses(z, s, 0.05)
    (exact_gradient,) = torch.autograd.grad(exact_rec + 1000 * exact_kd, [exact])

    assert rec.item() == pytest.approx(exact_rec.item(), rel=1e-4)
    assert kd.item() == pytest.approx(exact_kd.item(), rel=1e-4)
    assert kd.item() > 1e-4
    assert torch.linalg.norm(gradient - exact_gradient) <= 1e-4 * torch.linalg.norm(exact_gradient)
    assert (exact_gradient.abs() > 1e-3).all()
    if not layer_wise:  # the sum over groups is the chain rule of one coefficient a domain
        layered = exact.detach()[:, None].repeat(1, len(stack.groups)).float().requires_grad_()
        with merged_forward(backbone, stack, layered):
            users = embed_batch(backbone, sequences)
        rec, kd = batch_losses(users, drawn_domains, drawn_items, teachers, students, temperature=0.05)
        (layered_gradient,) = torch.autograd.grad(rec + 1000 * kd, [layered])
        assert torch.allclose(layered_gradient.sum(dim=1), gradient, rtol=1e-4)


def test_first_step_is_the_papers(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    stack, domains = stack_adapters(adapters), pseudo_domains(bert, adapters)
    learned = learn_coefficients(bert, stack, domains, replace(PAPER, steps=1))
    assert learned.initial_coefficients.tolist() == pytest.approx([0.2] * 3)
    assert (learned.coefficients - learned.initial_coefficients).abs().tolist() == pytest.approx([1e-3] * 3, rel=1e-3)
    drawn_domains, drawn_items = draw_pseudo_users(tuple(SIZES.values()), replace(PAPER, steps=1))
    E_hat = [dense_vectors(bert, adapters, lambda *_: 0.2, random_sequences(name)).detach() for name in stack.domains]
    E = [domains[name].teacher_items.double() for name in stack.domains]
    drawn = list(zip(drawn_domains[0], drawn_items[0], strict=True))
    z, s = [E_hat[k] @ E_hat[k][i] for k, i in drawn], [E[k] @ E[k][i] for k, i in drawn]
    rec, kd = oracle_losses(z, s, 0.05)
    assert learned.history[0] == pytest.approx((float(rec + 1000 * kd), float(rec), float(kd)), rel=1e-4)


def test_losses_by_hand() -> None:
    rec, kd = collaborative_losses(torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, -1.0]]), 1.0)
    assert rec.item() == pytest.approx(math.log(4.0))  # the teacher's item has probability 1/4
    p = 1 / (1 + math.exp(-1.0))
    assert kd.item() == pytest.approx(p * math.log(p / 0.25) + (1 - p) * math.log((1 - p) / 0.75), rel=1e-5)
    _, halved = collaborative_losses(torch.tensor([[0.0, 0.5 * math.log(3.0)]]), torch.tensor([[0.0, -0.5]]), 0.5)
    assert halved.item() == pytest.approx(0.25 * kd.item(), rel=1e-5)  # T² · the same KL


def test_equal_distributions_have_no_divergence() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    rec, kd = collaborative_losses(logits, logits, 0.05)
    assert rec.shape == kd.shape == (5,)
    assert kd.abs().max() <= 1e-9
    assert (rec > 0).all()


def test_merged_forward_is_the_folded_merge_and_leaves_no_trace(backbone: Backbone) -> None:
    stack = stack_adapters(random_adapters(layout_of(backbone)))
    sequences = random_sequences("toys")
    coefficients = torch.from_numpy(np.random.default_rng(2).uniform(-0.5, 0.7, (3, len(stack.groups)))).float()
    before = encode(backbone, sequences)
    with merged_forward(backbone, stack, coefficients):
        low_rank = encode(backbone, sequences)
    with applied(backbone, linear_merge(stack, coefficients)):
        folded = encode(backbone, sequences)
    assert (low_rank - folded).abs().max() <= 1e-5
    assert (low_rank - before).abs().max() > 0.05
    with pytest.raises(RuntimeError, match="inside"), merged_forward(backbone, stack, coefficients):
        raise RuntimeError("inside")
    assert torch.equal(encode(backbone, sequences), before)
    assert not any(module._forward_hooks for module in backbone.model.modules())


def test_bfloat16_does_not_round_the_coefficients(bert: Backbone) -> None:
    half = replace(bert, compute=resolve_compute("cpu", "bfloat16"))
    stack = stack_adapters(random_adapters(layout_of(bert)))
    vectors = []
    for value in (0.2, 0.2003):  # one and the same number in bfloat16
        with merged_forward(half, stack, torch.full((3,), value)):
            vectors.append(encode(half, random_sequences("toys")))
    assert not torch.equal(*vectors)


@pytest.mark.parametrize("granularity", ["domain", "layer"])
def test_two_runs_are_identical_and_inputs_unchanged(bert: Backbone, granularity: Literal["domain", "layer"]) -> None:
    adapters = random_adapters(layout_of(bert))
    domains = pseudo_domains(bert, adapters)
    before = [adapter_sha256(adapter) for adapter in adapters.values()]
    weights = {name: tensor.clone() for name, tensor in bert.model.state_dict().items()}
    settings = CollaborativeSettings(granularity=granularity, steps=7, refresh_every=3, balance_domains=True, seed=4)
    calls: list[tuple[int, int, dict[str, float]]] = []
    first = learn_coefficients(bert, stack_adapters(adapters), domains, settings, lambda *call: calls.append(call))
    turned = stack_adapters(dict(reversed(adapters.items())))
    second = learn_coefficients(bert, turned, dict(reversed(domains.items())), settings)
    assert torch.equal(first.coefficients, second.coefficients)
    assert first.history == second.history
    assert first.coefficients.shape == ((3,) if granularity == "domain" else (3, 2))
    assert [(step, steps) for step, steps, _ in calls] == [(step, 7) for step in range(1, 8)]
    assert [(c["loss"], c["rec"], c["kd"]) for _, _, c in calls] == list(first.history)
    other = learn_coefficients(bert, stack_adapters(adapters), domains, replace(settings, seed=5))
    assert first.history != other.history
    assert [adapter_sha256(adapter) for adapter in adapters.values()] == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bert.model.state_dict().items())


def test_finds_the_known_best_coefficient(bert: Backbone) -> None:
    """One domain whose teacher is its own expert: at w = 1 the student is the teacher."""
    adapters = {"toys": random_adapter(layout_of(bert), rank=4, scaling=1.0, seed=7)}
    settings = CollaborativeSettings(steps=40, learning_rate=0.1, rec_weight=0.0, refresh_every=5)
    domains = pseudo_domains(bert, adapters)
    learned = learn_coefficients(bert, stack_adapters(adapters), domains, settings)
    assert learned.coefficients.item() == pytest.approx(1.0, abs=0.05)
    assert learned.history[-1].kd < 0.02 * learned.history[0].kd
    paper = learn_coefficients(bert, stack_adapters(adapters), domains, replace(settings, refresh_every=None, steps=10))
    assert paper.history[:5] == learned.history[:5]
    assert paper.history[5] != learned.history[5]


def test_draws_walk_through_permutations() -> None:
    sizes = (3, 5, 20)
    domains, items = draw_pseudo_users(sizes, CollaborativeSettings(steps=14, batch_size=4))
    assert domains.shape == items.shape == (14, 4)
    every = {(k, i) for k, size in enumerate(sizes) for i in range(size)}
    pairs = list(zip(domains.ravel().tolist(), items.ravel().tolist(), strict=True))
    assert set(pairs[:28]) == set(pairs[28:]) == every
    assert pairs[:28] != pairs[28:]

    balanced = CollaborativeSettings(steps=15, batch_size=4, balance_domains=True)
    domains, items = draw_pseudo_users(sizes, balanced)
    pairs = list(zip(domains.ravel().tolist(), items.ravel().tolist(), strict=True))
    assert Counter(domains.ravel().tolist()) == {0: 20, 1: 20, 2: 20}
    assert {item for domain, item in pairs if domain == 2} == set(range(20))
    assert set(Counter(item for domain, item in pairs if domain == 1).values()) == {4}
    assert not np.array_equal(domains, draw_pseudo_users(sizes, replace(balanced, seed=1))[0])


def test_one_item_domain_is_the_experts_view_of_the_catalog(bert: Backbone) -> None:
    titles = ("red tent", "blue sleeping bag", "toy car for kids")
    attributes = {name: titles if name == "title" else ("",) * 3 for name in ATTRIBUTES}
    catalog = Catalog("tents", ("a", "b", "c"), attributes, "0" * 64)
    expert = random_adapter(layout_of(bert), rank=2, scaling=1.0, seed=0)
    domain = one_item_domain("tents", bert, expert, build_token_table(catalog, bert.tokenizer, 32), max_tokens=16)
    words = [bert.tokenizer.decode(sequence, skip_special_tokens=True) for sequence in domain.sequences]
    assert words == [f"title : {title}" for title in titles]
    stack = stack_adapters({"tents": expert})
    with merged_forward(bert, stack, torch.ones(1)):
        assert torch.allclose(domain.teacher_items, encode(bert, domain.sequences), atol=1e-5)


def test_settings_are_the_published_ones_and_bounded() -> None:
    section = config.MergeRec.model_fields
    for name in set(section) - {"granularities"}:
        assert section[name].default == getattr(PAPER, name)
    assert (PAPER.granularity, PAPER.steps, PAPER.batch_size, PAPER.kd_weight) == ("domain", 500, 16, 1000.0)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"granularity": "module"}, "granularity: found 'module', expected one of domain, layer"),
        ({"temperature": 0.0}, "temperature: found 0.0, expected a finite number, above 0.0"),
        ({"refresh_every": 0}, "refresh_every: found 0, expected an integer, at least 1, or None"),
        ({"steps": 1.5}, "steps: found 1.5, expected an integer"),
    ]
    for change, words in refused:
        with pytest.raises(ConfigError, match=words):
            replace(PAPER, **change)


def test_refuses_what_does_not_belong_together(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    domains = pseudo_domains(bert, adapters)
    with pytest.raises(
        LayoutMismatchError, match="found pseudo-users of books, tents, expected those of books, tents, t"
    ):
        learn_coefficients(bert, stack_adapters(adapters), {k: v for k, v in domains.items() if k != "toys"})
    elsewhere = {"toys": random_adapter({"encoder.layer.7.query": (4, 4)}, rank=1, scaling=1.0, seed=0)}
    with (
        pytest.raises(LayoutMismatchError, match=r"module encoder.layer.7.query: found NoneType"),
        merged_forward(bert, stack_adapters(elsewhere), torch.ones(1)),
    ):
        pass
    with pytest.raises(DomainError, match=r"'toys': found 11 sequences and teacher vectors of shape \(12, 32\)"):
        replace(domains["toys"], sequences=domains["toys"].sequences[:11])
    vectors = domains["toys"].teacher_items.clone()
    vectors[4] = torch.nan
    with pytest.raises(DomainError, match="item 4 has norm nan"):
        replace(domains["toys"], teacher_items=vectors)


def test_stops_at_a_loss_that_is_not_finite(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    with pytest.raises(MergeError, match="mergerec, step 1 of 500: found loss inf"):
        learn_coefficients(
            bert, stack_adapters(adapters), pseudo_domains(bert, adapters), replace(PAPER, kd_weight=1e42)
        )
    assert not any(module._forward_hooks for module in bert.model.modules())
