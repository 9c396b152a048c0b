"""The routes of the page: lists of all models, what moved and why, searches, and what is loaded for it."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from http_calls import DOMAIN, answering, ask, same_list, send, service_of, shelf_of
from run_folders import Place, make_place
from runs_with_heads import config_of, make_run_with_heads, train_head

from fedmerge.domain.catalog import make_catalog
from fedmerge.serving.http.page.models import columns, with_models_beside
from fedmerge.serving.http.page.search import find_items
from fedmerge.serving.http.service import Service
from fedmerge.serving.http.shelf import ItemChange, Shelf, change_items, make_shelf
from fedmerge.serving.listing import Listing
from fedmerge.serving.model import open_recommender
from fedmerge.serving.recommender import Item, Recommender, index_items, recommend, similar_items

FUSED = "head on the merge, fused"
TITLES = ["backbone", "expert", "merge: average", FUSED]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = make_place(tmp_path_factory.mktemp("place"))
    train_head(place, make_run_with_heads(place))
    (place.domains / DOMAIN / "interactions.parquet").unlink()  # nothing on this page reads them
    return place


def page_shelf(place: Place, name: str = "heads", served: str | None = None) -> Shelf:
    run = place.runs / name
    return with_models_beside(shelf_of(place, run, served, popularity=False), place.domains / DOMAIN, config_of(run))


def page_service(place: Place, folder: Path, name: str = "heads") -> Service:
    return Service(lambda run, model: page_shelf(place, run or name, model), folder / "items.jsonl", threads=2)


@pytest.fixture(scope="module")
def service(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return page_service(place, tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with answering(service, page=True) as address:
        yield address


def nearest(recommender: Recommender, item_id: str, history: list[str]) -> list[tuple[int, float]]:
    """Oracle: (place, cosine) of the two nearest items of a history of different items."""
    index = recommender.item_index
    vector = recommender.item_vectors[index[item_id]]
    cosines = [(place, float(recommender.item_vectors[index[item]] @ vector)) for place, item in enumerate(history)]
    return sorted(cosines, key=lambda each: -each[1])[:2]


def test_every_list_is_what_its_model_recommends_with_places_in_the_first_one_and_the_nearest_items(
    place: Place, address: str, service: Service
) -> None:
    ids = service.shelf.catalog.item_ids
    history = [ids[3], ids[5], ids[8]]
    status, found = ask(address, "/compare", {"history": history, "k": 4})
    assert (status, found["run"], found["ignored"]) == (200, "heads", [])
    assert [each["title"] for each in found["lists"]] == TITLES
    everything = recommend(
        shelf_of(place, place.runs / "heads", "backbone", popularity=False).recommender, history, 100
    )
    first = [item.item_id for item in everything]
    for model, each in zip(("backbone", "expert", "merged", FUSED), found["lists"], strict=True):
        alone = shelf_of(place, place.runs / "heads", model, popularity=False).recommender
        wanted = [(item.item_id, item.score) for item in recommend(alone, history, 4)]
        shown = each["recommendations"]
        assert same_list([(item["item_id"], item["score"]) for item in shown], wanted)
        assert [item["before"] for item in shown] == [first.index(item_id) + 1 for item_id, _ in wanted]
        gone = [item_id for item_id in first[:4] if item_id not in dict(wanted)]
        assert [(item["item_id"], item["before"]) for item in each["gone"]] == [
            (item_id, first.index(item_id) + 1) for item_id in gone
        ]
        assert each["score_kind"] == alone.score_kind
        read = history if model == FUSED else history[-found["read"] :]
        for item in shown:
            near = [(one["place"] - len(history) + len(read), one["cosine"]) for one in item["near"]]
            oracle = nearest(alone, item["item_id"], read)
            assert [place for place, _ in near] == [place for place, _ in oracle]
            assert [cosine for _, cosine in near] == pytest.approx([cosine for _, cosine in oracle], abs=1e-5)


def test_an_item_that_is_described_counts_for_text_models_and_unknown_ids_for_none(
    address: str, service: Service
) -> None:
    ids = service.shelf.catalog.item_ids
    known: list[Item] = [{"title": "a red tent"}, ids[2]]
    status, found = ask(address, "/compare", {"history": ["gone", *known], "k": 3})
    assert (status, found["ignored"], found["read"]) == (200, ["gone"], 2)
    for column, each in list(zip(columns(service.shelf), found["lists"], strict=True))[:3]:
        recommender = column.shelf.recommender
        wanted = recommend(recommender, known, 3)
        assert [item["item_id"] for item in each["recommendations"]] == [item.item_id for item in wanted]
        by_text = {one.item_id: one.score for one in similar_items(recommender, known[0], Listing(20))}
        for item in each["recommendations"]:
            cosines = {one["place"]: one["cosine"] for one in item["near"]}
            assert cosines.keys() == {1, 2}  # places in the history that was sent
            assert cosines[1] == pytest.approx(by_text[item["item_id"]], abs=1e-5)
    assert found["lists"][3]["recommendations"] == []
    assert "describes another one" in found["lists"][3]["refused"]


def test_the_page_names_its_models_their_looks_and_which_is_served(address: str) -> None:
    status, found = ask(address, "/page", None, "GET")
    assert (status, found["domain"], found["synthetic"], found["run"], found["items"]) == (
        200,
        DOMAIN,
        True,
        "heads",
        20,
    )
    assert [model["title"] for model in found["models"]] == TITLES
    assert [model["served"] for model in found["models"]] == [False, False, True, False]
    assert [model["colour"] for model in found["models"]] == [0, 1, 2, 7]  # those of reports
    assert found["absent"] == []
    assert found["title_attribute"] == "title"


def test_whatever_is_served_the_lists_are_the_same_and_share_what_is_equal(place: Place) -> None:
    served = page_shelf(place, served=FUSED)
    assert [column.title for column in columns(served)] == TITLES
    assert [column.served for column in columns(served)] == [False, False, False, True]
    merged = columns(served)[2].shelf.recommender
    assert merged.item_vectors is served.recommender.item_vectors
    assert all(each.recommender.table is merged.table for each in served.beside)
    alone = page_shelf(place, served="head on the merge")
    assert [column.title for column in columns(alone)] == [*TITLES[:3], "head on the merge"]


def test_models_that_are_not_here_are_absent_with_a_reason(place: Place) -> None:
    run = make_run_with_heads(place, "other")
    for file in sorted((run / "adapters" / DOMAIN).iterdir()):
        file.unlink()
    (run / "adapters" / DOMAIN).rmdir()
    config = config_of(run).model_copy(update={"cache_dir": str(place.root / "empty")})
    shelf = shelf_of(place, run, popularity=False)
    found = with_models_beside(shelf, place.domains / DOMAIN, config)
    assert [column.title for column in columns(found)] == ["backbone", "merge: average"]
    assert found.absent.keys() == {"expert", FUSED}
    assert "has no expert of toys" in found.absent["expert"]
    assert "not on this machine" in found.absent[FUSED]
    none = config.model_copy(update={"head": config.head.model_copy(update={"kind": None})})
    assert with_models_beside(shelf, place.domains / DOMAIN, none).absent["head"] == "The run trained no heads."


def test_a_federated_head_is_shown_without_its_fusion_which_reads_interactions(place: Place) -> None:
    run = make_run_with_heads(place, "federated", "federated")
    shelf = with_models_beside(shelf_of(place, run, popularity=False), place.domains / DOMAIN, config_of(run))
    assert [column.title for column in columns(shelf)][-1] == "federated head"


@pytest.mark.parametrize("adapter", ["average", None])
def test_beside_an_adapter_stands_the_backbone_and_beside_that_nothing(place: Place, adapter: str | None) -> None:
    config, folder = config_of(place.runs / "heads"), place.domains / DOMAIN
    path, label = (
        ("none", "backbone") if adapter is None else (place.runs / "heads/merged" / adapter, "adapter average")
    )
    opened = open_recommender(path, None, folder, config)
    shelf = make_shelf(opened, label, None, np.ones(20, dtype=np.bool_), config.cache_dir)
    found = [(column.title, column.served) for column in columns(with_models_beside(shelf, folder, config))]
    assert found == ([("backbone", True)] if adapter is None else [("backbone", False), (label, True)])


def test_added_items_are_in_every_list(place: Place, tmp_path: Path) -> None:
    shelf = change_items(page_shelf(place), [ItemChange("new", {"title": "a blue kite"}, None)])
    for column in columns(shelf):
        ids = [item.item_id for item in recommend(column.shelf.recommender, [shelf.catalog.item_ids[0]], 20)]
        assert "new" in ids
    assert find_items(shelf, "BLUE ki", 5) == ([20], 1)


def test_a_swap_changes_every_list(place: Place, tmp_path: Path) -> None:
    make_run_with_heads(place, "second")
    service = page_service(place, tmp_path)
    with answering(service, page=True) as address:
        assert ask(address, "/swap", {"model": "second", "served": "backbone"})[0] == 200
        found = ask(address, "/page", None, "GET")[1]
    assert (found["run"], [model["served"] for model in found["models"]]) == ("second", [True, False, False, False])


def test_the_routes_are_described(address: str) -> None:
    schema = ask(address, "/openapi.json", None, "GET")[1]
    assert {"/page", "/items", "/example", "/compare"} <= schema["paths"].keys()
    assert "words, all of which the titles have somewhere" in send(address, "GET", "/docs")[1].decode()


# Searches and examples


def with_titles(shelf: Shelf, titles: list[str]) -> Shelf:
    catalog = make_catalog("toys", [f"i{number}" for number in range(len(titles))], {"title": titles})
    recommender = replace(shelf.recommender, catalog=catalog, item_index=index_items(catalog))
    return replace(shelf, opened=replace(shelf.opened, recommender=recommender))


def test_items_are_found_by_words_in_their_titles_the_best_first(service: Service) -> None:
    titles = ["Best red tent", "a Predator", "Red kite", "RED", "tent, red", "Straße", "cafe\u0301 ﬁne", "i2"]
    shelf = with_titles(service.shelf, titles)
    assert find_items(shelf, "red", 9) == ([2, 3, 0, 4, 1], 5)
    assert find_items(shelf, "red", 2) == ([2, 3], 5)
    assert find_items(shelf, " tent RED ", 9) == ([0, 4], 2)
    assert find_items(shelf, "i2", 9) == ([2, 7], 2)  # an id, and a title
    assert find_items(shelf, "strasse", 9) == ([5], 1)
    assert find_items(shelf, "café FINE", 9) == ([6], 1)
    assert find_items(shelf, "blue", 9) == ([], 0)


def test_an_example_is_made_of_similar_items_and_the_same_number_gives_the_same(address: str, service: Service) -> None:
    first, again, other = (ask(address, f"/example?number={number}", None, "GET")[1] for number in (0, 0, 1))
    assert first == again != other
    ids = [item["item_id"] for item in first["history"]]
    assert len(set(ids)) == 4
    assert set(ids) <= set(service.shelf.catalog.item_ids)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/items", "q: Field required"),
        ("/items?q=", "q: String should have at least 1 character"),
        ("/items?q=%20%20", "q: found no word"),
        (f"/items?q={'x' * 201}", "q: String should have at most 200 characters"),
        ("/items?q=x&k=0", "k: Input should be greater than or equal to 1"),
        ("/items?q=x&k=51", "k: Input should be less than or equal to 50"),
        ("/items?q=x&limit=5", "limit: Extra inputs are not permitted"),
        ("/example?number=-1", "number: Input should be greater than or equal to 0"),
        ("/example?number=x", "number: Input should be a valid integer"),
        ("/example?seed=1", "seed: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_search_is_refused_in_a_line(address: str, path: str, part: str) -> None:
    status, found = ask(address, path, None, "GET")
    assert (status, part in found["error"]) == (422, True), found


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({}, "history: Field required"),
        ({"history": []}, "history: List should have at least 1 item"),
        ({"history": ["x"] * 101}, "at most 100 items"),
        ({"history": ["x"], "k": 51}, "k: Input should be less than or equal to 50"),
        ({"history": ["x"], "only": {}}, "only: Extra inputs are not permitted"),
        ({"history": ["gone"]}, "found none of its 1 ids in the catalog of toys"),
        ({"history": [{"colour": "red"}]}, "['colour'], expected some of"),
        ({"history": [{"title": " "}]}, "without text"),
        ({"history": [3]}, "history.0"),
    ],
)
def test_a_wrong_comparison_is_refused_in_a_line(address: str, body: dict[str, object], part: str) -> None:
    status, found = ask(address, "/compare", body)
    assert (status, part in found["error"]) == (422, True), found
    assert "\n" not in found["error"]


# Files, headers, key


def test_the_page_loads_its_own_files_alone_under_a_strict_policy(address: str) -> None:
    page = send(address, "GET", "/")[1].decode()
    assert set(re.findall(r'(?:src|href)="([^"]+)"', page)) == {"/icon.svg", "/page.css", "/page.js"}
    assert not re.search(r"<script>|<style|\son\w+=|style=", page)
    for path in ("/", "/page.css", "/page.js", "/icon.svg"):
        status, found = send(address, "GET", path)
        assert (status, len(found) > 100) == (200, True)
        assert "http://" not in found.decode().replace("http://www.w3.org/2000/svg", "")
    assert "innerHTML" not in send(address, "GET", "/page.js")[1].decode()


def test_with_a_key_the_files_are_sent_without_it_and_nothing_else_is(service: Service, place: Place) -> None:
    with answering(service, key="secret", page=True) as address:
        assert b'data-key="yes"' in send(address, "GET", "/")[1]
        for path in ("/page.css", "/page.js", "/icon.svg"):
            assert send(address, "GET", path)[0] == 200
        for path in ("/page", "/items?q=x", "/example", "/page.css/..", "//"):
            assert send(address, "GET", path)[0] == 401
        assert ask(address, "/compare", {"history": ["x"]})[0] == 401
        assert ask(address, "/page", None, "GET", Authorization="Bearer secret")[0] == 200


def test_without_the_page_there_is_none_and_no_other_model_is_loaded(place: Place, tmp_path: Path) -> None:
    service = service_of(place, place.runs / "heads", tmp_path / "items.jsonl", popularity=False)
    assert service.shelf.beside == ()
    with answering(service, key="secret") as address:
        assert send(address, "GET", "/")[0] == 401
        assert send(address, "GET", "/", None, {"Authorization": "Bearer secret"})[0] == 404
        assert send(address, "GET", "/items?q=x", None, {"Authorization": "Bearer secret"})[0] == 405
