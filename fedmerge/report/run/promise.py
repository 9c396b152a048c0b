"""What a run promises about privacy: ε and δ by domain, the assumptions, and what is not covered."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedmerge.config.privacy import ALLOWED
from fedmerge.privacy.dp.statement import summarise_statement
from fedmerge.report.html.page import (
    ABSENT,
    Cell,
    Column,
    Html,
    element,
    is_number,
    join,
    note,
    number_cell,
    table,
)
from fedmerge.report.run.many import only

PRIVACY_SECTION = "promise"  # anchor


def promise_section(
    statement: Mapping[str, Any], settings: Mapping[str, Any], shown: Sequence[str] | None = None
) -> Html:
    """Return the section; ``shown`` are the domains of its table, None for all.

    Args:
        statement: content of ``privacy.json``; empty without differential privacy.
        settings: dotted key -> value of the run's configuration.

    Raises:
        RunDirError: the statement is damaged.
    """
    policy = str(settings.get("privacy.policy", ABSENT))
    if not statement:
        return join(
            element(
                "p",
                "Nothing that left a client has noise, so no (ε, δ) holds. The policy ",
                element("strong", policy),
                " decides what may leave; interactions stay with the clients. Not covered is all that left:",
            ),
            _list(what_leaves(settings)),
            note(
                "An adapter is computed from private data and can reveal some of it; fedmerge privacy audit measures "
                "how much. The ledger below has the bytes of everything that left."
            ),
        )
    first, *_ = summarise_statement(statement)  # raises if it is damaged
    heads = [Column("Domain", numeric=False), *(Column(title) for title in _columns(statement))]
    domains = only(statement["domains"], shown)
    body = [[Cell(domain, domain), *_cells(statement["domains"][domain], statement)] for domain in domains]
    problems = [element("p", element("strong", "This guarantees nothing. "), why) for why in statement["why_not"]]
    if statement["guarantee"] and not statement["guarantee_of_run"]:
        problems.append(element("p", element("strong", "It does not hold for the run as a whole"), ", see below."))
    return join(
        element("p", first),
        *problems,
        table("promise-table", f"ε of one {statement['unit']}, δ = {_delta(statement)}", heads, body),
        element("h3", "Not covered"),
        _list(statement["not_covered"]),
        element("h3", "It holds if"),
        _list(statement["assumptions"]),
    )


def what_leaves(settings: Mapping[str, Any]) -> list[str]:
    """Return the kinds of content that may leave a client under a run's policy, in the plural and sorted."""
    policy, woven = settings.get("privacy.policy"), settings.get("weave.schedule") == "similarity"
    allowed = next((kinds for name, kinds in ALLOWED.items() if name == policy), frozenset())
    kinds = [kind for kind in sorted(allowed) if woven or kind != "similarity factors"]
    return [kind if kind.endswith("s") else f"{kind}s" for kind in kinds] or ["what it allows"]


def _columns(statement: Mapping[str, Any]) -> list[str]:
    if statement.get("adjacency") == "replace":
        return ["One replaced", "Releases"]
    return ["One added or removed", "One replaced by another", "Releases"]


def _cells(found: Mapping[str, Any], statement: Mapping[str, Any]) -> list[Cell]:
    keys = ("epsilon",) if statement.get("adjacency") == "replace" else ("epsilon", "epsilon_replaced")
    numbers = [found.get(key) for key in keys]
    return [
        *(number_cell(number, f"{number:.3g}" if is_number(number) else "∞") for number in numbers),
        number_cell(len(found["releases"]), str(len(found["releases"]))),
    ]


def _delta(statement: Mapping[str, Any]) -> str:
    delta = statement["delta"]
    return ABSENT if delta is None else f"{delta:g}"


def _list(items: Any) -> Html:
    return element("ul", *(element("li", str(item)) for item in items))
