"""What may leave a client, by policy. The client asks here before it answers; its answer is refused otherwise."""

from typing import Literal

from fedmerge.errors import PolicyError

Policy = Literal["adapter+catalog", "adapter", "aggregate-only"]
Kind = Literal["description", "adapter", "catalog", "metric sums", "masked update"]

ALLOWED: dict[Policy, frozenset[Kind]] = {
    "adapter": frozenset({"description", "adapter", "metric sums"}),
    "adapter+catalog": frozenset({"description", "adapter", "metric sums", "catalog"}),
    "aggregate-only": frozenset({"description", "masked update", "metric sums"}),
}

REMEDIES: dict[Kind, str] = {
    "adapter": "Do without methods that need single adapters, or set privacy.policy = 'adapter'.",
    "catalog": "Give the server a folder of catalogs (server.catalogs), or set privacy.policy = 'adapter+catalog'.",
    "masked update": "Set privacy.policy = 'aggregate-only'.",
}


def check_may_leave(policy: Policy, kind: Kind, domain: str) -> None:
    """Refuse to send what the policy keeps at the client.

    Raises:
        PolicyError: with the remedy.
    """
    if kind not in ALLOWED[policy]:
        raise PolicyError(f"domain {domain}: the policy {policy!r} keeps the {kind} at the client. {REMEDIES[kind]}")


def check_catalog_is_public(domain: str, public_catalog: bool) -> None:
    """Refuse to send a catalog that its owner has not declared public, whatever the policy.

    Raises:
        PolicyError: with the remedy.
    """
    if not public_catalog:
        raise PolicyError(
            f"domain {domain}: its manifest says public_catalog = false, so the catalog does not leave the client. "
            "Its owner can import the domain again as public, or the run can do without methods that need catalogs."
        )


def check_enough_users(domain: str, num_users: int, min_users: int) -> None:
    """Refuse to send sums over few users.

    Raises:
        PolicyError: with the remedy.
    """
    if num_users < min_users:
        raise PolicyError(
            f"domain {domain}: metric sums over {num_users} users do not leave the client, privacy.min_users is "
            f"{min_users}. Evaluate on more users, or lower privacy.min_users if that is acceptable."
        )
