"""Counters and histograms in the text format that Prometheus reads."""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

SECONDS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.06, 0.1, 0.25, 1.0, 5.0)  # upper bounds of buckets
SIZES = (1, 2, 4, 8, 16, 32)
Labels = tuple[tuple[str, str], ...]


class Histogram:
    """A histogram with cumulative buckets.

    Args:
        bounds: upper bounds, ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: Labels = ()) -> list[str]:
        """Return the samples of one series."""
        found, reached = [], 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            reached += count
            found.append(f"{name}_bucket{_labels((*labels, ('le', bound)))} {reached}")
        return [*found, f"{name}_sum{_labels(labels)} {self.total:.6f}", f"{name}_count{_labels(labels)} {reached}"]


class Metrics:
    """What a server counts; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[Labels] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._batches = Histogram(SIZES)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count one answer; ``path`` is that of a route, not what was asked for, so that series are few."""
        with self._lock:
            self._requests[("path", path), ("status", str(status))] += 1
            self._seconds.setdefault(path, Histogram(SECONDS)).add(seconds)

    def count_batch(self, size: int) -> None:
        """Count requests that were encoded together."""
        with self._lock:
            self._batches.add(size)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return everything in Prometheus' text format 0.0.4.

        Args:
            gauges: name -> help and value.
        """
        with self._lock:
            lines = ["# HELP fedmerge_requests_total Answers.", "# TYPE fedmerge_requests_total counter"]
            lines += [
                f"fedmerge_requests_total{_labels(labels)} {number}"
                for labels, number in sorted(self._requests.items())
            ]
            lines += ["# HELP fedmerge_request_seconds Time to an answer.", "# TYPE fedmerge_request_seconds histogram"]
            for path, histogram in sorted(self._seconds.items()):
                lines += histogram.lines("fedmerge_request_seconds", (("path", path),))
            lines += ["# HELP fedmerge_batch_size Requests encoded together.", "# TYPE fedmerge_batch_size histogram"]
            lines += self._batches.lines("fedmerge_batch_size")
        for name, (meaning, value) in gauges.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} gauge", f"{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    quoted = (f'{name}="{_escaped(value)}"' for name, value in labels)
    return "{" + ",".join(quoted) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
