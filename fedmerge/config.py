"""One experiment, validated. Imports neither torch nor transformers, so a bad file is refused at once.

An experiment file is TOML with one table per section. Flower's run configuration knows flat scalars only, so in files a
list is a comma-separated string and an absent value is ``"none"``; Python sees tuples and None.
"""

import difflib
import json
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

LEARNED_METHODS = frozenset({"mergerec", "adamerging"})  # from pseudo-users, so they need the catalogs

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
    wait_seconds: float = Field(30.0, gt=0, description="How long to wait for all clients to connect.")
    min_train_clients: int = Field(2, ge=1, description="Fewer working training clients than this: the run fails.")
    messages_at_once: int = Field(
        64, ge=1, description="Clients asked at once, others wait their turn; at least as many as can work at once."
    )
    describe_timeout_seconds: float = Field(
        600.0, gt=0, description="For opening the domain and loading the backbone, and for sending the catalog."
    )
    train_timeout_seconds: float = Field(7200.0, gt=0, description="For training an expert; who is later is excluded.")
    evaluate_timeout_seconds: float = Field(7200.0, gt=0, description="For one evaluation; who is later is excluded.")


class Privacy(Section):
    """What may leave a client; checked on both sides."""

    policy: Literal["adapter+catalog", "adapter"] = Field(
        "adapter+catalog",
        description="adapter+catalog: catalogs are public, as MergeRec has it; adapter: adapter and metric sums only.",
    )
    min_users: int = Field(20, ge=1, description="Metric sums over fewer users than this do not leave a client.")


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
    evaluation: Evaluation = Evaluation()
    sasrec: SASRec = SASRec()
    server: Server = Server()
    privacy: Privacy = Privacy()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _consistent(self) -> "ExperimentConfig":
        if self.resume and self.run_id is None:
            raise ValueError("resume = true, but run_id is 'none'; set run_id to the name of the run folder")
        rule = self.rounds.rule
        learned = [name for name in (self.merge.methods if rule is None else (rule,)) if name in LEARNED_METHODS]
        if learned and self.privacy.policy == "adapter" and self.server.catalogs is None:
            catalogs = (
                "which needs the catalogs, but privacy.policy = 'adapter' keeps them at the clients and "
                "server.catalogs is 'none'; set privacy.policy = 'adapter+catalog' or give server.catalogs a folder"
            )
            if rule is not None:
                raise ValueError(f"rounds.rule is {rule}, {catalogs}")
            raise ValueError(f"merge.methods holds {learned[0]}, {catalogs}")
        if strange := sorted({text.partition("=")[0] for text in self.lora.ranks} - {*self.domains.train}):
            raise ValueError(f"lora.ranks names {', '.join(strange)}, not among domains.train; correct the name")
        if self.server.min_train_clients > len(self.domains.train):
            raise ValueError(
                f"server.min_train_clients = {self.server.min_train_clients}, but domains.train names only "
                f"{len(self.domains.train)}; lower it"
            )
        return self


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
                update={"catalogs": config.server.catalogs and absolute(config.server.catalogs)}
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
