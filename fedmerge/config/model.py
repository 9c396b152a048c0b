"""Sections about data and model: domains, backbone, text and the LoRA adapter."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedmerge.config.section import ATTRIBUTE, ATTRIBUTES, DOMAIN_NAME, Section, twice

DEMO_ROOT = "demo"  # value of domains.root that names the bundled synthetic domains


class Domains(Section):
    """Domains that take part."""

    root: str = Field(
        DEMO_ROOT, min_length=1, description="Folder of domain folders; 'demo' for the bundled synthetic ones."
    )
    train: tuple[Annotated[str, Field(pattern=DOMAIN_NAME)], ...] = Field(
        ("beauty", "books", "camping", "coffee"), description="Domains that train an expert and are merged."
    )
    unseen: tuple[Annotated[str, Field(pattern=DOMAIN_NAME)], ...] = Field(
        ("toys",), description="Domains that are only evaluated."
    )
    attributes: tuple[Annotated[str, Field(pattern=ATTRIBUTE)], ...] = Field(
        ATTRIBUTES,
        description="Attributes in the text of an item, in order, with their own limits of tokens if any: "
        "'title,colour=8'. A domain with others is refused; '' lets domains differ.",
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Domains":
        if names := twice(self.train + self.unseen):
            raise ValueError(f"train and unseen name {names} more than once; name each domain once")
        if not self.train:
            raise ValueError("train names no domain; name at least one")
        return self


class BackboneSection(Section):
    """The frozen text encoder."""

    source: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2", min_length=1, description="Hugging Face model id, or a folder."
    )
    pooling: Literal["cls", "mean", "last"] = Field(
        "mean",
        description="Token vector that stands for a text. cls: BERT, BLaIR; mean: sentence-transformers; "
        "last: decoders.",
    )
    weights_sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="Expected SHA-256 of model.safetensors; MiniLM's is built in."
    )


class Text(Section):
    """Token sequences of items and histories."""

    max_attribute_tokens: int = Field(32, ge=1, le=512, description="Tokens that are read of each item attribute.")
    max_items: int = Field(50, ge=1, le=1000, description="Most recent items of a history that are read.")
    max_tokens: int = Field(128, ge=8, le=32768, description="Tokens of the longest sequence.")


class Lora(Section):
    """The adapter that each client trains."""

    rank: int = Field(8, ge=1, le=1024, description="Rank r of an update B A.")
    alpha: int = Field(16, ge=1, description="Numerator of the scaling alpha / rank of an update.")
    target_modules: tuple[str, ...] = Field(
        ("query", "value"), min_length=1, description="Names of the linear layers to adapt, or 'all-linear'."
    )
    ranks: tuple[Annotated[str, Field(pattern=r"^[^=,]+=[1-9][0-9]{0,3}$")], ...] = Field(
        (), description="Ranks of single domains, such as 'books=4,toys=16'; alpha / rank stays the same."
    )

    @model_validator(mode="after")
    def _ranks_once(self) -> "Lora":
        if names := twice([text.partition("=")[0] for text in self.ranks]):
            raise ValueError(f"ranks names {names} more than once; give each domain one rank")
        return self

    def ranks_of(self, domains: Sequence[str]) -> tuple[str, ...]:
        """Return the entries of ``ranks`` for some of the domains."""
        return tuple(text for text in self.ranks if text.partition("=")[0] in domains)

    def of(self, domain: str) -> "Lora":
        """Return the layout of one domain's adapter."""
        ranks = {name: int(rank) for name, _, rank in (text.partition("=") for text in self.ranks)}
        rank = ranks.get(domain, self.rank)
        alpha = self.alpha * rank / self.rank
        whole = int(alpha) if alpha.is_integer() else alpha
        return self.model_copy(update={"rank": rank, "alpha": whole, "ranks": ()})
