"""Lists by the approximate index: exact scores, filters, fresh items; its recall is that of the definition."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_folders import Place, make_place

from fedmerge.config import Text
from fedmerge.domain.catalog import make_catalog
from fedmerge.serving import index as index_module
from fedmerge.serving.index import is_exact, load_or_build_index
from fedmerge.serving.listing import Listing
from fedmerge.serving.recommender import History, Recommendation, Recommender, make_recommender, recommend_many

WIDTH, NUM_ITEMS = 32, 4000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def exact(place: Place) -> Recommender:
    """A recommender of drawn vectors, whose encoder is a table of users."""
    some = make_catalog("toys", ["a"], {"title": ["a"]})
    small = make_recommender(place.backbone(), None, some, Text())
    ids = [f"i{number}" for number in range(NUM_ITEMS)]
    catalog = make_catalog("toys", ids, {"title": ids, "colour": [str(i % 50) for i in range(NUM_ITEMS)]})
    table = replace(small.table, ids=np.arange(NUM_ITEMS, dtype=np.int32), offsets=np.arange(NUM_ITEMS + 1))
    vectors = drawn(NUM_ITEMS, 0)
    return replace(
        small,
        catalog=catalog,
        table=table,
        item_vectors=vectors,
        item_index={item: number for number, item in enumerate(ids)},
        encode=lambda sequences: drawn(len(sequences), 1),
    )


def drawn(number: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(7))
    chosen = centres[torch.randint(40, (number,), generator=rng)]
    return torch.nn.functional.normalize(chosen + 0.3 * torch.randn(number, WIDTH, generator=rng))


def histories(number: int) -> list[History]:
    rng = np.random.default_rng(2)
    return [History(rng.integers(0, NUM_ITEMS, 5), [np.zeros(1, dtype=np.int32)]) for _ in range(number)]


def shared(found: list[list[Recommendation]], wanted: list[list[Recommendation]]) -> float:
    counts = [
        len({item.item_id for item in a} & {item.item_id for item in b}) / len(b)
        for a, b in zip(found, wanted, strict=True)
    ]
    return float(np.mean(counts))


def test_the_limit_of_exact_search() -> None:
    assert is_exact(100_000, 384)
    assert not is_exact(1_000_000, 384)
    assert not is_exact(110_000, 384)


def test_lists_by_the_index_are_nearly_the_exact_ones_with_exact_scores(exact: Recommender, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    users = drawn(50, 1)
    index = load_or_build_index("toys", exact.item_vectors, lambda: users, str(tmp_path))
    assert index is not None
    indexed = replace(exact, index=index)
    asked, allowed = histories(50), np.arange(NUM_ITEMS) % 2 == 0
    for listing in (Listing(10), Listing(10, keep_seen=True), Listing(5, diversity=0.4), Listing(10, allowed=allowed)):
        found, wanted = (recommend_many(each, asked, [listing] * 50) for each in (indexed, exact))
        assert shared(found, wanted) > (0.9 if listing.diversity == 0 else 0.7)
        scores = {item.item_id: item.score for item in wanted[0]}
        for item in found[0]:
            assert item.item_id not in scores or item.score == pytest.approx(scores[item.item_id], abs=1e-6)
        assert all(len(each) == listing.k for each in found)
    few = Listing(10, allowed=np.arange(NUM_ITEMS) % 400 == 0)  # these are scored one by one
    assert shared(recommend_many(indexed, asked, [few] * 50), recommend_many(exact, asked, [few] * 50)) == 1
    best = (users @ exact.item_vectors.T).topk(10).indices.tolist()
    by_index = recommend_many(indexed, [History(np.zeros(0, np.int64), h.tokens) for h in asked], [Listing(10)] * 50)
    recall = np.mean(
        [
            len({int(item.item_id[1:]) for item in found} & set(wanted)) / 10
            for found, wanted in zip(by_index, best, strict=True)
        ]
    )
    assert index.recall == pytest.approx(recall)


def test_an_index_is_kept_and_fresh_items_are_found(
    exact: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    first = load_or_build_index("toys", exact.item_vectors, lambda: drawn(5, 1), str(tmp_path))
    monkeypatch.setattr(index_module, "_build", None)
    again = load_or_build_index("toys", exact.item_vectors, lambda: drawn(5, 1), str(tmp_path))
    assert first is not None
    assert again is not None
    assert again.recall == first.recall
    user = drawn(1, 1)
    vectors = torch.cat([exact.item_vectors, user])
    vectors[17] = -user[0]
    changed = replace(exact, item_vectors=vectors, index=again.changed(np.array([17, NUM_ITEMS])))
    ids = [*exact.catalog.item_ids, "new"]
    catalog = make_catalog("toys", ids, {"title": ids})
    (found,) = recommend_many(replace(changed, catalog=catalog), histories(1), [Listing(10)])
    assert found[0].item_id == "new"
    assert found[0].score == pytest.approx(1, abs=1e-6)
    assert "i17" not in [item.item_id for item in found]


def test_without_faiss_all_items_are_scored(
    exact: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    assert load_or_build_index("toys", exact.item_vectors, lambda: drawn(5, 1), str(tmp_path)) is None
    assert "pip install 'fedmerge[serve]'" in caplog.text
