"""The cohort whose coefficients are learned through the clients: its domains and experts, named by a hash."""

import hashlib
from collections.abc import Mapping

from fedmerge.adapter import Adapter, adapter_sha256


def cohort_sha256(adapters: Mapping[str, Adapter]) -> str:
    """Return a hash of the domains and their experts, by which the server and its clients name a cohort."""
    return cohort_of({domain: adapter_sha256(adapter) for domain, adapter in adapters.items()})


def cohort_of(sources: Mapping[str, str]) -> str:
    """Return :func:`cohort_sha256` from the hashes of the experts, domain -> hash."""
    lines = [f"{domain} {sources[domain]}" for domain in sorted(sources)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
