"""Checks of what may leave a client, under the table of policies in :mod:`fedmerge.config.privacy`.

The client calls them before every answer.
"""

from collections.abc import Mapping

from fedmerge.config.privacy import ALLOWED, Kind, Policy
from fedmerge.errors import PolicyError

_NEEDED = "Without it no client takes part: set another privacy.policy."

REMEDIES: Mapping[Kind, str] = {
    "description": _NEEDED,
    "adapter": "Remove methods that need single adapters, or set privacy.policy = 'adapter'.",
    "training report": _NEEDED,
    "catalog": "Give the server a folder of catalogs (server.catalogs), or set privacy.policy = 'adapter+catalog'.",
    "metric sums": "Set until = 'train', or another privacy.policy.",
    "pseudo-user count": "Remove learned merges, or set privacy.policy = 'catalog-private'.",
    "coefficient gradient": "Remove learned merges, or set privacy.policy = 'catalog-private'.",
    "similarity factors": "Set weave.schedule = 'none', or privacy.policy = 'adapter+catalog'.",
    "masked update": "Set privacy.policy = 'aggregate-only'.",
}


def check_may_leave(policy: Policy, kind: Kind, domain: str) -> None:
    """Refuse to send a kind of content that the policy keeps at the client.

    Raises:
        PolicyError: with the remedy.
    """
    if kind not in ALLOWED[policy]:
        raise PolicyError(f"domain {domain}: the policy {policy!r} keeps the {kind} at the client. {REMEDIES[kind]}")


def check_enough_users(domain: str, num_users: int, min_users: int, what: str = "metric sums") -> None:
    """Refuse to send sums over too few users.

    Raises:
        PolicyError: with the remedy.
    """
    if num_users < min_users:
        raise PolicyError(
            f"domain {domain}: {what} over {num_users} users do not leave the client; expected at least "
            f"privacy.min_users = {min_users}. Use more users, or lower privacy.min_users if that is acceptable."
        )
