"""The sections of an experiment, their keys, defaults and bounds."""

import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

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

OWN_METHOD = r"^[\w.]+:\w+$"  # package.module:function; imported by the server alone, never to check a configuration


def _merge_method(name: str) -> str:
    if name not in typing.get_args(MergeMethod) and not re.fullmatch(OWN_METHOD, name):
        raise ValueError(f"expected package.module:function or one of {', '.join(typing.get_args(MergeMethod))}")
    return name


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
    """A federation of several rounds in place of one merge, explained in [rounds.md](reference/rounds.md)."""

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

    methods: tuple[
        Annotated[
            str,
            AfterValidator(_merge_method),
            WithJsonSchema({"anyOf": [{"enum": list(typing.get_args(MergeMethod))}, {"pattern": OWN_METHOD}]}),
        ],
        ...,
    ] = Field(
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


PAPER_STEPS = 500  # of MergeRec, as published


class MergeRec(Section):
    """Collaborative merging (https://arxiv.org/abs/2601.01753), explained in [mergerec.md](reference/mergerec.md)."""

    preset: Literal["default", "paper"] = Field(
        "default", description="paper: the published value of every key that has its default here, granularities apart."
    )
    granularities: Granularities = Field(
        ("layer",),
        min_length=1,
        description="Variants to try: one coefficient per domain, or per domain and layer.",
    )
    initialisation: Literal["task-vectors", "ties", "pcb", "localize-and-stitch"] = Field(
        "task-vectors", description="What the coefficients multiply: the updates, or the rows of a method."
    )
    initial_coefficient: float | None = Field(
        None, description="Where every coefficient starts; 'none': 1/√K for task vectors of K domains, 1 for rows."
    )
    loss: Literal["rec+kd", "rec", "kd", "mse", "entropy", "entropy+kd", "self", "self+kd"] = Field(
        "kd", description="rec: the expert's first choice, kd: distillation, self: the merge's own first choice."
    )
    rec_weight: float = Field(1.0, ge=0, description="Factor on what stands in the loss beside the distillation.")
    rec_temperature: float = Field(1.0, gt=0, description="Of rec, entropy and self.")
    kd_weight: float = Field(1000.0, ge=0, description="Factor on the distillation loss.")
    temperature: float = Field(0.05, gt=0, description="Of the distillation loss.")
    kd_top_k: int | None = Field(
        50, ge=2, description="Distil the expert's first so many items only; 'none': the whole catalog."
    )
    learning_rate: float = Field(5e-3, gt=0, le=1, description="Of Adam, constant.")
    steps: int = Field(100, ge=1, description="Optimiser steps.")
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
    balance_domains: bool = Field(True, description="Draw domains equally often; false: by number of pseudo-users.")
    select_every: int | None = Field(
        None, ge=1, description="Choose the step on held-out pseudo-users, looked at every n steps; 'none': the last."
    )
    try_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="Variants to try: the coefficients after so many steps, besides those at the end."
    )
    prior_weight: float = Field(0.0, ge=0, description="Of the mean squared distance from the initial coefficients.")

    @model_validator(mode="after")
    def _consistent(self) -> "MergeRec":
        if len(set(self.try_steps)) < len(self.try_steps) or max(self.try_steps, default=0) >= self.steps_made:
            found = ", ".join(map(str, self.try_steps))
            raise ValueError(f"try_steps: found {found}; expected different numbers below steps = {self.steps_made}")
        if twice := _twice(self.granularities):
            raise ValueError(f"granularities names {twice} twice; name each once")
        if self.pseudo_users in ("subset", "centroid") and self.num_pseudo_users is None:
            raise ValueError(f"pseudo_users = '{self.pseudo_users}' needs a number; set num_pseudo_users, say to 1000")
        if self.pseudo_users == "one-item" and self.num_pseudo_users is not None:
            raise ValueError("pseudo_users = 'one-item' takes every item; use 'subset' for a number of them")
        return self

    @property
    def steps_made(self) -> int:
        """The optimiser steps under the preset."""
        published = self.preset == "paper" and self.steps == type(self).model_fields["steps"].default
        return PAPER_STEPS if published else self.steps


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
    """Coefficients learned by the clients: `privacy.policy = "catalog-private"` ([policies](reference/policies.md))."""

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
        "that none of them has signed are refused, and a key registered for another domain. 'none': signatures are "
        "checked, but not whose they are.",
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
        "([policies](reference/policies.md)).",
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
    """The gate in front of the merge, explained in [admission.md](reference/admission.md)."""

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
    """A benchmark's client that poisons its own training, explained in [admission.md](reference/admission.md)."""

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
    """Differential privacy, explained in [differential-privacy.md](reference/differential-privacy.md)."""

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
    coefficient_clip: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="Largest norm of an answer about merging coefficients, or by user of a user's part of it.",
    )
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
    """What `fedmerge privacy audit`, or a benchmark that audits, needs of a training; for simulations only."""

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
