"""Sections about training: one client's fine-tuning, and federations of several rounds."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedmerge.config.merging import MergeMethod
from fedmerge.config.section import Section, twice

RoundRule = Literal[
    "weighted-average",
    "fedit",
    "ffa-lora",
    "flora",
    "flexlora",
    "hetlora",
    "median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "fedavgm",
    "fedadam",
    "fedyogi",
]


class Train(Section):
    """Local fine-tuning. It ends at the first budget reached; the learning rate falls linearly to zero over it."""

    learning_rate: float = Field(1e-3, gt=0, le=1, description="AdamW learning rate after warm-up.")
    batch_size: int = Field(64, ge=2, le=4096, description="Users a step; their targets are each other's negatives.")
    samples: Literal["last", "random-prefix"] = Field(
        "random-prefix",
        description="Target of a user in an epoch: the last training item (as published), or a random one.",
    )
    max_epochs: int | None = Field(None, ge=1, description="Passes over the training users.")
    max_steps: int | None = Field(60, ge=1, description="Optimiser steps.")
    max_minutes: float | None = Field(
        None, gt=0, description="Wall-clock minutes; results then depend on the machine's speed."
    )
    warmup_steps: int = Field(10, ge=0, description="Steps over which the learning rate rises from zero.")
    validate_every_steps: int = Field(
        20,
        ge=1,
        description="Steps between two validations; the best adapter is the expert. Five validations without a better "
        "NDCG@10 end the training.",
    )
    validation_users: int | None = Field(500, ge=1, description="Validation users for early stopping; 'none' for all.")
    negatives: Literal["in-batch", "catalog"] = Field(
        "in-batch",
        description="Negatives of a user. in-batch: the other targets of a step; catalog: every item, its vector held "
        "fixed (no gradient).",
    )
    item_refresh_steps: int = Field(
        10, ge=1, description="Steps between two encodings of the items by the current model, for catalog negatives."
    )

    @model_validator(mode="after")
    def _some_budget(self) -> "Train":
        if self.max_epochs is None and self.max_steps is None and self.max_minutes is None:
            raise ValueError("max_epochs, max_steps and max_minutes are all 'none'; set at least one")
        return self


class Rounds(Section):
    """A federation of several rounds in place of one merge, explained in [rounds.md](reference/rounds.md)."""

    rule: RoundRule | MergeMethod | None = Field(
        None, description="Aggregation rule or merging method of a round; 'none': experts train once and are merged."
    )
    number: int = Field(4, ge=1, description="Rounds; the budgets of train cover all rounds together.")
    parameters: tuple[Annotated[str, Field(pattern=r"^[a-z0-9_]+=[^=,]+$")], ...] = Field(
        (), description="Parameters of the rule, such as 'num_malicious=1,continuation=frozen'."
    )
    weights: Literal["equal", "users"] = Field(
        "equal", description="Weights of the clients: equal, or proportional to their users."
    )
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the clients that is drawn for each round.")
    proximal: float = Field(
        0.0, ge=0, description="FedProx coefficient: pull of a client towards the model that the round started from."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Rounds":
        if names := twice([text.partition("=")[0] for text in self.parameters]):
            raise ValueError(f"parameters has {names} more than once; give each once")
        return self

    def clients_a_round(self, num_domains: int) -> int:
        """Return how many of the training clients take part in a round, at least one."""
        return max(1, math.ceil(self.fraction * num_domains))
