"""Auxiliary losses of a batch against definitions, one user at a time."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import WORDS, tiny_bert

from fedmerge.client.auxiliary.categories import categories_of
from fedmerge.client.auxiliary.objectives import auxiliary_losses, catalog_loss, masked_history
from fedmerge.client.auxiliary.prepared import Auxiliary, prepare, similar_items
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.losses import TEMPERATURE
from fedmerge.config import Text, Train
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import make_catalog
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import make_interactions
from fedmerge.encoder.backbone import load_backbone
from fedmerge.encoder.encode import embed_batch
from fedmerge.encoder.text import Order, Tokens, item_text, pack_sequences
from fedmerge.errors import BackboneError, DomainError
from fedmerge.seeding import generator
from fedmerge.sequence.augmentation import augmented, segment

SEED, STEP = 3, 4
USERS = np.arange(12)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> LocalDomain:
    """Thirty items of three categories or none, under a backbone whose tokenizer has a mask token."""
    place = tmp_path_factory.mktemp("shop")
    backbone = load_backbone(str(tiny_bert(place / "bert")), "mean", resolve_compute("cpu", "float32"))
    backbone.tokenizer.mask_token = "[MASK]"
    words = [word for word in WORDS if len(word) > 2]
    titles = [f"{words[number % 20]} {words[(7 * number + 3) % 19]}" for number in range(30)]
    categories = [("camping red", "coffee", "toy", "")[number % 4] for number in range(30)]
    brands = [("", "blue")[number % 2] for number in range(30)]
    columns = {"title": titles, "brand": brands, "category": categories}
    draws = generator(0, "test")
    users = make_interactions([f"u{number}" for number in range(20)], [draws.integers(0, 12, 7) for _ in range(20)])
    catalog = make_catalog("shop", [f"i{number}" for number in range(30)], columns)
    write_domain(place / "shop", catalog, users, public_catalog=True, synthetic=True, source="test")
    return open_domain(place / "shop", backbone, Text(max_attribute_tokens=1, max_items=3, max_tokens=48))


def prepared(domain: LocalDomain, *objectives: str, **settings: object) -> Auxiliary:
    found = prepare(domain, Train.model_validate({"objectives": objectives, **settings}), SEED, "shop")
    assert found is not None
    return found


def histories(domain: LocalDomain) -> list[np.ndarray]:
    """Prefixes of different lengths, so that some users have one item only."""
    return [domain.training_sequences[user][: 1 + user % 4] for user in USERS]


def losses_of(auxiliary: Auxiliary, domain: LocalDomain) -> list[float]:
    return [loss.item() for loss in auxiliary_losses(auxiliary, domain, histories(domain), USERS, STEP)]


def vector(domain: LocalDomain, tokens: Tokens) -> torch.Tensor:
    with torch.no_grad():
        return embed_batch(domain.backbone, [tokens])[0].double()


def u(domain: LocalDomain, items: Sequence[int]) -> torch.Tensor:
    text = domain.text
    (tokens,) = pack_sequences(domain.table, [items], domain.backbone.special, text.max_items, text.max_tokens)
    return vector(domain, tokens)


def info_nce(anchor: torch.Tensor, positive: torch.Tensor, negatives: Sequence[torch.Tensor]) -> float:
    scores = [float(anchor @ other) / TEMPERATURE for other in (positive, *negatives)]
    return math.log(math.fsum(math.exp(score - scores[0]) for score in scores))


def test_segments_against_the_rest_of_their_histories(shop: LocalDomain) -> None:
    pairs = []
    for user, whole in zip(USERS, histories(shop), strict=True):
        history = whole[-shop.text.max_items :].tolist()
        if len(history) >= 2:
            span = segment(len(history), generator(SEED, "client", "shop", "auxiliary", "sp", STEP, int(user)))
            pairs.append((tuple(history[: span.start] + history[span.stop :]), tuple(history[span])))
    assert 2 < len(pairs) < len(USERS)
    assert len({pair[1] for pair in pairs}) < len(pairs)  # one segment is that of two users
    expected = [
        info_nce(u(shop, rest), u(shop, own), [u(shop, other) for other in {pair[1] for pair in pairs} - {own}])
        for rest, own in pairs
    ]
    assert losses_of(prepared(shop, "sp=0.3"), shop) == pytest.approx([0.3 * np.mean(expected)], rel=1e-4)


def test_views_against_each_other(shop: LocalDomain) -> None:
    auxiliary = prepared(shop, "coserec=0.1")
    views = list[tuple[tuple[int, ...], tuple[int, ...]]]()
    for user, whole in zip(USERS, histories(shop), strict=True):
        history, later = whole[-shop.text.max_items :], shop.training_sequences[user][len(whole) :]
        draws = generator(SEED, "client", "shop", "auxiliary", "coserec", STEP, int(user))
        forbidden = {*later.tolist()} - {*whole.tolist()}
        drawn = [augmented(history, Train().view_rates, auxiliary.similar, forbidden, draws) for _ in range(2)]
        assert not ({*np.concatenate(drawn).tolist()} & forbidden)
        views.append((tuple(drawn[0].tolist()), tuple(drawn[1].tolist())))
    read = [tuple(whole[-shop.text.max_items :].tolist()) for whole in histories(shop)]
    expected = []
    for number, pair in enumerate(views):
        for own, partner in (pair, pair[::-1]):
            negatives = [
                u(shop, other)
                for another, its_pair in enumerate(views)
                for other in its_pair
                if read[another] != read[number] and other not in (own, partner)
            ]
            expected.append(info_nce(u(shop, own), u(shop, partner), negatives))
    assert losses_of(auxiliary, shop) == pytest.approx([0.1 * np.mean(expected)], rel=1e-4)


# Masked items


@pytest.mark.parametrize("order", ["newest-first", "newest-last"])
def test_one_item_becomes_one_mask_token(shop: LocalDomain, order: Order) -> None:
    shop = replace(shop, text=shop.text.model_copy(update={"order": order}))
    mask_id, seen = shop.backbone.tokenizer.mask_token_id, set()
    history = shop.training_sequences[0][:3]
    text = shop.text
    for number in range(40):
        tokens, position, item = masked_history(shop, history, generator(0, "test", number))
        assert tokens[position] == mask_id
        assert (tokens == mask_id).sum() == 1
        assert len(tokens) <= text.max_tokens
        replaced = np.concatenate([tokens[:position], shop.table.item(item), tokens[position + 1 :]])
        (whole,) = pack_sequences(shop.table, [history], shop.backbone.special, text.max_items, 1000, order)
        kept = len(replaced) - 1
        if order == "newest-first":
            assert replaced[:-1].tolist() == whole[:kept].tolist()
        else:
            assert replaced[1:].tolist() == whole[-kept:].tolist()
        seen.add(item)
    assert seen == {*history.tolist()}


def test_items_that_no_longer_fit_are_not_masked(shop: LocalDomain) -> None:
    short = replace(shop, text=shop.text.model_copy(update={"max_tokens": 8}))
    history = shop.training_sequences[0][:3]
    found = {masked_history(short, history, generator(0, "test", number))[2] for number in range(40)}
    assert found == {int(history[-1])}


@pytest.mark.parametrize("trained", [False, True])
def test_masked_items_and_their_categories(shop: LocalDomain, trained: bool) -> None:
    auxiliary = prepared(shop, "mip=0.5", "map=2")
    if trained:  # W is no longer the identity
        for number, of_loss in enumerate(auxiliary.maps.values()):
            noise = generator(0, "test", number).standard_normal((32, 32))
            of_loss.data.add_(torch.from_numpy(0.1 * noise).float())
    states, items = [], []
    for user, whole in zip(USERS, histories(shop), strict=True):
        history = whole[-shop.text.max_items :]
        if len(history) >= 2:
            draws = generator(SEED, "client", "shop", "auxiliary", "mip", STEP, int(user))
            tokens, position, item = masked_history(shop, history, draws)
            with torch.no_grad():
                hidden = shop.backbone.model(torch.from_numpy(tokens[None].astype(np.int64))).last_hidden_state
            states.append(hidden[0, position].double())
            items.append(item)
    assert len({*items}) < len(items)  # a duplicate

    def mean(of_loss: str, wanted: Sequence[tuple[torch.Tensor, str]], texts: dict[str, torch.Tensor]) -> float:
        weight = auxiliary.maps[of_loss].detach().double()
        found = []
        for state, key in wanted:
            mapped = weight @ state
            others = [texts[other] for other in {key for _, key in wanted} - {key}]
            found.append(info_nce(mapped / mapped.norm(), texts[key], others))
        return float(np.mean(found))

    of_items = {str(item): vector(shop, shop.item_sequences[item]) for item in items}
    mip = mean("mip", [(state, str(item)) for state, item in zip(states, items, strict=True)], of_items)
    category = shop.catalog.attributes["category"]
    of_values = {value: vector(shop, tokens_of(shop, f"category: {cut(shop, value)}")) for value in category}
    known = [(state, category[item]) for state, item in zip(states, items, strict=True) if category[item]]
    assert losses_of(auxiliary, shop) == pytest.approx([0.5 * mip, 2 * mean("map", known, of_values)], rel=1e-4)


def test_a_backbone_without_a_mask_token_is_refused(toys: LocalDomain) -> None:
    with pytest.raises(BackboneError, match=r"train\.objectives has map.*no mask token.*Leave map out"):
        prepared(toys, "map=0.1")


# Categories


def tokens_of(domain: LocalDomain, text: str) -> Tokens:
    return np.array(domain.backbone.tokenizer(text)["input_ids"], dtype=np.int32)


def cut(domain: LocalDomain, value: str) -> str:
    text = item_text({"category": value}, domain.backbone.tokenizer, domain.text.max_attribute_tokens)
    return text.removeprefix("category: ")


def test_categories_are_texts_of_their_own(shop: LocalDomain) -> None:
    found, attributes = categories_of(shop, "map"), shop.catalog.attributes
    for item, value in enumerate(attributes["category"]):
        row = found.of_items[item]
        assert (row == -1) == (not value)
        if value:
            assert found.values[row].tolist() == tokens_of(shop, f"category: {cut(shop, value)}").tolist()
    assert len({tokens.tobytes() for tokens in found.values}) == len(found.values)
    limit = shop.text.max_attribute_tokens
    for item, tokens in zip(found.items, found.without, strict=True):
        values = {name: column[item] for name, column in attributes.items() if name != "category"}
        assert tokens.tolist() == tokens_of(shop, item_text(values, shop.backbone.tokenizer, limit)).tolist()
    assert len(found.items) == sum(bool(value) for value in attributes["category"])


def test_attribute_dropout_reads_the_catalog_alone(shop: LocalDomain) -> None:
    auxiliary, found = prepared(shop, "attribute-dropout=0.7", batch_size=8), categories_of(shop, "map")
    draws = generator(SEED, "client", "shop", "auxiliary", "attribute-dropout", STEP)
    drawn = draws.choice(len(found.items), 8, replace=False)
    values = [int(found.of_items[found.items[index]]) for index in drawn]
    expected = [
        info_nce(
            vector(shop, found.without[index]),
            vector(shop, found.values[value]),
            [vector(shop, found.values[other]) for other in {*values} - {value}],
        )
        for index, value in zip(drawn, values, strict=True)
    ]
    others = replace(shop, interactions=make_interactions(["u"], [[0, 1, 2]]))
    for domain in (shop, others):
        loss = catalog_loss(auxiliary, domain, STEP)
        assert loss is not None
        assert float(loss) == pytest.approx(0.7 * np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("categories", ["", "one"])
def test_a_domain_without_categories_is_refused(shop: LocalDomain, categories: str) -> None:
    blank = {**shop.catalog.attributes, "category": (categories,) * len(shop.catalog)}
    domain = replace(shop, catalog=replace(shop.catalog, attributes=blank))
    with pytest.raises(DomainError, match=r"domain shop: train\.objectives has attribute-dropout.* [01] distinct"):
        prepared(domain, "attribute-dropout=0.1")


# Similar items


def with_sequences(domain: LocalDomain, sequences: Sequence[Sequence[int]]) -> LocalDomain:
    users = [f"u{number}" for number in range(len(sequences))]
    return replace(domain, interactions=make_interactions(users, [np.array(sequence) for sequence in sequences]))


def test_similar_items_are_counted_on_train_alone(shop: LocalDomain) -> None:
    interactions, vectors = shop.interactions, shop.backbone_item_vectors
    sequences = [interactions.sequence(user).tolist() for user in range(interactions.num_users)]
    held_out = with_sequences(shop, [[*sequence[:-2], 0, 1] for sequence in sequences])
    trained = with_sequences(shop, [[*sequence[:-4], 9, 8, *sequence[-2:]] for sequence in sequences])
    table = similar_items(shop, vectors)
    assert (similar_items(held_out, vectors) == table).all()
    assert (similar_items(trained, vectors) != table).any()
    by_user = similar_items(shop, vectors, by_user=True)
    assert (similar_items(trained, vectors, by_user=True) == by_user).all()
    assert (by_user != table).any()
