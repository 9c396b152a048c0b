"""A merge that validation can choose."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmerge.adapter import Adapter


@dataclass(frozen=True)
class Candidate:
    """One merge.

    Attributes:
        label: unique in the run, e.g. ``task-arithmetic 0.4``.
        method: row of METHODS.
        adapter: the merged adapter.
        provenance: label, source domains and hashes, method, parameters, coefficients, the largest rank of a module,
            who was left out on request, policy, backbone, loss curve of a learned merge.
    """

    label: str
    method: str
    adapter: Adapter
    provenance: Mapping[str, Any] = field(repr=False)
