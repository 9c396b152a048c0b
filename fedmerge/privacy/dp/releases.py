"""The releases of a client in one run by its configuration: their number, and the share of users in each."""

from dataclasses import dataclass
from typing import Literal

from fedmerge.config import DP, LEARNED_METHODS, ExperimentConfig, ThroughClients, Train

METRIC_SUMS = "metric sums"  # in a record of releases
DEFAULT_DELTA = 1e-6  # of statements about noised metric sums where no dp.delta is set

Adjacency = Literal["add-remove", "replace"]  # what ε is about: one unit more or less, or one in place of another
Counted = tuple[float, int]  # the probability that a unit takes part in a release, and the number of releases


@dataclass(frozen=True)
class Release:
    """A number of equal Gaussian mechanisms.

    Attributes:
        noise_multiplier: standard deviation of the noise over the sensitivity.
        sample_rate: probability that a unit takes part, in (0, 1].
        steps: number of mechanisms.
        replaced: sensitivity to one unit replaced, over that to one added. A contribution may be the opposite of
            another, which gives 2; metric sums have none below zero, and noise by domain is chosen for replacement.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    replaced: float = 2.0


def coefficient_messages(config: ExperimentConfig) -> int:
    """Return the largest number of messages about merging coefficients that a client answers in a run."""
    if not config.privacy.learns_through_clients or config.until == "train":
        return 0
    steps = {"mergerec": config.mergerec.steps, "adamerging": config.adamerging.steps}
    variants = {"mergerec": config.mergerec.granularities, "adamerging": config.adamerging.granularities}
    a_message = config.through_clients.local_steps if config.through_clients.mode == "local-steps" else 1
    learned = LEARNED_METHODS & {*config.merge.methods}
    return sum(len(variants[method]) * -(-steps[method] // a_message) for method in learned)


def answers_have_noise(dp: DP, through_clients: ThroughClients) -> bool:
    """Return True if noise is added to answers about coefficients; by user, only if they are computed from users."""
    return dp.mode == "domain-local" or (dp.mode == "user" and through_clients.users == "own-users")


@dataclass(frozen=True)
class NoisyAnswers:
    """The answers about coefficients to which a client adds noise in a run.

    Attributes:
        number: the largest number of them; 0 without noise.
        batch_size: users expected in an answer that is computed from users.
    """

    number: int
    batch_size: int


def noisy_answers(config: ExperimentConfig) -> NoisyAnswers:
    """Count the noisy answers about coefficients that a client gives in a run."""
    number = coefficient_messages(config) if answers_have_noise(config.dp, config.through_clients) else 0
    return NoisyAnswers(number, config.through_clients.batch_size)


def metric_releases(config: ExperimentConfig) -> tuple[Release, ...]:
    """Return a user's releases in noised metric sums; every evaluated user takes part, so nothing is sampled."""
    number = noised_sums(config)
    return (Release(config.privacy.metrics_noise, 1.0, number, replaced=1.0),) if number else ()


def noised_sums(config: ExperimentConfig) -> int:
    """Return the largest number of noised metric sums that a client sends in a run: one for each evaluation."""
    if config.privacy.metrics != "noised" or config.until == "train":
        return 0
    return 2 + (config.admission.action is not None and config.admission.leave_one_out)  # validation, test, the gate


def domain_releases(num_answers: int) -> tuple[Counted, ...]:
    """Return a domain's releases with ``dp.mode = "domain-local"``: its update and its answers, with equal noise."""
    return ((1.0, 1 + num_answers),)


def woven_steps(config: ExperimentConfig) -> int:
    """Return the largest number of steps in which a client continues adapters of others in a run, over all of them."""
    return config.weave.trainings(len(config.domains.train)) * config.weave.steps


def user_releases(train: Train, answers: NoisyAnswers, num_users: int, woven: int = 0) -> tuple[Counted, ...]:
    """Return a user's releases with ``dp.mode = "user"``.

    Args:
        train: batch size and steps of the expert's training.
        answers: answers about coefficients on own users.
        num_users: users that the domain trains on.
        woven: :func:`woven_steps`.

    Returns:
        The steps of the expert's training, always first; answers and woven steps where there are any.
    """
    rate = sample_rate(train.batch_size, num_users)
    counted = [(sample_rate(answers.batch_size, num_users), answers.number), (rate, woven)]
    return ((rate, int(train.max_steps or 0)), *(each for each in counted if each[1]))


def sample_rate(batch_size: int, num_users: int) -> float:
    """Return the probability that a user takes part in a step of training, or in an answer on own users."""
    return min(1.0, batch_size / num_users)
