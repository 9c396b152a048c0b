"""Sections about training: one client's fine-tuning, federations of several rounds, and weaving."""

import math
from collections.abc import Collection, Sequence
from typing import Annotated, Any, ClassVar, Literal

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

WeaveSchedule = Literal["all", "sampled", "ring", "relay", "mean", "similarity"]
OBJECTIVES = ("sp", "mip", "map", "coserec", "attribute-dropout")
USERS_OBJECTIVES = frozenset(OBJECTIVES) - {"attribute-dropout"}  # their negatives are other users of the step
AUGMENTATIONS = ("crop", "mask", "reorder", "insert", "substitute")
CSFT = "train.objective = 'csft'"
CSFT_STYLE = "csft, LLM2Rec-style (arXiv:2506.21579)"
DEFAULT_VIEWS = ("crop=0.6", "mask=0.7", "reorder=0.2", "insert=0.4", "substitute=0.1")


def named_numbers(key: str, entries: Sequence[str], known: Collection[str], most: float) -> dict[str, float]:
    """Read a list such as ``sp=0.1,mip=0.3``, in the order of the known names; entries of 0 are left out.

    Args:
        key: key of the setting, for the message.
        entries: the list.
        known: allowed names.
        most: largest number.

    Raises:
        ValueError: an unknown or repeated name, or a number outside [0, most].
    """
    found: dict[str, float] = {}
    for entry in entries:
        name, _, text = entry.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if name not in known or not 0 <= number <= most:
            raise ValueError(
                f"{key} has {entry!r}; expected NAME=NUMBER, the name one of {', '.join(known)} and the number "
                f"between 0 and {most:g}"
            )
        if name in found:
            raise ValueError(f"{key} has {name} more than once; give it once")
        found[name] = number
    return {name: found[name] for name in known if found.get(name)}


class Train(Section):
    """Local fine-tuning. It ends at the first budget reached; the learning rate falls linearly to zero over it."""

    learning_rate: float = Field(1e-3, gt=0, le=1, description="AdamW learning rate after warm-up.")
    batch_size: int = Field(64, ge=2, le=4096, description="Users a step; their targets are each other's negatives.")
    tokens_at_once: int | None = Field(
        None,
        ge=1,
        description="Tokens whose activations a step holds at once. It encodes its texts in such parts, and each again "
        "for its gradient, so memory does not depend on batch_size; 'none' holds all, which is faster.",
    )
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
    objective: Literal["infonce", "csft"] = Field(
        "infonce",
        description="Usual loss. infonce: the target among negatives, by vectors; csft: the next item's title, token "
        "by token, for decoders ([language-models.md](reference/training/language-models.md)).",
    )
    objectives: tuple[str, ...] = Field(
        (),
        description="Auxiliary losses with their weights, such as 'sp=0.1,coserec=0.1', explained in "
        "[auxiliary-losses.md](reference/training/auxiliary-losses.md): sp, mip, map, coserec, attribute-dropout.",
    )
    views: tuple[str, ...] = Field(
        DEFAULT_VIEWS,
        description="Augmentations with their rates that the two views of a history are drawn from, for coserec.",
    )
    augment: tuple[str, ...] = Field(
        (),
        description="Augmentations of the histories of the usual loss with their rates, such as "
        "'insert=0.3,substitute=0.1': crop, mask, reorder, insert, substitute. Targets stay.",
    )
    augment_share: float = Field(
        0.5, gt=0, le=1, description="Share of a step's users whose history is augmented, with augment."
    )

    @property
    def objective_weights(self) -> dict[str, float]:
        """The auxiliary losses with a weight above 0."""
        return named_numbers("objectives", self.objectives, OBJECTIVES, 10)

    @property
    def view_rates(self) -> dict[str, float]:
        """The augmentations of views."""
        return named_numbers("views", self.views, AUGMENTATIONS, 1)

    @property
    def augment_rates(self) -> dict[str, float]:
        """The augmentations of histories in the usual loss."""
        return named_numbers("augment", self.augment, AUGMENTATIONS, 1)

    def auxiliary_record(self) -> dict[str, Any]:
        """Return what is on beside InfoNCE on whole histories, for caches and provenance; empty if nothing is."""
        weights, rates = self.objective_weights, self.augment_rates
        return {
            **({"objective": CSFT_STYLE} if self.objective == "csft" else {}),
            **({"objectives": {f"{name}-style": weight for name, weight in weights.items()}} if weights else {}),
            **({"views": self.view_rates} if "coserec" in weights else {}),
            **({"augment": rates, "augment_share": self.augment_share} if rates else {}),
        }

    def cache_inputs(self) -> dict[str, Any]:
        """Return the settings for the key of a cache; what is off, if only by a weight of 0, is left out."""
        off = {"objective", "objectives", "views", "augment", "augment_share"}
        off |= set() if self.tokens_at_once else {"tokens_at_once"}
        return self.model_dump(exclude=off) | self.auxiliary_record()

    @model_validator(mode="after")
    def _auxiliary_losses(self) -> "Train":
        if "coserec" in self.objective_weights and not self.view_rates:
            raise ValueError("objectives has coserec, but views names no augmentation; name one, such as 'insert=0.4'")
        _ = self.augment_rates, self.view_rates
        return self

    @model_validator(mode="after")
    def _no_negatives(self) -> "Train":
        if self.objective == "csft" and self.negatives != "in-batch":
            raise ValueError(
                f"objective = 'csft' predicts tokens and has no negatives, but negatives = '{self.negatives}'; leave "
                "negatives out, or set objective = 'infonce'"
            )
        return self

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


