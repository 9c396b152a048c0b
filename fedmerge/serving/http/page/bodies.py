"""What the page sends and is answered, with its limits."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedmerge.serving.http.bodies import Attributes, Body, ItemId, Listed

MOST_HISTORY, MOST_SHOWN = 100, 50  # items of a history, and of a list or of what a search finds


class ItemsQuery(BaseModel):
    """A search for items."""

    model_config = ConfigDict(extra="forbid")

    q: str = Field(
        min_length=1, max_length=200, description="an item's id, or words, all of which the titles have somewhere"
    )
    k: int = Field(default=8, ge=1, le=MOST_SHOWN, description="number of items")


class ExampleQuery(BaseModel):
    """Which example."""

    model_config = ConfigDict(extra="forbid")

    number: int = Field(default=0, ge=0, lt=2**31, description="the same number gives the same history")


class CompareBody(Body):
    """A history, and how long the lists are."""

    history: list[ItemId | Attributes] = Field(
        min_length=1,
        max_length=MOST_HISTORY,
        description="oldest first: ids, or attributes of items that the catalog lacks",
    )
    k: int = Field(default=10, ge=1, le=MOST_SHOWN, description="number of items in a list")


class Named(BaseModel):
    """An item."""

    item_id: str
    title: str


class ItemsFound(BaseModel):
    """What a search found, the best first."""

    items: list[Named]
    total: int = Field(description="number of items that the search matches")


class ExampleAnswer(BaseModel):
    """A history that nobody had: an item and some of those with similar texts."""

    history: list[Named]


class Model(BaseModel):
    """A model whose lists the page shows."""

    title: str
    meaning: str
    served: bool = Field(description="the model that /recommend answers with")
    colour: int = Field(description="number of the colour that reports give the method")
    shape: str = Field(description="path of the symbol that reports give the method")


class Absent(BaseModel):
    """A model that the page cannot show."""

    title: str
    reason: str


class PageAnswer(BaseModel):
    """What the page is about."""

    domain: str
    synthetic: bool
    run: str | None
    items: int
    attributes: list[str] = Field(description="attributes of an item")
    title_attribute: str
    models: list[Model] = Field(description="in the order of the lists; the first is what the others are compared with")
    absent: list[Absent]


class Reason(BaseModel):
    """An item of the history that is near a recommended one."""

    place: Annotated[int, Field(description="in the history that was sent, from 0")]
    cosine: float = Field(description="of the two items' vectors under the model")


class Shown(Listed):
    """An item of a list."""

    before: int | None = Field(description="its place in the first list, from 1; null if it is not in the first 100")
    near: list[Reason] = Field(description="the nearest items of the history that the model reads, at most two")


class Gone(Named):
    """An item of the first list that this list lacks."""

    before: int


class OfModel(BaseModel):
    """The list of one model."""

    title: str
    score_kind: str = Field(description="cosine, or standardised over the catalog")
    recommendations: list[Shown]
    gone: list[Gone]
    refused: str | None = Field(description="why there is no list")


class CompareAnswer(BaseModel):
    """Lists in the order of the page's models."""

    run: str | None
    read: int = Field(description="number of the latest items that text models read")
    lists: list[OfModel]
    ignored: list[str] = Field(description="ids of the history that the catalog lacks")
