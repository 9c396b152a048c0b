"""One experiment, validated. Imports neither torch nor transformers, so a bad file is refused at once.

An experiment file is TOML with one table per section. Flower's run configuration knows flat scalars only, so in files a
list is a comma-separated string and an absent value is ``"none"``; Python sees tuples and None.
"""

import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedmerge.errors import ConfigError

Scalar = str | int | float | bool

Split = Literal["valid", "test"]

DOMAIN_NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # fit to be a folder, part of a comma-separated list, a record key

DEMO_ROOT = "demo"  # value of domains.root that names the bundled synthetic domains

MergeMethod = Literal[
    "average",
    "task-arithmetic",
    "ties",
    "dare",
    "dare-ties",
    "pcb",
    "localize-and-stitch",
    "breadcrumbs",
    "knots-ties",
    "knots-dare",
    "knots-dare-ties",
    "knots-task-arithmetic",
    "tsv",
    "iso-c",
    "iso-cts",
    "mergerec",
    "adamerging",
]

SUMMED_METHODS = (
    "average",
    "task-arithmetic",
    "knots-task-arithmetic",
)  # multiples of the sum, so a secure sum is enough for them
SUMMED_RULES = ("weighted-average", "fedit", "ffa-lora", "flexlora", "fedavgm", "fedadam", "fedyogi")
MIN_SUMMED = 3  # adapters in a secure sum: of two, each client reads the other's off it

LEARNED_METHODS = frozenset({"mergerec", "adamerging"})  # from pseudo-users, so they need the catalogs

Transport = Literal["float32", "float16", "int8", "top-k"]

Tracking = Literal["tensorboard", "mlflow"]

Baseline = Literal["popularity", "last-item", "item-knn", "sasrec"]


def _twice(names: Sequence[str]) -> str:
    return ", ".join(sorted({name for name in names if names.count(name) > 1}))


class Section(BaseModel):
    """Frozen; unknown keys are errors; the file forms of tuples and None are understood."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _from_file_form(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {
            key: _parse(value, cls.model_fields[key].annotation) if key in cls.model_fields else value
            for key, value in data.items()
        }


class Domains(Section):
    """Which domains take part."""

    root: str = Field(
        DEMO_ROOT, min_length=1, description="Folder of domain folders; 'demo' for the bundled synthetic ones."
    )
    train: tuple[Annotated[str, Field(pattern=DOMAIN_NAME)], ...] = Field(
        ("beauty", "books", "camping", "coffee"), description="Domains that train an expert and are merged."
    )
    unseen: tuple[Annotated[str, Field(pattern=DOMAIN_NAME)], ...] = Field(
        ("toys",), description="Domains that are only evaluated."
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Domains":
        if twice := _twice(self.train + self.unseen):
            raise ValueError(f"named twice in train and unseen: {twice}; name each domain once")
        if not self.train:
            raise ValueError("train names no domain; name at least one")
        return self


class BackboneSection(Section):
    """The frozen text encoder."""

    source: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2", min_length=1, description="Hugging Face model id or folder."
    )
    pooling: Literal["cls", "mean", "last"] = Field(
        "mean", description="cls: BERT, BLaIR; mean: sentence-transformers; last: decoders."
    )
    weights_sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="Expected SHA-256 of model.safetensors; MiniLM's is built in."
    )


class Text(Section):
    """How items and histories become token sequences."""

    max_attribute_tokens: int = Field(
        32, ge=1, le=512, description="Each attribute of an item is cut to this many tokens."
    )
    max_items: int = Field(50, ge=1, le=1000, description="Most recent items of a history that are read.")
    max_tokens: int = Field(128, ge=8, le=32768, description="Longest sequence in tokens.")


class Lora(Section):
    """The adapter that each client trains."""

    rank: int = Field(8, ge=1, le=1024, description="r, the rank of an update B A.")
    alpha: int = Field(16, ge=1, description="An update is scaled by alpha / rank.")
    target_modules: tuple[str, ...] = Field(
        ("query", "value"), min_length=1, description="Names of linear layers, or 'all-linear'."
    )
    ranks: tuple[Annotated[str, Field(pattern=r"^[^=,]+=[1-9][0-9]{0,3}$")], ...] = Field(
        (), description="Ranks of single domains, such as 'books=4,toys=16'; alpha / rank stays the same."
    )

    @model_validator(mode="after")
    def _ranks_once(self) -> "Lora":
        if twice := _twice([text.partition("=")[0] for text in self.ranks]):
            raise ValueError(f"ranks names {twice} twice; give each domain one rank")
        return self

    def ranks_of(self, domains: Sequence[str]) -> tuple[str, ...]:
        """The entries of ``ranks`` for some of the domains."""
        return tuple(text for text in self.ranks if text.partition("=")[0] in domains)

    def of(self, domain: str) -> "Lora":
        """The layout of one domain's adapter."""
        ranks = {name: int(rank) for name, _, rank in (text.partition("=") for text in self.ranks)}
        rank = ranks.get(domain, self.rank)
        alpha = self.alpha * rank / self.rank
        whole = int(alpha) if alpha.is_integer() else alpha
        return self.model_copy(update={"rank": rank, "alpha": whole, "ranks": ()})


