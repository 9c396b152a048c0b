"""Exact samples of the discrete Gaussian: P(k) ∝ exp(-k² / 2σ²) on the whole numbers, by integer arithmetic alone.

No number is rounded, so there are no low bits and no missing tail that an attacker could use. Everything is made of
fair draws below a bound, from the operating system's generator or a seeded one. Its time depends on what is drawn.

(ε, δ) of integer sums: for sums of d coordinates that change by a whole vector of norm Δ the discrete Gaussian has the
Rényi divergence of the Gaussian, αΔ²/2σ², at most.

Source: Canonne, Kamath and Steinke, The Discrete Gaussian for Differential Privacy, arXiv:2004.00010, algorithms 1–3.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial

from fedmerge.privacy.dp.randomness import Source, draw_below

Below = Callable[[int], int]  # bound -> a whole number from 0 to bound - 1, each as likely


def sample_discrete_gaussian(variance: Fraction | int, size: int, drawn: Source) -> list[int]:
    """Draw independent numbers.

    Args:
        variance: σ², positive.
        size: how many.
        drawn: randomness.
    """
    below = partial(draw_below, drawn)
    return [_discrete_gaussian(Fraction(variance), below) for _ in range(size)]


def _discrete_gaussian(variance: Fraction, below: Below) -> int:
    scale = math.isqrt(math.floor(variance)) + 1  # of the Laplace draws that are accepted or not
    while True:
        drawn = _discrete_laplace(scale, below)
        excess = (abs(drawn) - variance / scale) ** 2 / (2 * variance)
        if _bernoulli_exp(excess, below):
            return drawn


def _discrete_laplace(scale: int, below: Below) -> int:
    """Draw k with P(k) ∝ exp(-|k| / scale)."""
    while True:
        rest = below(scale)
        if not _bernoulli_exp(Fraction(rest, scale), below):
            continue
        whole = 0
        while _bernoulli_exp(Fraction(1), below):
            whole += 1
        size, negative = rest + scale * whole, below(2)
        if size or not negative:  # zero has one sign
            return -size if negative else size


def _bernoulli_exp(rate: Fraction, below: Below) -> bool:
    """Return True with probability exp(-rate): factors exp(-1), and what is left of the rate."""
    while rate > 1:
        if not _bernoulli_exp_below_one(Fraction(1), below):
            return False
        rate -= 1
    return _bernoulli_exp_below_one(rate, below)


def _bernoulli_exp_below_one(rate: Fraction, below: Below) -> bool:
    """Return True with probability exp(-rate), 0 ≤ rate ≤ 1: the first k-th draw of chance rate/k that fails is odd."""
    number = 1
    while below(rate.denominator * number) < rate.numerator:
        number += 1
    return number % 2 == 1
