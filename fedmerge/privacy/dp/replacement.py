"""The (ε, δ) for one unit replaced by another, by numerical composition of privacy losses.

One step of the sampled Gaussian mechanism, in units of the clip norm C, on two data sets that differ in one unit:
P = (1 - q) N(0, σ²) + q N(1, σ²) and Q = (1 - q) N(0, σ²) + q N(-1, σ²). No pair of units is easier to tell apart. For
contributions a and b in the unit ball, a set S with N_0(S) = m and α ≥ 1, by Neyman and Pearson,

    P(S) - αQ(S) = -(1 - q)(α - 1) N_0(S) + q N_a(S) - qα N_b(S)
                 ≤ -(1 - q)(α - 1) m + q Φ(Φ⁻¹(m) + 1/σ) - qα Φ(Φ⁻¹(m) - 1/σ),

with equality for a = 1, b = -1 and a half-line. For α < 1 exchange P and Q, which are mirror images. A pair that
dominates every step dominates the composition. Releases without sampling are Gaussian; ``Release.replaced`` is their
sensitivity to a replacement over that to an addition: 2 in general, 1 where contributions have no opposite.

The distributions of the privacy loss are rounded to a grid so that δ(ε) is exact on the grid and too large between its
points, and composed by FFT. What lies beyond the range of the FFT is bounded by Chernoff and added to δ.

Source: dominating pairs, arXiv:2106.08567; the rounding, "connect the dots", arXiv:2207.04380; composition by FFT,
arXiv:2006.07134.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp, ndtr

from fedmerge.privacy.dp.releases import Release

Floats = npt.NDArray[np.float64]

_TAIL = 9.0  # standard deviations; beyond lies 1e-19 of a step, which counts as an infinite loss
_FINENESS = 0.02  # grid step times the root of the number of steps
_MOST_POINTS = 2**20  # of the composition; a coarser grid gives a larger ε, never one that is too small
_OUTSIDE = 1e-4  # of δ, left beyond each end of the FFT's range
_TILTS = np.logspace(-3, 2.5, 30)


@dataclass(frozen=True)
class _Losses:
    """A privacy loss on the grid: P(loss = step · i) for i from ``first``, and the mass of infinite losses."""

    first: int
    mass: Floats  # (L,)
    infinite: float


def replaced_epsilon(releases: Sequence[Release], delta: float) -> float:
    """Return an ε at this δ of all releases about one unit that is replaced by another; infinite without noise.

    The excess over the exact ε is below 0.01 for noise multipliers above 0.5, and grows below.
    """
    counted = [release for release in releases if release.steps]
    if not counted:
        return 0.0
    if any(release.noise_multiplier <= 0 for release in counted):
        return math.inf
    step = _FINENESS / math.sqrt(sum(release.steps for release in counted))
    while True:
        numbers = [release.steps for release in counted]
        bound = max(_largest_loss(release) for release in counted)
        if bound <= step * _MOST_POINTS / 2:
            losses = [_losses_of(release, step) for release in counted]
            low, high = _range(losses, numbers, step, delta * _OUTSIDE)
            if high - low < _MOST_POINTS:
                return _epsilon(losses, numbers, step, low, high, delta)
        step *= 2


def _distance(release: Release) -> float:
    """Return half the distance of the two contributions."""
    return release.replaced / 2 if release.sample_rate == 1 else 1.0


def _largest_loss(release: Release) -> float:
    """Return log P(x)/Q(x) at the last x that counts."""
    q, sigma, distance = release.sample_rate, release.noise_multiplier, _distance(release)
    x = distance + _TAIL * sigma
    rest = math.log(1 - q) if q < 1 else -math.inf
    of_p, of_q = (math.log(q) + (sign * 2 * x - distance) * distance / (2 * sigma**2) for sign in (1, -1))
    return float(np.logaddexp(rest, of_p) - np.logaddexp(rest, of_q))


def _places(release: Release, losses: Floats) -> Floats:
    """Return x with log P(x)/Q(x) = loss, for losses ≥ 0: a quadratic equation in exp(x/σ²), solved in logarithms."""
    q, variance = release.sample_rate, release.noise_multiplier**2
    if q == 1:
        return losses * variance / release.replaced
    with np.errstate(divide="ignore"):
        middle = math.log(1 - q) + losses + np.log(-np.expm1(-losses))
    ends = math.log(2 * q) - 1 / (2 * variance)
    root = np.logaddexp(2 * middle, 2 * ends + losses) / 2
    return np.asarray(variance * (np.logaddexp(middle, root) - ends))


def _losses_of(release: Release, step: float) -> _Losses:
    """Return the privacy loss of one step on the grid."""
    q, sigma, distance = release.sample_rate, release.noise_multiplier, _distance(release)
    number = math.ceil(_largest_loss(release) / step) + 1
    half = _places(release, step * np.arange(number + 1, dtype=np.float64))
    x = np.concatenate([-half[:0:-1], half])  # (2n + 1,); the loss is odd

    def between(sign: float) -> Floats:
        """Return the mass of (1 - q) N(0) + q N(±distance) in every cell, precise in both tails."""
        found = np.zeros(len(x) - 1)
        for weight, mean in ((1 - q, 0.0), (q, sign * distance)):
            if weight:
                z = (x - mean) / sigma
                upper = z[:-1] > 0
                found += weight * np.where(upper, ndtr(-z[:-1]) - ndtr(-z[1:]), ndtr(z[1:]) - ndtr(z[:-1]))
        return found

    of_p, of_q = between(1.0), between(-1.0)
    # Each cell's mass goes to its two ends such that its mass under Q = Σ mass · exp(-loss) is the same.
    with np.errstate(over="ignore", invalid="ignore"):
        above = (of_p - of_q * np.exp(step * np.arange(-number, number))) / -math.expm1(-step)
    above = np.clip(np.nan_to_num(above, nan=0.0, posinf=np.inf, neginf=0.0), 0.0, of_p)
    mass = np.zeros(2 * number + 1)
    mass[1:] += above
    mass[:-1] += of_p - above
    beyond = sum(weight * ndtr(-(x[-1] - mean) / sigma) for weight, mean in ((1 - q, 0.0), (q, distance)) if weight)
    mass[0] += max(0.0, 1.0 - float(mass.sum()) - float(beyond))
    return _Losses(-number, mass, float(beyond))


def _range(losses: Sequence[_Losses], numbers: Sequence[int], step: float, outside: float) -> tuple[int, int]:
    """Return grid points between which the sum of all losses lies, but for ``outside`` at either end (Chernoff)."""

    def reach(sign: float) -> float:
        best = math.inf
        for tilt in _TILTS:
            total = 0.0
            for of, number in zip(losses, numbers, strict=True):
                places = sign * step * (of.first + np.arange(len(of.mass)))
                total += number * float(logsumexp(tilt * places, b=of.mass))
            best = min(best, (total - math.log(outside)) / tilt)
        return best

    return -math.ceil(reach(-1.0) / step) - 1, math.ceil(reach(1.0) / step) + 1


def _epsilon(
    losses: Sequence[_Losses], numbers: Sequence[int], step: float, low: int, high: int, delta: float
) -> float:
    """Compose by FFT on the grid points from ``low`` to ``high`` and return the ε."""
    from scipy.fft import irfft, next_fast_len, rfft  # noqa: PLC0415 - takes long, and few commands come here
    from scipy.signal import lfilter  # noqa: PLC0415

    size = next_fast_len(high - low + 1, real=True)
    spectrum, finite = np.ones(size // 2 + 1, dtype=complex), 1.0
    for of, number in zip(losses, numbers, strict=True):
        places = (of.first + np.arange(len(of.mass))) % size
        spectrum *= rfft(np.bincount(places, weights=of.mass, minlength=size)) ** number
        finite *= (1 - of.infinite) ** number
    composed = np.roll(irfft(spectrum, size), -(low % size)).clip(min=0.0)  # from the point low on
    at = step * (low + np.arange(size))
    left = delta - (1 - finite) - delta * _OUTSIDE
    at, composed = at[at > 0], composed[at > 0]
    if left <= 0:
        return math.inf
    # δ(ε) = Σ mass · (1 - exp(ε - loss)) over the losses above ε; between two points it is solved in closed form.
    above = np.cumsum(composed[::-1])[::-1]  # Σ mass from this point on
    discounted = lfilter([1.0], [1.0, -math.exp(-step)], composed[::-1])[::-1]  # Σ mass · exp(this point - loss)
    enough = above - discounted <= left
    if not enough.any():
        return math.inf
    first = int(np.argmax(enough))
    if above[first] <= left:  # only at the first point
        return 0.0
    return max(0.0, float(at[first] + math.log((above[first] - left) / discounted[first])))
