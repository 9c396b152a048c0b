"""An organisation's own policy: a file on its disk that no run can change.

Settings of a run arrive with the run. This file is the organisation's word: its client reads it before every answer. If
the run asks for more than the file allows, the client sends nothing but the refusal.
"""

import math
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from fedmerge.config import DP, SEARCHED_METHODS, ExperimentConfig, Section, describe_problem
from fedmerge.config.privacy import Disclosure, Policy
from fedmerge.errors import ConfigError, PolicyError
from fedmerge.privacy.dp.accountant import agreed_noise, spent_epsilon
from fedmerge.privacy.dp.releases import (
    DEFAULT_DELTA,
    Adjacency,
    Release,
    metric_releases,
    noisy_answers,
    user_releases,
    woven_steps,
)
from fedmerge.privacy.dp.replacement import replaced_epsilon
from fedmerge.privacy.metric_sums import DISCLOSURES


class ClientPolicy(Section):
    """Limits that one organisation sets for every run."""

    policies: tuple[Policy, ...] = Field(("adapter+catalog", "adapter"), min_length=1)
    min_users: int = Field(20, ge=1)
    max_message_bytes: int | None = Field(None, ge=2**16)
    max_minutes: float | None = Field(1440.0, gt=0)
    receive_adapters: bool = False
    real_users: bool = False
    share_similarity: bool = False
    require_peer_keys: bool = True
    metrics: Disclosure | None = None
    max_models: int = Field(100, ge=1)
    max_epsilon: float | None = Field(None, gt=0)
    max_delta: float | None = Field(None, gt=0, lt=1)
    max_total_epsilon: float | None = Field(None, gt=0)
    adjacency: Adjacency = "add-remove"

    @model_validator(mode="after")
    def _total_needs_delta(self) -> "ClientPolicy":
        if self.max_total_epsilon is not None and self.max_delta is None:
            raise ValueError("max_total_epsilon is set without max_delta; set the delta at which runs are added up")
        return self

    @property
    def least_metrics(self) -> Disclosure:
        """The least private ``privacy.metrics`` that is accepted."""
        return self.metrics or ("suppressed" if self.max_epsilon is self.max_total_epsilon is None else "noised")


DEFAULT_POLICY_TOML = """\
# The limits that this organisation sets for every run. Its client refuses a run that asks for more, and names the key.

# Accepted values of privacy.policy.
policies = "adapter+catalog,adapter"

# Smallest accepted privacy.min_users, below which no sums leave the client.
min_users = 20

# Largest answer in bytes; "none": no limit. An adapter of MiniLM at rank 8 has about 600,000.
max_message_bytes = "none"

# Longest time for one answer in minutes, training included; "none": no limit. `fedmerge client` stops the work then;
# a client started in another way only refuses runs with a larger train.max_minutes, or head.max_minutes times heads.
# The number of answers is not limited.
max_minutes = 1440.0

# Accept single adapters of other domains, which privacy.policy = "catalog-private" sends: to learn a merge of them, or
# to continue them (weave.schedule). Every participant evaluates merges in any case, and they contain these adapters.
receive_adapters = false

# Allow learning merging coefficients on its own users (policy "catalog-private"); their gradients then leave, or with
# personal.universal the coefficients themselves.
real_users = false

# Send similarity factors of the items that other catalogs have, too (weave.schedule = "similarity"): the server reads
# them, and the other clients their mean. Of two clients each learns the other's.
share_similarity = false

# Take part in secure sums (policy "aggregate-only") only with identity_key and peer_keys in client.toml. Without them a
# server that invents two clients can read this client's adapter off a sum.
require_peer_keys = true
# Least private accepted value of privacy.metrics: "exact", "suppressed" or "noised". "none" is "suppressed", and
# "noised" where max_epsilon or max_total_epsilon is set. Exact sums give single users' outcomes to those who ask twice.
metrics = "none"

# Largest number of models that one run may have evaluated on this organisation's users.
max_models = 100

# Required differential privacy of each run (dp.mode "user" or "domain-local"): largest epsilon and delta; "none"
# requires nothing.
max_epsilon = "none"
max_delta = "none"

# Largest epsilon of all runs together, at max_delta; `fedmerge client check` shows what is spent. "none" is no limit.
max_total_epsilon = "none"

# What the limits on epsilon are about: "add-remove", one user more or less, which dp.epsilon of a run means; or
# "replace", one user in place of another, which is stricter.
adjacency = "add-remove"
"""


