"""Sections about privacy: what may leave a client, and differential privacy."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from fedmerge.config.section import Section

Transport = Literal["float32", "float16", "int8", "top-k"]
Disclosure = Literal["exact", "suppressed", "noised"]  # of metric sums, from the least to the most private
Policy = Literal["adapter+catalog", "adapter", "catalog-private", "aggregate-only"]
Kind = Literal[
    "description",
    "adapter",
    "training report",
    "catalog",
    "metric sums",
    "pseudo-user count",
    "coefficient gradient",
    "masked update",
    "similarity factors",
]
_ALWAYS: frozenset[Kind] = frozenset({"description", "training report", "metric sums"})

ALLOWED: Mapping[Policy, frozenset[Kind]] = {
    "adapter+catalog": _ALWAYS | {"adapter", "catalog", "similarity factors"},
    "adapter": _ALWAYS | {"adapter", "similarity factors"},
    "catalog-private": _ALWAYS | {"adapter", "pseudo-user count", "coefficient gradient"},
    "aggregate-only": _ALWAYS | {"masked update"},
}
"""Kinds of content that may leave a client; see docs/reference/privacy/policies.md for what each policy promises."""


class Privacy(Section):
    """Limits on what leaves a client; checked on both sides."""

    policy: Policy = Field(
        "adapter+catalog",
        description="Information that leaves a client. adapter+catalog: catalogs are public, as MergeRec has it; "
        "adapter: adapter and metric sums only; catalog-private: the clients learn the coefficients; aggregate-only: "
        "sums of adapters only ([policies](reference/privacy/policies.md)).",
    )
    min_users: int = Field(20, ge=1, description="Users behind a metric sum, at least; sums over fewer stay.")
    metrics: Disclosure = Field(
        "exact",
        description="Metric sums that leave a client. exact: with cross-products, for paired intervals; suppressed: "
        "Recall@10 and NDCG@10, rounded, and only with min_users hits and as many misses; noised: the same two "
        "with noise by user, counted in privacy.json ([metric sums](reference/privacy/metric-sums.md)).",
    )
    metrics_noise: float = Field(
        4.0,
        ge=0.5,
        le=10000,
        description="Noise of metrics = 'noised', in multiples of the sensitivity; each split is one more release.",
    )
    transport: Transport = Field(
        "float32",
        description="Encoding of experts on the way; int8: 8-bit levels; top-k: the largest tenth of the changes.",
    )
    threshold: int | None = Field(
        None,
        ge=2,
        description="Clients of a secure sum that must stay to the end (aggregate-only); one fewer learn nothing "
        "together. 'none': the smallest majority.",
    )

    @property
    def sends_catalogs(self) -> bool:
        """True if clients may send their catalogs to the server."""
        return "catalog" in ALLOWED[self.policy]

    @property
    def learns_through_clients(self) -> bool:
        """True if merging coefficients are learned through the clients, which keep their catalogs."""
        return "coefficient gradient" in ALLOWED[self.policy]

    @property
    def hides_adapters(self) -> bool:
        """True if the server sees no single adapter, only sums."""
        return "adapter" not in ALLOWED[self.policy]


class DP(Section):
    """Differential privacy, explained in [differential-privacy.md](reference/privacy/differential-privacy.md)."""

    mode: Literal["none", "user", "domain-local", "domain-central"] = Field(
        "none",
        description="Protected unit: a user of a domain; or a whole domain, which trusts nobody (domain-local) or the "
        "server (domain-central).",
    )
    epsilon: float | None = Field(
        None, gt=0, le=1000, description="Epsilon of the guarantee, for which the noise is chosen; needs delta."
    )
    delta: float | None = Field(
        None, gt=0, lt=1, description="Delta of the guarantee; well below one over the number of users."
    )
    noise_multiplier: float | None = Field(
        None,
        ge=0,
        le=10000,
        description="Noise in multiples of the sensitivity, in place of epsilon; 0: clipping alone, no guarantee.",
    )
    clip: float = Field(1.0, gt=0, le=1e6, description="Largest norm of a user's gradient, or of a domain's update.")
    coefficient_clip: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="Largest norm of an answer about merging coefficients, or of one user's part of it in mode user.",
    )
    accountant: Literal["prv", "rdp"] = Field(
        "prv", description="Privacy accountant. prv: tighter, numerical; rdp: an upper bound by Rényi divergences."
    )
    randomness: Literal["system", "seeded"] = Field(
        "system",
        description="Source of the noise. seeded: reproducible, for research; no guarantee, since the seed is enough "
        "to subtract the noise.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "DP":
        given = [key for key in ("epsilon", "noise_multiplier") if getattr(self, key) is not None]
        if self.mode == "none":
            if given or self.delta is not None:
                raise ValueError(
                    f"mode = 'none', but {', '.join([*given, *['delta'] * (self.delta is not None)])} is set; set mode "
                    "to 'user' or to a domain mode, or leave the others out"
                )
            return self
        if len(given) != 1:
            found = "both are set" if given else "neither is set"
            raise ValueError(f"mode = '{self.mode}' needs epsilon or noise_multiplier, {found}; set one of the two")
        if self.delta is None and self.noise_multiplier != 0:
            raise ValueError(
                f"{given[0]} is set without delta; Gaussian noise gives no guarantee with delta = 0. Set delta well "
                "below one over the number of users, say 1e-6"
            )
        return self
