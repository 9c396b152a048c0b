"""The page's files and routes: ``/``, ``/page``, ``GET /items``, ``/example`` and ``/compare``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Annotated

from fastapi import FastAPI, Query, Response
from fastapi.concurrency import run_in_threadpool

from fedmerge.report.html.svg import shape_path
from fedmerge.serving.http.batching import Prepare, answers
from fedmerge.serving.http.bodies import REFUSALS, Filters
from fedmerge.serving.http.page.bodies import (
    Absent,
    CompareAnswer,
    CompareBody,
    ExampleAnswer,
    ExampleQuery,
    ItemsFound,
    ItemsQuery,
    Model,
    Named,
    OfModel,
    PageAnswer,
)
from fedmerge.serving.http.page.comparison import DEPTH, NO_TEXTS, can_read, explain, num_read
from fedmerge.serving.http.page.models import Column, columns
from fedmerge.serving.http.page.search import example_history, find_items
from fedmerge.serving.http.service import Service, known_items, listing_of, run_name
from fedmerge.serving.http.shelf import Shelf
from fedmerge.serving.listing import Listing
from fedmerge.serving.recommender import History, Item, Recommendation, read_history

HERE, REPORT = "fedmerge.serving.http.page", "fedmerge.report.html"
ASSETS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "/": ("text/html", ((HERE, "page.html"),)),
    "/page.css": ("text/css", ((REPORT, "page.css"), (HERE, "page.css"))),  # looks as reports do
    "/page.js": ("text/javascript", ((HERE, "page.js"),)),
    "/icon.svg": ("image/svg+xml", ((HERE, "icon.svg"),)),
}  # path -> media type, and the files (package, name) that are sent one after another
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, service: Service, *, has_key: bool) -> None:
    """Add the page to an application.

    Args:
        app: with the other routes.
        service: whose shelf has the other models beside it.
        has_key: the page asks for a key before it asks for anything else.
    """
    for path, (media_type, parts) in ASSETS.items():
        content = "\n".join(files(package).joinpath(name).read_text(encoding="utf-8") for package, name in parts)
        if has_key:
            content = content.replace('<body data-key="no">', '<body data-key="yes">')
        _add_file(app, path, content, media_type)
    _add_items(app, service)
    _add_lists(app, service)


def _add_file(app: FastAPI, path: str, content: str, media_type: str) -> None:
    async def file() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    app.add_api_route(path, file, include_in_schema=False)


def _add_items(app: FastAPI, service: Service) -> None:
    @app.get("/page", responses=REFUSALS)
    def page() -> PageAnswer:
        """Say what the page at / is about: the models that it shows, and those that are absent."""
        shelf = service.shelf
        return PageAnswer(
            domain=shelf.catalog.name,
            synthetic=shelf.opened.manifest.synthetic,
            run=run_name(shelf),
            items=len(shelf.catalog),
            attributes=list(shelf.catalog.attributes),
            title_attribute=shelf.catalog.title_attribute,
            models=[_model(column) for column in columns(shelf)],
            absent=[Absent(title=title, reason=reason) for title, reason in shelf.absent.items()],
        )

    @app.get("/items", responses=REFUSALS)
    def items(query: Annotated[ItemsQuery, Query()]) -> ItemsFound:
        """Find items by the words of their titles, or by an id."""
        shelf = service.shelf
        found, total = find_items(shelf, query.q, query.k)
        return ItemsFound(items=_named(shelf, found), total=total)

    @app.get("/example", responses=REFUSALS)
    def example(query: Annotated[ExampleQuery, Query()]) -> ExampleAnswer:
        """Make an example history of similar items of the catalog."""
        shelf = service.shelf
        return ExampleAnswer(history=_named(shelf, example_history(columns(shelf)[0].shelf, query.number)))


def _add_lists(app: FastAPI, service: Service) -> None:
    @app.post("/compare", responses=REFUSALS)
    async def compare(body: CompareBody) -> CompareAnswer:
        """Recommend items to the user of a history by every model of the page, and say why, and what moved."""
        shelf = service.shelf
        places, ignored = known_items(shelf, body.history)
        items = [body.history[place] for place in places]
        shown = columns(shelf)
        reading = [column for column in shown if can_read(column, items)]
        depths = [max(DEPTH, body.k) if column is shown[0] else body.k for column in reading]
        jobs = [
            service.batcher.submit(column.shelf.recommender, _preparing(column.shelf, items, depth))
            for column, depth in zip(reading, depths, strict=True)
        ]
        found = dict(zip(reading, await answers(*jobs), strict=True))
        lists, read = await run_in_threadpool(_explained, shown, items, places, found, body.k)
        return CompareAnswer(run=run_name(shelf), read=read, lists=lists, ignored=ignored)


def _explained(
    shown: Sequence[Column],
    items: Sequence[Item],
    places: Sequence[int],
    found: Mapping[Column, Sequence[Recommendation]],
    k: int,
) -> tuple[list[OfModel], int]:
    """Return the lists, and the number of items that text models read."""
    first = found.get(shown[0], ())
    lists = [
        explain(column, items, places, found[column], first, k)
        if column in found
        else OfModel(title=column.title, score_kind="", recommendations=[], gone=[], refused=NO_TEXTS)
        for column in shown
    ]
    by_text = replace(shown[0].shelf.recommender, head=None)
    return lists, num_read(by_text, read_history(by_text, items))


def _preparing(shelf: Shelf, items: Sequence[Item], depth: int) -> Prepare:
    def prepare() -> tuple[History, Listing]:
        return read_history(shelf.recommender, items), listing_of(shelf, Filters(k=depth))

    return prepare


def _named(shelf: Shelf, places: Sequence[int]) -> list[Named]:
    ids, titles = shelf.catalog.item_ids, shelf.catalog.titles
    return [Named(item_id=ids[place], title=titles[place]) for place in places]


def _model(column: Column) -> Model:
    return Model(
        title=column.title,
        meaning=column.meaning,
        served=column.served,
        colour=column.look.colour,
        shape=shape_path(column.look),
    )
