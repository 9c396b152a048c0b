"""Metric sums: the sums and cross-products of per-user outcomes that a client reports.

They suffice for means, paired differences between methods, and standard errors. Metrics are in
:mod:`fedmerge.evaluation.ranks`. What a client withholds or noises before sums leave is in
:mod:`fedmerge.privacy.metric_sums`; such sums come without cross-products, see :func:`inexact_sums`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from fedmerge.config import HeadVectors
from fedmerge.errors import ClientError, LayoutMismatchError
from fedmerge.evaluation.ranks import METRICS, FloatArray

Variant = Literal["unmasked", "masked"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
BACKBONE, EXPERT = "backbone", "expert"  # names of these two models at client and server
PERSONAL = "personal merge"
WOVEN = "woven merge"  # of one target; on validation with the factor behind it
GROUP = "group merge"  # of the domains like this one; on validation with the method and number of groups behind it
FEDERATED_HEAD, FEDERATED_FUSED = "federated head", "federated head, fused"
LAST_ITEM, RECENT_ITEMS = "last item", "recent items"
FEDERATED_SOURCES = (FEDERATED_HEAD, "text", RECENT_ITEMS)  # of the fused row, in this order
INTERVAL_95 = 1.96  # half-width of a two-sided 95 % normal interval in standard errors


def head_label(vectors: HeadVectors) -> str:
    """Return the row of a client's own head: ``head on the merge``."""
    return f"head on the {vectors}"


def fused_label(vectors: HeadVectors) -> str:
    """Return the row of a client's own head fused with text and recent items: ``head on the merge, fused``."""
    return f"{head_label(vectors)}, fused"


def woven_label(factor: float) -> str:
    """Return the row of a domain's woven merge on validation: ``woven merge 1.4``."""
    return f"{WOVEN} {factor:g}"


