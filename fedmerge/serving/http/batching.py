"""Requests that wait at the same time are encoded together, by as many threads as there are cores."""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from fedmerge.errors import FedMergeError
from fedmerge.serving.http.metrics import Metrics
from fedmerge.serving.listing import Listing
from fedmerge.serving.recommender import History, Recommendation, Recommender, recommend_many

MOST_TOGETHER = 8  # on a CPU more together are no faster, and the first would wait for the last
MOST_WAITING = 1000
ANSWER_SECONDS = 30.0  # until a request gives up waiting


class BusyError(FedMergeError):
    """More requests wait than can be answered soon."""


Prepare = Callable[[], tuple[History, Listing]]
"""Reads a request; what it raises is the answer."""


@dataclass(frozen=True, eq=False)
class Job:
    """One request.

    Attributes:
        recommender: of the moment when the request arrived; a swap does not touch it.
        prepare: returns the history as the recommender reads it, and how the list is made.
        answer: the list, later.
    """

    recommender: Recommender
    prepare: Prepare
    answer: Future[list[Recommendation]] = field(default_factory=Future)


class Batcher:
    """A queue of requests and the threads that answer them.

    A thread takes what waits, up to MOST_TOGETHER, encodes and scores it, and takes what has come meanwhile. Nobody
    waits for a batch to fill.

    Args:
        threads: number of threads.
        metrics: count the batches.
    """

    def __init__(self, threads: int, metrics: Metrics) -> None:
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._metrics = metrics
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return self._waiting.qsize()

    def submit(self, recommender: Recommender, prepare: Prepare) -> Future[list[Recommendation]]:
        """Put a request into the queue.

        Raises:
            BusyError: MOST_WAITING requests wait already.
        """
        if self.waiting >= MOST_WAITING:
            raise BusyError(f"{MOST_WAITING} requests wait already, expected fewer. Ask again later.")
        job = Job(recommender, prepare)
        self._waiting.put(job)
        return job.answer

    def close(self) -> None:
        """End the threads when everything that waits is answered."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            jobs = [first]
            while len(jobs) < MOST_TOGETHER:
                try:
                    job = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if job is None:  # another thread's
                    self._waiting.put(None)
                    break
                jobs.append(job)
            self._metrics.count_batch(len(jobs))
            for recommender in {id(job.recommender): job.recommender for job in jobs}.values():
                _answer(recommender, [job for job in jobs if job.recommender is recommender])


async def answers(*jobs: Future[list[Recommendation]]) -> list[list[Recommendation]]:
    """Return the lists of jobs.

    Raises:
        BusyError: not within ANSWER_SECONDS.
        FedMergeError: what a job raises.
    """
    try:
        return await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, jobs)), ANSWER_SECONDS)
    except TimeoutError:
        raise BusyError(f"no answer within {ANSWER_SECONDS:g} s. Ask again later.") from None


def _answer(recommender: Recommender, jobs: list[Job]) -> None:
    ready = list[tuple[Job, History, Listing]]()
    for job in jobs:
        if not job.answer.set_running_or_notify_cancel():
            continue
        try:
            ready.append((job, *job.prepare()))
        except Exception as error:
            job.answer.set_exception(error)
    try:
        lists = recommend_many(recommender, [history for _, history, _ in ready], [listing for *_, listing in ready])
    except Exception as error:
        for job, *_ in ready:
            job.answer.set_exception(error)
        return
    for (job, *_), found in zip(ready, lists, strict=True):
        job.answer.set_result(found)