class Train(Section):
    """Local fine-tuning. It ends at the first budget reached; the learning rate falls linearly to zero over it."""

    learning_rate: float = Field(1e-3, gt=0, le=1, description="Of AdamW, after the warm-up.")
    batch_size: int = Field(64, ge=2, le=4096, description="Users a step; their targets are each other's negatives.")
    temperature: float = Field(0.05, gt=0, le=10, description="Cosines are divided by it.")
    samples: Literal["last", "random-prefix"] = Field(
        "random-prefix",
        description="Target of a user in an epoch: the last training item (as published), or a random one.",
    )
    max_epochs: int | None = Field(None, ge=1, description="Passes over the training users.")
    max_steps: int | None = Field(60, ge=1, description="Optimiser steps.")
    max_minutes: float | None = Field(None, gt=0, description="Wall clock; results then depend on the machine's speed.")
    warmup_steps: int = Field(10, ge=0, description="Steps over which the learning rate rises from zero.")
    validate_every_steps: int = Field(
        20, ge=1, description="Steps between two looks at the validation users; the best adapter is kept."
    )
    validation_users: int | None = Field(500, ge=1, description="Users that early stopping looks at; 'none' for all.")
    patience: int = Field(5, ge=1, description="Validations without a better NDCG@10 before training stops.")
    negatives: Literal["in-batch", "catalog"] = Field(
        "in-batch",
        description="in-batch: the other targets of a step; catalog: every item, its vector held fixed (no gradient).",
    )
    item_refresh_steps: int = Field(
        10, ge=1, description="With catalog negatives: steps between two encodings of the items by the current model."
    )

    @model_validator(mode="after")
    def _some_budget(self) -> "Train":
        if self.max_epochs is None and self.max_steps is None and self.max_minutes is None:
            raise ValueError("max_epochs, max_steps and max_minutes are all 'none'; set at least one")
        return self


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


class Rounds(Section):
    """A federation of several rounds in place of one merge, explained in [federated.md](federated.md)."""

    rule: RoundRule | MergeMethod | None = Field(
        None, description="Rule of a round, or a merging method; 'none': experts are trained once and merged."
    )
    number: int = Field(4, ge=1, description="Rounds; the budgets of train are those of all rounds together.")
    parameters: tuple[Annotated[str, Field(pattern=r"^[a-z0-9_]+=[^=,]+$")], ...] = Field(
        (), description="Of the rule, such as 'num_malicious=1,continuation=frozen'."
    )
    weights: Literal["equal", "users"] = Field("equal", description="Clients count alike, or by their users.")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the clients that is drawn for each round.")
    proximal: float = Field(0.0, ge=0, description="FedProx: clients are drawn to where a round began.")

    @model_validator(mode="after")
    def _consistent(self) -> "Rounds":
        if twice := _twice([text.partition("=")[0] for text in self.parameters]):
            raise ValueError(f"parameters has {twice} twice; give each once")
        return self


