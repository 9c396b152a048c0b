"""MergeRec: losses by hand, a dense float64 oracle, draws, determinism, convergence, refusals."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapter, random_adapters
from backbones import tiny_bert
from merging_oracles import dense_vectors, oracle_rows
from numpy.typing import NDArray

from fedmerge import config
from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import ATTRIBUTES, Text
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import Catalog
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.encode import embed_batch, encode
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import build_token_table
from fedmerge.errors import ConfigError, DomainError, LayoutMismatchError, MergeError
from fedmerge.mergerec.learn import draw_pseudo_users, learn_coefficients, student_vectors
from fedmerge.mergerec.objective import (
    ADAMERGING,
    LOSSES,
    PAPER,
    STUDIED,
    TERMS,
    MergeRecSettings,
    batch_terms,
    weighted_total,
)
from fedmerge.mergerec.pseudo_users import Kind, PseudoDomain, one_item_domain
from fedmerge.mergerec.vectors import INITIALISATIONS, SparseRows, initial_vectors, merge_vectors, merged_forward
from fedmerge.merging.methods import METHODS
from fedmerge.merging.stack import stack_adapters
from fedmerge.merging.training_free import merge_adapters
from fedmerge.seeding import generator


@pytest.fixture(scope="module")
def backbone(either_backbone: Backbone) -> Backbone:
    return either_backbone


SIZES = {"books": 7, "tents": 9, "toys": 12}


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
            texts, vectors = random_sequences(name), encode(backbone, random_sequences(name))
            domains[name] = PseudoDomain(name, texts, vectors, texts, vectors)
    return domains


# ---- an oracle written from the paper: dense weights, float64, one pseudo-user at a time


def oracle_terms(z: torch.Tensor, s: torch.Tensor, settings: MergeRecSettings) -> dict[str, torch.Tensor]:
    """Return every term for one pseudo-user with student logits z and teacher logits s over its own catalog."""
    T, tau = settings.temperature, settings.rec_temperature
    top = (
        range(len(s)) if settings.kd_top_k is None else sorted(range(len(s)), key=lambda j: -s[j])[: settings.kd_top_k]
    )
    p_top = torch.stack([torch.exp(s[j] / T) for j in top])
    q_top = torch.stack([torch.exp(z[j] / T) for j in top])
    p_top, q_top = p_top / p_top.sum(), q_top / q_top.sum()
    normaliser = torch.log(torch.exp(z / tau).sum())
    probabilities = torch.exp(z / tau - normaliser)
    return {
        "rec": normaliser - z[int(torch.argmax(s))] / tau,
        "kd": T**2 * (p_top * (torch.log(p_top) - torch.log(q_top))).sum(),
        "mse": ((z - s) ** 2).sum() / len(z),
        "entropy": -(probabilities * torch.log(probabilities)).sum(),
        "self": normaliser - z.max() / tau,
    }


EVERY_LOSS = [
    *(replace(PAPER, loss=loss) for loss in LOSSES if "similarity" not in loss),
    replace(PAPER, loss="self+kd", kd_top_k=3, rec_temperature=0.2, temperature=0.3, kd_weight=20.0),
    replace(PAPER, loss="rec", rec_temperature=0.05, rec_weight=2.0),
]


@pytest.mark.parametrize("layer_wise", [False, True], ids=["domain", "layer"])
@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_every_loss_and_gradient_equals_the_dense_oracle(
    backbone: Backbone, initialisation: str, layer_wise: bool
) -> None:
    adapters = random_adapters(layout_of(backbone))
    vectors = initial_vectors(stack_adapters(adapters), initialisation)
    start = INITIALISATIONS[initialisation]
    domains, names = pseudo_domains(backbone, adapters), vectors.domains
    drawn_domains, drawn_items = np.array([0, 2, 1, 2, 0, 2]), np.array([3, 11, 0, 5, 6, 5])
    pairs = list(zip(drawn_domains, drawn_items, strict=True))
    sequences = [domains[names[k]].users[i] for k, i in pairs]
    values = start * np.random.default_rng(1).uniform(0.5, 3, (3, len(vectors.groups)) if layer_wise else (3,))

    by_name = student_vectors(backbone, vectors, domains, torch.full((3,), start))
    students, teachers = [by_name[name] for name in names], [domains[name].teacher_items for name in names]
    teacher_users = torch.stack([domains[names[k]].teacher_users[i] for k, i in pairs])

    rows = oracle_rows(adapters, initialisation)
    exact = torch.tensor(values, requires_grad=True)

    def coefficient(domain: str, module: str) -> torch.Tensor:
        row = exact[names.index(domain)]
        return row[vectors.group_of[module]] if layer_wise else row

    E, E_hat = [], []
    for name in names:
        catalog = random_sequences(name)
        E.append(dense_vectors(backbone, {name: adapters[name]}, lambda *_: 1.0, catalog).detach())
        E_hat.append(dense_vectors(backbone, rows, lambda *_: start, catalog).detach())
    exact_users = dense_vectors(backbone, rows, coefficient, sequences)
    z = [E_hat[k] @ user for k, user in zip(drawn_domains, exact_users, strict=True)]
    s = [E[k] @ E[k][i] for k, i in pairs]

    for settings in EVERY_LOSS:
        coefficients = torch.tensor(values, dtype=torch.float32, requires_grad=True)
        with merged_forward(backbone, vectors, coefficients):
            users = embed_batch(backbone, sequences)
        terms = batch_terms(users, teacher_users, drawn_domains, teachers, students, settings)
        loss = weighted_total(terms, settings)
        (gradient,) = torch.autograd.grad(loss, [coefficients])
        each = [oracle_terms(*logits, settings) for logits in zip(z, s, strict=True)]
        exact_loss = torch.zeros((), dtype=torch.float64)
        for name, term in terms.items():
            exact_term = torch.stack([terms_of_one[name] for terms_of_one in each]).mean()
            assert term.item() == pytest.approx(exact_term.item(), rel=1e-4), (settings.loss, name)
            exact_loss = exact_loss + exact_term * (settings.kd_weight if name == "kd" else settings.rec_weight)
        (exact_gradient,) = torch.autograd.grad(exact_loss, [exact], retain_graph=True)
        assert terms.keys() == set(LOSSES[settings.loss])
        assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-4), settings.loss
        assert torch.linalg.norm(gradient - exact_gradient) <= 1e-4 * torch.linalg.norm(exact_gradient), settings.loss
        assert (exact_gradient != 0).all()


def test_the_gradient_of_a_domains_coefficient_is_the_sum_over_its_layers(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    for initialisation in INITIALISATIONS:
        vectors = initial_vectors(stack_adapters(adapters), initialisation)
        gradients: list[torch.Tensor] = []
        for shape in ((3,), (3, len(vectors.groups))):
            coefficients = torch.full(shape, 0.3, requires_grad=True)
            with merged_forward(bert, vectors, coefficients):
                users = embed_batch(bert, random_sequences("toys"))
            gradients += torch.autograd.grad(users[:, :5].sum(), [coefficients])
        assert torch.allclose(gradients[1].sum(dim=1), gradients[0], rtol=1e-4)


def test_the_first_step_is_that_of_the_paper(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    stack, domains = stack_adapters(adapters), pseudo_domains(bert, adapters)
    learned = learn_coefficients(bert, stack, domains, replace(PAPER, steps=1))
    assert learned.initial_coefficients.tolist() == pytest.approx([0.2] * 3)
    assert (learned.coefficients - learned.initial_coefficients).abs().tolist() == pytest.approx([1e-3] * 3, rel=1e-3)
    drawn_domains, drawn_items = draw_pseudo_users(tuple(SIZES.values()), replace(PAPER, steps=1))
    E_hat = [dense_vectors(bert, adapters, lambda *_: 0.2, random_sequences(name)).detach() for name in stack.domains]
    E = [domains[name].teacher_items.double() for name in stack.domains]
    drawn = list(zip(drawn_domains[0], drawn_items[0], strict=True))
    each = [oracle_terms(E_hat[k] @ E_hat[k][i], E[k] @ E[k][i], PAPER) for k, i in drawn]
    rec, kd = (float(torch.stack([terms[name] for terms in each]).mean()) for name in ("rec", "kd"))
    assert learned.history[0] == pytest.approx({"total": rec + 1000 * kd, "rec": rec, "kd": kd}, rel=1e-4)


def test_losses_by_hand() -> None:
    z, S = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, -1.0]])
    one = replace(PAPER, temperature=1.0)
    assert TERMS["rec"](z, S, one).item() == pytest.approx(math.log(4.0))  # the teacher's item has probability 1/4
    p = 1 / (1 + math.exp(-1.0))
    kl = p * math.log(p / 0.25) + (1 - p) * math.log((1 - p) / 0.75)
    assert TERMS["kd"](z, S, one).item() == pytest.approx(kl, rel=1e-5)
    halved = TERMS["kd"](0.5 * z, 0.5 * S, replace(one, temperature=0.5))
    assert halved.item() == pytest.approx(0.25 * kl, rel=1e-5)  # T² · the same KL
    assert TERMS["mse"](z, S, one).item() == pytest.approx((math.log(3.0) + 1) ** 2 / 2)
    assert TERMS["self"](z, S, one).item() == pytest.approx(math.log(4 / 3))
    assert TERMS["entropy"](z, S, one).item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    three = torch.tensor([[0.3, 0.1, -9.0]]), torch.tensor([[0.2, 0.5, 0.1]])
    first_two = TERMS["kd"](*three, replace(PAPER, kd_top_k=2))
    assert first_two.item() == pytest.approx(TERMS["kd"](three[0][:, :2], three[1][:, :2], PAPER).item(), rel=1e-5)


def test_the_published_losses_exist() -> None:
    published = {"rec+kd", "rec", "kd", "mse", "entropy", "entropy+kd", "self", "self+kd"}
    assert set(LOSSES) == published | {"similarity", "similarity+kd"}
    assert {term for terms in LOSSES.values() for term in terms} == TERMS.keys() | {"similarity"}


def test_equal_distributions_have_no_divergence() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    values = {name: term(logits, logits, PAPER) for name, term in TERMS.items()}
    assert {value.shape for value in values.values()} == {(5,)}
    assert values["kd"].abs().max() <= 1e-9
    assert values["mse"].abs().max() == 0
    assert torch.equal(values["rec"], values["self"])


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_merged_forward_is_the_folded_merge_and_leaves_no_trace(backbone: Backbone, initialisation: str) -> None:
    vectors = initial_vectors(stack_adapters(random_adapters(layout_of(backbone))), initialisation)
    sequences = random_sequences("toys")
    coefficients = torch.from_numpy(np.random.default_rng(2).uniform(-0.5, 0.7, (3, len(vectors.groups)))).float()
    before = encode(backbone, sequences)
    with merged_forward(backbone, vectors, coefficients):
        hooked = encode(backbone, sequences)
    with applied(backbone, merge_vectors(vectors, coefficients)):
        folded = encode(backbone, sequences)
    assert (hooked - folded).abs().max() <= 1e-5
    assert (hooked - before).abs().max() > 0.01
    with pytest.raises(RuntimeError, match="inside"), merged_forward(backbone, vectors, coefficients):
        raise RuntimeError("inside")
    assert torch.equal(encode(backbone, sequences), before)
    assert not any(module._forward_hooks for module in backbone.model.modules())


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_bfloat16_does_not_round_the_coefficients(bert: Backbone, initialisation: str) -> None:
    half = replace(bert, compute=resolve_compute("cpu", "bfloat16"))
    rows = initial_vectors(stack_adapters(random_adapters(layout_of(bert))), initialisation)
    found = []
    for value in (0.2, 0.2003):  # one and the same number in bfloat16
        with merged_forward(half, rows, torch.full((3,), value)):
            found.append(encode(half, random_sequences("toys")))
    assert not torch.equal(*found)


def test_rows_start_at_the_training_free_merge(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    for initialisation, start in INITIALISATIONS.items():
        vectors = initial_vectors(stack_adapters(adapters), initialisation)
        merged = merge_vectors(vectors, torch.full((3,), start))
        method = "task-arithmetic" if initialisation == "task-vectors" else initialisation
        wanted = merge_adapters(adapters, method, coefficient=start).adapter
        for name, module in merged.modules.items():
            torch.testing.assert_close(module.delta_weight(), wanted.modules[name].delta_weight(), atol=1e-6, rtol=1e-5)


def test_rows_are_sparse(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    entries = sum(width_out * width_in for width_out, width_in in layout_of(bert).values())
    sizes = {name: initial_vectors(stack_adapters(adapters), name) for name in ("ties", "pcb", "localize-and-stitch")}
    for name, density in (("ties", 0.2), ("pcb", 0.1), ("localize-and-stitch", 0.05)):
        rows = sizes[name]
        assert isinstance(rows, SparseRows)
        assert 0 < rows.size_bytes <= 8 * (3 * density * entries + 3 * len(rows.modules))  # index and value


@pytest.mark.parametrize("granularity", ["domain", "layer"])
def test_two_runs_are_identical_and_inputs_unchanged(bert: Backbone, granularity: Literal["domain", "layer"]) -> None:
    adapters = random_adapters(layout_of(bert))
    domains = pseudo_domains(bert, adapters)
    before = [adapter_sha256(adapter) for adapter in adapters.values()]
    weights = {name: tensor.clone() for name, tensor in bert.model.state_dict().items()}
    settings = replace(PAPER, granularity=granularity, steps=7, refresh_every=3, balance_domains=True, seed=4)
    calls: list[tuple[int, int, Mapping[str, float]]] = []
    first = learn_coefficients(bert, stack_adapters(adapters), domains, settings, lambda *call: calls.append(call))
    turned = stack_adapters(dict(reversed(adapters.items())))
    second = learn_coefficients(bert, turned, dict(reversed(domains.items())), settings)
    assert torch.equal(first.coefficients, second.coefficients)
    assert first.history == second.history
    assert first.coefficients.shape == ((3,) if granularity == "domain" else (3, 2))
    assert [(step, steps) for step, steps, _ in calls] == [(step, 7) for step in range(1, 8)]
    assert [losses for _, _, losses in calls] == list(first.history)
    other = learn_coefficients(bert, stack_adapters(adapters), domains, replace(settings, seed=5))
    assert first.history != other.history
    assert [adapter_sha256(adapter) for adapter in adapters.values()] == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bert.model.state_dict().items())


def test_the_known_best_coefficient_is_found(bert: Backbone) -> None:
    """One domain whose teacher is its own expert: at w = 1 the student is the teacher."""
    adapters = {"toys": random_adapter(layout_of(bert), rank=4, scaling=1.0, seed=7)}
    settings = replace(PAPER, steps=40, learning_rate=0.1, rec_weight=0.0, refresh_every=5)
    domains = pseudo_domains(bert, adapters)
    learned = learn_coefficients(bert, stack_adapters(adapters), domains, settings)
    assert learned.coefficients.item() == pytest.approx(1.0, abs=0.05)
    assert learned.history[-1]["kd"] < 0.02 * learned.history[0]["kd"]
    paper = learn_coefficients(bert, stack_adapters(adapters), domains, replace(settings, refresh_every=None, steps=10))
    assert paper.history[:5] == learned.history[:5]
    assert paper.history[5] != learned.history[5]


def test_draws_are_permutations() -> None:
    sizes = (3, 5, 20)
    domains, items = draw_pseudo_users(sizes, replace(PAPER, steps=14, batch_size=4))
    assert domains.shape == items.shape == (14, 4)
    every = {(k, i) for k, size in enumerate(sizes) for i in range(size)}
    pairs = list(zip(domains.ravel().tolist(), items.ravel().tolist(), strict=True))
    assert set(pairs[:28]) == set(pairs[28:]) == every
    assert pairs[:28] != pairs[28:]

    balanced = replace(PAPER, steps=15, batch_size=4, balance_domains=True)
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
    domain = one_item_domain("tents", bert, expert, build_token_table(catalog, bert.tokenizer, 32), Text(max_tokens=16))
    words = [bert.tokenizer.decode(sequence, skip_special_tokens=True) for sequence in domain.items]
    assert words == [f"title : {title}" for title in titles]
    stack = stack_adapters({"tents": expert})
    with merged_forward(bert, stack, torch.ones(1)):
        assert torch.allclose(domain.teacher_items, encode(bert, domain.items), atol=1e-5)


def test_settings_have_one_default_and_bounds() -> None:
    section = config.MergeRec.model_fields
    for name in set(section) - {"granularities", "preset"}:
        assert section[name].default == getattr(MergeRecSettings(), name)
    assert (PAPER.start, MergeRecSettings().start) == (0.2, None)
    assert MergeRecSettings(initialisation="ties").start == 1.0
    parameters = {name: parameter.default for name, parameter in METHODS["mergerec"].parameters.items()}
    assert parameters == {name: getattr(MergeRecSettings(), name) for name in parameters}
    assert {
        method for method, row in METHODS.items() if row.learned
    } == config.LEARNED_METHODS | config.SEARCHED_METHODS
    choices = {name: parameter.choices for name, parameter in METHODS["mergerec"].parameters.items()}
    assert choices["loss"] == tuple(LOSSES)
    assert choices["initialisation"] == tuple(INITIALISATIONS)
    assert choices["pseudo_users"] == get_args(Kind)
    assert not STUDIED.keys() & (parameters.keys() | section.keys())
    assert {name: studied.default for name, studied in STUDIED.items()} == {
        name: getattr(MergeRecSettings(), name) for name in STUDIED
    }
    paper = config.MergeRec(preset="paper")
    for name in set(section) - {"granularities", "preset"}:
        assert getattr(paper, name) == getattr(PAPER, name)
    for method in ("mergerec", "adamerging"):  # bounds and choices stand twice: for files, and for the library
        model = config.MergeRec if method == "mergerec" else config.AdaMerging
        defaults = {name: parameter.default for name, parameter in METHODS[method].parameters.items()}
        of_files = {name: getattr(model(), name) for name in defaults.keys() & model.model_fields.keys()}
        assert defaults == defaults | {"granularity": model().granularities[0]} | of_files
        for name in METHODS[method].parameters.keys() & model.model_fields.keys():
            allowed = get_args(model.model_fields[name].annotation) or ()
            if METHODS[method].parameters[name].choices:
                assert set(allowed) == set(METHODS[method].parameters[name].choices) - {"popular"}
    assert (PAPER.granularity, PAPER.steps, PAPER.batch_size, PAPER.kd_weight) == ("domain", 500, 16, 1000.0)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"granularity": "module"}, r"granularity: .*'module', .*domain, layer"),
        ({"temperature": 0.0}, r"temperature: .*0\.0, .*above 0\.0"),
        ({"refresh_every": 0}, r"refresh_every: .*0, .*at least 1, or None"),
        ({"steps": 1.5}, r"steps: .*1\.5, .*integer"),
        ({"loss": "rec+mse"}, r"loss: .*'rec\+mse', .*rec\+kd, rec, kd, mse"),
        ({"initialisation": "dare"}, r"initialisation: .*'dare', .*task-vectors, ties"),
        ({"initial_coefficient": "many"}, r"initial_coefficient: .*'many', .*number, or None"),
    ]
    for change, values in refused:
        with pytest.raises(ConfigError, match=values):
            replace(PAPER, **change)


def test_inputs_that_do_not_belong_together_are_refused(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    domains = pseudo_domains(bert, adapters)
    with pytest.raises(LayoutMismatchError, match=r"books, tents, .*books, tents, toys"):
        learn_coefficients(bert, stack_adapters(adapters), {k: v for k, v in domains.items() if k != "toys"})
    elsewhere = {"toys": random_adapter({"encoder.layer.7.query": (4, 4)}, rank=1, scaling=1.0, seed=0)}
    with (
        pytest.raises(LayoutMismatchError, match=r"encoder\.layer\.7\.query.*NoneType"),
        merged_forward(bert, stack_adapters(elsewhere), torch.ones(1)),
    ):
        pass
    with pytest.raises(DomainError, match=r"'toys': .*11 .*\(12, 32\)"):
        replace(domains["toys"], items=domains["toys"].items[:11])
    vectors = domains["toys"].teacher_items.clone()
    vectors[4] = torch.nan
    with pytest.raises(DomainError, match=r"item 4 .*nan"):
        replace(domains["toys"], teacher_items=vectors)


def test_a_loss_that_is_not_finite_is_an_error(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    with pytest.raises(MergeError, match=r"mergerec, step 1 of 500: .*inf"):
        learn_coefficients(
            bert, stack_adapters(adapters), pseudo_domains(bert, adapters), replace(PAPER, kd_weight=1e42)
        )
    assert not any(module._forward_hooks for module in bert.model.modules())


def test_any_initial_coefficients_and_the_whole_trajectory(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    stack, domains = stack_adapters(adapters), pseudo_domains(bert, adapters)
    settings = replace(PAPER, granularity="layer", steps=2)
    start = torch.tensor([0.5, 0.0, -0.2])
    learned = learn_coefficients(bert, stack, domains, settings, start=start)
    assert torch.equal(learned.initial_coefficients, start[:, None].expand(3, 2))
    assert learned.trajectory.shape == (3, 3, 2)
    assert torch.equal(learned.trajectory[0], learned.initial_coefficients)
    assert torch.equal(learned.trajectory[-1], learned.coefficients)
    assert learned.chosen_step == 2
    assert start.tolist() == pytest.approx([0.5, 0.0, -0.2])
    with pytest.raises(LayoutMismatchError, match=r"\(3, 2\), .*\(3,\)"):
        learn_coefficients(bert, stack, domains, PAPER, start=torch.zeros(3, 2))
    with pytest.raises(ConfigError, match=r"Stack.*'ties'"):
        learn_coefficients(bert, stack, domains, replace(PAPER, initialisation="ties"))


def test_a_prior_holds_the_coefficients_at_their_start(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    stack, domains = stack_adapters(adapters), pseudo_domains(bert, adapters)
    free = replace(PAPER, steps=30, learning_rate=0.05)
    moved = [
        (learned.coefficients - 0.2).abs().max()
        for prior in (0.0, 1e6)
        for learned in [learn_coefficients(bert, stack, domains, replace(free, prior_weight=prior))]
    ]
    assert moved[1] < 0.3 * moved[0]
    held = learn_coefficients(bert, stack, domains, replace(free, prior_weight=2.0, steps=2)).history[1]
    assert held["prior"] == pytest.approx(0.05**2, rel=1e-3)  # after one step of Adam
    assert held["total"] == pytest.approx(held["rec"] + 1000 * held["kd"] + 2.0 * held["prior"], rel=1e-5)


def test_the_step_is_chosen_on_pseudo_users_that_are_not_trained_on(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    stack, domains = stack_adapters(adapters), pseudo_domains(bert, adapters)
    wild = replace(PAPER, steps=20, learning_rate=1.0, select_every=6)  # far too fast: later is worse
    learned = learn_coefficients(bert, stack, domains, wild)
    assert [step for step, _ in learned.validation] == [0, 6, 12, 18, 20]
    best = min(learned.validation, key=lambda looked: looked[1])
    assert learned.chosen_step == best[0]
    assert torch.equal(learned.coefficients, learned.trajectory[best[0]])

    def held_out(name: str) -> NDArray[np.int64]:
        order = generator(wild.seed, "mergerec", "held out", name).permutation(SIZES[name])
        return order[: SIZES[name] // 5]

    losses = []  # at the start, by the oracle: the mean over domains of the mean over those held out
    for name in stack.domains:
        E_hat = dense_vectors(bert, adapters, lambda *_: 0.2, random_sequences(name)).detach()
        E = domains[name].teacher_items.double()
        each = [oracle_terms(E_hat @ E_hat[i], E @ E[i], wild) for i in held_out(name)]
        losses.append(np.mean([float(terms["rec"] + 1000 * terms["kd"]) for terms in each]))
    assert learned.validation[0][1] == pytest.approx(np.mean(losses), rel=1e-4)

    others = dict(domains)  # other users in the place of those held out: the training does not notice
    for name, domain in domains.items():
        place = [(i + 1) % SIZES[name] if i in held_out(name) else i for i in range(SIZES[name])]
        users = [domain.users[i] for i in place]
        others[name] = replace(domain, users=users, teacher_users=domain.teacher_users[place])
    changed = learn_coefficients(bert, stack, others, wild)
    assert torch.equal(changed.trajectory, learned.trajectory)
    assert changed.validation != learned.validation


def test_too_few_pseudo_users_to_choose_the_step_are_refused(bert: Backbone) -> None:
    adapters = {"books": random_adapters(layout_of(bert))["books"]}
    domains = pseudo_domains(bert, adapters)
    few = replace(domains["books"], users=domains["books"].users[:4], teacher_users=domains["books"].teacher_users[:4])
    with pytest.raises(ConfigError, match=r"select_every.* 4, .* 5 "):
        learn_coefficients(bert, stack_adapters(adapters), {"books": few}, replace(PAPER, select_every=2))


def test_adamerging_is_entropy_in_bounds(bert: Backbone) -> None:
    adapters = random_adapters(layout_of(bert))
    stack, domains = stack_adapters(adapters), pseudo_domains(bert, adapters)
    published = (ADAMERGING.start, ADAMERGING.loss, ADAMERGING.learning_rate, ADAMERGING.steps)
    assert published == (0.3, "entropy", 1e-3, 500)
    learned = learn_coefficients(bert, stack, domains, replace(ADAMERGING, steps=5, learning_rate=1.0))
    assert learned.history[0].keys() == {"total", "entropy"}
    assert ((learned.trajectory >= 0) & (learned.trajectory <= 1)).all()
    assert ((learned.trajectory == 0) | (learned.trajectory == 1)).any()
    free = learn_coefficients(bert, stack, domains, replace(ADAMERGING, steps=5, learning_rate=1.0, clamp=False))
    assert ((free.trajectory < 0) | (free.trajectory > 1)).any()