class Weave(Section):
    """Experts that other clients continue before the merge, explained in [weaving](reference/merging.md#weaving)."""

    LATER: ClassVar[tuple[str, ...]] = ("similarity_rank", "similarity_weight")

    schedule: WeaveSchedule | None = Field(
        None,
        description="Adapters that a client continues on its own users. all: every other expert; sampled, ring: some "
        "of them; relay: each adapter walks through all clients; mean: the mean of the others; similarity: its own "
        "expert, towards the mean similarity of shared items; 'none': no weaving. Needs privacy.policy = "
        "'catalog-private'; similarity: catalogs at the server.",
    )
    sources: int = Field(1, ge=1, description="Adapters that a client continues under schedules sampled and ring.")
    steps: int = Field(200, ge=0, description="Optimiser steps of each; the best of five points on validation is kept.")
    rate: float = Field(0.2, gt=0, le=10, description="AdamW learning rate, as a share of train.learning_rate.")
    proximal: float = Field(0.0, ge=0, description="FedProx coefficient: pull towards the adapter that was received.")
    similarity_rank: int = Field(
        64, ge=1, le=64, description="Columns of the similarity factors that a client sends under schedule similarity."
    )
    similarity_weight: float = Field(
        10.0, ge=0, description="Weight of the squared difference from the mean similarity of shared items."
    )
    factors: tuple[Annotated[float, Field(gt=0, le=10)], ...] = Field(
        (1.0, 1.4, 1.8), min_length=1, description="Variants to try: factors on the mean of the woven adapters."
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Weave":
        if values := twice([f"{value:g}" for value in self.factors]):
            raise ValueError(
                f"factors has {values} more than once (to the six digits that name a merge); give each once"
            )
        return self

    def trainings(self, num_domains: int) -> int:
        """Return how many adapters each training client continues, of a run with this many of them."""
        others = max(0, num_domains - 1)
        if self.schedule is None or not others:
            return 0
        return {
            "mean": 1,
            "similarity": 1,
            "sampled": min(self.sources, others),
            "ring": min(self.sources, others),
        }.get(self.schedule, others)


class Mntp(Section):
    """The server's first stage on its merges ([language-models.md](reference/training/language-models.md))."""

    steps: int = Field(
        0, ge=0, description="Optimiser steps of masked next-token prediction on titles of public catalogs; 0: none."
    )
    batch_size: int = Field(32, ge=1, le=4096, description="Titles a step.")
    learning_rate: float = Field(5e-5, gt=0, le=1, description="AdamW learning rate; it falls linearly to zero.")
    share: float = Field(
        0.2,
        gt=0,
        le=1,
        description="Share of a title's tokens that are predicted: 80 % masked, 10 % random, 10 % kept.",
    )


class Simcse(Section):
    """The server's second stage on its merges, from titles, after [mntp]."""

    steps: int = Field(
        0, ge=0, description="Optimiser steps that contrast two passes of a title under attention dropout; 0: none."
    )
    batch_size: int = Field(256, ge=2, le=4096, description="Titles a step; they are each other's negatives.")
    learning_rate: float = Field(
        2e-4, gt=0, le=1, description="AdamW learning rate after warm-up; it falls linearly to zero."
    )
    warmup_steps: int = Field(300, ge=0, description="Steps over which the learning rate rises from zero.")
    dropout: float = Field(0.2, gt=0, lt=1, description="Dropout of the attention's weights.")
    temperature: float = Field(0.1, gt=0, le=1, description="Divisor of the cosines.")