class Merge(Section):
    """Which merges are made. Among a method's variants the best on validation is kept."""

    methods: tuple[MergeMethod, ...] = Field(
        ("average", "task-arithmetic", "mergerec"),
        min_length=1,
        description="Methods to try; `fedmerge methods` describes them.",
    )
    task_arithmetic_coefficients: tuple[float, ...] = Field(
        (0.2, 0.4, 0.6, 0.8), min_length=1, description="Variants to try: the factor on the sum of all updates."
    )
    densities: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (), description="Variants to try of every method with a density; empty: each method's own default."
    )
    coefficients: tuple[float, ...] = Field(
        (), description="Variants to try of every method that is not linear: the factor on the merge; empty: 1."
    )
    scope: Literal["tensor", "layer", "model"] = Field(
        "tensor", description="What densities are taken over: a module, a layer, or the whole model."
    )
    space: Literal["full", "core"] = Field(
        "full", description="Coordinates that methods which are not linear merge in; core: cheap, and of low rank."
    )
    output_rank: int | None = Field(
        None, ge=1, description="Rank that merges which are not linear are compressed to; 'none': not at all."
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Merge":
        if twice := _twice(self.methods):
            raise ValueError(f"methods names {twice} twice; name each method once")
        for key in ("task_arithmetic_coefficients", "densities", "coefficients"):
            if twice := _twice([f"{value:g}" for value in getattr(self, key)]):
                raise ValueError(f"{key} has {twice} twice (to six digits, which name the merge); give each once")
        return self


Granularities = tuple[Literal["domain", "layer"], ...]


class MergeRec(Section):
    """Collaborative merging (https://arxiv.org/abs/2601.01753), explained in [collaborative.md](collaborative.md)."""

    preset: Literal["default", "paper"] = Field(
        "default", description="paper: the published value of every key that has its default here, granularities apart."
    )
    granularities: Granularities = Field(
        ("domain", "layer"),
        min_length=1,
        description="Variants to try: one coefficient per domain, or per domain and layer.",
    )
    initialisation: Literal["task-vectors", "ties", "pcb", "localize-and-stitch"] = Field(
        "task-vectors", description="What the coefficients multiply: the updates, or the rows of a method."
    )
    initial_coefficient: float | None = Field(
        None, description="Where every coefficient starts; 'none': 0.2 for task vectors, 1 for rows."
    )
    loss: Literal["rec+kd", "rec", "kd", "mse", "entropy", "entropy+kd", "self", "self+kd"] = Field(
        "rec+kd", description="rec: the expert's first choice, kd: distillation, self: the merge's own first choice."
    )
    rec_weight: float = Field(1.0, ge=0, description="Factor on what stands in the loss beside the distillation.")
    rec_temperature: float = Field(1.0, gt=0, description="Of rec, entropy and self.")
    kd_weight: float = Field(1000.0, ge=0, description="Factor on the distillation loss.")
    temperature: float = Field(0.05, gt=0, description="Of the distillation loss.")
    kd_top_k: int | None = Field(
        None, ge=2, description="Distil the expert's first so many items only; 'none': the whole catalog."
    )
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Of Adam, constant.")
    steps: int = Field(500, ge=1, description="Optimiser steps.")
    batch_size: int = Field(16, ge=1, description="Pseudo-users a step, of all domains together.")
    pseudo_users: Literal["one-item", "subset", "centroid", "chain", "contrastive"] = Field(
        "one-item", description="What a pseudo-user has seen; also for adamerging."
    )
    num_pseudo_users: int | None = Field(
        None,
        ge=1,
        description="Pseudo-users a domain; 'none': as many as items. Subset and centroid need it.",
    )
    refresh_every: int | None = Field(
        None, ge=1, description="Re-encode the student's items every n steps; 'none': never."
    )
    balance_domains: bool = Field(False, description="Draw domains equally often instead of by number of pseudo-users.")
    select_every: int | None = Field(
        None, ge=1, description="Choose the step on held-out pseudo-users, looked at every n steps; 'none': the last."
    )
    try_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="Variants to try: the coefficients after so many steps, besides those at the end."
    )
    prior_weight: float = Field(0.0, ge=0, description="Of the mean squared distance from the initial coefficients.")

    @model_validator(mode="after")
    def _consistent(self) -> "MergeRec":
        if len(set(self.try_steps)) < len(self.try_steps) or max(self.try_steps, default=0) >= self.steps:
            found = ", ".join(map(str, self.try_steps))
            raise ValueError(f"try_steps: found {found}; expected different numbers below steps = {self.steps}")
        if twice := _twice(self.granularities):
            raise ValueError(f"granularities names {twice} twice; name each once")
        if self.pseudo_users in ("subset", "centroid") and self.num_pseudo_users is None:
            raise ValueError(f"pseudo_users = '{self.pseudo_users}' needs a number; set num_pseudo_users, say to 1000")
        if self.pseudo_users == "one-item" and self.num_pseudo_users is not None:
            raise ValueError("pseudo_users = 'one-item' takes every item; use 'subset' for a number of them")
        return self


class AdaMerging(Section):
    """Least entropy of the merged model (https://arxiv.org/abs/2310.02575) on the pseudo-users of mergerec."""

    granularities: Granularities = Field(
        ("domain", "layer"),
        min_length=1,
        description="Variants to try: one coefficient per domain, or per domain and layer.",
    )
    initial_coefficient: float = Field(
        0.3, ge=0, le=1, description="Where every coefficient starts; all stay in [0, 1]."
    )
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Of Adam, constant.")
    steps: int = Field(500, ge=1, description="Optimiser steps.")
    batch_size: int = Field(16, ge=1, description="Pseudo-users a step, of all domains together.")

    @model_validator(mode="after")
    def _distinct(self) -> "AdaMerging":
        if twice := _twice(self.granularities):
            raise ValueError(f"granularities names {twice} twice; name each once")
        return self


class ThroughClients(Section):
    """Coefficients learned through the clients: `privacy.policy = "catalog-private"` ([privacy.md](privacy.md))."""

    mode: Literal["exact", "local-steps"] = Field(
        "exact", description="exact: one message a step, as if the server had the catalogs; local-steps: several."
    )
    local_steps: int = Field(10, ge=1, description="Steps a message in mode local-steps; the changes are averaged.")
    users: Literal["pseudo-users", "own-users"] = Field(
        "pseudo-users", description="own-users: each client's real ones, where its own policy file allows it."
    )
    batch_size: int = Field(32, ge=1, description="Own users a client and step.")
    negatives: int = Field(
        64, ge=1, description="Items of its catalog that a client draws for its own users in a step."
    )
    temperature: float = Field(0.05, gt=0, description="Cosines of own users are divided by it.")


