"""``fedmerge recommend``."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import adapter_config, add_domain, add_model, run_of

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.config import ExperimentConfig
    from fedmerge.domain.catalog import Catalog
    from fedmerge.serving.decision import Decision
    from fedmerge.serving.listing import Listing
    from fedmerge.serving.model import Opened
    from fedmerge.serving.recommender import Item, Recommender, ScoreKind

SCORES = {"cosine": "cosine similarity", "standardised": "scores standardised over the catalog"}
SHOWN_HISTORY = 10  # most recent items that are printed
SECONDS_BETWEEN_LINES = 10.0  # progress


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    recommend = commands.add_parser("recommend", help="recommend items of a catalog, for one history or for all users")
    add_model(recommend)
    add_domain(recommend, "a domain folder")
    whose = recommend.add_argument_group("whose history (one of these)").add_mutually_exclusive_group(required=True)
    whose.add_argument(
        "--history",
        metavar="ID,…",
        help="item ids, oldest first, separated by commas; - reads them from standard input",
    )
    whose.add_argument(
        "--history-text",
        action="append",
        metavar="TEXT",
        help="the title of an item that the catalog lacks, or its attributes as JSON; once for each item, oldest first",
    )
    whose.add_argument("--user", metavar="ID", help="a user of the domain, whose interactions are read")
    whose.add_argument("--all-users", action="store_true", help="all users of the domain; needs --out")
    whose.add_argument(
        "--histories",
        type=Path,
        metavar="FILE",
        help="a table with user_id and history (lists of ids), or with user_id and item_id, oldest first; needs --out",
    )
    recommend.add_argument("--out", type=Path, metavar="FILE", help="Parquet file for the lists of many users")
    add_listing(recommend)
    recommend.add_argument("--json", action="store_true", help="machine-readable output")
    recommend.set_defaults(command=_recommend)


def add_listing(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`listing_of` reads."""
    lists = parser.add_argument_group("the list")
    lists.add_argument("-k", type=int, default=10, help="number of items (default: 10)")
    lists.add_argument("--keep-seen", action="store_true", help="allow items of the history among the recommendations")
    lists.add_argument("--in-stock", type=Path, metavar="FILE", help="ids of the items in stock, one a line")
    lists.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="ATTRIBUTE=VALUE",
        help="items with this value, or with one that begins so: category='Games*'; of several values, any",
    )
    lists.add_argument(
        "--diversity",
        type=float,
        default=0.0,
        metavar="λ",
        help="0: the best items (default); towards 1: items unlike those before them (maximal marginal relevance)",
    )
    lists.add_argument(
        "--popularity",
        type=float,
        default=0.0,
        metavar="w",
        help="share of popularity in the scores, 0 to 1 (default: 0); the domain's interactions are counted",
    )


def _recommend(options: argparse.Namespace) -> int:
    config = adapter_config(options)

    from fedmerge.domain.catalog import load_catalog
    from fedmerge.serving.listing import Listing
    from fedmerge.serving.recommender import check_history, index_items

    many = options.all_users or options.histories is not None
    _check_usage(options, many)
    listing = Listing(options.k, options.keep_seen, None, options.diversity, options.popularity)
    history: list[Item] = []
    if not many:  # what is wrong with it is said before anything is loaded
        catalog = load_catalog(options.domain)
        history = _history(options, catalog)
        check_history(catalog.name, index_items(catalog), history)
    opened = _open(options, config)
    listing = _filtered(options, opened.recommender, listing)
    if options.popularity:
        opened = replace(opened, recommender=_with_popularity(options.domain, opened.recommender))
    if many:
        return _write_lists(options, opened, listing)
    return _print_list(options, opened, history, listing)


def _check_usage(options: argparse.Namespace, many: bool) -> None:
    from fedmerge.errors import ConfigError

    if many and options.out is None:
        raise ConfigError("recommend: found no --out for the lists of many users, expected a file. Give --out FILE.")
    if many and options.json:
        raise ConfigError("recommend: --json prints one list, but these are many. Read the file of --out.")
    if not many and options.out is not None:
        raise ConfigError("recommend: --out takes the lists of many users. Give --histories or --all-users with it.")


def _history(options: argparse.Namespace, catalog: "Catalog") -> "list[Item]":
    """Return the items of one history: ids, or attributes."""
    if options.user is not None:
        from fedmerge.domain.interactions import load_interactions
        from fedmerge.serving.batch import history_of

        return [*history_of(load_interactions(options.domain), catalog, options.user)]
    if options.history_text is not None:
        return [_attributes(text, catalog.title_attribute) for text in options.history_text]
    text = sys.stdin.read().replace("\n", ",") if options.history == "-" else options.history
    return [item.strip() for item in text.split(",") if item.strip()]


def _attributes(text: str, title: str) -> dict[str, str]:
    from fedmerge.errors import ConfigError

    if not text.lstrip().startswith("{"):
        return {title: text}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--history-text: found {text!r}, expected a title or JSON ({error}). Correct it.") from error
    if not all(isinstance(value, str) for value in found.values()):
        raise ConfigError(f"--history-text: found {text!r}, expected a text for each attribute. Quote the values.")
    return dict(found)


def _open(options: argparse.Namespace, config: "ExperimentConfig") -> "Opened":
    import torch

    from fedmerge.serving.model import open_recommender

    torch.set_num_threads(config.runtime.server_threads)
    show = _lines()

    def progress(done: int, number: int) -> None:
        show(f"encoding the items, once: {done:,} of {number:,}")

    return open_recommender(options.adapter, run_of(options), options.domain, config, options.model, progress)


