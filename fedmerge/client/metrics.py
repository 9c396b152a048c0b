"""Full-ranking metrics with one relevant item a user, and the sums of them that may leave a client.

Per-user outcomes stay where the interactions are. A client reports :class:`MetricSums` only: sums and cross-products
over its users, which is all that means, paired differences between methods and their standard errors need.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.errors import ClientError, DivergedError, LayoutMismatchError

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float64]
Variant = Literal["unmasked", "masked"]

CUTOFFS: tuple[int, ...] = (1, 5, 10, 50)
METRICS: tuple[str, ...] = (*(f"recall@{k}" for k in CUTOFFS), *(f"ndcg@{k}" for k in CUTOFFS), "mrr")
VARIANTS: tuple[Variant, ...] = get_args(Variant)
BACKBONE, EXPERT = "backbone", "expert"  # what client and server call these two models

# Half-width of a two-sided 95 % normal interval in standard errors.
INTERVAL_95 = 1.96

# Scores held at once when no block size is asked for: 16 MiB of float32.
_SCORES_PER_BLOCK = 2**22


# Ranks


def target_ranks(
    scores: torch.Tensor, targets: IntArray, seen: Sequence[IntArray] | None = None, *, block_size: int | None = None
) -> npt.NDArray[np.int64]:
    """Rank of each user's target among all items; ties count against the target.

    rank = 1 + #{candidates i other than the target : score_i >= score_target}

    Args:
        scores: (U, N) floating point; higher is better. An expanded view is not materialised.
        targets: (U,) item index of each user's one relevant item.
        seen: one array of item indices a user, repeats allowed: the masked variant, which takes these items out of the
            candidates, except the target itself. None is the unmasked variant.
        block_size: users ranked at once; None keeps a block at about four million scores.

    Returns:
        (U,) int64 ranks from 1.

    Raises:
        LayoutMismatchError: shapes or item indices that do not fit the scores.
        ClientError: NaN or infinite scores.

    >>> target_ranks(torch.tensor([[0.9, 0.5, 0.5, 0.1]]), np.array([2]))
    array([3])
    >>> target_ranks(torch.tensor([[0.9, 0.5, 0.5, 0.1]]), np.array([2]), [np.array([0, 2, 0])])
    array([2])
    """
    if scores.ndim != 2:
        raise LayoutMismatchError(f"scores have shape {tuple(scores.shape)}; expected (users, items)")
    num_users, num_items = scores.shape
    _check_indices(num_users, num_items, targets, seen)
    spans = _row_spans(num_users, num_items, block_size)
    with torch.no_grad():
        return _rank_blocks(((span, scores[span]) for span in spans), targets, seen)


def rank_targets(
    user_vectors: torch.Tensor,
    item_vectors: torch.Tensor,
    targets: IntArray,
    seen: Sequence[IntArray] | None = None,
    *,
    block_size: int | None = None,
) -> npt.NDArray[np.int64]:
    """Ranks as in :func:`target_ranks` under inner-product scores, computed in float32 block by block.

    score = <user vector, item vector>, the cosine when both are L2-normalised. No (U, N) matrix is ever held. Autocast
    is switched off inside: half-precision scores would tie items that the vectors tell apart.

    Args:
        user_vectors: (U, d).
        item_vectors: (N, d), on the same device.
        targets: (U,) item index of each user's one relevant item.
        seen: as in :func:`target_ranks`.
        block_size: users scored at once; None keeps a block at about four million scores.

    Returns:
        (U,) int64 ranks from 1.

    Raises:
        LayoutMismatchError: vectors of different width, or item indices outside the catalog.
        ClientError: NaN or infinite scores.
    """
    if user_vectors.ndim != 2 or item_vectors.ndim != 2 or user_vectors.shape[1] != item_vectors.shape[1]:
        raise LayoutMismatchError(
            f"user vectors have shape {tuple(user_vectors.shape)} and item vectors {tuple(item_vectors.shape)}; "
            "expected (users, d) and (items, d) from one encoder"
        )
    num_users, num_items = user_vectors.shape[0], item_vectors.shape[0]
    _check_indices(num_users, num_items, targets, seen)
    spans = _row_spans(num_users, num_items, block_size)
    with torch.no_grad(), torch.autocast(item_vectors.device.type, enabled=False):
        catalog_by_column = item_vectors.float().T  # (d, N)
        return _rank_blocks(((span, user_vectors[span].float() @ catalog_by_column) for span in spans), targets, seen)


def _row_spans(num_users: int, num_items: int, block_size: int | None) -> Iterator[slice]:
    if block_size is None:
        block_size = max(1, _SCORES_PER_BLOCK // max(1, num_items))
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; expected at least 1 user, or None to have it chosen")
    return (slice(start, min(start + block_size, num_users)) for start in range(0, num_users, block_size))


def _check_indices(num_users: int, num_items: int, targets: IntArray, seen: Sequence[IntArray] | None) -> None:
    if targets.shape != (num_users,):
        raise LayoutMismatchError(
            f"targets have shape {targets.shape}; expected one item for each of {num_users} users"
        )
    check_in_catalog(targets, num_items, "targets")
    if seen is None:
        return
    if len(seen) != num_users:
        raise LayoutMismatchError(
            f"histories of {len(seen)} users were given; expected one for each of {num_users} users"
        )
    if num_users:
        check_in_catalog(np.concatenate(seen), num_items, "histories")


def check_in_catalog(items: IntArray, num_items: int, what: str) -> None:
    """Refuse item indices outside 0 .. num_items - 1; a negative one would silently count from the end.

    Raises:
        LayoutMismatchError: how many there are in ``what``.
    """
    num_outside = int(np.count_nonzero((items < 0) | (items >= num_items)))
    if num_outside:
        raise LayoutMismatchError(
            f"{num_outside} of {items.size} item indices in {what} are outside the catalog of {num_items} items; "
            "rank against the catalog that the interactions were written with"
        )


def _rank_blocks(
    blocks: Iterable[tuple[slice, torch.Tensor]], targets: IntArray, seen: Sequence[IntArray] | None
) -> npt.NDArray[np.int64]:
    ranks = np.zeros(len(targets), dtype=np.int64)
    num_non_finite = num_scores = 0
    for span, scores in blocks:  # scores (b, N)
        num_scores += scores.numel()
        # A float64 sum of finite float32 numbers cannot overflow, so one read-only pass tells whether any score is NaN
        # or infinite.
        if not math.isfinite(scores.sum(dtype=torch.float64).item()):
            num_in_block = int((~torch.isfinite(scores)).sum())
            num_non_finite += num_in_block
            if num_in_block:
                continue
        target = torch.as_tensor(targets[span].astype(np.int64), device=scores.device)  # (b,)
        at_least = scores >= scores.gather(1, target[:, None])  # (b, N) bool
        if seen is not None:
            histories = seen[span]
            rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
            columns = np.concatenate(histories).astype(np.int64)
            pairs = torch.as_tensor(np.stack([rows, columns]), device=scores.device)  # (2, history items)
            at_least[pairs[0], pairs[1]] = False
        at_least.scatter_(1, target[:, None], False)  # the target is no competitor of itself, in its history or not
        ranks[span] = (1 + at_least.sum(dim=1)).cpu().numpy()
    if num_non_finite:
        raise DivergedError(
            f"ranking of {len(targets)} users: {num_non_finite} of {num_scores} scores are NaN or infinite; "
            "expected finite scores. The adapter or the encoder has diverged: lower its learning rate, "
            "or leave this adapter out of the merge"
        )
    return ranks


# Metrics


def per_user_metrics(ranks: IntArray) -> FloatArray:
    """Outcomes of every user, for one relevant item each.

    recall@k = [rank <= k],  ndcg@k = [rank <= k] / log2(1 + rank),  mrr = 1 / rank

    Args:
        ranks: (U,) ranks from 1.

    Returns:
        (U, len(METRICS)) float64, columns in the order of METRICS. Private to the client: only :func:`metric_sums` of
        it leaves.

    Raises:
        ValueError: a rank below 1.

    >>> dict(zip(METRICS, per_user_metrics(np.array([3]))[0].tolist()))["ndcg@5"]
    0.5
    """
    if ranks.ndim != 1 or (ranks.size and int(ranks.min()) < 1):
        raise ValueError(
            f"ranks have shape {ranks.shape} and minimum {ranks.min(initial=1)}; expected (users,) and ranks from 1"
        )
    rank = ranks.astype(np.float64)[:, None]  # (U, 1)
    hits = (rank <= np.array(CUTOFFS)).astype(np.float64)  # (U, cutoffs)
    return np.concatenate([hits, hits / np.log2(1.0 + rank), 1.0 / rank], axis=1)


# Sums


@dataclass(frozen=True, slots=True, eq=False)  # eq: arrays have no single truth value
class MetricSums:
    """What a client tells about its users: sums and cross-products of their outcomes under P methods.

    Args:
        methods: the P methods, in the order of the axes below.
        variant: "unmasked" or "masked".
        num_users: users summed over.
        sums: (P, M) float64, sum over users of x_p, with M the metrics of METRICS.
        products: (M, P, P) float64, sum over users of x_p * x_q; symmetric in p and q.

    Raises:
        ClientError: on construction, whatever cannot be such sums, so that nothing malformed gets past the wire.
    """

    methods: tuple[str, ...]
    variant: Variant
    num_users: int
    sums: FloatArray
    products: FloatArray

    def __post_init__(self) -> None:
        num_methods, num_metrics = len(self.methods), len(METRICS)
        if (
            not num_methods
            or len(set(self.methods)) != num_methods
            or not all(isinstance(name, str) for name in self.methods)
        ):
            raise ClientError(
                f"metric sums name the methods {list(self.methods)}; expected at least one, each named once"
            )
        if self.variant not in VARIANTS:
            raise ClientError(f"metric sums name the variant {self.variant!r}; expected one of {list(VARIANTS)}")
        if self.num_users < 1:
            raise ClientError(
                f"metric sums over {self.num_users} users; expected at least 1: a domain without evaluated users has "
                "no metrics"
            )
        expected = {"sums": (num_methods, num_metrics), "products": (num_metrics, num_methods, num_methods)}
        for name, array in (("sums", self.sums), ("products", self.products)):
            if array.shape != expected[name] or array.dtype != np.float64:
                raise ClientError(
                    f"metric sums: {name} are {array.dtype} of shape {array.shape}; "
                    f"expected float64 of shape {expected[name]} for {num_methods} methods and {num_metrics} metrics"
                )
            if not np.isfinite(array).all():
                raise ClientError(
                    f"metric sums: {np.count_nonzero(~np.isfinite(array))} of {array.size} {name} are not finite; "
                    "exclude this client"
                )
        if not np.allclose(self.products, self.products.transpose(0, 2, 1), rtol=1e-9, atol=1e-9):
            raise ClientError(
                "metric sums: products are not symmetric between methods; expected sum(x_p * x_q) over the same users "
                "both ways"
            )

    def means(self) -> FloatArray:
        """(P, M) mean outcome of every method and metric."""
        return self.sums / self.num_users

    def mean(self, method: str, metric: str) -> float:
        """Mean outcome of one method in one metric."""
        return float(self.sums[_method_index(self, method), _metric_index(metric)] / self.num_users)

    def metrics_by_method(self) -> dict[str, dict[str, float]]:
        """Method -> metric -> mean outcome."""
        return {
            method: dict(zip(METRICS, row, strict=True))
            for method, row in zip(self.methods, self.means().tolist(), strict=True)
        }

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON types; floats survive JSON exactly. See :func:`metric_sums_from_dict`."""
        return {
            "methods": list(self.methods),
            "metrics": list(METRICS),
            "variant": self.variant,
            "num_users": self.num_users,
            "sums": self.sums.tolist(),
            "products": self.products.tolist(),
        }