class Evaluation(Section):
    """Full-ranking evaluation on the clients' own users."""

    validation_users: int | None = Field(500, ge=1, description="Users a domain for choosing variants; 'none' for all.")
    test_users: int | None = Field(None, ge=1, description="Users a domain for the final table; 'none' for all.")
    selection_metric: Literal["recall@10", "ndcg@10", "mrr"] = Field(
        "ndcg@10", description="Mean over training domains, unmasked."
    )
    baselines: tuple[Baseline, ...] = Field(
        ("popularity", "last-item"),
        description="Reference rows on test. item-knn takes seconds a domain, sasrec minutes, both on the client.",
    )
    fallback: bool = Field(
        True, description="Choose for each training domain, on validation, between the served merge and its own expert."
    )

    @model_validator(mode="after")
    def _baselines_once(self) -> "Evaluation":
        twice = sorted({name for name in self.baselines if self.baselines.count(name) > 1})
        if twice:
            raise ValueError(f"baselines names {', '.join(twice)} twice; name each baseline once")
        return self


class SASRec(Section):
    """The baseline ``sasrec``: a small Transformer over item ids, trained by each client alone on its own users."""

    hidden_size: int = Field(64, ge=1, le=4096, description="Size of an item vector.")
    layers: int = Field(2, ge=1, le=48, description="Transformer blocks.")
    heads: int = Field(2, ge=1, le=64, description="Attention heads a block.")
    dropout: float = Field(0.5, ge=0, lt=1, description="Share of values that training drops.")
    max_length: int = Field(50, ge=1, le=1000, description="Most recent items of a history that are read.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Of Adam.")
    batch_size: int = Field(64, ge=1, le=4096, description="Users a step.")
    max_epochs: int = Field(100, ge=1, description="Passes over the users, at most.")
    max_minutes: float | None = Field(
        10.0, gt=0, description="Wall clock; where it ends the training, the row depends on the machine's speed."
    )
    validation_users: int | None = Field(
        None, ge=1, description="Users that early stopping looks at after every epoch; 'none' for all."
    )
    patience: int = Field(5, ge=1, description="Epochs without a better NDCG@10 before training stops.")

    @model_validator(mode="after")
    def _heads_divide(self) -> "SASRec":
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size = {self.hidden_size} is no multiple of heads = {self.heads}; change one")
        return self


class Server(Section):
    """What the server waits for and where it finds catalogs."""

    catalogs: str | None = Field(
        None,
        description="Folder of domain folders that hold at least manifest and catalog; 'none': clients send their "
        "catalogs, if the policy lets them.",
    )
    client_keys: str | None = Field(
        None,
        description="Folder of the clients' public keys, NAME.pub, as fedmerge deploy add-client keeps it: answers "
        "that none of them has signed are refused. 'none': signatures are checked, but not whose they are.",
    )
    wait_seconds: float = Field(30.0, gt=0, description="How long to wait for all clients to connect.")
    min_train_clients: int = Field(2, ge=1, description="Fewer working training clients than this: the run fails.")
    messages_at_once: int = Field(
        64, ge=1, description="Clients asked at once, others wait their turn; at least as many as can work at once."
    )
    return_seconds: float = Field(
        180.0,
        ge=0,
        description="How long a client that was lost on the way (process, machine or network) is waited for, in each "
        "phase, to be asked again; 0: it is excluded at once.",
    )
    describe_timeout_seconds: float = Field(
        600.0, gt=0, description="For opening the domain and loading the backbone, and for sending the catalog."
    )
    train_timeout_seconds: float = Field(7200.0, gt=0, description="For training an expert; who is later is excluded.")
    evaluate_timeout_seconds: float = Field(7200.0, gt=0, description="For one evaluation; who is later is excluded.")


class Privacy(Section):
    """What may leave a client; checked on both sides."""

    policy: Literal["adapter+catalog", "adapter", "catalog-private", "aggregate-only"] = Field(
        "adapter+catalog",
        description="adapter+catalog: catalogs are public, as MergeRec has it; adapter: adapter and metric sums only; "
        "catalog-private: the clients learn the coefficients; aggregate-only: sums of adapters only "
        "([privacy.md](privacy.md)).",
    )
    min_users: int = Field(20, ge=1, description="Metric sums over fewer users than this do not leave a client.")
    transport: Transport = Field(
        "float32", description="How experts travel to the server; int8: 8-bit levels, top-k: the largest changes only."
    )
    transport_density: float = Field(0.1, gt=0, le=1, description="top-k: share of each factor's entries that travels.")
    threshold: int | None = Field(
        None,
        ge=2,
        description="aggregate-only: clients that must stay to the end; one fewer learn nothing together. "
        "'none': the smallest majority.",
    )
    value_range: float = Field(
        8.0, gt=0, le=1e4, description="aggregate-only: largest entry of what is summed; larger ones are refused."
    )


class Admission(Section):
    """The gate in front of the merge, explained in [admission.md](admission.md)."""

    action: Literal["flag", "exclude"] | None = Field(
        "flag", description="What happens to an expert that fails a check; 'none': nothing is checked."
    )
    probe_items: int | None = Field(
        None,
        ge=20,
        description="Items of its own catalog that an expert must still tell apart and find by title; the server then "
        "asks for catalogs. 'none': no probe.",
    )
    leave_one_out: bool = Field(
        False,
        description="Average without each domain in turn, evaluated on the validation users of the others. Takes "
        "domains² evaluations.",
    )
    rollback: bool = Field(
        False,
        description="Where the served merge drops a domain below its own expert: serve the best merge without the "
        "domains that failed a check, else those domains their own experts.",
    )

    @model_validator(mode="after")
    def _of_a_gate(self) -> "Admission":
        asked = [key for key in ("probe_items", "leave_one_out", "rollback") if getattr(self, key)]
        if self.action is None and asked:
            raise ValueError(f"action is 'none', but {', '.join(asked)} is set; set action = 'flag', or leave it out")
        return self


