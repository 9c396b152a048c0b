"""Another run is swapped in under load: no request is lost, each is answered by one run or the other."""

import threading
from pathlib import Path

import pytest
from http_calls import Load, answering, ask, listed, right_lists, same_list, service_of, shelf_of
from run_folders import Place, make_place, make_run

from fedmerge.serving.http.service import Service
from fedmerge.serving.http.shelf import Shelf

KITE = {"items": [{"item_id": "kite", "attributes": {"title": "a blue kite"}}]}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    for name, method in (("first", "average"), ("second", "task-arithmetic")):
        make_run(place, name, [f"merge.methods={method}", f"cache_dir={tmp_path / 'cache'}"])
    # the second serves another merge: make_run always names the average
    choice = place.runs / "second" / "choice.json"
    choice.write_text(choice.read_text().replace('"served": "average"', '"served": "task-arithmetic 0.5"'))
    return place


@pytest.fixture
def service(place: Place, tmp_path: Path) -> Service:
    return service_of(place, place.runs / "first", tmp_path / "items.jsonl")


@pytest.mark.long
def test_no_request_is_lost_or_wrong_while_runs_are_swapped(place: Place, service: Service) -> None:
    right = {run: right_lists(shelf_of(place, place.runs / run)) for run in ("first", "second")}
    assert right["first"] != right["second"]
    with answering(service) as address, Load(address, right) as load:
        for run in ("second", "first", "second"):
            status, found = ask(address, "/swap", {"model": run})
            assert (status, found["run"]) == (200, run)
            load.wait_for(run, 20)
    assert (load.lost, load.wrong) == ([], [])
    assert all(load.answers[run] >= 20 for run in right)


def test_items_that_were_added_are_in_the_next_model_too(place: Place, service: Service) -> None:
    with answering(service) as address:
        ask(address, "/items", KITE, "PUT")
        assert ask(address, "/swap", {"model": "second"})[0] == 200
        assert ask(address, "/health", None, "GET")[1]["items"] == 21
        found = ask(address, "/recommend", {"history": [{"title": "a blue kite"}], "k": 1})[1]
        assert same_list(listed(found), [("kite", 1.0)])


def test_a_swap_that_fails_leaves_the_old_model_and_two_at_once_are_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    load = service._load

    def slow(model: str | None, served: str | None) -> Shelf:
        begun.set()
        go_on.wait(10)
        return load(model, served)

    with answering(service) as address:
        before = service.shelf
        assert ask(address, "/swap", {"model": "none-such"})[0] == 422
        assert ask(address, "/swap", {"served": "head on the moon"})[0] == 422
        assert service.shelf is before
        monkeypatch.setattr(service, "_load", slow)
        other = threading.Thread(target=ask, args=(address, "/swap", {"model": "second"}))
        other.start()
        assert begun.wait(10)
        status, found = ask(address, "/swap", {"model": "second"})
        assert (status, "another swap" in found["error"]) == (409, True)
        ask(address, "/items", KITE, "PUT")  # while the other model is loaded
        go_on.set()
        other.join()
        assert service.shelf.catalog.item_ids[-1] == "kite"
        assert ask(address, "/health", None, "GET")[1]["run"] == "second"


def test_too_many_that_wait_are_sent_away(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmerge.serving.http.batching.MOST_WAITING", 0)
    with answering(service) as address:
        status, found = ask(address, "/recommend", {"history": [service.shelf.catalog.item_ids[0]]})
        assert (status, "0 requests wait already" in found["error"]) == (503, True)
