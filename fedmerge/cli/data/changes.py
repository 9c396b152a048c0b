"""``fedmerge data add-items``, ``forget`` and ``map-attributes``: change a domain, and say what depends on it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.domain.changes import Change


def add_commands(data: "Commands") -> None:
    """Add the commands to ``fedmerge data``."""
    add = data.add_parser("add-items", help="append new items to a domain's catalog, without a new import")
    _add_domain(add)
    add.add_argument(
        "--catalog", type=Path, required=True, metavar="FILE", help="a table with the ids and attributes of new items"
    )
    add.add_argument("--item-column", default="item_id", metavar="NAME", help="column of ids (default: item_id)")
    add.set_defaults(command=_add_items)
    forget = data.add_parser("forget", help="remove users or items from a domain; says what must be trained again")
    _add_domain(forget)
    what = forget.add_mutually_exclusive_group(required=True)
    what.add_argument("--users", type=Path, metavar="FILE", help="ids of users, one a line")
    what.add_argument("--items", type=Path, metavar="FILE", help="ids of items, one a line")
    forget.add_argument("--skip-unknown", action="store_true", help="skip ids that the domain does not have")
    forget.set_defaults(command=_forget)
    mapped = data.add_parser("map-attributes", help="give a domain's items the attributes that other domains have")
    _add_domain(mapped)
    mapped.add_argument(
        "--to", required=True, metavar="NAMES", help="attributes in the order of a text, as domains.attributes has them"
    )
    mapped.add_argument("--map", nargs="+", default=[], metavar="OLD=NEW", help="attributes that are named otherwise")
    mapped.add_argument("--drop", nargs="+", default=[], metavar="OLD", help="attributes to leave out")
    mapped.set_defaults(command=_map_attributes)


def _add_domain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("domain", type=Path, metavar="DOMAIN", help="a domain folder")
    parser.add_argument(
        "--cache-dir", type=Path, default=None, metavar="DIR", help="cache of this client (default: ~/.cache/fedmerge)"
    )


def _add_items(options: argparse.Namespace) -> int:
    from fedmerge.domain.changes import add_items

    change = add_items(options.domain, options.catalog, options.item_column)
    if change.absent:
        print(f"without a column, so empty: {', '.join(change.absent)}")
    for note in change.notes:
        print(f"{options.catalog}: {note}")
    if _say_change(options.domain, change, "were there already"):
        print("The new items are ranked by their text at once. Heads score them by text until they are trained again.")
        _say_cached(options, change.after.name, forgotten=False)
    return 0


def _forget(options: argparse.Namespace) -> int:
    from fedmerge.domain.changes import forget_items, forget_users, read_ids

    forget, file = (forget_items, options.items) if options.users is None else (forget_users, options.users)
    change = forget(options.domain, read_ids(file), options.skip_unknown)
    if _say_change(options.domain, change, "are not in the domain"):
        if options.users is not None and change.after.catalog_source == "interactions":
            print("The catalog may still depend on them (catalog_source = 'interactions'); import again to compute it.")
        print(
            "Every expert, head and merge that was trained before still holds what it learned, and an adapter that was "
            "sent cannot be recalled: ask the operator to merge again without it."
        )
        _say_cached(options, change.after.name, forgotten=True)
    return 0


def _map_attributes(options: argparse.Namespace) -> int:
    from fedmerge.domain.changes import map_attributes
    from fedmerge.errors import DomainError

    pairs = [text.partition("=") for text in options.map]
    if wrong := [text for text, (old, _, new) in zip(options.map, pairs, strict=True) if not (old and new)]:
        raise DomainError(f"--map: found {wrong[0]!r}, expected OLD=NEW, such as maker=brand.")
    mapping = {old: new for old, _, new in pairs}
    change = map_attributes(options.domain, options.to.split(","), mapping, options.drop)
    if change.before == change.after:
        print(f"{options.domain}: nothing changed")
        return 0
    print(f"{options.domain}: {', '.join(change.before.attributes)} became {', '.join(change.after.attributes)}")
    if change.absent:
        print(f"nothing is mapped to them, so empty: {', '.join(change.absent)}")
    print("Texts have changed, so experts and heads that were trained on the old ones do not fit.")
    _say_cached(options, change.after.name, forgotten=False)
    return 0


def _say_change(domain: Path, change: "Change", known: str) -> bool:
    """Print the counts; return True if the domain was changed."""
    from fedmerge.domain.changes import change_counts

    differences = [f"{number:+} {name}" for name, number in change_counts(change).items() if number]
    skipped = f"; {change.num_known} {known}" if change.num_known else ""
    print(f"{domain}: {', '.join(differences) or 'nothing changed'}{skipped}")
    return change.before != change.after


def _say_cached(options: argparse.Namespace, name: str, *, forgotten: bool) -> None:
    """Print what the cache holds of the domain as it was."""
    from fedmerge.client.cache.dependents import LEARNED, RECORDS, cached_of
    from fedmerge.config import ExperimentConfig

    place = options.cache_dir or Path(ExperimentConfig().cache_dir)
    found = cached_of(name, place)
    if not found:
        print(f"{place}: holds nothing of {name}. Give --cache-dir if the client has another cache.")
        return
    remedy = "delete it and train again" if forgotten else "it is not reused; train again for an expert of all items"
    for kind, paths in found.items():
        todo = remedy if kind in LEARNED else "made anew by the next run; delete it"
        if kind in RECORDS:
            todo = "a record of what has left, which later answers are checked against: keep it"
        print(f"  {place / kind}: {len(paths)} of {name}: {todo}")
        for path in paths:
            print(f"    {path.name}")