@dataclass(frozen=True, slots=True, eq=False)  # eq: arrays have no single truth value
class MetricSums:
    """Sums and cross-products of a client's per-user outcomes under P methods.

    Attributes:
        methods: P methods, in the order of the axes below.
        variant: "unmasked" or "masked".
        num_users: number of users in the sums.
        sums: (P, M) float64, sum over users of x_p, for the M metrics of METRICS; NaN where the client withholds it.
        products: (M, P, P) float64, sum over users of x_p * x_q; symmetric in p and q. Bounds if ``noise`` is not 0.
        noise: standard deviation of the error of every sum: of added noise, or of rounding. 0 for exact sums.

    Raises:
        ClientError: on construction, if the values cannot be such sums, so that malformed replies are refused.
    """

    methods: tuple[str, ...]
    variant: Variant
    num_users: int
    sums: FloatArray
    products: FloatArray
    noise: float = 0.0

    def __post_init__(self) -> None:
        num_methods, num_metrics = len(self.methods), len(METRICS)
        if (
            not num_methods
            or len(set(self.methods)) != num_methods
            or not all(isinstance(name, str) for name in self.methods)
        ):
            raise ClientError(f"metric sums: found the methods {list(self.methods)}; expected at least one, each once")
        if self.variant not in VARIANTS:
            raise ClientError(f"metric sums: found the variant {self.variant!r}; expected one of {list(VARIANTS)}")
        if self.num_users < 1:
            raise ClientError(
                f"metric sums over {self.num_users} users; expected at least 1, since a domain without evaluated users "
                "has no metrics"
            )
        expected = {"sums": (num_methods, num_metrics), "products": (num_metrics, num_methods, num_methods)}
        for name, array in (("sums", self.sums), ("products", self.products)):
            if array.shape != expected[name] or array.dtype != np.float64:
                raise ClientError(
                    f"metric sums: {name} are {array.dtype} of shape {array.shape}; "
                    f"expected float64 of shape {expected[name]} for {num_methods} methods and {num_metrics} metrics"
                )
            wrong = np.isinf(array) if self.noise else ~np.isfinite(array)
            if wrong.any():
                raise ClientError(
                    f"metric sums: {np.count_nonzero(wrong)} of {array.size} {name} are not finite; exclude this client"
                )
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ClientError(f"metric sums: found noise {self.noise}; expected a standard deviation of at least 0")
        if not np.allclose(self.products, self.products.transpose(0, 2, 1), rtol=1e-9, atol=1e-9, equal_nan=True):
            raise ClientError(
                "metric sums: products are not symmetric between methods; expected sum(x_p * x_q) over the same users "
                "for both orders"
            )

    def means(self) -> FloatArray:
        """Return the (P, M) mean outcomes of all methods and metrics."""
        return self.sums / self.num_users

    def mean(self, method: str, metric: str) -> float:
        """Return the mean outcome of one method in one metric; NaN if the client withholds it."""
        return float(self.sums[_method_index(self, method), _metric_index(metric)] / self.num_users)

    def metrics_by_method(self) -> dict[str, dict[str, float]]:
        """Return method -> metric -> mean outcome; a withheld one is absent."""
        return {
            method: {metric: mean for metric, mean in zip(METRICS, row, strict=True) if not math.isnan(mean)}
            for method, row in zip(self.methods, self.means().tolist(), strict=True)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types; floats survive JSON exactly. See :func:`metric_sums_from_dict`."""
        return {
            "methods": list(self.methods),
            "metrics": list(METRICS),
            "variant": self.variant,
            "num_users": self.num_users,
            "sums": [[None if math.isnan(value) else value for value in row] for row in self.sums.tolist()],
            "products": None if self.noise else self.products.tolist(),
            "noise": self.noise,
        }


def metric_sums_from_dict(record: Mapping[str, Any]) -> MetricSums:
    """Invert :meth:`MetricSums.to_dict`.

    Raises:
        ClientError: entries are missing or malformed, or the metrics are not METRICS.
    """
    names = ("methods", "metrics", "variant", "num_users", "sums", "products", "noise")
    if set(record) != set(names):
        raise ClientError(f"metric sums: found the entries {sorted(record)}; expected {sorted(names)}")
    if list(record["metrics"]) != list(METRICS):
        raise ClientError(
            f"metric sums: found the metrics {list(record['metrics'])}; expected {list(METRICS)}: use one version on "
            "both ends"
        )
    methods, exact = tuple(record["methods"]), record["products"] is not None
    try:
        sums = np.array(record["sums"], dtype=np.float64)  # None becomes NaN
        products = np.array(record["products"] if exact else [], dtype=np.float64)
        num_users, noise = int(record["num_users"]), float(record["noise"])
    except (TypeError, ValueError, OverflowError) as error:
        raise ClientError(
            f"metric sums: some entries are not numbers ({error}); expected rectangular arrays of floats"
        ) from error
    if exact == (noise != 0):
        raise ClientError(
            f"metric sums: found noise {noise:g} {'with' if exact else 'without'} products; expected products for "
            "exact sums, and only for these"
        )
    if exact:
        return MetricSums(methods, record["variant"], num_users, sums, products)
    return inexact_sums(methods, record["variant"], num_users, sums, noise)


def inexact_sums(
    methods: tuple[str, ...], variant: Variant, num_users: int, sums: FloatArray, noise: float
) -> MetricSums:
    """Make metric sums from rounded or noised sums alone, without cross-products.

    Cross-products become bounds, so that every interval computed from them is conservative. As outcomes are in [0, 1]:

        sum x^2 <= sum x,  sum x_p x_q >= max(0, sum x_p + sum x_q - U)

    Each square is also raised by noise^2 (U - 1) / U, which adds the variance of the noise to every standard error:
    noise^2 / U^2 for a mean, twice that for a paired difference.

    Args:
        methods: P methods.
        variant: variant of the ranks.
        num_users: U.
        sums: (P, M), NaN where withheld.
        noise: standard deviation of the error of every sum, above 0.

    Raises:
        ClientError: as :class:`MetricSums`.
    """
    if sums.shape != (len(methods), len(METRICS)):
        raise ClientError(
            f"metric sums: sums are of shape {sums.shape}; expected {(len(methods), len(METRICS))} for {len(methods)} "
            f"methods and {len(METRICS)} metrics"
        )
    if num_users < 1:
        raise ClientError(f"metric sums over {num_users} users; expected at least 1")
    by_metric = np.clip(sums.T, 0.0, num_users)  # (M, P); noise may have moved a sum outside
    products = np.maximum(0.0, by_metric[:, :, None] + by_metric[:, None, :] - num_users)
    squares = by_metric + noise**2 * (num_users - 1) / num_users
    of_method = np.arange(len(methods))
    products[:, of_method, of_method] = squares
    return MetricSums(methods, variant, num_users, sums, products, noise)


def metric_sums(outcomes: Mapping[str, FloatArray], variant: Variant) -> MetricSums:
    """Compute sums and cross-products over the users of one client.

    Args:
        outcomes: method -> (U, M) from :func:`~fedmerge.evaluation.ranks.per_user_metrics`, for the same users in the
            same order.
        variant: variant that the outcomes were ranked in.

    Raises:
        ClientError: no method, no users, or outcomes are not finite.
        LayoutMismatchError: methods have different numbers of users.
    """
    methods = tuple(outcomes)
    num_users = len(next(iter(outcomes.values()))) if methods else 0
    for method, array in outcomes.items():
        if array.shape != (num_users, len(METRICS)):
            raise LayoutMismatchError(
                f"outcomes of {method!r} have shape {array.shape}; expected {(num_users, len(METRICS))}: evaluate "
                "every method on the same users"
            )
    # One contiguous row per method and metric, summed by NumPy's pairwise rule: accurate and exactly symmetric, and
    # methods with equal outcomes get equal products to the last bit, which a matrix product does not guarantee.
    columns = [np.ascontiguousarray(outcomes[method].T, dtype=np.float64) for method in methods]  # P x (M, U)
    sums = np.array([column.sum(axis=1) for column in columns]).reshape(len(methods), len(METRICS))
    products = np.empty((len(METRICS), len(methods), len(methods)))
    for p, left in enumerate(columns):
        for q, right in enumerate(columns[: p + 1]):
            products[:, p, q] = products[:, q, p] = (left * right).sum(axis=1)
    return MetricSums(methods, variant, num_users, sums, products)


def copy_row(sums: MetricSums, method: str, name: str) -> MetricSums:
    """Add a row that is a copy of another, under a name of its own; its means and paired differences are exact.

    Raises:
        ClientError: an unknown method, or a name that exists.
    """
    row = _method_index(sums, method)
    rows = [*range(len(sums.methods)), row]
    return MetricSums(
        (*sums.methods, name),
        sums.variant,
        sums.num_users,
        sums.sums[rows],
        np.ascontiguousarray(sums.products[:, rows][:, :, rows]),
        sums.noise,
    )


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean over users, or over their paired differences, with its standard error and 95 % normal interval."""

    mean: float
    standard_error: float
    low: float
    high: float


def estimate_mean(sums: MetricSums, method: str, metric: str) -> Estimate:
    """Estimate the mean outcome of one method, with an interval over users.

    mean = sum x / U,  var = (sum x^2 - (sum x)^2 / U) / (U - 1),  SE = sqrt(var / U).

    Args:
        sums: metric sums of one domain.
        method: one of ``sums.methods``.
        metric: one of METRICS.

    Raises:
        ClientError: an unknown method or metric, or fewer than two users.
    """
    p, m, num_users = _method_index(sums, method), _metric_index(metric), sums.num_users
    if num_users < 2:
        raise ClientError(f"mean of {method!r} over {num_users} user; a standard error needs at least 2")
    total = float(sums.sums[p, m])
    scatter = max(float(sums.products[m, p, p]) - total * total / num_users, 0.0)
    return _with_interval(total / num_users, math.sqrt(scatter / (num_users - 1) / num_users))


def paired_difference(sums: MetricSums, method: str, baseline: str, metric: str) -> Estimate:
    """Estimate the mean difference between two methods on the same users, from sums and products alone.

    With d_u = x_u - y_u:  mean = sum d / U,  var = (sum d^2 - (sum d)^2 / U) / (U - 1),  SE = sqrt(var / U),
    where sum d^2 = sum x^2 + sum y^2 - 2 sum xy.

    Args:
        sums: metric sums of one domain.
        method: one of ``sums.methods``.
        baseline: method that is subtracted.
        metric: one of METRICS.

    Raises:
        ClientError: an unknown method or metric, fewer than two users, or products that no outcomes can have.
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
    if not sums.noise and scatter < -1e-9 * max(1.0, own_squares):  # more than rounding can explain
        raise ClientError(
            f"paired difference of {method!r} and {baseline!r} in {metric}: a negative variance "
            f"({scatter / (num_users - 1):.3g}); "
            "expected sums and products over the same users"
        )
    standard_error = math.sqrt(max(scatter, 0.0) / (num_users - 1) / num_users)
    return _with_interval(total / num_users, standard_error)


def paired_difference_of_mean(domains: Sequence[MetricSums], method: str, baseline: str, metric: str) -> Estimate:
    """Estimate the paired difference of the unweighted mean over domains, whose users are independent.

    mean = sum_k mean_k / K,  SE = sqrt(sum_k SE_k^2) / K.  The interval is for other users of these domains, not for
    other domains.

    Args:
        domains: metric sums of each domain, all of one variant.
        method: one of the methods.
        baseline: method that is subtracted.
        metric: one of METRICS.

    Raises:
        LayoutMismatchError: no domain, or domains of different variants.
        ClientError: as in :func:`paired_difference`.
    """
    variants = sorted({sums.variant for sums in domains})
    if len(variants) != 1:
        raise LayoutMismatchError(
            f"mean over {len(domains)} domains: found the variants {variants}; expected at least one domain, and one "
            "variant"
        )
    differences = [paired_difference(sums, method, baseline, metric) for sums in domains]
    mean = math.fsum(difference.mean for difference in differences) / len(differences)
    variance_of_total = math.fsum(difference.standard_error**2 for difference in differences)
    return _with_interval(mean, math.sqrt(variance_of_total) / len(differences))


def _with_interval(mean: float, standard_error: float) -> Estimate:
    half_width = INTERVAL_95 * standard_error
    return Estimate(mean, standard_error, mean - half_width, mean + half_width)


def _method_index(sums: MetricSums, method: str) -> int:
    if method not in sums.methods:
        raise ClientError(
            f"metric sums have no method {method!r}; they have {list(sums.methods)}: evaluate it, or use one of these"
        )
    return sums.methods.index(method)


def _metric_index(metric: str) -> int:
    if metric not in METRICS:
        raise ClientError(f"no metric {metric!r}; expected one of {list(METRICS)}")
    return METRICS.index(metric)