def read_client_policy(path: Path) -> ClientPolicy:
    """Read an organisation's policy file.

    Args:
        path: TOML file like DEFAULT_POLICY_TOML, which has the defaults of missing keys.

    Raises:
        ConfigError: the file cannot be read; or all problems in it.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"policy file {path}: cannot be read ({error.strerror}), so nothing is sent. "
            "Correct policy-path in the node's configuration."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"policy file {path}: not valid TOML ({error}). Nothing is sent until it is corrected."
        ) from error
    try:
        return ClientPolicy.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(f"  {describe_problem(problem)}" for problem in error.errors(include_url=False))
        known = ", ".join(ClientPolicy.model_fields)
        raise ConfigError(
            f"policy file {path}: nothing is sent until these keys are corrected. Known keys: {known}.\n{lines}"
        ) from error


def check_run_is_allowed(
    own: ClientPolicy | None, run: ExperimentConfig, domain: str, *, has_peer_keys: bool = False
) -> None:
    """Refuse a run that asks for more than the organisation allows.

    A run that sets no ``train.max_minutes`` or ``head.max_minutes`` states no time, and passes: ``fedmerge client``
    ends every answer, be it of a training or of heads, after the organisation's ``max_minutes``.

    Args:
        own: the organisation's policy; None if it has no policy file: then it allows everything but gradients and
            coefficients of its own users, and secure sums without keys.
        run: the experiment.
        domain: the organisation's domain.
        has_peer_keys: the client signs in secure sums and knows the keys of the others.

    Raises:
        PolicyError: every key that refuses, with the run's value.
    """
    problems = []
    privacy, learned_on = run.privacy, run.through_clients.users
    from_users = [f"through_clients.users = {learned_on!r}"] * (learned_on == "own-users")
    from_users += ["personal.universal = true"] * run.personal.universal
    if own is None or not own.real_users:
        problems += [f"real_users = false, the run has {setting}" for setting in from_users]
    if privacy.policy == "aggregate-only" and not has_peer_keys and (own is None or own.require_peer_keys):
        problems.append(
            "require_peer_keys = true, the run has privacy.policy = 'aggregate-only' and this client has no "
            "identity_key and peer_keys (client.toml, or identity-key and peer-keys in the node's configuration)"
        )
    if own is None:
        return _refuse(problems, domain)
    if privacy.policy not in own.policies:
        problems.append(f"policies = {','.join(own.policies)!r}, the run has privacy.policy = {privacy.policy!r}")
    if privacy.policy == "catalog-private" and not own.receive_adapters:
        problems.append("receive_adapters = false, the run has privacy.policy = 'catalog-private'")
    if run.shares_similarity and not own.share_similarity:
        problems.append("share_similarity = false, the run has weave.schedule = 'similarity'")
    if privacy.min_users < own.min_users:
        problems.append(f"min_users = {own.min_users}, the run has privacy.min_users = {privacy.min_users}")
    num_heads = len(run.head.vectors) if run.head.kind else 0  # one answer trains them one after another
    limits = {"train": (run.train.max_minutes, 1), "head": (run.head.max_minutes, num_heads)}
    problems += [
        f"max_minutes = {own.max_minutes:g}, the run has {section}.max_minutes = {minutes:g}"
        + (f" for each of {times} heads" if times > 1 else "")
        for section, (minutes, times) in limits.items()
        if own.max_minutes is not None and minutes is not None and times * minutes > own.max_minutes
    ]
    if DISCLOSURES.index(privacy.metrics) < DISCLOSURES.index(own.least_metrics):
        problems.append(f"metrics = {own.least_metrics!r}, the run has privacy.metrics = {privacy.metrics!r}")
    searched = SEARCHED_METHODS & {*run.merge.methods} and run.rmm.reward == "validation"
    if searched and run.rmm.budget > own.max_models:
        problems.append(f"max_models = {own.max_models}, the run has rmm.budget = {run.rmm.budget} with rmm-style")
    return _refuse([*problems, *_unmet_bounds(own, run.dp), *_unmet_noise(own, run)], domain)


def check_replacement_is_allowed(own: ClientPolicy | None, run: ExperimentConfig, num_users: int, domain: str) -> None:
    """Refuse a run whose ε exceeds ``max_epsilon`` for one user replaced by another, if the policy's adjacency is that.

    Args:
        own: the organisation's policy; None allows everything.
        run: the experiment, which :func:`check_run_is_allowed` allows.
        num_users: users that the domain trains on.
        domain: the organisation's domain.

    Raises:
        PolicyError: both values of ε.
        ConfigError: no noise is enough for the run; or Opacus is not installed.
    """
    if own is None or own.adjacency != "replace" or own.max_epsilon is None or run.dp.mode != "user":
        return
    sums = metric_releases(run)
    training = user_releases(run.train, noisy_answers(run), num_users, woven_steps(run)) if num_users else ()
    noise = agreed_noise(run.dp, training, sums) if training else 0.0
    releases = [*(Release(noise, rate, steps) for rate, steps in training), *sums]
    delta = own.max_delta or run.dp.delta or DEFAULT_DELTA
    epsilon = replaced_epsilon(releases, delta)
    if epsilon > own.max_epsilon:
        _refuse(
            [
                f"max_epsilon = {own.max_epsilon:g} with adjacency = 'replace', the run comes to {epsilon:.3g} for one "
                f"user replaced by another (dp.epsilon = {run.dp.epsilon or math.inf:g} is for one user more or less)"
            ],
            domain,
        )


def check_message_size(own: ClientPolicy, size_bytes: int, domain: str) -> None:
    """Refuse to send more than the organisation allows in one message.

    Raises:
        PolicyError: with both sizes.
    """
    if own.max_message_bytes is not None and size_bytes > own.max_message_bytes:
        _refuse([f"max_message_bytes = {own.max_message_bytes:,}, the answer has {size_bytes:,}"], domain)


def too_slow_error(max_minutes: float, domain: str) -> PolicyError:
    """Make the error for an answer that took longer than the organisation allows."""
    return PolicyError(
        f"domain {domain}: its own policy file refuses: max_minutes = {max_minutes:g}, and the answer was not ready by "
        "then. Ask for less (fewer train.max_steps, users or methods), or agree on a higher limit with the "
        "organisation."
    )


def _unmet_noise(own: ClientPolicy, run: ExperimentConfig) -> Iterator[str]:
    """Yield what the noise of the metric sums does not meet, whatever the run trains here."""
    if run.privacy.metrics != "noised":
        return
    if own.least_metrics != "exact" and run.dp.randomness != "system":
        yield (
            f"metrics = {own.least_metrics!r}, the run has dp.randomness = {run.dp.randomness!r}: whoever knows the "
            "seed subtracts the noise of its metric sums"
        )
    if own.max_epsilon is not None:
        epsilon = spent_epsilon(metric_releases(run), own.max_delta or run.dp.delta or DEFAULT_DELTA, "rdp")
        if not epsilon <= own.max_epsilon:
            yield (
                f"max_epsilon = {own.max_epsilon:g}, the metric sums of the run alone come to {epsilon:.3g} by user "
                f"(privacy.metrics_noise = {run.privacy.metrics_noise:g})"
            )


def _unmet_bounds(own: ClientPolicy, dp: DP) -> Iterator[str]:
    """Yield the required bounds of differential privacy that the client's own noise does not meet in this run."""
    for key, demanded, promised in (("epsilon", own.max_epsilon, dp.epsilon), ("delta", own.max_delta, dp.delta)):
        if demanded is None:
            continue
        if dp.mode not in ("user", "domain-local") or dp.randomness != "system":
            found = (
                f"dp.mode = {dp.mode!r} and dp.randomness = {dp.randomness!r}, which guarantee nothing for this client"
            )
        elif promised is None:
            found = f"no dp.{key}"
        elif promised > demanded:
            found = f"dp.{key} = {promised:g}"
        else:
            continue
        yield f"max_{key} = {demanded:g}, the run has {found}"


def _refuse(problems: Sequence[str], domain: str) -> None:
    if problems:
        raise PolicyError(
            f"domain {domain}: its own policy file refuses: {'; '.join(problems)}. Change the run, or agree on another "
            "policy file with the organisation (its policy.toml, or the node's policy-path)."
        )
