"""An approximate index of item vectors, for catalogs whose items cannot all be scored for every request.

Chosen by measurement (benchmarks/speed/bench_serving.py, docs/performance.md): an inverted file is built faster than
graphs of neighbours, and finds more of what users are nearest to, who lie beside the items rather than among them.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.client.cache.folders import inputs_key, mark_used
from fedmerge.errors import ClientError
from fedmerge.evaluation.ranks import IntArray
from fedmerge.tensor_files import read_tensors, write_tensors

EXACT_VALUES = 40_000_000  # of all vectors; one core scores so many in about 20 ms
LISTS = 4  # number of lists of the index, in √N
TRAINED = 40  # vectors that place the centre of each list
PROBED = 64  # lists that are searched
FOUND = 4  # times as many items as asked for, whose exact scores then decide
CUTOFF = 10  # of the recall

logger = logging.getLogger(__name__)


def is_exact(num_items: int, width: int) -> bool:
    """Return whether so many vectors are scored one by one."""
    return num_items * width <= EXACT_VALUES


@dataclass(frozen=True, eq=False)
class ItemIndex:
    """An inverted file: vectors in lists, of which those with the nearest centres are searched. Threads may share it.

    Attributes:
        file: of faiss, over the first ``covered`` items; vectors in 8 bits a value.
        covered: number of items in it.
        fresh: positions of the items that were changed or added since; they are always found.
        recall: share of the 10 best of exact search that it finds, the mean over users who were made up.
    """

    file: Any
    covered: int
    fresh: IntArray
    recall: float

    def search(self, user: torch.Tensor, number: int) -> npt.NDArray[np.int64]:
        """Return ascending positions, among which the ``number`` items nearest to a user (d,) probably are."""
        import faiss  # noqa: PLC0415  # optional: of the extra `serve`

        faiss.omp_set_num_threads(1)  # requests run in threads of their own
        number = min(FOUND * number + len(self.fresh), self.covered)
        found = self.file.search(user[None].numpy(), number, params=faiss.SearchParametersIVF(nprobe=PROBED))[1][0]
        found = found[found >= 0]  # fewer lie in the lists
        return np.union1d(np.setdiff1d(found, self.fresh), self.fresh)

    def changed(self, positions: IntArray) -> "ItemIndex":
        """Return the index after these items were changed or added."""
        return replace(self, fresh=np.union1d(self.fresh, positions))


def load_or_build_index(
    name: str, vectors: torch.Tensor, users: Callable[[], torch.Tensor], cache_dir: str
) -> ItemIndex | None:
    """Return an index of item vectors: from ``cache_dir/indexes`` if they were indexed before, else built and kept.

    Args:
        name: of the domain.
        vectors: (N, d), L2-normalised.
        users: makes up users (U, d), on whom the recall is measured.
        cache_dir: folder on the client's own disk.

    Returns:
        None if faiss is not installed, with a warning.
    """
    try:
        import faiss  # noqa: PLC0415  # optional: of the extra `serve`
    except ImportError:
        logger.warning(
            "%s: all of %d items are scored for every request, which is slow; pip install 'fedmerge[serve]' brings an "
            "index",
            name,
            len(vectors),
        )
        return None
    inputs = {
        "vectors": hashlib.sha256(vectors.contiguous().reshape(-1).numpy().data).hexdigest(),
        "settings": [LISTS, TRAINED, PROBED],
        "faiss": faiss.__version__,
    }
    path = Path(cache_dir).expanduser() / "indexes" / f"{name}-{inputs_key(inputs)}.safetensors"
    none = np.zeros(0, dtype=np.int64)
    if (cached := read_tensors(path)) is not None:
        mark_used(path)
        file = faiss.deserialize_index(cached[0]["file"].numpy())
        return ItemIndex(file, len(vectors), none, float(cached[1]["recall"]))
    logger.info("%s: indexing %d items", name, len(vectors))
    index = _build(faiss, vectors)
    index = replace(index, recall=_recall(index, vectors, users()))
    try:
        file = torch.from_numpy(faiss.serialize_index(index.file))
        write_tensors(path, {"file": file}, {"recall": index.recall}, f"domain {name}: its index")
    except ClientError as error:
        logger.warning("%s", error)
    return index


def _build(faiss: Any, vectors: torch.Tensor) -> ItemIndex:
    num_items, width = vectors.shape
    lists = max(1, min(round(LISTS * num_items**0.5), num_items // TRAINED))
    file = faiss.index_factory(width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    file.cp.niter = 5
    faiss.omp_set_num_threads(torch.get_num_threads())
    drawn = np.linspace(0, num_items - 1, min(num_items, TRAINED * lists)).astype(np.int64)  # of the whole catalog
    file.train(vectors[torch.from_numpy(drawn)].numpy())
    file.add(vectors.numpy())
    return ItemIndex(file, num_items, np.zeros(0, dtype=np.int64), 1.0)


def _recall(index: ItemIndex, vectors: torch.Tensor, users: torch.Tensor) -> float:
    """Return the mean share of the 10 best of exact search that the list of 10 has."""
    shares = []
    for user in users:
        rows = torch.from_numpy(index.search(user, CUTOFF))
        found = rows[torch.topk(vectors[rows] @ user, min(CUTOFF, len(rows))).indices].tolist()
        wanted = torch.topk(vectors @ user, CUTOFF).indices.tolist()
        shares.append(len(set(found) & set(wanted)) / CUTOFF)
    return float(np.mean(shares))