class Attack(Section):
    """A benchmark's client that poisons its own training on purpose, explained in [admission.md](admission.md)."""

    domain: str | None = Field(None, description="The training domain that does so; 'none': nobody.")
    kind: Literal["flipped-labels", "promoted-items", "scaled-update"] = Field(
        "flipped-labels",
        description="Targets i become N - 1 - i; or one of a few items; or the expert is trained well and multiplied.",
    )
    strength: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="Share of the targets that are poisoned, or the factor on the update.",
    )
    on_real_data: bool = Field(False, description="Allow it on data that are not synthetic.")

    @model_validator(mode="after")
    def _possible(self) -> "Attack":
        most = {"flipped-labels": 1.0, "promoted-items": 0.95}.get(self.kind, 1000.0)
        if self.domain is not None and self.strength > most:
            raise ValueError(
                f"strength = {self.strength:g}: for {self.kind} it is a share of the targets, at most {most:g}"
                + ("; with all of them promoted no other item is left to rank below" if most == 0.95 else "")
            )
        return self


class DP(Section):
    """Differential privacy, explained in [differential-privacy.md](differential-privacy.md)."""

    mode: Literal["none", "user", "domain-local", "domain-central"] = Field(
        "none",
        description="What one unit is: a user of a domain, or a whole domain that trusts nobody, or the server.",
    )
    epsilon: float | None = Field(None, gt=0, le=1000, description="The noise is chosen to meet it; needs delta.")
    delta: float | None = Field(None, gt=0, lt=1, description="Of the guarantee; well below one over the users.")
    noise_multiplier: float | None = Field(
        None, ge=0, le=10000, description="Noise over the sensitivity, in place of epsilon; 0: clipped, no guarantee."
    )
    clip: float = Field(1.0, gt=0, le=1e6, description="Largest norm of a user's gradient, or of a domain's update.")
    accountant: Literal["prv", "rdp"] = Field(
        "prv", description="prv: tighter, numerical; rdp: an upper bound by Rényi divergences."
    )
    randomness: Literal["system", "seeded"] = Field(
        "system",
        description="seeded: reproducible, for research, no guarantee: whoever knows the seed can subtract the noise.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "DP":
        given = [key for key in ("epsilon", "noise_multiplier") if getattr(self, key) is not None]
        if self.mode == "none":
            if given or self.delta is not None:
                raise ValueError(
                    f"mode = 'none', but {', '.join([*given, *['delta'] * (self.delta is not None)])} is set; set mode "
                    "to 'user' or to a domain mode, or leave the others out"
                )
            return self
        if len(given) != 1:
            found = "both are set" if given else "neither is set"
            raise ValueError(f"mode = '{self.mode}' needs epsilon or noise_multiplier, {found}; set one of the two")
        if self.delta is None and self.noise_multiplier != 0:
            raise ValueError(
                f"{given[0]} is set without delta; Gaussian noise gives no guarantee with delta = 0. Set delta well "
                "below one over the number of users, say 1e-6"
            )
        return self


class Audit(Section):
    """What `fedmerge privacy audit` needs of a training; for simulations only."""

    held_out_users: float = Field(
        0.0, ge=0, le=0.9, description="Share of the users who are left out of training: the audit's non-members."
    )
    canaries: int = Field(
        0, ge=0, le=10000, description="Planted users with random items, trained on; as many are kept out to compare."
    )


class Runtime(Section):
    """Compute on each side."""

    threads_per_client: int = Field(
        1, ge=1, description="PyTorch threads of a client; also its CPUs in the simulation."
    )
    server_threads: int = Field(2, ge=1, description="PyTorch threads of the server.")
    gpus_per_client: float = Field(
        0.0, ge=0, description="GPUs that the simulation gives a client: a share, say 0.25, or whole ones."
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: a GPU where PyTorch sees one, else the CPU."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of matrix products; auto: bfloat16 where the processor multiplies it natively."
    )

    @model_validator(mode="after")
    def _whole_gpus(self) -> "Runtime":
        if self.gpus_per_client > 1 and self.gpus_per_client % 1:
            raise ValueError(
                f"gpus_per_client = {self.gpus_per_client:g}: clients share one GPU or get whole ones; set at most 1, "
                "or a whole number"
            )
        return self


class ExperimentConfig(Section):
    """Everything that defines one experiment."""

    name: str = Field("demo", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="Begins the name of the run folder.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of every random draw.")
    run_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Name of the run folder; 'none': name, time and a random part.",
    )
    resume: bool = Field(False, description="Go on with the run that run_id names, from where it was ended.")
    until: Literal["report", "train"] = Field("report", description="train: end when the experts are on disk.")
    output_dir: str = Field("runs", min_length=1, description="Where run folders are made.")
    cache_dir: str = Field(
        "~/.cache/fedmerge", min_length=1, description="Each client's own disk: its experts, the demo domains."
    )
    tracking: Tracking | None = Field(
        None, description="Copy curves, scores and settings for this viewer into the run folder."
    )
    domains: Domains = Domains()
    backbone: BackboneSection = BackboneSection()
    text: Text = Text()
    lora: Lora = Lora()
    train: Train = Train()
    rounds: Rounds = Rounds()
    merge: Merge = Merge()
    mergerec: MergeRec = MergeRec()
    adamerging: AdaMerging = AdaMerging()
    through_clients: ThroughClients = ThroughClients()
    evaluation: Evaluation = Evaluation()
    sasrec: SASRec = SASRec()
    server: Server = Server()
    privacy: Privacy = Privacy()
    admission: Admission = Admission()
    attack: Attack = Attack()
    dp: DP = DP()
    audit: Audit = Audit()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _consistent(self) -> "ExperimentConfig":
        if self.resume and self.run_id is None:
            raise ValueError("resume = true, but run_id is 'none'; set run_id to the name of the run folder")
        rule = self.rounds.rule
        learned = [name for name in (self.merge.methods if rule is None else (rule,)) if name in LEARNED_METHODS]
        policy = self.privacy.policy
        if learned and policy == "catalog-private":
            self._check_through_clients(learned)
        elif self.through_clients.users == "own-users":
            raise ValueError(
                "through_clients.users = 'own-users', but nothing is learned through the clients; set privacy.policy = "
                "'catalog-private' and add mergerec to merge.methods, or leave users at 'pseudo-users'"
            )
        if self.privacy.transport != "float32" and (self.rounds.rule is not None or policy == "aggregate-only"):
            raise ValueError(
                f"privacy.transport = '{self.privacy.transport}' is for experts that are trained once and merged; set "
                "it to 'float32' with rounds.rule and with privacy.policy = 'aggregate-only'"
            )
        if learned and policy == "adapter" and self.server.catalogs is None:
            catalogs = (
                "which needs the catalogs, but privacy.policy = 'adapter' keeps them at the clients and "
                "server.catalogs is 'none'; set privacy.policy = 'adapter+catalog' or give server.catalogs a folder"
            )
            if rule is not None:
                raise ValueError(f"rounds.rule is {rule}, {catalogs}")
            raise ValueError(f"merge.methods holds {learned[0]}, {catalogs}")
        if self.privacy.policy == "aggregate-only":
            _check_aggregate_only(self)
        _check_admission(self)
        if problem := too_few_for_krum(self.rounds, len(self.domains.train)):
            raise ValueError(problem)
        if strange := sorted({text.partition("=")[0] for text in self.lora.ranks} - {*self.domains.train}):
            raise ValueError(f"lora.ranks names {', '.join(strange)}, not among domains.train; correct the name")
        self._check_dp()
        if self.server.min_train_clients > len(self.domains.train):
            raise ValueError(
                f"server.min_train_clients = {self.server.min_train_clients}, but domains.train names only "
                f"{len(self.domains.train)}; lower it"
            )
        return self

    def _check_dp(self) -> None:
        mode, train = self.dp.mode, self.train
        if mode == "user" and train.negatives == "in-batch":
            raise ValueError(
                "dp.mode = 'user', but train.negatives = 'in-batch': a user's loss then depends on the other users of "
                "the step, and clipping by user bounds nothing; set train.negatives = 'catalog'"
            )
        if mode == "user" and (train.max_steps is None or train.max_epochs or train.max_minutes):
            raise ValueError(
                "dp.mode = 'user' needs the number of steps beforehand, since the noise is chosen for it; set "
                "train.max_steps and leave train.max_epochs and train.max_minutes at 'none'"
            )
        if mode != "none" and self.privacy.policy == "aggregate-only":
            raise ValueError(
                f"dp.mode = '{mode}' with privacy.policy = 'aggregate-only': a secure sum carries no account of what "
                "each client has spent; set dp.mode = 'none', or another policy"
            )
        own = (self.privacy.policy, self.through_clients.users) == ("catalog-private", "own-users")
        if mode != "none" and own and {*self.merge.methods} & LEARNED_METHODS:
            raise ValueError(
                f"dp.mode = '{mode}' with through_clients.users = 'own-users': gradients of coefficients on own users "
                "carry no noise and are not in the account; set through_clients.users = 'pseudo-users'"
            )
        if mode.startswith("domain") and self.rounds.rule is not None:
            raise ValueError(
                f"dp.mode = '{mode}' covers a single merge, but rounds.rule is {self.rounds.rule}; set rounds.rule = "
                "'none', or dp.mode = 'user'"
            )
        if mode == "domain-central" and self.merge.methods != ("average",):
            raise ValueError(
                "dp.mode = 'domain-central' adds noise to the sum of all updates, so merge.methods can only be "
                f"'average', found {', '.join(self.merge.methods)}; set merge.methods = 'average', or dp.mode = "
                "'domain-local', after which any method may follow"
            )

    def _check_through_clients(self, learned: Sequence[str]) -> None:
        """Refuse what cannot be learned through the clients, each with the remedy."""
        section, problems = self.through_clients, []
        if self.rounds.rule is not None:
            problems.append(
                f"rounds.rule = '{learned[0]}' learns from catalogs at the server; set privacy.policy = "
                "'adapter+catalog', or another rule"
            )
        if self.server.catalogs is not None:
            problems.append(
                "server.catalogs gives the server what the policy keeps at the clients; set server.catalogs = 'none', "
                "or privacy.policy = 'adapter'"
            )
        if self.mergerec.select_every is not None:
            problems.append("mergerec.select_every needs losses, which stay at the clients; set it to 'none'")
        if section.mode == "local-steps" and (self.mergerec.try_steps or self.mergerec.prior_weight):
            problems.append(
                "mergerec.try_steps and mergerec.prior_weight need one message a step; set through_clients.mode = "
                "'exact', or leave them out"
            )
        if section.users == "own-users" and "adamerging" in learned:
            problems.append(
                "adamerging has no loss on own users; set through_clients.users = 'pseudo-users', or leave it out"
            )
        if section.users == "own-users" and section.batch_size < self.privacy.min_users:
            problems.append(
                f"through_clients.batch_size = {section.batch_size} own users are fewer than privacy.min_users = "
                f"{self.privacy.min_users}; raise the one, or lower the other"
            )
        if problems:
            raise ValueError(f"privacy.policy = 'catalog-private': {'; '.join(problems)}")


