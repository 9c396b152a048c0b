"""The noise for a guarantee by user, or the guarantee of a noise, before anything is trained."""

from dataclasses import dataclass

from fedmerge.errors import ConfigError
from fedmerge.privacy.dp.accountant import Method, account, calibrate_noise
from fedmerge.privacy.dp.releases import Release, sample_rate
from fedmerge.privacy.dp.replacement import replaced_epsilon


@dataclass(frozen=True)
class Plan:
    """A training by user, and what it costs.

    Attributes:
        noise_multiplier: σ.
        sample_rate: probability that a user takes part in a step.
        steps: of the training.
        metric_sums: number of noised metric sums.
        delta: δ.
        epsilon: ε for one user added or removed.
        epsilon_replaced: ε for one user replaced by another.
        accountant: of ``epsilon``.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    metric_sums: int
    delta: float
    epsilon: float
    epsilon_replaced: float
    accountant: Method


def plan_training(
    num_users: int,
    batch_size: int,
    steps: int,
    delta: float,
    *,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    metric_sums: int = 0,
    metrics_noise: float = 4.0,
    accountant: Method = "prv",
) -> Plan:
    """Return the plan for an ε, or for a noise multiplier: one of the two is given.

    Args:
        num_users: users that a domain trains on.
        batch_size: ``train.batch_size``.
        steps: ``train.max_steps``.
        delta: δ.
        epsilon: ``dp.epsilon``; the least noise that meets it is chosen.
        noise_multiplier: ``dp.noise_multiplier``.
        metric_sums: number of noised metric sums: 2 in a run, 3 with the leave-one-out gate.
        metrics_noise: ``privacy.metrics_noise``.
        accountant: ``dp.accountant``.

    Raises:
        ConfigError: δ is no guarantee for so many users; no noise is enough; or Opacus is not installed.
    """
    if delta >= 1 / num_users:
        raise ConfigError(
            f"delta = {delta:g} is not below one over the {num_users:,} users, so it would allow to publish one of "
            f"them. Choose a delta well below {1 / num_users:.2g}."
        )
    rate = sample_rate(batch_size, num_users)
    others = (Release(metrics_noise, 1.0, metric_sums, replaced=1.0),) if metric_sums else ()
    if noise_multiplier is None:
        if epsilon is None:
            raise ValueError("plan_training: expected epsilon or noise_multiplier")
        noise_multiplier = calibrate_noise(epsilon, delta, ((rate, steps),), accountant, others)
    releases = [Release(noise_multiplier, rate, steps), *others]
    found, by = account(releases, delta, accountant)
    replaced = replaced_epsilon(releases, delta)
    return Plan(noise_multiplier, rate, steps, metric_sums, delta, found, replaced, by)


def plan_text(plan: Plan) -> str:
    """Format a plan for the terminal."""
    sums = f", and {plan.metric_sums} noised metric sums" if plan.metric_sums else ""
    return (
        f"noise multiplier           {plan.noise_multiplier:.4g}\n"
        f"added or removed (1 user)  ε = {plan.epsilon:.4g}, δ = {plan.delta:g} ({plan.accountant})\n"
        f"replaced (1 user)          ε = {plan.epsilon_replaced:.4g}, δ = {plan.delta:g} (pld)\n"
        f"releases                   {plan.steps} steps, in each of which a user takes part with probability "
        f"{plan.sample_rate:.3g}{sums}\n"
    )
