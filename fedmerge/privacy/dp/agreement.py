"""Checks of a client's DP report against the noise, steps and sampling that the configuration implies."""

import math
from collections.abc import Mapping
from typing import Any

from fedmerge.config import ExperimentConfig
from fedmerge.errors import ClientError, ConfigError
from fedmerge.federated.rounds import steps_of_round
from fedmerge.privacy.dp.accountant import agreed_noise
from fedmerge.privacy.dp.domain_noise import domain_noise, domain_record
from fedmerge.privacy.dp.releases import metric_releases, noisy_answers, user_releases, woven_steps

_CHANCE = 1e-10  # probability that one entry leaves the range; a model has 1e5 to 1e8 entries
LARGEST_ENTRY = 8.0  # of a trained update; a larger one shows that the training diverged
_NOISE_TOLERANCE = 0.01  # relative; the client calibrates by itself, perhaps with other library versions


def check_releases(config: ExperimentConfig) -> None:
    """Refuse a run, before any work, if no noise covers its releases by domain or its releases cannot be counted.

    Raises:
        ConfigError: the setting and its remedy.
    """
    mode, several = config.dp.mode, config.rounds.rule is not None or config.weave.schedule is not None
    if mode == "domain-local":
        domain_noise(config)  # raises if no noise is enough
    counted = (mode == "user" and several) or noisy_answers(config).number > 0
    if counted and config.run_id is None:
        raise ConfigError(
            f"dp.mode = '{mode}': clients count the releases of a run by its run_id, but run_id is 'none'. Set a new "
            "run_id, or use fedmerge run, which sets one."
        )


def largest_entry(config: ExperimentConfig) -> float:
    """Return the largest entry that a term of a secure sum may have: LARGEST_ENTRY, or what noise by domain makes.

    A and B of an adapter have noise of deviation d each, so entries of their product reach the rank's tail · d².
    """
    if config.dp.mode != "domain-local":
        return LARGEST_ENTRY
    deviation = domain_noise(config) * 2 * config.dp.clip
    layouts = [config.lora.of(domain) for domain in config.domains.train]
    largest = (
        max(lora.scaled_alpha / lora.rank * largest_product(lora.rank, _CHANCE) for lora in layouts) * deviation**2
    )
    return max(LARGEST_ENTRY, float(math.ceil(largest)))


def largest_product(rank: int, chance: float) -> float:
    """Return t with P(|Σ aᵢbᵢ| > t) ≤ chance for ``rank`` products of independent standard normals (Chernoff's bound).

    E exp(s Σ aᵢbᵢ) = (1 - s²)^(-rank/2) for s < 1.
    """

    def log_chance(t: float) -> float:
        s = (math.sqrt(rank**2 + 4 * t**2) - rank) / (2 * t)
        return math.log(2) - s * t - rank / 2 * math.log1p(-(s**2))

    low, high = 1.0, 1e6
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if log_chance(middle) <= math.log(chance) else (middle, high)
    return high


def check_spent(
    domain: str,
    config: ExperimentConfig,
    reported: Any,
    num_users: int,
    number: int | None = None,
    woven: bool = False,
) -> None:
    """Refuse a training whose report about its DP releases is missing or differs from the configuration.

    Args:
        domain: the client's domain.
        config: dp, train, rounds and audit are read.
        reported: the entry ``privacy`` of its report.
        num_users: number of users that the client announced.
        number: round, or None without rounds.
        woven: True for a training that continued an adapter of another domain.

    Raises:
        ClientError: the entries that differ.
        ConfigError: no noise meets (ε, δ) for this number of users.
    """
    dp = config.dp
    if dp.mode not in ("user", "domain-local"):
        return
    remedy = "Use one configuration and one fedmerge version everywhere."
    if not isinstance(reported, Mapping):
        raise ClientError(f"domain {domain}: dp.mode is {dp.mode!r}, but its report lacks 'privacy'. {remedy}")
    most = num_users + config.simulation.canaries
    units = reported.get("num_units")
    if dp.mode == "domain-local":
        agreed = domain_record(dp, domain_noise(config))
    elif type(units) is not int or not 1 <= units <= most:
        raise ClientError(
            f"domain {domain}: its report states training on {units!r} users, expected 1 to {most}. {remedy}"
        )
    else:
        releases = user_releases(config.train, noisy_answers(config), units, woven_steps(config))
        rate, steps = releases[0]
        if woven:
            steps = config.weave.steps
        agreed = {
            "unit": "user",
            "noise_multiplier": agreed_noise(dp, releases, metric_releases(config)),
            "clip": dp.clip,
            "sample_rate": rate,
            "num_units": units,
            "steps": steps if number is None else steps_of_round(steps, number, config.rounds.number),
            "randomness": dp.randomness,
        }
    if wrong := [key for key, value in agreed.items() if not _is(reported.get(key), value, key)]:
        found = ", ".join(f"{key} {reported.get(key)!r} instead of {agreed[key]!r}" for key in wrong)
        raise ClientError(f"domain {domain}: its report differs from the settings of dp.*: {found}. {remedy}")


def _is(found: Any, agreed: Any, key: str) -> bool:
    if not isinstance(agreed, float):
        return type(found) is type(agreed) and bool(found == agreed)
    tolerance = _NOISE_TOLERANCE if key == "noise_multiplier" else 1e-9
    return type(found) in (int, float) and abs(found) < 1e9 and math.isclose(found, agreed, rel_tol=tolerance)
