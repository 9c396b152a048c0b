"""Contrasts of two models: weights by hand, bounds, neutral settings; the contrastive teacher of distillation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from adapters import layout_of, random_adapters
from backbones import tiny_bert

from fedmerge.adapter import Adapter
from fedmerge.config import MergeRec, Text, from_flat
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import generate_domain
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import TokenTable, build_token_table
from fedmerge.errors import ConfigError
from fedmerge.mergerec.contrast import adaptive_contrast, adaptive_weights, contrast
from fedmerge.mergerec.learn import learn_coefficients
from fedmerge.mergerec.objective import PAPER, batch_terms
from fedmerge.mergerec.pseudo_users import PseudoDomain, average_of_others, pseudo_users_of
from fedmerge.merging.stack import stack_adapters

TAUGHT = replace(PAPER, loss="rec+kd", teacher="contrastive", steps=3, batch_size=4)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(str(tiny_bert(tmp_path_factory.mktemp("bert"))), "mean", resolve_compute("cpu", "float32"))


@pytest.fixture(scope="module")
def adapters(bert: Backbone) -> dict[str, Adapter]:
    return random_adapters(layout_of(bert))


@pytest.fixture(scope="module")
def tables(bert: Backbone) -> dict[str, TokenTable]:
    names = {"books": "camping", "tents": "coffee", "toys": "camping"}
    catalogs = {name: generate_domain(of, num_users=1, num_items=20).catalog for name, of in names.items()}
    return {name: build_token_table(catalog, bert.tokenizer, 6) for name, catalog in catalogs.items()}


def made(
    bert: Backbone, adapters: dict[str, Adapter], tables: dict[str, TokenTable], kind: str, teacher: str
) -> dict[str, PseudoDomain]:
    return {
        name: pseudo_users_of(
            name, bert, adapters, tables[name], Text(max_tokens=60), kind=kind, seed=0, teacher=teacher
        )
        for name in adapters
    }


def logits(*distributions: tuple[float, ...]) -> list[torch.Tensor]:
    """Scores whose softmax at temperature .05 is given."""
    return [0.05 * torch.tensor([p], dtype=torch.float64).log() for p in distributions]


def test_the_weights_of_four_items_by_hand() -> None:
    S, M = logits((0.5, 0.25, 0.125, 0.125), (0.125, 0.125, 0.25, 0.5))
    alpha, beta = adaptive_weights(S, M)
    # H = (ln 2)/2 twice and (ln 8)/8 twice; m = 5/16, 3/16, 3/16, 5/16
    rest = (1 - math.log(8) / 8) / (1 - math.log(2) / 2)
    assert alpha[0].tolist() == pytest.approx([1, 1, rest, rest])
    outer = (math.log(8 / 5) / 2 + math.log(2 / 5) / 8) / 2
    inner = (math.log(4 / 3) / 4 + math.log(2 / 3) / 8) / 2
    assert beta[0].tolist() == pytest.approx([1, inner / outer, inner / outer, 1])
    assert (rest, inner / outer) == pytest.approx((1.1326, 0.1763), abs=1e-4)
    expected = [(1 + a) * s - b * m for a, s, b, m in zip(alpha[0], S[0], beta[0], M[0], strict=True)]
    assert adaptive_contrast(S, M)[0].tolist() == pytest.approx([float(value) for value in expected])


def test_the_weights_stay_in_their_bounds() -> None:
    rng = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.05, 0.3, 1.0, 30.0):
        S, M = (scale * torch.randn(20, 50, generator=rng) for _ in range(2))
        alpha, beta = adaptive_weights(S, M)
        assert alpha.amin(dim=1).tolist() == pytest.approx([1.0] * 20)
        assert 1 <= float(alpha.min()) <= float(alpha.max()) <= 1.59
        assert 0 <= float(beta.min()) <= float(beta.max()) <= 1
        assert beta.amax(dim=1).tolist() == pytest.approx([1.0] * 20)


def test_equal_models_are_not_contrasted() -> None:
    rng = torch.Generator().manual_seed(0)
    S = torch.rand(20, 50, generator=rng)
    for M in (S, S + 1e-7 * torch.randn(20, 50, generator=rng)):  # also if they differ by rounding
        alpha, beta = adaptive_weights(S, M)
        assert not beta.any()
        assert torch.equal(adaptive_contrast(S, M), (1 + alpha) * S)


def test_fixed_weights_of_0_and_1_are_the_plain_contrast_and_0_and_0_the_expert() -> None:
    S, M = torch.randn(2, 20, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(contrast(S, M, 0, 1), S - M)
    assert torch.equal(contrast(S, M, 0, 0), S)


def test_an_excluded_item_has_no_part() -> None:
    S, M = torch.randn(2, 20, 50, generator=torch.Generator().manual_seed(0))
    without = [*range(7), *range(8, 50)]
    expected = adaptive_weights(S[:, without], M[:, without])
    S[:, 7] = M[:, 7] = -torch.inf
    for found, wanted in zip(adaptive_weights(S, M), expected, strict=True):
        torch.testing.assert_close(found[:, without], wanted)


@pytest.mark.parametrize("top", [None, 3])
def test_the_contrast_teaches_kd_alone(top: int | None) -> None:
    rng = torch.Generator().manual_seed(0)
    users, teachers, amateurs = (
        torch.nn.functional.normalize(torch.randn(4, 6, generator=rng), dim=1) for _ in range(3)
    )
    items, teacher_items, amateur_items = (
        torch.nn.functional.normalize(torch.randn(9, 6, generator=rng), dim=1) for _ in range(3)
    )
    settings, where = replace(TAUGHT, kd_top_k=top, temperature=0.2), np.zeros(4, np.int64)
    plain = batch_terms(users, teachers, where, [teacher_items], [items], settings)
    found = batch_terms(users, teachers, where, [teacher_items], [items], settings, amateurs, [amateur_items])
    assert torch.equal(found["rec"], plain["rec"])
    expected = []
    for u, s, m in zip(users, teachers, amateurs, strict=True):
        score = adaptive_contrast((teacher_items @ s)[None], (amateur_items @ m)[None])[0].double()
        best = score.argsort(descending=True)[: top or 9]
        p, z = torch.softmax(score[best] / 0.2, dim=0), (items @ u)[best].double() / 0.2
        expected.append(float(0.2**2 * (p * (p.log() - z + z.logsumexp(dim=0))).sum()))
    assert found["kd"].item() == pytest.approx(np.mean(expected), rel=1e-4)
    assert abs(found["kd"].item() - plain["kd"].item()) > 0.01


@pytest.mark.parametrize("kind", ["one-item", "subset", "contrastive-adaptive"])
def test_a_contrastive_teacher_has_the_vectors_of_the_other_experts_average(
    bert: Backbone, adapters: dict[str, Adapter], tables: dict[str, TokenTable], kind: str
) -> None:
    for name, domain in made(bert, adapters, tables, kind, "contrastive").items():
        with applied(bert, average_of_others(adapters, name)):
            for texts, vectors in ((domain.items, domain.amateur_items), (domain.users, domain.amateur_users)):
                assert vectors is not None
                torch.testing.assert_close(vectors, encode(bert, texts))


def test_the_experts_teach_as_before_and_the_contrast_teaches_something_else(
    bert: Backbone, adapters: dict[str, Adapter], tables: dict[str, TokenTable]
) -> None:
    stack = stack_adapters(adapters)
    plain, contrasted = (made(bert, adapters, tables, "chain", teacher) for teacher in ("expert", "contrastive"))
    by_experts = replace(TAUGHT, teacher="expert")
    before = learn_coefficients(bert, stack, plain, by_experts)
    assert torch.equal(before.coefficients, learn_coefficients(bert, stack, contrasted, by_experts).coefficients)
    found = [learn_coefficients(bert, stack, contrasted, TAUGHT) for _ in range(2)]
    assert torch.equal(found[0].coefficients, found[1].coefficients)
    assert found[0].history[0]["rec"] == before.history[0]["rec"]
    assert found[0].history[0]["kd"] != before.history[0]["kd"]
    with pytest.raises(ConfigError, match=r"books, tents, toys .* teacher='contrastive'"):
        learn_coefficients(bert, stack, plain, TAUGHT)


def test_a_teacher_that_nothing_learns_from_is_refused(
    bert: Backbone, adapters: dict[str, Adapter], tables: dict[str, TokenTable]
) -> None:
    with pytest.raises(ConfigError, match=r"mergerec: teacher = 'contrastive' .* 'rec' .* with kd"):
        replace(PAPER, loss="rec", teacher="contrastive")
    with pytest.raises(ConfigError, match=r"mergerec: teacher = 'contrastive' .* 'similarity' .* with kd"):
        from_flat({"mergerec.teacher": "contrastive", "mergerec.loss": "similarity"})
    alone = {"toys": adapters["toys"]}
    with pytest.raises(ConfigError, match=r"'toys': .* found none; set mergerec.teacher = 'expert'"):
        pseudo_users_of(
            "toys", bert, alone, tables["toys"], Text(max_tokens=60), kind="one-item", seed=0, teacher="contrastive"
        )


def test_caches_from_before_the_key_stay_valid() -> None:
    assert MergeRec().cache_inputs() == {
        "preset": "default",
        "granularities": ("layer",),
        "initial_coefficient": None,
        "loss": "kd",
        "kd_top_k": 50,
        "learning_rate": 5e-3,
        "steps": 100,
        "pseudo_users": "one-item",
    }
    assert MergeRec(teacher="contrastive").cache_inputs()["teacher"] == "contrastive"