def _check_aggregate_only(config: ExperimentConfig) -> None:
    """Refuse what a server cannot do that sees sums alone.

    Raises:
        ValueError: what, and the remedy.
    """
    hidden = "privacy.policy = 'aggregate-only' shows the server no single adapter"
    rule, num_domains = config.rounds.rule, len(config.domains.train)
    if rule is None:
        if needing := [method for method in config.merge.methods if method not in SUMMED_METHODS]:
            raise ValueError(
                f"merge.methods holds {needing[0]}, which needs every single adapter, but {hidden}; use "
                f"one of {', '.join(SUMMED_METHODS)}, or set privacy.policy = 'adapter'"
            )
        if config.until == "train":
            raise ValueError(f"until = 'train' ends with the experts on the server's disk, but {hidden}; set 'report'")
    elif rule not in SUMMED_RULES:
        why = "lays the factors side by side, which shows every block" if rule == "flora" else "needs every single one"
        raise ValueError(
            f"rounds.rule is {rule}, which {why}, but {hidden}; use one of {', '.join(SUMMED_RULES)}, or set "
            "privacy.policy = 'adapter'"
        )
    elif rule in ("fedit", "ffa-lora") and config.lora.ranks:
        raise ValueError(
            f"lora.ranks differ, but rounds.rule = '{rule}' sums factors of one shape; leave lora.ranks out"
        )
    drawn = num_domains if rule is None else math.ceil(config.rounds.fraction * num_domains)
    if drawn < MIN_SUMMED:
        raise ValueError(
            f"privacy.policy = 'aggregate-only' with {drawn} clients in a sum: with fewer than {MIN_SUMMED} one client "
            "reads another's adapter off the sum; name more domains, or raise rounds.fraction"
        )
    threshold = config.privacy.threshold
    if threshold is not None and not drawn // 2 < threshold <= drawn:
        raise ValueError(
            f"privacy.threshold = {threshold} with {drawn} clients in a sum: expected {drawn // 2 + 1} to {drawn}, "
            "more than half of them and not more than there are; change it, or write 'none'"
        )


