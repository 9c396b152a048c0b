"""The session that a run configuration implies. Server and clients compute it separately; a client refuses any other.

The configuration fixes names, threshold, range, noise and how clients are weighed. The server alone chooses who of the
named clients are in a session, and its identifier.
"""

import json
from typing import Literal

from fedmerge.config import MIN_SUMMED, ExperimentConfig
from fedmerge.errors import PolicyError
from fedmerge.privacy.dp.agreement import largest_entry
from fedmerge.privacy.secagg.session import Session, default_threshold

Summand = Literal["adapter", "head"]  # what a sum is of: adapters of the backbone, or the federated head


def agreement_of(config: ExperimentConfig, number: int, what: Summand = "adapter") -> str:
    """Return run, round, weights and noise of a sum in canonical form. Sums of adapters and of heads never agree.

    Args:
        config: of the run.
        number: of the round; 0 outside of rounds.
        what: the sum is of.
    """
    facts = {
        "run_id": config.run_id,
        "round": number,
        "rule": config.rounds.rule,
        "weights": _weighing(config, what),
        "dp": config.dp.model_dump(mode="json"),
    }
    if what == "head":
        facts |= {"what": what, "rule": config.head.rule}
    return json.dumps(facts, sort_keys=True)


def agreed_threshold(config: ExperimentConfig, num_clients: int) -> int:
    """Return t of a sum: ``privacy.threshold`` where as many clients have trained, else all; always a majority."""
    return max(min(config.privacy.threshold or 0, num_clients), default_threshold(num_clients))


def check_session(
    session: Session,
    config: ExperimentConfig,
    client: str,
    number: int,
    num_users: int,
    what: Summand = "adapter",
) -> None:
    """Refuse a session that differs from what the run configuration says.

    Every honest client vouches for its own weight. As all of them are bound to one session, no weight but that of a
    client that works with the server can be wrong.

    Args:
        session: as the server announced it.
        config: of the run, as this client received it.
        client: its name.
        number: of the round that it trained last; 0 outside of rounds.
        num_users: users of the client, of which its weight is made with ``rounds.weights = 'users'``.
        what: it trained last.

    Raises:
        PolicyError: every difference.
    """
    clients = session.clients
    problems = []
    if strange := sorted({*clients} - {*config.domains.train}):
        problems.append(f"the clients {', '.join(strange)}, which domains.train does not name")
    if client not in clients:
        problems.append(f"the clients {', '.join(clients)}, without this one")
    least = max(MIN_SUMMED, config.server.min_train_clients if config.rounds.fraction == 1 else 0)
    if len(clients) < least:
        problems.append(f"{len(clients)} clients, at least {least} agreed (server.min_train_clients)")
    if session.threshold != (agreed := agreed_threshold(config, len(clients))):
        problems.append(f"a threshold of {session.threshold}, {agreed} agreed (privacy.threshold)")
    agreed_range = largest_entry(config)
    # Noise by domain widens it; its calibration may differ a little between versions of libraries.
    slack = max(1.0, 0.02 * agreed_range) if config.dp.mode == "domain-local" else 0.0
    if abs(session.value_range - agreed_range) > slack:
        problems.append(f"a range of {session.value_range:g}, {agreed_range:g} agreed")
    if session.agreement != (text := agreement_of(config, number, what)):
        problems.append(f"the agreement {session.agreement[:500]}, {text} in this client's configuration")
    own = float(num_users) if _weighing(config, what) == "users" else 1.0
    total = session.total_weight if _weighing(config, what) == "users" else float(len(clients))
    coefficient = session.coefficients.get(client, 0.0)
    if session.total_weight != total or coefficient != own / total:
        problems.append(
            f"a coefficient of {coefficient:.6g} of a total weight of {session.total_weight:g}, {own:g} of {total:g} "
            "agreed (rounds.weights)"
        )
    if problems:
        raise PolicyError(
            f"domain {client}: the server announced a secure sum with {'; '.join(problems)}. Nothing was sent. Use one "
            "configuration and one fedmerge version everywhere; if they are, do not trust this server"
        )


def _weighing(config: ExperimentConfig, what: Summand) -> str:
    return "equal" if what == "adapter" and config.rounds.rule is None else config.rounds.weights