def _lines() -> Callable[[str], None]:
    """Return a function that prints lines of progress on standard error, some seconds apart."""
    last = time.monotonic()

    def show(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return show


def _filtered(options: argparse.Namespace, recommender: "Recommender", listing: "Listing") -> "Listing":
    """Add the filters of the command; of items in stock that the catalog does not have, the number is printed."""
    from fedmerge.domain.changes import read_ids
    from fedmerge.serving.filters import check_values, in_stock, passing

    only = split_filters(options.only)
    if options.in_stock is None and not only:
        return listing
    catalog = recommender.catalog
    check_values(catalog, only)
    allowed = passing(catalog, only)
    if options.in_stock is not None:
        ids = read_ids(options.in_stock)
        allowed &= in_stock(catalog, recommender.item_index, ids)
        if unknown := sum(item not in recommender.item_index for item in ids):
            print(
                f"{options.in_stock}: {unknown} of {len(ids)} ids are not in the catalog of {catalog.name}",
                file=sys.stderr,
            )
    return replace(listing, allowed=allowed)


def split_filters(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return attribute -> values of ``ATTRIBUTE=VALUE`` texts.

    Raises:
        ConfigError: a text without an attribute.
    """
    from fedmerge.errors import ConfigError

    only: dict[str, list[str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--only: found {text!r}, expected ATTRIBUTE=VALUE, such as category=Puzzles.")
        only.setdefault(name, []).append(value)
    return only


def _with_popularity(domain: Path, recommender: "Recommender") -> "Recommender":
    from fedmerge.domain.interactions import load_interactions
    from fedmerge.serving.batch import count_items
    from fedmerge.serving.listing import popularity_source

    counts = count_items(load_interactions(domain), len(recommender.catalog))
    return replace(recommender, popularity=popularity_source(counts))


def _write_lists(options: argparse.Namespace, opened: "Opened", listing: "Listing") -> int:
    from fedmerge.domain.interactions import load_interactions
    from fedmerge.files import write_table
    from fedmerge.serving.batch import SCHEMA, Tally, all_users, read_histories, recommended_rows

    recommender, tally, start, show = opened.recommender, Tally(), time.monotonic(), _lines()
    if options.all_users:
        interactions = load_interactions(options.domain)
        users, of = all_users(interactions, recommender.catalog), f" of {interactions.num_users:,}"
    else:
        users, of = read_histories(options.histories), ""

    def progress(done: int) -> None:
        show(f"{done:,}{of} users, {done / (time.monotonic() - start):,.0f} a second")

    write_table(options.out, recommended_rows(recommender, users, listing, tally, progress), SCHEMA)
    served = "" if opened.decision is None else f", by {opened.decision.model} ({opened.decision.reason})"
    print(f"{options.out}: lists of {tally.users:,} users of {opened.manifest.name}{served}")
    if tally.without:
        print(f"without a list: {tally.without:,} users, of whom the catalog has no item")
    if tally.unknown:
        print(f"left out: {tally.unknown:,} items of histories that are not in the catalog")
    return 0


def _print_list(options: argparse.Namespace, opened: "Opened", history: "list[Item]", listing: "Listing") -> int:
    from fedmerge.escaping import one_line
    from fedmerge.serving.recommender import recommend

    recommender, manifest, decision = opened.recommender, opened.manifest, opened.decision
    found = recommend(recommender, history, listing=listing)
    shown = [_shown(recommender, item) for item in history]
    if options.json:
        result = {
            "domain": manifest.name,
            "synthetic": manifest.synthetic,
            **({"adapter": options.adapter} if decision is None else _of_run(decision)),
            "score_kind": score_kind(recommender, listing),
            "precision": recommender.encoder.compute.precision,
            "keep_seen": options.keep_seen,
            "history": [{"item_id": item, "title": title} for item, title in shown],
            "recommendations": [asdict(recommendation) for recommendation in found],
        }
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return 0
    print(f"{manifest.name}{' (SYNTHETIC DATA)' if manifest.synthetic else ''}: history")
    if earlier := max(0, len(shown) - SHOWN_HISTORY):
        print(f"             … {earlier} earlier")
    for item, title in shown[earlier:]:
        print(f"             {item or '(by its text)'}  {one_line(title) or '(no title)'}")
    if decision is not None:
        print(f"served: {decision.model} ({decision.reason})")
    print(f"recommended, with {SCORES[score_kind(recommender, listing)]}:")
    for number, one in enumerate(found, start=1):
        print(f"{number:3}  {one.score:7.4f} {one.item_id}  {one_line(one.title) or '(no title)'}")
    if not found:
        print("     nothing is left: all items were seen, or none passes the filters")
    return 0


def _shown(recommender: "Recommender", item: "Item") -> tuple[str | None, str]:
    """Return the id of an item, if it has one, and its title."""
    catalog = recommender.catalog
    if isinstance(item, str):
        return item, catalog.titles[recommender.item_index[item]]
    return None, item.get(catalog.title_attribute, "")


def score_kind(recommender: "Recommender", listing: "Listing") -> "ScoreKind":
    """Return the meaning of the scores of a list: with popularity they are standardised."""
    return "standardised" if listing.popularity else recommender.score_kind


def _of_run(decision: "Decision") -> dict[str, str]:
    return {"run": str(decision.run), "model": decision.model, "reason": decision.reason}