def _check_admission(config: ExperimentConfig) -> None:
    admission, attack = config.admission, config.attack
    if admission.probe_items and config.privacy.policy != "adapter+catalog" and config.server.catalogs is None:
        raise ValueError(
            f"admission.probe_items needs the catalogs, but privacy.policy = '{config.privacy.policy}' keeps them at "
            "the clients and server.catalogs is 'none'; leave the probe out or give server.catalogs a folder"
        )
    asked = [key for key in ("probe_items", "leave_one_out", "rollback") if getattr(admission, key)]
    if config.privacy.policy == "aggregate-only" and (asked or admission.action == "exclude"):
        keys = ", ".join(f"admission.{key}" for key in asked or ["action"])
        raise ValueError(
            f"{keys}: the gate looks at single adapters, which privacy.policy = 'aggregate-only' hides from the "
            "server; leave it out, or set privacy.policy = 'adapter'"
        )
    if config.rounds.rule is not None and (asked or admission.action == "exclude"):
        keys = ", ".join(f"admission.{key}" for key in asked or ["action"])
        raise ValueError(
            f"{keys}: the gate stands in front of one merge of experts, but rounds.rule is {config.rounds.rule}; leave "
            "it out, or choose a robust rule (median, trimmed-mean, krum, multi-krum)"
        )
    if attack.domain is not None and config.dp.mode != "none":
        raise ValueError(
            f"attack.domain = {attack.domain!r} with dp.mode = '{config.dp.mode}': who poisons its training keeps no "
            "promise of privacy; leave one of the two out"
        )
    if attack.domain is not None and attack.domain not in config.domains.train:
        raise ValueError(f"attack.domain = {attack.domain!r} is not among domains.train; only who trains can poison")


