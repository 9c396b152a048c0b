"""Composition of releases, compared with the library itself, a second library, and closed forms."""

import builtins
import math
import warnings
from typing import Any

import pytest
from scipy import optimize, stats

from fedmerge.config import from_flat
from fedmerge.errors import ConfigError
from fedmerge.privacy.dp.accountant import ORDERS, account, agreed_noise, calibrate_noise, spent_epsilon
from fedmerge.privacy.dp.releases import Release, metric_releases, noisy_answers, user_releases
from fedmerge.privacy.dp.statement import privacy_statement
from fedmerge.runs.dp_spent import add_metric_sums

RELEASES = [Release(1.0, 0.05, 20), Release(4.0, 1.0, 2)]


@pytest.mark.parametrize("method", ["rdp", "prv"])
def test_it_equals_opacus(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant, RDPAccountant  # noqa: PLC0415 - takes seconds

        accountant: Any = RDPAccountant() if method == "rdp" else PRVAccountant()
        for release in RELEASES:
            for _ in range(release.steps):  # step by step, as a training would
                accountant.step(noise_multiplier=release.noise_multiplier, sample_rate=release.sample_rate)
        alphas = {"alphas": list(ORDERS)} if method == "rdp" else {}
        expected = accountant.get_epsilon(delta=1e-5, **alphas)
    assert spent_epsilon(RELEASES, 1e-5, method) == pytest.approx(expected, abs=1e-6)  # type: ignore[arg-type]


def test_it_equals_dp_accounting() -> None:
    dp_accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.pld import PLDAccountant  # noqa: PLC0415
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415

    rdp, pld = RdpAccountant(orders=list(ORDERS)), PLDAccountant()
    for release in RELEASES:
        gaussian = dp_accounting.GaussianDpEvent(release.noise_multiplier)
        event = dp_accounting.PoissonSampledDpEvent(release.sample_rate, gaussian)
        for accountant in (rdp, pld):
            accountant.compose(dp_accounting.SelfComposedDpEvent(event, release.steps))
    assert spent_epsilon(RELEASES, 1e-5, "rdp") == pytest.approx(rdp.get_epsilon(1e-5), abs=1e-6)
    # Two numerical accountants: each within its own error of the exact value.
    assert spent_epsilon(RELEASES, 1e-5, "prv") == pytest.approx(pld.get_epsilon(1e-5), abs=0.03)


@pytest.mark.parametrize("noise", [0.7, 2.0, 10.0])
def test_one_release_without_sampling_is_the_gaussian_mechanism(noise: float) -> None:
    """δ(ε) = Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ), Balle and Wang, arXiv:1805.06530."""

    def excess(epsilon: float) -> float:
        near, far = 1 / (2 * noise) - epsilon * noise, -1 / (2 * noise) - epsilon * noise
        return float(stats.norm.cdf(near) - math.exp(epsilon) * stats.norm.cdf(far)) - 1e-5

    exact = optimize.brentq(excess, 0, 60)
    prv, rdp = (spent_epsilon([Release(noise, 1.0, 1)], 1e-5, method) for method in ("prv", "rdp"))
    assert exact <= prv <= exact + 0.02
    assert exact <= rdp <= 1.2 * exact + 0.1


def test_nothing_released_spends_nothing_and_nothing_without_noise_is_bounded() -> None:
    assert spent_epsilon([], 1e-5, "prv") == 0.0
    assert spent_epsilon([Release(1.0, 0.1, 0)], 1e-5, "prv") == 0.0
    assert spent_epsilon([Release(1.0, 0.1, 5), Release(0.0, 0.1, 1)], 1e-5, "rdp") == math.inf


@pytest.mark.parametrize("method", ["rdp", "prv"])
def test_the_calibrated_noise_meets_epsilon_and_hardly_more(method: Any) -> None:
    noise = calibrate_noise(2.0, 1e-5, ((1.0, 4),), method)
    assert spent_epsilon([Release(noise, 1.0, 4)], 1e-5, method) <= 2.0
    assert spent_epsilon([Release(0.99 * noise, 1.0, 4)], 1e-5, method) > 2.0


@pytest.mark.long
@pytest.mark.parametrize("method", ["rdp", "prv"])
def test_the_calibrated_noise_meets_epsilon_over_releases_of_several_kinds(method: Any) -> None:
    kinds = ((0.1, 40), (0.25, 100))
    noise = calibrate_noise(4.0, 1e-4, kinds, method)
    assert spent_epsilon([Release(noise, rate, steps) for rate, steps in kinds], 1e-4, method) <= 4.0
    assert spent_epsilon([Release(0.99 * noise, rate, steps) for rate, steps in kinds], 1e-4, method) > 4.0
    assert spent_epsilon([Release(0.99 * noise, *kinds[1])], 1e-4, method) < 4.0  # of one kind alone


def test_the_calibrated_noise_meets_a_small_epsilon_with_the_error_of_the_accountant() -> None:
    noise = calibrate_noise(0.05, 1e-5, ((1.0, 1),), "prv")
    assert spent_epsilon([Release(noise, 1.0, 1)], 1e-5, "prv") <= 0.05
    with pytest.raises(ConfigError, match=r"(?s)dp\.accountant.*'rdp'.*0\.01"):
        calibrate_noise(0.009, 1e-5, ((1.0, 1),), "prv")


@pytest.mark.parametrize("release", [Release(0.01, 0.05, 60), Release(1.0, 0.05, 10**9), Release(0.01, 1.0, 1)])
def test_what_prv_cannot_count_is_counted_by_rdp(release: Release) -> None:
    assert account([release], 1e-5, "prv") == (spent_epsilon([release], 1e-5, "rdp"), "rdp")
    assert account([Release(2.0, 0.05, 10)], 1e-5, "prv")[1] == "prv"


def test_an_epsilon_that_no_noise_meets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dp\.epsilon = 1e-06.*dp\.delta = 1e-09.*10000"):
        calibrate_noise(1e-6, 1e-9, ((1.0, 1000),), "rdp")


def test_without_opacus_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_opacus(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("opacus"):
            raise ImportError("no such package")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_opacus)
    with pytest.raises(ConfigError, match=r"dp\.mode.*Opacus.*no such package.*'fedmerge\[dp\]'"):
        spent_epsilon([Release(1.0, 0.1, 1)], 1e-5, "rdp")


# Errors of the configuration

USER = {"dp.mode": "user", "dp.epsilon": 4.0, "dp.delta": 1e-5, "train.negatives": "catalog"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.negatives": "in-batch"}, r"train\.negatives = 'catalog'"),
        ({"dp.delta": "none"}, r"epsilon.*delta"),
        ({"dp.epsilon": "none"}, r"epsilon.*noise_multiplier"),
        ({"dp.noise_multiplier": 1.0}, r"epsilon.*noise_multiplier"),
        ({"train.max_steps": "none", "train.max_epochs": 2}, r"train\.max_steps"),
        ({"train.max_minutes": 2.0}, r"train\.max_steps"),
        ({"dp.mode": "none"}, r"mode = 'none'.*epsilon, delta.*'user'"),
        ({"dp.mode": "domain-local", "rounds.rule": "fedit"}, r"rounds\.rule.*fedit"),
        ({"dp.mode": "domain-central"}, r"merge\.methods.*'average'.*average, task-arithmetic, mergerec"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat({**USER, **changes})


def test_good_settings_are_taken() -> None:
    assert from_flat(USER).dp.epsilon == 4.0
    clipped_only = {**USER, "dp.epsilon": "none", "dp.delta": "none", "dp.noise_multiplier": 0.0}
    assert from_flat(clipped_only).dp.noise_multiplier == 0.0
    central = {**USER, "dp.mode": "domain-central", "merge.methods": "average", "train.negatives": "in-batch"}
    assert from_flat(central).dp.mode == "domain-central"


def test_the_statement_of_a_run_with_noised_metric_sums_agrees_with_google_s_accountant() -> None:
    """Steps of training, answers on own users and metric sums have three different noises and sample rates."""
    dp_accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415

    noised = {"privacy.metrics": "noised", "privacy.metrics_noise": 6.0, "privacy.policy": "catalog-private"}
    answers = {"through_clients.users": "own-users", "through_clients.batch_size": 64, "mergerec.steps": 5}
    config = from_flat(
        {**USER, "dp.accountant": "rdp", "train.max_steps": 40, "train.batch_size": 128, **noised, **answers}
    )
    num_users, dp = 1200, config.dp
    counted, sums = user_releases(config.train, noisy_answers(config), num_users), metric_releases(config)
    assert (len(counted), len(sums)) == (2, 1)
    noise = agreed_noise(dp, counted, sums)
    records = [
        {"noise_multiplier": noise, "clip": 1.0, "sample_rate": rate, "num_units": num_users, "steps": steps}
        for rate, steps in counted
    ]
    spent = add_metric_sums({"books": records}, ["books"], config)
    statement = privacy_statement(dp, spent, evaluated=False, noised_metrics=True)
    assert statement["guarantee_of_run"]

    google = RdpAccountant(orders=list(ORDERS))
    for rate, noise_multiplier, steps in [
        *((rate, noise, steps) for rate, steps in counted),
        (1.0, config.privacy.metrics_noise, 2),
    ]:
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise_multiplier))
        google.compose(dp_accounting.SelfComposedDpEvent(event, steps))
    assert dp.delta is not None
    epsilon = statement["domains"]["books"]["epsilon"]
    assert epsilon == pytest.approx(google.get_epsilon(dp.delta), rel=1e-3)
    assert 0.99 * 4.0 < epsilon <= 4.0
