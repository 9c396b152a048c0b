"""The privacy statement of a run: (ε, δ) by unit, its assumptions, and what is not covered."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from fedmerge.config import DP
from fedmerge.errors import RunDirError
from fedmerge.privacy.dp.accountant import Method, account
from fedmerge.privacy.dp.releases import DEFAULT_DELTA, METRIC_SUMS, Release
from fedmerge.privacy.dp.replacement import replaced_epsilon

PRIVACY_FILE = "privacy.json"

_ARRIVED = (
    "everything that arrived during the run is counted, even if it was late, refused or lost; anything that a client "
    "sends after the end of the run is one more release."
)
_USER = (
    "unit: one user of one domain, all their interactions. For a user of several domains, ε and δ add up.",
    "adjacency: one user added or removed, which changes a step's sum by at most the clip norm C; the second number "
    "holds for one user replaced by another, whose gradient may be the opposite (2C).",
    "Poisson sampling: each user takes part in a step with the same probability, independently, with one record.",
    "public: the catalog, and the number of users that a domain trains on.",
    "no early stopping: validation users are not read, and the last adapter is kept.",
    _ARRIVED,
)
_DOMAIN_LOCAL = (
    "unit: a whole domain, with all data behind its adapter and its answers about coefficients. Its participation is "
    "public.",
    "adjacency: all data of one domain replaced by other data; the sensitivity is 2C.",
    "early stopping and everything else in the training is covered, because it happens before clipping and noise.",
    _ARRIVED,
)
_DOMAIN_CENTRAL = (
    "unit: a whole domain, with all data behind its adapter. The number of domains is public.",
    "adjacency: one domain added or removed, which changes the sum by at most the clip norm C; the second number holds "
    "for one domain replaced by another (2C).",
    "the server is trusted: it sees every adapter without noise, and its run folder holds them. Only the merge may be "
    "published, nothing else of the folder.",
)
_ALWAYS = (
    "only this run is counted: earlier runs on the same data, and settings tuned on them, add to it.",
    "a client's report of its own noise is believed; the noise is floating-point, except on metric sums, where it is "
    "exact.",
)
_NONE = (
    "unit: one user of one domain, in the metric sums alone. For a user of several domains, ε and δ add up.",
    "adjacency: one user added or removed, which changes the sums of P methods by at most √(2P) in the L2 norm; one "
    "user replaced by another changes them by no more, because outcomes lie between 0 and 1.",
    "public: the number of evaluated users. Models are taken as given; an expert trained without noise depends on "
    "them.",
)
_COVERS = {
    "none": "the metric sums, and nothing else that left",
    "user": "the adapters and answers about coefficients, and everything computed from them",
    "domain-local": "the adapters and answers about coefficients, and everything computed from them",
    "domain-central": "the merge",
}
_COUNTS = "counts of users, items and interactions, and hashes of the data, which every client announces"
_SUMS = (
    "metric sums on validation and test, which have no noise, and the selection among merges based on them: no (ε, δ) "
    "holds for the run as a whole. By user, set privacy.metrics = 'noised'; or end with until = 'train', merge without "
    "learning from users, and evaluate on users who are not protected"
)
_ADAPTERS = "the adapters and everything computed from them, which have no noise (dp.mode = 'none')"
_CATALOGS = "the catalogs, which the server has without noise, and everything computed from them alone"
_HEADS = "heads, trained on all users of a domain without noise: their reports, and the metric sums of their rows"
_TIMES = "the time that anything took"


def privacy_statement(
    dp: DP,
    spent: Mapping[str, Sequence[Mapping[str, Any]]],
    evaluated: bool,
    catalogs: bool = False,
    not_counted: Mapping[str, str] = MappingProxyType({}),
    noised_metrics: bool = False,
    heads: bool = False,
) -> dict[str, Any]:
    """Add up what was released.

    Args:
        dp: the settings.
        spent: domain -> records of its releases.
        evaluated: True if metric sums left the clients that are not noised by user.
        catalogs: True if the server has the domains' catalogs.
        not_counted: domain -> reason why something that it sent cannot be counted.
        noised_metrics: True if metric sums are among the releases.
        heads: True if clients trained heads.

    Returns:
        JSON: mode, unit, adjacency of ``epsilon``, delta, accountant; per domain epsilon (None if unbounded) under that
        adjacency and for one unit replaced, the accountant of each, and its releases; whether the guarantee holds for
        what it covers, and the reason if not; whether it holds for the run as a whole; assumptions; what is not
        covered.
    """
    domains = {domain: _domain(dp, records) for domain, records in spent.items()}
    problems = []
    if dp.randomness == "seeded":
        problems.append(
            "noise and sampling came from the experiment's seed, which every participant holds, so they can be "
            "subtracted; the numbers are for research only. Set dp.randomness = 'system'."
        )
    if not domains and not not_counted:
        problems.append("nothing was released with noise.")
    if any(found["epsilon"] is None for found in domains.values()):
        problems.append("a release had no noise (noise_multiplier = 0).")
    for domain, why in sorted(not_counted.items()):
        problems.append(f"something that {domain} sent cannot be counted, so no ε holds for it: {why}")
        by = {"accountant": dp.accountant, "accountant_replaced": _replaced_accountant(dp)}
        counted = domains.get(domain, {"num_units": None, "releases": []})
        domains[domain] = {**counted, **by, "epsilon": None, "epsilon_replaced": None}
    uncovered = [_COUNTS, *([_CATALOGS] if catalogs and dp.mode != "user" else [])]
    uncovered += [_ADAPTERS] if dp.mode == "none" else []
    own = {"none": _NONE, "user": _USER, "domain-local": _DOMAIN_LOCAL, "domain-central": _DOMAIN_CENTRAL}[dp.mode]
    return {
        "mode": dp.mode,
        "unit": "domain" if dp.mode.startswith("domain") else "user",
        "adjacency": "replace" if dp.mode == "domain-local" else "add-remove",
        "delta": _delta(dp),
        "accountant": dp.accountant,
        "guarantee": not problems,
        "guarantee_of_run": not problems and not evaluated and dp.mode != "none",
        "why_not": problems,
        "covers": _COVERS[dp.mode] + (", and the metric sums" if noised_metrics and dp.mode == "user" else ""),
        "domains": dict(sorted(domains.items())),
        "assumptions": [*own, *_ALWAYS],
        "not_covered": [*uncovered, *([_SUMS] if evaluated else []), *([_HEADS] if heads else []), _TIMES],
    }


def statement_text(statement: Mapping[str, Any]) -> str:
    """Format the statement for the report."""
    lines = [f"differential privacy ({statement['mode']}), covers {statement['covers']}:"]
    for domain, found in statement["domains"].items():
        noise = ", ".join(
            f"{release['steps']} × noise multiplier {release['noise_multiplier']:.3g} at sample rate "
            f"{release['sample_rate']:.3g}, clip {release['clip']:g}"
            for release in found["releases"]
        )
        epsilon = epsilon_text(found["epsilon"], statement["delta"])
        lines.append(f"  {domain}: {epsilon} ({_replaced(found)}; {noise or 'not known'})")
    bounded = [
        name for name, of in statement["domains"].items() if "rdp" in (of["accountant"], of["accountant_replaced"])
    ]
    if statement["accountant"] == "prv" and bounded:
        lines.append(
            f"  counted by rdp, an upper bound, because prv would need too large a grid: {', '.join(bounded)}."
        )
    if statement["guarantee_of_run"]:
        lines.append(f"  accountant: {statement['accountant']}. It holds under these assumptions:")
    elif statement["guarantee"]:
        why = "adapters without noise" if statement["mode"] == "none" else "exact sums over users"
        lines.append(
            f"  accountant: {statement['accountant']}. It holds for what it covers, NOT for the run as a whole, "
            f"because {why} left the clients. The assumptions are:"
        )
    else:
        lines.append("  THIS GUARANTEES NOTHING: " + " ".join(statement["why_not"]) + " The assumptions are:")
    lines += [f"  - {assumption}" for assumption in statement["assumptions"]]
    lines += ["  not covered:", *(f"  - {what}" for what in statement["not_covered"])]
    return "\n".join(lines) + "\n"


def summarise_statement(statement: Mapping[str, Any]) -> list[str]:
    """Return the statement in a few sentences: ε, δ, unit, adjacency, and what is not covered.

    Raises:
        RunDirError: an entry is missing or of the wrong type.
    """
    try:
        unit = statement.get("unit", "unit")
        one = f"one {unit}"
        delta, found = statement["delta"], statement["domains"]
        by_replacement = statement.get("adjacency") == "replace"
        added = "replaced" if by_replacement else "added or removed"
        lines = [f"Differential privacy of {one} covers {statement['covers']}."]
        for domain, of in found.items():
            text = f"{domain}: {epsilon_text(of['epsilon'], delta)} for {one} {added}"
            if not by_replacement:
                replaced = of["epsilon_replaced"]
                text += f", ε = {'∞' if replaced is None else f'{replaced:.3g}'} for {one} replaced by another"
            lines.append(text + ".")
        if not statement["guarantee"]:
            lines.append("This guarantees nothing: " + " ".join(statement["why_not"]))
        elif not statement["guarantee_of_run"]:
            lines.append("It does not hold for the run as a whole.")
        lines.append(f"Not covered: {'; '.join(statement['not_covered'])}.")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunDirError(f"{PRIVACY_FILE}: damaged ({type(error).__name__}: {error}). Restore the file.") from error
    return lines


def _domain(dp: DP, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    releases = [
        Release(
            record["noise_multiplier"],
            record["sample_rate"],
            record["steps"],
            replaced=1.0 if record.get("what") == METRIC_SUMS else 2.0,
        )
        for record in records
    ]
    delta = _delta(dp)
    if delta is None:
        epsilon, by = None, dp.accountant
    else:
        epsilon, by = account(releases, delta, dp.accountant)
    chosen_for_it = dp.mode == "domain-local"
    replaced = epsilon if delta is None or chosen_for_it else replaced_epsilon(releases, delta)
    return {
        "epsilon": _finite(epsilon),
        "epsilon_replaced": _finite(replaced),
        "accountant": by,
        "accountant_replaced": by if chosen_for_it else _replaced_accountant(dp),
        "num_units": records[0]["num_units"],
        "releases": [dict(record) for record in records],
    }


def _delta(dp: DP) -> float | None:
    return dp.delta or (DEFAULT_DELTA if dp.mode == "none" else None)


def _replaced_accountant(dp: DP) -> Method | Literal["pld"]:
    return dp.accountant if dp.mode == "domain-local" else "pld"


def _finite(epsilon: float | None) -> float | None:
    """Return ε, None if it is infinite, since JSON has no infinity."""
    return epsilon if epsilon is not None and math.isfinite(epsilon) else None


def epsilon_text(epsilon: float | None, delta: float | None) -> str:
    """Return ``ε = 3.2, δ = 1e-05``; ``ε = ∞`` for None."""
    return "ε = ∞" if epsilon is None else f"ε = {epsilon:.3g}, δ = {delta:g}"


def _replaced(found: Mapping[str, Any]) -> str:
    epsilon = found["epsilon_replaced"]
    return f"one unit replaced: ε = {'∞' if epsilon is None else f'{epsilon:.3g}'}"