def too_few_for_krum(rounds: Rounds, num_domains: int) -> str:
    """What is wrong where Krum or Multi-Krum has fewer than 2f + 3 clients in a round; empty if nothing is."""
    clients = max(1, math.ceil(rounds.fraction * num_domains))
    given = dict(text.split("=", 1) for text in rounds.parameters).get("num_malicious", "1")
    if rounds.rule not in ("krum", "multi-krum") or not given.isdecimal() or clients >= 2 * int(given) + 3:
        return ""
    return (
        f"rounds.rule is {rounds.rule} with num_malicious = {given}, and {clients} clients take part in a round; its "
        f"proof needs at least 2 · num_malicious + 3 = {2 * int(given) + 3}. Name more domains, or lower num_malicious "
        "in rounds.parameters"
    )


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment file.

    Args:
        path: TOML file, or None for the defaults.
        overrides: ``key=value`` pairs with dotted keys, values as in TOML (quotes may be left out).

    Raises:
        ConfigError: every problem at once.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = flatten(tomllib.loads(path.read_text(encoding="utf-8-sig")))
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}). Give the path of an experiment file."
            ) from error
        except (ValueError, RecursionError) as error:  # TOML that is none, bytes that are no UTF-8, nesting without end
            raise ConfigError(f"{path}: not valid TOML: {error}.") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override!r}: expected key=value, for example --set train.max_steps=100.")
        values[key.strip()] = _toml_value(text.strip())
    return from_flat(values, where=str(path) if path else "settings")


def from_flat(flat: Mapping[str, Any], where: str = "run config") -> ExperimentConfig:
    """Build the experiment from dotted keys, as Flower hands them over.

    Raises:
        ConfigError: every problem at once.
    """
    nested: dict[str, Any] = {}
    known = set(to_flat(ExperimentConfig()))
    problems = []
    for key, value in flat.items():
        if key in ExperimentConfig.model_fields and key not in known:
            problems.append(f"{key}: found {value!r}, but this is a section; write [{key}] and its keys below")
            continue
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            problems.append(
                f"{key}: unknown key; " + (f"did you mean {close[0]}?" if close else "docs/config.md lists all keys")
            )
            continue
        section, dot, field = key.rpartition(".")
        (nested.setdefault(section, {}) if dot else nested)[field] = value
    try:
        config = ExperimentConfig.model_validate(nested)
    except ValidationError as error:
        problems += [describe_problem(problem) for problem in error.errors(include_url=False)]
    if problems:
        raise ConfigError(
            f"{where}: {len(problems)} problem{'s' * (len(problems) > 1)}\n" + "\n".join(f"  {p}" for p in problems)
        )
    return config


def to_flat(config: ExperimentConfig) -> dict[str, Scalar]:
    """The experiment as dotted keys and scalars; :func:`from_flat` reverses it."""
    return {key: _to_scalar(value) for key, value in flatten(config.model_dump()).items()}


def to_toml(config: ExperimentConfig) -> str:
    """The whole experiment as a TOML file."""
    lines: list[str] = []
    for key, value in to_flat(config).items():
        section, dot, field = key.rpartition(".")
        if dot and f"[{section}]" not in lines:
            lines += ["", f"[{section}]"]
        lines.append(f"{field} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def with_absolute_paths(config: ExperimentConfig, start: Path) -> ExperimentConfig:
    """Resolve relative paths against ``start``; ``demo`` and hub ids stay as they are."""

    def absolute(path: str) -> str:
        return str((start / Path(path).expanduser()).resolve())

    source = config.backbone.source
    is_folder = source.startswith((".", "~", "/")) or (start / source).is_dir()
    return config.model_copy(
        update={
            "output_dir": absolute(config.output_dir),
            "cache_dir": absolute(config.cache_dir),
            "domains": config.domains.model_copy(
                update={
                    "root": config.domains.root if config.domains.root == DEMO_ROOT else absolute(config.domains.root)
                }
            ),
            "backbone": config.backbone.model_copy(update={"source": absolute(source) if is_folder else source}),
            "server": config.server.model_copy(
                update={
                    "catalogs": config.server.catalogs and absolute(config.server.catalogs),
                    "client_keys": config.server.client_keys and absolute(config.server.client_keys),
                }
            ),
        }
    )


def _to_scalar(value: Any) -> Scalar:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return typing.cast(Scalar, value)


def _parse(value: Any, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, bool) and {int, float} & {annotation, *arguments}:
        return str(value).lower()  # refused with this text; by itself pydantic takes true for 1
    if not isinstance(value, str):
        # --set takes 0.5 for a number
        return (value,) if origin is tuple and isinstance(value, (int, float)) else value
    if value.strip() == "none" and (origin in (typing.Union, types.UnionType)) and type(None) in arguments:
        return None
    if origin is tuple:
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def describe_problem(problem: Any) -> str:
    """One of pydantic's problems in a line: where, what, and what was found."""
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    found = "" if isinstance(problem["input"], (Mapping, BaseModel)) else f" (found {problem['input']!r})"
    return f"{where}: {message}{found}" if where else f"{message}"