def metric_sums_from_dict(record: Mapping[str, Any]) -> MetricSums:
    """Inverse of :meth:`MetricSums.to_dict`.

    Raises:
        ClientError: missing or malformed entries, or other metrics than METRICS.
    """
    names = ("methods", "metrics", "variant", "num_users", "sums", "products")
    if set(record) != set(names):
        raise ClientError(f"metric sums: found the entries {sorted(record)}; expected {sorted(names)}")
    if list(record["metrics"]) != list(METRICS):
        raise ClientError(
            f"metric sums: found the metrics {list(record['metrics'])}; expected {list(METRICS)}: use one version on "
            "both ends"
        )
    try:
        sums, products = np.array(record["sums"], dtype=np.float64), np.array(record["products"], dtype=np.float64)
        num_users = int(record["num_users"])
    except (TypeError, ValueError) as error:
        raise ClientError(
            f"metric sums: entries that are not numbers ({error}); expected rectangular arrays of floats"
        ) from error
    return MetricSums(tuple(record["methods"]), record["variant"], num_users, sums, products)


def metric_sums(outcomes: Mapping[str, FloatArray], variant: Variant) -> MetricSums:
    """Sums and cross-products over the users of one client.

    Args:
        outcomes: method -> (U, M) of :func:`per_user_metrics`; the same users in the same order for every method.
        variant: how the outcomes were ranked.

    Raises:
        ClientError: no method, no users, or outcomes that are not finite.
        LayoutMismatchError: methods with different numbers of users.
    """
    methods = tuple(outcomes)
    num_users = len(next(iter(outcomes.values()))) if methods else 0
    for method, array in outcomes.items():
        if array.shape != (num_users, len(METRICS)):
            raise LayoutMismatchError(
                f"outcomes of {method!r} have shape {array.shape}; expected {(num_users, len(METRICS))}: evaluate "
                "every method on the same users"
            )
    # One contiguous row a method and metric, summed by NumPy's pairwise rule: accurate, exactly symmetric, and two
    # methods with equal outcomes get equal products to the last bit, which a matrix product does not promise.
    columns = [np.ascontiguousarray(outcomes[method].T, dtype=np.float64) for method in methods]  # P x (M, U)
    sums = np.array([column.sum(axis=1) for column in columns]).reshape(len(methods), len(METRICS))
    products = np.empty((len(METRICS), len(methods), len(methods)))
    for p, left in enumerate(columns):
        for q, right in enumerate(columns[: p + 1]):
            products[:, p, q] = products[:, q, p] = (left * right).sum(axis=1)
    return MetricSums(methods, variant, num_users, sums, products)


