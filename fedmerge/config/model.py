"""Sections about data and model: domains, backbone, text and the LoRA adapter."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from fedmerge.config.section import ATTRIBUTE, ATTRIBUTES, DOMAIN_NAME, Section, twice
from fedmerge.storage.addresses import address_problem, is_address

DEMO_ROOT = "demo"  # value of domains.root that names the bundled synthetic domains


class Domains(Section):
    """Domains that take part."""

    root: str = Field(
        DEMO_ROOT,
        min_length=1,
        description="Folder of domain folders; 'demo' for the bundled synthetic ones; or the address of one on shared "
        "storage, for example s3://bucket/shops, from which each client copies its domain to cache_dir.",
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
        if is_address(self.root) and (problem := address_problem(self.root)):
            raise ValueError(f"root: {problem}")
        if names := twice(self.train + self.unseen):
            raise ValueError(f"train and unseen name {names} more than once; name each domain once")
        if not self.train:
            raise ValueError("train names no domain; name at least one")
        return self


class BackboneSection(Section):
    """The frozen text encoder."""

    LATER: ClassVar[tuple[str, ...]] = (
        "family",
        "history_prompt",
        "item_prompt",
        "eos",
        "attention",
        "dimension",
        "max_positions",
        "quantisation",
    )

    source: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2", min_length=1, description="Hugging Face model id, or a folder."
    )
    family: Literal[
        "auto", "plain", "encoder", "blair", "decoder", "qwen3-embedding", "e5-mistral", "llm2vec", "recformer"
    ] = Field(
        "auto",
        description="Conventions of the encoder. auto: read from the model's own files; plain: the mean of all tokens, "
        "nothing is read; others: those of a published family.",
    )
    pooling: Literal["auto", "cls", "mean", "mean-text", "last"] = Field(
        "auto",
        description="Token vector that stands for a text. cls: BLaIR; mean: sentence-transformers; mean-text: mean "
        "without prompt and leading special tokens (LLM2Vec); last: decoders; auto: as the family says.",
    )
    history_prompt: str | None = Field(
        None, max_length=2000, description="Text before a history; '' for no prompt, none for that of the family."
    )
    item_prompt: str | None = Field(
        None, max_length=2000, description="Text before an item; '' for no prompt, none for that of the family."
    )
    eos: Literal["auto", "tokenizer", "append"] = Field(
        "auto",
        description="End-of-sequence token. tokenizer: only if the tokenizer adds it; append: exactly one in any case, "
        "after truncation; auto: as the family says.",
    )
    attention: Literal["auto", "causal", "both-ways"] = Field(
        "auto",
        description="Direction of the attention. both-ways also switches a decoder; both values are tested when the "
        "model is loaded. auto: as the family says, otherwise the model's own.",
    )
    dimension: int | None = Field(
        None, ge=1, description="First dimensions of a vector that are kept (MRL), normalised again; none: all."
    )
    max_positions: int | None = Field(
        None, ge=8, description="Limit of text.max_tokens below the model's own; none: that of the family."
    )
    quantisation: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="Bits of the frozen linear layers, under adapters in full precision. int8: a scale a row; nf4: 4 "
        "bits, with bitsandbytes. Vectors are others than without, so all parties need the same.",
    )
    weights_sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="Expected SHA-256 of model.safetensors; MiniLM's is built in."
    )

    def cache_inputs(self) -> dict[str, Any]:
        """Return the settings for the key of a cache; the default encoder's pooling is the mean by its own files."""
        found = super().cache_inputs()
        if self.pooling == "auto" and self.source == type(self).model_fields["source"].default:
            found["pooling"] = "mean"
        return found


class Text(Section):
    """Token sequences of items and histories."""

    LATER: ClassVar[tuple[str, ...]] = ("order",)

    max_attribute_tokens: int = Field(32, ge=1, le=512, description="Tokens that are read of each item attribute.")
    max_items: int = Field(50, ge=1, le=1000, description="Most recent items of a history that are read.")
    max_tokens: int = Field(128, ge=8, le=32768, description="Tokens of the longest sequence.")
    order: Literal["newest-first", "newest-last"] = Field(
        "newest-first",
        description="Order of the items in a history. newest-last: for causal models, whose last token is read; too "
        "long histories are cut at the beginning instead of the end. The newest items are kept in both.",
    )


class Lora(Section):
    """The adapter that each client trains."""

    LATER: ClassVar[tuple[str, ...]] = ("variant",)

    rank: int = Field(8, ge=1, le=1024, description="Rank r of an update B A.")
    alpha: int = Field(16, ge=1, description="Numerator of the scaling alpha / rank of an update.")
    variant: Literal["lora", "rslora"] = Field(
        "lora", description="rslora: the scaling is alpha / √rank (rank-stabilised LoRA)."
    )
    target_modules: tuple[str, ...] = Field(
        ("query", "value"),
        min_length=1,
        description="Linear layers to adapt: their names, 'attention' or 'mlp' for those of the model's type, or "
        "'all-linear'.",
    )
    ranks: tuple[Annotated[str, Field(pattern=r"^[^=,]+=[1-9][0-9]{0,3}$")], ...] = Field(
        (),
        description="Ranks of single domains, such as 'books=4,toys=16'; alpha / rank stays the same, with rslora "
        "alpha.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_dora(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("variant") == "dora":
            raise ValueError(
                "variant = 'dora' is not B A alone: its magnitudes depend on the weights of the backbone, and a sum of "
                "such updates is none; take 'lora' or 'rslora'"
            )
        return data

    @model_validator(mode="after")
    def _ranks_once(self) -> "Lora":
        if names := twice([text.partition("=")[0] for text in self.ranks]):
            raise ValueError(f"ranks names {names} more than once; give each domain one rank")
        return self

    @property
    def scaled_alpha(self) -> float:
        """The scaling of an update times its rank: PEFT's alpha without rank stabilisation."""
        return self.alpha if self.variant == "lora" else self.alpha * math.sqrt(self.rank)

    def ranks_of(self, domains: Sequence[str]) -> tuple[str, ...]:
        """Return the entries of ``ranks`` for some of the domains."""
        return tuple(text for text in self.ranks if text.partition("=")[0] in domains)

    def of(self, domain: str) -> "Lora":
        """Return the layout of one domain's adapter."""
        ranks = {name: int(rank) for name, _, rank in (text.partition("=") for text in self.ranks)}
        rank = ranks.get(domain, self.rank)
        alpha = self.alpha * rank / self.rank if self.variant == "lora" else float(self.alpha)
        whole = int(alpha) if alpha.is_integer() else alpha
        return self.model_copy(update={"rank": rank, "alpha": whole, "ranks": ()})
