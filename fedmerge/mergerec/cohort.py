"""The cohort whose coefficients are learned through the clients: its domains and experts, named by a hash."""

import hashlib
from collections.abc import Mapping

from fedmerge.adapter import Adapter, adapter_sha256


def cohort_sha256(adapters: Mapping[str, Adapter]) -> str:
    """Return a hash of the domains and their experts, by which the server and its clients name a cohort."""
    lines = [f"{domain} {adapter_sha256(adapters[domain])}" for domain in sorted(adapters)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
