"""What is sent and answered over HTTP, with its limits; OpenAPI is made of it."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fedmerge.domain.parquet import LONGEST_TEXT

MOST_ITEMS = 1000  # of a history, of a list, and of a change
MOST_IDS = 50_000  # of a filter
MOST_VALUES = 1000  # of a filter on attributes

ItemId = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT, description="an item's id")]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Attributes = Annotated[
    dict[Annotated[str, Field(max_length=64)], Text],
    Field(min_length=1, max_length=64, description="attribute -> text, such as title and brand"),
]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Body(BaseModel):
    """A request: unknown fields are refused, so that a misspelt filter is not ignored."""

    model_config = ConfigDict(extra="forbid")


class Filters(Body):
    """Which items may be in a list. Items that are not available never are."""

    k: int = Field(default=10, ge=1, le=MOST_ITEMS, description="number of items")
    only: dict[str, Annotated[list[Text], Field(min_length=1, max_length=MOST_VALUES)]] = Field(
        default_factory=dict,
        max_length=64,
        description="attribute -> values of which an item must have one; a * at the end stands for anything",
    )
    among: list[ItemId] | None = Field(default=None, max_length=MOST_IDS, description="the only items to consider")
    exclude: list[ItemId] = Field(default_factory=list, max_length=MOST_IDS, description="items to leave out")


class RecommendBody(Filters):
    """A user's history, and how the list is made."""

    history: list[ItemId | Attributes] = Field(
        min_length=1,
        max_length=MOST_ITEMS,
        description="oldest first: ids, or attributes of items that the catalog lacks",
    )
    keep_seen: bool = Field(default=False, description="items of the history may be recommended")
    diversity: Share = Field(default=0.0, description="λ of maximal marginal relevance; 0: the best items")
    popularity: Share = Field(default=0.0, description="share of popularity in the scores, if it was counted")


class SimilarBody(Filters):
    """An item, by its id or its attributes."""

    item: ItemId | Attributes


class ChangedItem(Body):
    """An item that is new, or has another text, or is available or not."""

    item_id: ItemId
    attributes: Attributes | None = Field(default=None, description="its text; left out: as it is")
    available: bool | None = Field(default=None, description="may it be recommended; left out: as it is, new: yes")


class ItemsBody(Body):
    """Items to add or change."""

    items: list[ChangedItem] = Field(min_length=1, max_length=MOST_ITEMS)


class SwapBody(Body):
    """What to serve from now on."""

    model: str | None = Field(
        default=None, max_length=4096, description="a run or an adapter, as on the command line; left out: the same"
    )
    served: str | None = Field(
        default=None, max_length=100, description="a model of the run in place of its choice (--model)"
    )


class Listed(BaseModel):
    """An item of a list."""

    item_id: str
    title: str
    score: float


class ListAnswer(BaseModel):
    """A list, best first."""

    run: str | None = Field(description="the run that is served; null for an adapter")
    model: str = Field(description="what scored: a model of the run, or the adapter")
    score_kind: str = Field(description="cosine, or standardised over the catalog")
    recommendations: list[Listed]
    ignored: list[str] = Field(default_factory=list, description="ids of the history that the catalog lacks")


class ItemsAnswer(BaseModel):
    """What a change did."""

    added: int
    changed: int = Field(description="known items with another text or another availability")
    items: int = Field(description="items of the catalog now")


class SwapAnswer(BaseModel):
    """What is served now."""

    model: str
    run: str | None
    seconds: float


class Search(BaseModel):
    """How items are found."""

    kind: str = Field(description="exact, or approximate")
    recall_at_10: float | None = Field(default=None, description="of the index against exact search")


class HealthAnswer(BaseModel):
    """What is served."""

    status: str
    domain: str
    synthetic: bool
    model: str
    reason: str | None
    run: str | None
    score_kind: str
    items: int
    unavailable: int
    changed: int = Field(description="items that were added or changed since the catalog was read")
    popularity: bool = Field(description="popularity was counted")
    search: Search
    uptime_seconds: float


class ErrorAnswer(BaseModel):
    """Why a request was refused."""

    error: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": meaning}
    for status, meaning in {401: "no valid key", 413: "too large a body", 422: "a wrong request", 503: "busy"}.items()
}