# Paired differences


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of method minus baseline, its standard error, and the bounds of its 95 % normal interval."""

    mean: float
    standard_error: float
    low: float
    high: float


def paired_difference(sums: MetricSums, method: str, baseline: str, metric: str) -> PairedDifference:
    """Mean difference between two methods on the same users, from sums and products alone.

    With d_u = x_u - y_u:  mean = sum d / U,  var = (sum d^2 - (sum d)^2 / U) / (U - 1),  SE = sqrt(var / U),
    where sum d^2 = sum x^2 + sum y^2 - 2 sum xy.

    Args:
        sums: of one domain.
        method: what is judged.
        baseline: what it is judged against.
        metric: one of METRICS.

    Raises:
        ClientError: an unknown method or metric, fewer than two users, or products that no users can have produced.
    """
    p, q, m = _method_index(sums, method), _method_index(sums, baseline), _metric_index(metric)
    num_users = sums.num_users
    if num_users < 2:
        raise ClientError(
            f"paired difference of {method!r} and {baseline!r} over {num_users} user; a standard error needs at least 2"
        )
    total = float(sums.sums[p, m] - sums.sums[q, m])
    own_squares = float(sums.products[m, p, p] + sums.products[m, q, q])
    squares = own_squares - 2.0 * float(sums.products[m, p, q])
    scatter = squares - total * total / num_users
    if scatter < -1e-9 * max(1.0, own_squares):  # more than rounding can explain
        raise ClientError(
            f"paired difference of {method!r} and {baseline!r} in {metric}: a negative variance "
            f"({scatter / (num_users - 1):.3g}); "
            "expected sums and products over the same users, without noise"
        )
    standard_error = math.sqrt(max(scatter, 0.0) / (num_users - 1) / num_users)
    return _with_interval(total / num_users, standard_error)


def paired_difference_of_mean(
    domains: Sequence[MetricSums], method: str, baseline: str, metric: str
) -> PairedDifference:
    """The paired difference of the unweighted mean over domains, whose users are independent.

    mean = sum_k mean_k / K,  SE = sqrt(sum_k SE_k^2) / K.  The interval speaks of other users of these domains, not of
    other domains.

    Args:
        domains: one MetricSums a domain, all of one variant.
        method: what is judged.
        baseline: what it is judged against.
        metric: one of METRICS.

    Raises:
        LayoutMismatchError: no domain, or domains of different variants.
        ClientError: as :func:`paired_difference`.
    """
    variants = sorted({sums.variant for sums in domains})
    if len(variants) != 1:
        raise LayoutMismatchError(
            f"a mean over {len(domains)} domains of the variants {variants}; expected at least one domain, and one "
            "variant"
        )
    differences = [paired_difference(sums, method, baseline, metric) for sums in domains]
    mean = math.fsum(difference.mean for difference in differences) / len(differences)
    variance_of_total = math.fsum(difference.standard_error**2 for difference in differences)
    return _with_interval(mean, math.sqrt(variance_of_total) / len(differences))


def _with_interval(mean: float, standard_error: float) -> PairedDifference:
    half_width = INTERVAL_95 * standard_error
    return PairedDifference(mean, standard_error, mean - half_width, mean + half_width)


def _method_index(sums: MetricSums, method: str) -> int:
    if method not in sums.methods:
        raise ClientError(
            f"no metric sums of the method {method!r}; found {list(sums.methods)}: evaluate it, or ask for one of these"
        )
    return sums.methods.index(method)


def _metric_index(metric: str) -> int:
    if metric not in METRICS:
        raise ClientError(f"no metric {metric!r}; expected one of {list(METRICS)}")
    return METRICS.index(metric)
