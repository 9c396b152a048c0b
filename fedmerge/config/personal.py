"""Section about personal merges: every client's own coefficients over the directions of the others."""

from typing import ClassVar, Literal

from pydantic import Field

from fedmerge.config.section import Section

Directions = Literal["module", "model", "rank-one", "raw"]


class Personal(Section):
    """A merge of its own for every training client, explained in [merging.md](reference/merging.md#personal-merges)."""

    LATER: ClassVar[tuple[str, ...]] = ("own",)

    directions: Directions | None = Field(
        None,
        description="Unit in which the other domains' updates are normalised: each module, the whole model, or each "
        "singular direction; raw: not at all; 'none': no personal merges. Needs privacy.policy = 'catalog-private'.",
    )
    own: bool = Field(False, description="Fit of a factor on the own update by layer, too; it starts at 1.")
    universal: bool = Field(
        False,
        description="Sending of the fitted coefficients for one more merge, the mean of all personal ones; each "
        "organisation must allow it (real_users).",
    )
    fit_on: Literal["held-out", "train"] = Field(
        "held-out",
        description="Users that the coefficients are fitted on. held-out: the validation item of users whom neither "
        "early stopping nor the selection reads; train: the training users, which the expert has fitted already.",
    )
    steps: int = Field(100, ge=1, description="Adam steps; the best of five points on validation is kept.")
    learning_rate: float = Field(1e-2, gt=0, le=1, description="Adam learning rate, constant.")
