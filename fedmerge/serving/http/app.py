"""The routes of ``fedmerge serve``."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from fedmerge import __version__
from fedmerge.errors import FedMergeError, RunDirError
from fedmerge.serving.http.batching import BusyError, answers
from fedmerge.serving.http.bodies import (
    REFUSALS,
    HealthAnswer,
    ItemsAnswer,
    ItemsBody,
    ListAnswer,
    Listed,
    RecommendBody,
    Search,
    SimilarBody,
    SwapAnswer,
    SwapBody,
)
from fedmerge.serving.http.docs_page import page_of
from fedmerge.serving.http.page.routes import add_page
from fedmerge.serving.http.service import Service, SwapInProgressError, known_items, listing_of, run_name
from fedmerge.serving.http.shelf import ItemChange, Shelf
from fedmerge.serving.listing import Listing
from fedmerge.serving.recommender import History, Recommendation, read_history, similar_items

LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
STATUS = {BusyError: 503, SwapInProgressError: 409}  # of other errors that are raised on purpose: 422


def make_app(service: Service, *, has_key: bool, is_local: bool, page: bool = False) -> FastAPI:
    """Return the application. Whoever has the key may change items and models; without one, this machine alone.

    Args:
        service: what is served.
        has_key: every request that arrives has given the key.
        is_local: only this machine reaches the application.
        page: with the page at ``/`` and its routes.
    """
    app = FastAPI(
        title="fedmerge serve",
        version=__version__,
        description="Recommendations of the model that a federation made for this domain.",
        docs_url=None,  # the default pages load scripts from other servers
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(FedMergeError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)

    _add_lists(app, service)
    _add_changes(app, service, has_key, is_local)
    _add_state(app, service)
    if page:
        add_page(app, service, has_key=has_key)
    return app


def _add_lists(app: FastAPI, service: Service) -> None:
    @app.post("/recommend", responses=REFUSALS)
    async def recommend(body: RecommendBody) -> ListAnswer:
        """Recommend items to the user of a history."""
        shelf = service.shelf
        recommender = shelf.recommender
        places, ignored = known_items(shelf, body.history)

        def prepare() -> tuple[History, Listing]:
            listing = listing_of(shelf, body, body.keep_seen, body.diversity, body.popularity)
            return read_history(recommender, [body.history[place] for place in places]), listing

        (found,) = await answers(service.batcher.submit(recommender, prepare))
        kind = "standardised" if body.popularity else recommender.score_kind
        return _answer(shelf, kind, found, ignored)

    @app.post("/similar", responses=REFUSALS)
    def similar(body: SimilarBody) -> ListAnswer:
        """List the items that an item's text is nearest to; the score is the cosine of their vectors."""
        shelf = service.shelf
        found = similar_items(shelf.recommender, body.item, listing_of(shelf, body))
        return _answer(shelf, "cosine", found, [])


def _add_changes(app: FastAPI, service: Service, has_key: bool, is_local: bool) -> None:
    def check_may_change(request: Request) -> None:
        # A web page that makes its own name lead to this machine asks under that name.
        if not has_key and not (is_local and request.url.hostname in LOCAL_NAMES):
            where = "" if is_local else ", since others reach this address"
            raise HTTPException(
                403,
                f"items and models are changed with a key, or at one of {', '.join(LOCAL_NAMES)}{where}: start with "
                "--api-key-file FILE",
            )

    @app.put("/items", responses=REFUSALS)
    def items(body: ItemsBody, request: Request) -> ItemsAnswer:
        """Add items, or change their text or whether they are available; the next request sees them."""
        check_may_change(request)
        changes = [ItemChange(item.item_id, item.attributes, item.available) for item in body.items]
        try:
            added, changed, number = service.change(changes)
        except RunDirError as error:  # nothing was changed
            raise HTTPException(507, str(error)) from error
        return ItemsAnswer(added=added, changed=changed, items=number)

    @app.post("/swap", responses=REFUSALS)
    def swap(body: SwapBody, request: Request) -> SwapAnswer:
        """Serve another run from now on, or the same with the catalog as it is on disk now; no request is dropped."""
        check_may_change(request)
        start = service.uptime_seconds
        shelf = service.swap(body.model, body.served)
        return SwapAnswer(model=shelf.label, run=run_name(shelf), seconds=service.uptime_seconds - start)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> HealthAnswer:
        """Say what is served."""
        shelf = service.shelf
        recommender, decision, index = shelf.recommender, shelf.opened.decision, shelf.recommender.index
        return HealthAnswer(
            status="ok",
            domain=shelf.catalog.name,
            synthetic=shelf.opened.manifest.synthetic,
            model=shelf.label,
            reason=None if decision is None else decision.reason,
            run=run_name(shelf),
            score_kind=recommender.score_kind,
            items=len(shelf.catalog),
            unavailable=int((~shelf.available).sum()),
            changed=len(shelf.changed),
            popularity=shelf.counts is not None,
            search=Search(kind="exact") if index is None else Search(kind="approximate", recall_at_10=index.recall),
            uptime_seconds=service.uptime_seconds,
        )

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counters in Prometheus' text format."""
        shelf, index = service.shelf, service.shelf.recommender.index
        gauges = {
            "fedmerge_items": ("Items of the catalog.", float(len(shelf.catalog))),
            "fedmerge_items_changed": ("Items added or changed since it was read.", float(len(shelf.changed))),
            "fedmerge_waiting": ("Requests that wait to be encoded.", float(service.batcher.waiting)),
            "fedmerge_uptime_seconds": ("Time since the start.", service.uptime_seconds),
        }
        if index is not None:
            gauges["fedmerge_index_recall_at_10"] = ("Recall of the index against exact search.", index.recall)
        return PlainTextResponse(service.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> str:
        return page_of(app.openapi())


def _answer(shelf: Shelf, score_kind: str, found: list[Recommendation], ignored: list[str]) -> ListAnswer:
    items = [Listed.model_construct(item_id=one.item_id, title=one.title, score=one.score) for one in found]
    return ListAnswer.model_construct(
        run=run_name(shelf), model=shelf.label, score_kind=score_kind, recommendations=items, ignored=ignored
    )


async def _refused(_: Request, error: Exception) -> JSONResponse:
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 422)
    return JSONResponse({"error": str(error)}, status, {"Retry-After": "1"} if status in (409, 503) else None)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    """Say what is wrong without the values, which need not be text that can be sent back."""
    if not isinstance(error, RequestValidationError):
        raise TypeError(type(error))
    problems = [
        f"{'.'.join(str(part) for part in problem['loc'][1:]) or 'body'}: {problem['msg']}"
        for problem in error.errors()
    ]
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return JSONResponse({"error": _sendable("; ".join(problems[:5]) + more)}, 422)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise TypeError(type(error))
    return JSONResponse({"error": _sendable(str(error.detail))}, error.status_code, error.headers)


def _sendable(text: str) -> str:
    """Return a text that UTF-8 can hold, of at most 1,000 characters."""
    return text[:1000].encode(errors="replace").decode()
