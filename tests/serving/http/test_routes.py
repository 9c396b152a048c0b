"""The routes answer what ranking directly gives, over real HTTP; what is wrong is a 4xx in a line."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_calls import DOMAIN, answering, ask, listed, same_list, send, service_of, shelf_of
from run_folders import Place, make_place, make_run

from fedmerge.serving.http.service import Service
from fedmerge.serving.listing import Listing
from fedmerge.serving.recommender import Item, Recommender, recommend


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    return make_run(place, "trial", ["merge.methods=average", f"cache_dir={place.root / 'cache'}"])


@pytest.fixture(scope="module")
def recommender(place: Place, run: Path) -> Recommender:
    return shelf_of(place, run).recommender


@pytest.fixture
def service(place: Place, run: Path, tmp_path: Path) -> Service:
    return service_of(place, run, tmp_path / "items.jsonl")


@pytest.fixture
def address(service: Service) -> Iterator[str]:
    with answering(service) as address:
        yield address


def is_right(answer: Any, recommender: Recommender, history: list[Item], listing: Listing) -> bool:
    wanted = recommend(recommender, history, listing=listing)
    return same_list(listed(answer), [(item.item_id, item.score) for item in wanted])


def test_lists_are_those_of_ranking_directly(address: str, recommender: Recommender) -> None:
    ids, category = recommender.catalog.item_ids, recommender.catalog.attributes["category"]
    history: list[Item] = [ids[3], ids[5]]
    status, found = ask(address, "/recommend", {"history": history})
    assert (status, found["model"], found["score_kind"], found["ignored"]) == (200, "merged", "cosine", [])
    assert is_right(found, recommender, history, Listing())
    assert found["recommendations"][0]["title"] == recommender.catalog.titles[ids.index(listed(found)[0][0])]
    by_text: list[Item] = [{"title": "a red tent"}, ids[2]]
    assert is_right(ask(address, "/recommend", {"history": by_text})[1], recommender, by_text, Listing())
    mixed = {"history": history, "k": 4, "keep_seen": True, "diversity": 0.5, "popularity": 0.25}
    status, found = ask(address, "/recommend", mixed)
    assert is_right(found, recommender, history, Listing(4, True, None, 0.5, 0.25))
    assert found["score_kind"] == "standardised"
    allowed = np.array([value.startswith("Toys & Games > G") for value in category])
    allowed[[0, 1]] = False
    filters = {"only": {"category": ["Toys & Games > G*"]}, "among": [*ids, "gone"], "exclude": [ids[0], ids[1], "x"]}
    status, found = ask(address, "/recommend", {"history": history, "k": 20, **filters})
    assert is_right(found, recommender, history, Listing(20, allowed=allowed))
    assert ask(address, "/recommend", {"history": ["gone", ids[3]]})[1]["ignored"] == ["gone"]


def test_similar_items_have_the_largest_cosines(address: str, recommender: Recommender) -> None:
    ids, vectors = recommender.catalog.item_ids, recommender.item_vectors
    cosines = (vectors @ vectors[7]).tolist()
    order = sorted((i for i in range(len(ids)) if i != 7), key=lambda i: -cosines[i])
    found = listed(ask(address, "/similar", {"item": ids[7], "k": 5})[1])
    assert same_list(found, [(ids[i], cosines[i]) for i in order[:5]])
    text = {name: values[7] for name, values in recommender.catalog.attributes.items()}
    assert same_list(listed(ask(address, "/similar", {"item": text, "k": 1})[1]), [(ids[7], 1.0)])
    assert "not in the catalog" in ask(address, "/similar", {"item": "gone"})[1]["error"]


def test_items_are_added_and_changed_while_serving_and_are_there_after_a_restart(
    place: Place, run: Path, service: Service, recommender: Recommender, tmp_path: Path
) -> None:
    ids = recommender.catalog.item_ids
    new = {"item_id": "new", "attributes": {"title": "a blue kite", "brand": "North"}}
    old = {"item_id": ids[4], "attributes": {"title": "a blue kite"}, "available": True}
    gone = {"item_id": ids[6], "available": False}
    with answering(service) as address:
        status, found = ask(address, "/items", {"items": [new, old, gone]}, "PUT")
        assert (status, found) == (200, {"added": 1, "changed": 2, "items": 21})
        first = ask(address, "/recommend", {"history": [{"title": "a blue kite"}], "k": 30})[1]
        assert len(first["recommendations"]) == 20
        assert same_list(listed(first)[:1], [(ids[4], 1.0)])
        assert ids[6] not in dict(listed(first))
        of_new = ask(address, "/recommend", {"history": ["new", ids[6]], "k": 30})[1]
        health = ask(address, "/health", None, "GET")[1]
        assert (health["items"], health["unavailable"], health["changed"]) == (21, 1, 3)
        refused = {"items": [{"item_id": "newer", "available": False}]}
        assert "comes without attributes" in ask(address, "/items", refused, "PUT")[1]["error"]
        assert ask(address, "/items", {"items": [{**new, "attributes": {"colour": "red"}}]}, "PUT")[0] == 422
    with answering(service_of(place, run, tmp_path / "items.jsonl")) as address:
        assert ask(address, "/recommend", {"history": [{"title": "a blue kite"}], "k": 30})[1] == first
        assert ask(address, "/recommend", {"history": ["new", ids[6]], "k": 30})[1] == of_new


def test_a_disk_that_is_full_changes_nothing(service: Service, tmp_path: Path) -> None:
    new = {"items": [{"item_id": "new", "attributes": {"title": "a blue kite"}}]}
    with answering(service) as address:
        (tmp_path / "items.jsonl").mkdir()  # a file cannot be written there
        status, found = ask(address, "/items", new, "PUT")
        assert (status, "cannot be written" in found["error"]) == (507, True)
        assert ask(address, "/health", None, "GET")[1]["items"] == 20


def test_health_metrics_and_the_page_say_what_is_served(address: str, service: Service) -> None:
    status, health = ask(address, "/health", None, "GET")
    assert status == 200
    assert {key: health[key] for key in ("status", "domain", "synthetic", "model", "run", "items", "popularity")} == {
        "status": "ok",
        "domain": DOMAIN,
        "synthetic": True,
        "model": "merged",
        "run": "trial",
        "items": 20,
        "popularity": True,
    }
    assert health["search"] == {"kind": "exact", "recall_at_10": None}
    for _ in range(3):
        ask(address, "/recommend", {"history": [service.shelf.catalog.item_ids[0]]})
    ask(address, "/recommend", {})
    send(address, "GET", "/elsewhere")
    lines = send(address, "GET", "/metrics")[1].decode().splitlines()
    assert 'fedmerge_requests_total{path="/recommend",status="200"} 3' in lines
    assert 'fedmerge_requests_total{path="/recommend",status="422"} 1' in lines
    assert 'fedmerge_requests_total{path="other",status="404"} 1' in lines
    assert 'fedmerge_request_seconds_bucket{path="/recommend",le="+Inf"} 4' in lines
    assert "fedmerge_batch_size_sum 3.000000" in lines
    assert "fedmerge_items 20" in lines
    page = send(address, "GET", "/docs")[1].decode()
    assert "/recommend" in page
    assert "src=" not in page  # nothing is loaded from elsewhere
    assert "//" not in page.replace("<!doctype", "")
    schema = json.loads(send(address, "GET", "/openapi.json")[1])
    assert {"/recommend", "/similar", "/items", "/swap", "/health", "/metrics"} == schema["paths"].keys()


def test_without_a_key_nothing_is_answered_but_health(service: Service) -> None:
    body = {"history": [service.shelf.catalog.item_ids[0]]}
    with answering(service, key="secret") as address:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            assert ask(address, "/recommend", body, "POST", **headers)[0] == 401
            assert send(address, "GET", "/metrics", None, headers)[0] == 401
        assert ask(address, "/recommend", body, Authorization="Bearer secret")[0] == 200
        assert send(address, "GET", "/health")[0] == 200


def test_where_anybody_may_ask_nobody_changes_anything_without_a_key(service: Service) -> None:
    with answering(service, host="0.0.0.0") as address:
        status, found = ask(address, "/items", {"items": [{"item_id": "x", "attributes": {"title": "x"}}]}, "PUT")
        assert (status, "--api-key-file" in found["error"]) == (403, True)
        assert ask(address, "/swap", {})[0] == 403
        assert ask(address, "/recommend", {"history": [service.shelf.catalog.item_ids[0]]})[0] == 200


def test_a_web_page_whose_name_leads_here_changes_nothing(address: str) -> None:
    for headers, status in (({"Host": "evil.example:8000"}, 403), ({"Host": "localhost:8000"}, 200)):
        body = {"items": [{"item_id": "x", "attributes": {"title": "x"}}]}
        assert ask(address, "/items", body, "PUT", **headers)[0] == status


def test_popularity_that_nobody_counted_is_refused(service: Service) -> None:
    service.shelf = replace(service.shelf, counts=None)
    with answering(service) as address:
        body = {"history": [service.shelf.catalog.item_ids[0]], "popularity": 0.5}
        assert "--count-popularity" in ask(address, "/recommend", body)[1]["error"]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({}, "history: Field required"),
        ({"history": []}, "history: List should have at least 1 item"),
        ({"history": ["gone"]}, "found none of its 1 ids in the catalog of toys"),
        ({"history": ["x"], "k": 0}, "k: Input should be greater than or equal to 1"),
        ({"history": ["x"], "k": 1001}, "less than or equal to 1000"),
        ({"history": ["x"] * 1001}, "at most 1000 items"),
        ({"history": ["x"], "kk": 1}, "kk: Extra inputs are not permitted"),
        ({"history": ["toys-i00001"], "diversity": 2}, "diversity: Input should be less than or equal to 1"),
        ({"history": ["toys-i00001"], "only": {"colour": ["red"]}}, "found a filter on 'colour'"),
        ({"history": [{"colour": "red"}]}, "['colour'], expected some of"),
        ({"history": [{"title": " "}]}, "without text"),
    ],
)
def test_a_wrong_request_is_refused_in_a_line(address: str, body: dict[str, object], part: str) -> None:
    status, found = ask(address, "/recommend", body)
    assert status == 422
    assert part in found["error"]
    assert "\n" not in found["error"]
