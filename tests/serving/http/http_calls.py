"""A server of a small run on a free port, and calls of it."""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from run_folders import Place

from fedmerge.config import load_config
from fedmerge.domain.interactions import load_interactions
from fedmerge.serving.batch import count_items
from fedmerge.serving.http.server import bind, make_server
from fedmerge.serving.http.service import Service
from fedmerge.serving.http.shelf import Shelf, make_shelf
from fedmerge.serving.model import open_recommender
from fedmerge.serving.recommender import recommend

DOMAIN = "toys"
Lists = list[tuple[str, float]]


def shelf_of(place: Place, run: Path, served: str | None = None, popularity: bool = True) -> Shelf:
    """Load the shelf of DOMAIN as it is on disk."""
    config, folder = load_config(run / "config.toml"), place.domains / DOMAIN
    opened = open_recommender(str(run), run, folder, config, served)
    size = len(opened.recommender.catalog)
    counts = count_items(load_interactions(folder), size) if popularity else None
    label = opened.decision.model if opened.decision else "adapter"
    return make_shelf(opened, label, counts, np.ones(size, dtype=np.bool_), config.cache_dir)


def service_of(place: Place, run: Path, changes: Path, served: str | None = None, popularity: bool = True) -> Service:
    """Return a service whose swaps take the name of a run in the same folder of runs."""

    def load(model: str | None, other: str | None) -> Shelf:
        return shelf_of(place, run if model is None else run.parent / model, other or served, popularity)

    return Service(load, changes, threads=2)


@contextmanager
def answering(service: Service, key: str | None = None, host: str = "127.0.0.1", page: bool = False) -> Iterator[str]:
    """Yield the address of a uvicorn that runs in a thread of this process."""
    bound = bind(host, 0)
    server = make_server(service, bound, key, page)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        service.batcher.close()


def send(
    address: str, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Send a request as it stands; return status and body of the answer."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def ask(address: str, path: str, body: Any, method: str = "POST", **headers: str) -> tuple[int, Any]:
    """Send JSON; return status and JSON."""
    status, found = send(address, method, path, json.dumps(body).encode(), headers)
    return status, json.loads(found)


def listed(answer: Any) -> Lists:
    """Return ids and scores of a list."""
    return [(item["item_id"], item["score"]) for item in answer["recommendations"]]


class Load:
    """Threads that ask for lists until they are stopped, one history after the other, and check every answer.

    Args:
        address: of the server.
        right: run -> for each history its list, as (item id, score).
        threads: number of threads.
    """

    def __init__(self, address: str, right: Mapping[str, Mapping[tuple[str, ...], Lists]], threads: int = 4) -> None:
        self.address, self.right = address, right
        self.answers: Counter[str] = Counter()  # by run
        self.lost: list[str] = []  # requests without an answer
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(threads)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, run: str, number: int) -> None:
        """Wait until a run has answered so many more requests."""
        wanted = self.answers[run] + number
        while self.answers[run] < wanted:
            time.sleep(0.01)

    def _ask(self, number: int) -> None:
        histories = list(next(iter(self.right.values())))
        while not self._stop.is_set():
            history = histories[number % len(histories)]
            number += 1
            try:
                status, found = ask(self.address, "/recommend", {"history": history})
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.lost.append(repr(error))
                time.sleep(0.02)
                continue
            if status != 200:
                self.wrong.append(f"{status} {found}")
                continue
            if not same_list(listed(found), self.right[found["run"]][history]):
                self.wrong.append(f"{history}: {found}")
            self.answers[found["run"]] += 1


def same_list(found: Lists, wanted: Lists) -> bool:
    """Return whether two lists are equal up to the rounding of their scores."""
    return [item for item, _ in found] == [item for item, _ in wanted] and np.allclose(
        [score for _, score in found], [score for _, score in wanted], atol=1e-5
    )


def right_lists(shelf: Shelf) -> dict[tuple[str, ...], Lists]:
    """Return what ranking directly gives for some histories."""
    ids = shelf.catalog.item_ids
    histories = [(ids[i], ids[(3 * i + 1) % len(ids)]) for i in range(len(ids))]
    return {
        history: [(item.item_id, item.score) for item in recommend(shelf.recommender, history)] for history in histories
    }
