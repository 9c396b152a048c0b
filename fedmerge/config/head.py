"""The section about sequence heads: models of histories over item vectors, trained by each client or together."""

from typing import Any, Literal

from pydantic import Field, model_validator

from fedmerge.config.section import Section, twice
from fedmerge.config.training import AUGMENTATIONS, DEFAULT_VIEWS, RoundRule, named_numbers

HeadVectors = Literal["merge", "expert", "backbone"]
HeadInputs = Literal["text+ids", "text", "ids"]


class Head(Section):
    """Sequence heads over item vectors, explained in [heads.md](reference/heads.md)."""

    kind: Literal["local", "federated"] | None = Field(
        None,
        description="Heads of a run. local: each client trains its own, which never leaves it; federated: one without "
        "ids is trained over rounds, then fused with each client's own. 'none': text vectors alone.",
    )
    inputs: HeadInputs = Field(
        "text+ids", description="Item representation of a client's own head: its text vector, its id, or both."
    )
    vectors: tuple[HeadVectors, ...] = Field(
        ("merge",),
        min_length=1,
        description="Encoders of the item vectors; each has a head and two rows: the head alone, and fused with text "
        "and recent items.",
    )
    hidden_size: int = Field(128, ge=2, le=1024, multiple_of=2, description="Width of a client's own head.")
    dropout: float = Field(0.5, ge=0, lt=1, description="Dropout in the training of a client's own head.")
    id_dropout: float = Field(
        0.2, ge=0, lt=1, description="Share of items read without their id in training, so that new items work."
    )
    sampled_items: int | None = Field(
        None,
        ge=2,
        description="Items drawn for the softmax of a training step, for catalogs from some 100,000 items on; 'none': "
        "the softmax is over all items.",
    )
    contrast: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Weight of CoSeRec-style contrast of two augmented views of each history in the training of a "
        "client's own head; 0: none.",
    )
    views: tuple[str, ...] = Field(
        DEFAULT_VIEWS, description="Augmentations with their rates that these views are drawn from, as train.views."
    )
    max_epochs: int = Field(
        100, ge=1, description="Passes over the training users; early stopping usually ends before."
    )
    max_minutes: float | None = Field(
        10.0, gt=0, description="Wall-clock limit on training one head; results then depend on the machine's speed."
    )
    rounds: int = Field(
        3, ge=0, description="Rounds of the federated head; 0: its start, untrained: recent items, whitened."
    )
    rule: RoundRule = Field("weighted-average", description="Aggregation rule of the federated head's rounds.")
    rank: int = Field(8, ge=1, le=1024, description="Rank of the federated head's maps.")
    steps: int = Field(25, ge=1, description="Optimiser steps of a client in a round of the federated head.")
    proximal: float = Field(
        0.0, ge=0, description="FedProx coefficient: pull of a client towards the head that the round started from."
    )

    @property
    def view_rates(self) -> dict[str, float]:
        """The augmentations of views."""
        return named_numbers("views", self.views, AUGMENTATIONS, 1)

    def scored(self, num_items: int) -> int:
        """Return the number of items that the softmax of a training step is over."""
        return num_items if self.sampled_items is None else min(self.sampled_items, num_items)

    def contrast_record(self) -> dict[str, Any]:
        """Return the settings of the contrast of views, for caches; empty without one."""
        return {"coserec-style": self.contrast, "views": self.view_rates} if self.contrast else {}

    def cache_inputs(self) -> dict[str, Any]:
        """Return the settings for the key of a cache; what is off is left out: a contrast with its views, sampling."""
        contrast = {"contrast": self.contrast_record()} if self.contrast else {}
        sampling = {} if self.sampled_items is None else {"sampled_items": self.sampled_items}
        return self.model_dump(exclude={"contrast", "views", "sampled_items"}) | contrast | sampling

    @model_validator(mode="after")
    def _consistent(self) -> "Head":
        if not self.view_rates and self.contrast:
            raise ValueError(
                "contrast is on, but views names no augmentation; name one, such as 'insert=0.4', or set contrast = 0"
            )
        if names := twice(self.vectors):
            raise ValueError(f"vectors names {names} more than once; name each once")
        if self.kind == "federated" and self.inputs == "ids":
            raise ValueError(
                "kind = 'federated' with inputs = 'ids': ids never leave a client, so nothing could be shared; set "
                "inputs = 'text+ids' or 'text', or kind = 'local'"
            )
        return self
