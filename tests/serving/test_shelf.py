"""Items that are added or changed while serving rank as if the catalog had had them, under every kind of model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_folders import Place, make_place
from runs_with_heads import DOMAIN, config_of, make_run_with_heads, train_head

from fedmerge.domain.catalog import make_catalog
from fedmerge.domain.interactions import load_interactions
from fedmerge.errors import DomainError
from fedmerge.serving.batch import count_items
from fedmerge.serving.http.added import keep_changes, kept_changes
from fedmerge.serving.http.shelf import ItemChange, Shelf, change_items, make_shelf
from fedmerge.serving.listing import Listing
from fedmerge.serving.model import Opened, load_head, load_served, open_run, served_recommender, with_head
from fedmerge.serving.recommender import Recommender, recommend

KITE, TENT = {"title": "a blue kite", "category": "Toys"}, {"title": "a red tent", "brand": "North"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    run = make_run_with_heads(place, "shared", "federated")
    train_head(place, run, "merge")
    return run


def opened(place: Place, run: Path, model: str, texts: Mapping[str, Mapping[str, str]]) -> Opened:
    """Load a model for the domain's catalog with these texts, as after `data add-items` and an import."""
    here = open_run(run, place.domains / DOMAIN, config_of(run))
    catalog = here.catalog
    rows = {
        item: {name: values[i] for name, values in catalog.attributes.items()}
        for i, item in enumerate(catalog.item_ids)
    }
    rows |= {item: {name: text.get(name, "") for name in catalog.attributes} for item, text in texts.items()}
    columns = {name: [row[name] for row in rows.values()] for name in catalog.attributes}
    here = replace(here, catalog=make_catalog(DOMAIN, list(rows), columns))
    served = load_served(here, model)
    recommender = served_recommender(here, served)
    if model == "merged":
        return Opened(recommender, here.manifest, served.decision)
    head = load_head(here, served, recommender.item_vectors)
    return Opened(with_head(recommender, head), here.manifest, served.decision, head)


def shelf_of(opened: Opened, counts: np.ndarray | None = None) -> Shelf:
    return make_shelf(opened, "model", counts, np.ones(len(opened.recommender.catalog), dtype=np.bool_), "unused")


def everything(recommender: Recommender, history: list[str], listing: Listing) -> dict[str, float]:
    return {item.item_id: item.score for item in recommend(recommender, history, listing=listing)}


@pytest.mark.parametrize("model", ["merged", "head on the merge", "head on the merge, fused", "federated head, fused"])
def test_a_changed_shelf_ranks_as_the_changed_catalog(place: Place, run: Path, model: str) -> None:
    shelf = shelf_of(opened(place, run, model, {}))
    ids = shelf.catalog.item_ids
    texts = {ids[4]: KITE, "new": TENT, "newer": KITE, ids[0]: TENT}
    changed = change_items(shelf, [ItemChange(item, text, None) for item, text in list(texts.items())[:2]])
    changed = change_items(changed, [ItemChange(item, text, None) for item, text in list(texts.items())[2:]])
    direct = opened(place, run, model, texts).recommender
    assert changed.catalog.item_ids == direct.catalog.item_ids
    assert changed.catalog.attributes == direct.catalog.attributes
    for part in ("ids", "offsets", "separator"):
        np.testing.assert_array_equal(getattr(changed.recommender.table, part), getattr(direct.table, part))
    for history in ([ids[4], "new"], [ids[2], ids[9], ids[0]]):
        for keep_seen in (False, True):
            listing = Listing(50, keep_seen)
            found = everything(changed.recommender, history, listing)
            assert found == pytest.approx(everything(direct, history, listing), abs=1e-4)
    assert changed.changed == texts.keys()


def test_the_shelf_before_a_change_stays_as_it_was(place: Place, run: Path) -> None:
    counts = count_items(load_interactions(place.domains / DOMAIN), 20)
    shelf = shelf_of(opened(place, run, "merged", {}), counts)
    history, listing = [shelf.catalog.item_ids[3]], Listing(50, popularity=0.3)
    before = everything(shelf.recommender, history, listing)
    later = change_items(shelf, [ItemChange("new", TENT, None)])
    latest = change_items(later, [ItemChange("newer", KITE, False), ItemChange(history[0], TENT, None)])
    assert everything(shelf.recommender, history, listing) == before
    assert (len(shelf.catalog), len(later.catalog), len(latest.catalog)) == (20, 21, 22)
    assert later.recommender.item_vectors.data_ptr() == later.room.data_ptr()
    assert change_items(later, [ItemChange("other", KITE, None)]).room is later.room  # nothing was copied
    assert latest.available.tolist() == [True] * 21 + [False]
    assert latest.counts is not None
    assert latest.counts.tolist() == [*counts.tolist(), 0.0, 0.0]


def test_an_availability_alone_encodes_nothing(place: Place, run: Path) -> None:
    shelf = shelf_of(opened(place, run, "merged", {}))
    gone = change_items(shelf, [ItemChange(shelf.catalog.item_ids[1], None, False)])
    assert gone.recommender is shelf.recommender
    assert np.flatnonzero(~gone.available).tolist() == [1]
    with pytest.raises(DomainError, match="'new' is not in the catalog of toys and comes without attributes"):
        change_items(shelf, [ItemChange("new", None, False)])
    with pytest.raises(DomainError, match=r"\['colour'\]"):
        change_items(shelf, [ItemChange("new", {"colour": "red"}, None)])


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "serving" / "toys-items.jsonl"
    keep_changes(path, "before", [ItemChange("a", {"title": "old"}, None), ItemChange("new", {"title": "new"}, False)])
    keep_changes(path, "now", [ItemChange("b", {"title": "changed"}, None), ItemChange("a", None, False)])
    return path


def test_kept_changes_end_where_the_catalog_is_newer(kept: Path) -> None:
    now = replace(make_catalog("toys", ["a", "b"], {"title": ["a", "b"]}), sha256="now")
    assert kept_changes(kept, now) == [
        ItemChange("new", {"title": "new"}, False),
        ItemChange("b", {"title": "changed"}, None),
        ItemChange("a", None, False),  # its text in the catalog is newer
    ]
    with_all = make_catalog("toys", ["a", "b", "new"], {"title": ["a", "b", "new"]})
    assert kept_changes(kept, with_all) == [ItemChange("new", None, False), ItemChange("a", None, False)]
    assert kept_changes(kept, with_all, since=2e10) == []  # what is in stock was said later
    other = make_catalog("toys", ["a"], {"name": ["a"]})
    assert kept_changes(kept, other) == [ItemChange("a", None, False)]
    assert kept_changes(kept.with_name("none"), other) == []


def test_a_large_change_moves_the_vectors(place: Place, run: Path) -> None:
    shelf = shelf_of(opened(place, run, "merged", {}))
    many = change_items(shelf, [ItemChange(f"new-{i}", {"title": f"a tent {i % 7}"}, None) for i in range(1500)])
    more = change_items(many, [ItemChange(f"more-{i}", {"title": f"a kite {i % 5}"}, None) for i in range(1500)])
    assert len(more.recommender.item_vectors) == 3020
    assert torch.equal(more.recommender.item_vectors[:1520], many.recommender.item_vectors)
