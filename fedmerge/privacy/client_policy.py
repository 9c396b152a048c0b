"""What an organisation itself allows: a file on its own disk, which no run can change.

The settings of a run come with the run. This file is the organisation's word: its client reads it before every answer,
and where the run asks for more than the file allows, nothing but that refusal is sent.
"""

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from fedmerge.config import DP, ExperimentConfig, Section, describe_problem
from fedmerge.errors import ConfigError, PolicyError
from fedmerge.privacy.policy import Policy


class ClientPolicy(Section):
    """What one organisation allows, whatever a run asks for."""

    policies: tuple[Policy, ...] = Field(("adapter+catalog", "adapter"), min_length=1)
    min_users: int = Field(20, ge=1)
    max_message_bytes: int | None = Field(None, ge=2**16)
    max_minutes: float | None = Field(1440.0, gt=0)
    receive_adapters: bool = False
    real_users: bool = False
    max_epsilon: float | None = Field(None, gt=0)
    max_delta: float | None = Field(None, gt=0, lt=1)


DEFAULT_POLICY_TOML = """\
# What this organisation allows, whatever a run asks for. Its client refuses runs that ask for more, and says which key.

# The values of privacy.policy that it takes part under.
policies = "adapter+catalog,adapter"

# It takes part only where privacy.min_users, below which no sums leave, is at least this.
min_users = 20

# The most bytes that one answer may have; "none": no bound. An adapter of MiniLM at rank 8 has about 600,000.
max_message_bytes = "none"

# The most minutes that one answer may take, training included; "none": no bound. `fedmerge client` ends the work then;
# a client that is started otherwise refuses only runs with more train.max_minutes. How many answers is not bounded.
max_minutes = 1440.0

# Whether single adapters of other domains may be sent to it, as privacy.policy = "catalog-private" does. Merges, which
# every participant evaluates, hold other domains' adapters in any case.
receive_adapters = false

# Whether merging coefficients may be learned on its own users (policy "catalog-private"), whose gradients then leave.
real_users = false

# Differential privacy that it demands of each run (dp.mode "user" or "domain-local"): the largest epsilon and delta;
# "none": no demand. Runs are not added up: several of them spend several budgets.
max_epsilon = "none"
max_delta = "none"
"""


def read_client_policy(path: Path) -> ClientPolicy:
    """Read an organisation's policy file.

    Args:
        path: TOML file as DEFAULT_POLICY_TOML; a key that is left out has the value it has there.

    Raises:
        ConfigError: it cannot be read, or every problem in it.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"policy file {path}: cannot be read ({error.strerror}), so nothing is sent. "
            "Correct the node's policy-path."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"policy file {path}: not valid TOML: {error}. Nothing is sent until it is.") from error
    try:
        return ClientPolicy.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(f"  {describe_problem(problem)}" for problem in error.errors(include_url=False))
        known = ", ".join(ClientPolicy.model_fields)
        raise ConfigError(
            f"policy file {path}: nothing is sent until this is corrected; keys: {known}\n{lines}"
        ) from error


def check_run_is_allowed(own: ClientPolicy | None, run: ExperimentConfig, domain: str) -> None:
    """Refuse a run that asks for more than the organisation allows.

    Args:
        own: the organisation's; None for one that has no policy file and leaves all to the run but the gradients of its
            own users.
        run: the experiment.
        domain: whose policy it is.

    Raises:
        PolicyError: every key that refuses, with what the run has.
    """
    problems = []
    privacy, learned_on = run.privacy, run.through_clients.users
    if learned_on == "own-users" and (own is None or not own.real_users):
        problems.append(f"real_users = false, the run has through_clients.users = {learned_on!r}")
    if own is None:
        return _refuse(problems, domain)
    if privacy.policy not in own.policies:
        problems.append(f"policies = {','.join(own.policies)!r}, the run has privacy.policy = {privacy.policy!r}")
    if privacy.policy == "catalog-private" and not own.receive_adapters:
        problems.append("receive_adapters = false, the run has privacy.policy = 'catalog-private'")
    if privacy.min_users < own.min_users:
        problems.append(f"min_users = {own.min_users}, the run has privacy.min_users = {privacy.min_users}")
    if own.max_minutes is not None and (run.train.max_minutes or 0) > own.max_minutes:
        problems.append(f"max_minutes = {own.max_minutes:g}, the run has train.max_minutes = {run.train.max_minutes:g}")
    return _refuse([*problems, *_unmet_bounds(own, run.dp)], domain)


def check_message_size(own: ClientPolicy, size_bytes: int, domain: str) -> None:
    """Refuse to send more than the organisation allows in one message.

    Raises:
        PolicyError: with both sizes.
    """
    if own.max_message_bytes is not None and size_bytes > own.max_message_bytes:
        _refuse([f"max_message_bytes = {own.max_message_bytes:,}, the answer has {size_bytes:,}"], domain)


def took_too_long(max_minutes: float, domain: str) -> PolicyError:
    """What is said when an answer was not ready within the minutes that the organisation allows."""
    return PolicyError(
        f"domain {domain}: its own policy file refuses: max_minutes = {max_minutes:g}, and the answer was not ready by "
        "then. Ask for less (fewer train.max_steps, users or methods), or agree with the organisation on more."
    )


def _unmet_bounds(own: ClientPolicy, dp: DP) -> Iterator[str]:
    """Demands of differential privacy that one run does not meet by what the client itself does."""
    for key, demanded, promised in (("epsilon", own.max_epsilon, dp.epsilon), ("delta", own.max_delta, dp.delta)):
        if demanded is None:
            continue
        if dp.mode not in ("user", "domain-local") or dp.randomness != "system":
            found = (
                f"dp.mode = {dp.mode!r} and dp.randomness = {dp.randomness!r}, by which this client promises nothing"
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
            f"domain {domain}: its own policy file refuses: {'; '.join(problems)}. Change the run, or agree with the "
            "organisation on another policy file (its policy.toml, or the node's policy-path)."
        )
