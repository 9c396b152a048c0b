"""Privacy policies: the kinds of content that may leave a client. The client checks this before every answer.

A new policy is a row of ALLOWED. docs/reference/policies.md says what each policy promises, and to whom.
"""

from typing import Literal

from fedmerge.errors import PolicyError

Policy = Literal["adapter+catalog", "adapter", "catalog-private", "aggregate-only"]
Kind = Literal["description", "adapter", "catalog", "metric sums", "coefficient gradient", "masked update"]

ALLOWED: dict[Policy, frozenset[Kind]] = {
    "adapter+catalog": frozenset({"description", "adapter", "metric sums", "catalog"}),
    "adapter": frozenset({"description", "adapter", "metric sums"}),
    "catalog-private": frozenset({"description", "adapter", "metric sums", "coefficient gradient"}),
    "aggregate-only": frozenset({"description", "masked update", "metric sums"}),
}

REMEDIES: dict[Kind, str] = {
    "adapter": "Remove methods that need single adapters, or set privacy.policy = 'adapter'.",
    "catalog": "Give the server a folder of catalogs (server.catalogs), or set privacy.policy = 'adapter+catalog'.",
    "coefficient gradient": "Remove learned merges, or set privacy.policy = 'catalog-private'.",
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
