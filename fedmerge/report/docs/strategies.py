"""The table of all strategies: what each sends, costs and allows. ``make docs`` writes it into docs/strategies.md.

Merging methods and rules of rounds come from their own tables; what is not a method or a rule is listed here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from fedmerge.config import SUMMED_METHODS, SUMMED_RULES, from_flat
from fedmerge.config.privacy import Policy
from fedmerge.errors import ConfigError
from fedmerge.federated.rules import RULES, Rule
from fedmerge.merging.methods import METHODS, Method
from fedmerge.merging.parameters import markdown_table

POLICIES = get_args(Policy)
CATALOG_PRIVATE = "catalog-private"
BY_USER: Mapping[str, object] = {
    "dp.mode": "user",
    "dp.epsilon": 4.0,
    "dp.delta": 1e-6,
    "train.negatives": "catalog",
}
COHORT = ("beauty", "books", "camping", "coffee", "garden")  # enough for every rule
ONE_TRAINING = "1"
FROM_CATALOGS = ("train", "query.catalog")
CATALOG_UP = "P up, a catalog up"


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to make one recommender of several domains.

    Attributes:
        name: what the documentation calls it.
        settings: flat keys of an experiment that asks for it.
        messages: messages beside ``query.describe`` and ``evaluate``, which every run has.
        travels: bytes of a run for K domains, P bytes of an adapter, G groups of layers, up at the client's side.
        trainings: trainings of a client.
        source: paper or standard.
        use: when to take it.
    """

    name: str
    settings: Mapping[str, object]
    messages: tuple[str, ...]
    travels: str
    trainings: str
    source: str
    use: str


OTHERS: tuple[Strategy, ...] = (
    Strategy(
        "contrastive pseudo-users",
        {"merge.methods": "mergerec", "mergerec.pseudo_users": "contrastive-adaptive"},
        FROM_CATALOGS,
        CATALOG_UP,
        ONE_TRAINING,
        "Taesar-style (arXiv:2602.22743)",
        "histories shall show what is special about each domain",
    ),
    Strategy(
        "contrastive teacher",
        {"merge.methods": "mergerec", "mergerec.teacher": "contrastive"},
        FROM_CATALOGS,
        CATALOG_UP,
        ONE_TRAINING,
        "Taesar-style (arXiv:2602.22743)",
        "the merge shall learn where an expert differs from the others",
    ),
    Strategy(
        "union similarity",
        {"merge.methods": "mergerec", "mergerec.loss": "similarity"},
        FROM_CATALOGS,
        CATALOG_UP,
        ONE_TRAINING,
        "FedCIA-style (arXiv:2504.14208)",
        "the merge shall relate items of different domains as the experts do on average",
    ),
    Strategy(
        "learned through clients",
        {"merge.methods": "mergerec", "privacy.policy": CATALOG_PRIVATE},
        ("train", "query.cohort", "query.gradient"),
        "P up, K · P down, K · G numbers a step",
        ONE_TRAINING,
        "MergeRec's objective (arXiv:2601.01753), computed by the clients",
        "catalogs are private too",
    ),
    Strategy(
        "own users",
        {"merge.methods": "mergerec", "privacy.policy": CATALOG_PRIVATE, "through_clients.users": "own-users"},
        ("train", "query.cohort", "query.gradient"),
        "P up, K · P down, K · G numbers a step",
        ONE_TRAINING,
        "our own: the training loss on real users",
        "the coefficients shall fit real users, and the clients allow it",
    ),
    Strategy(
        "layer-wise search through clients",
        {"merge.methods": "rmm-style", "rmm.reward": "validation", "privacy.policy": CATALOG_PRIVATE},
        ("train", "query.cohort", "query.layer_map"),
        "P up, K · P down, G numbers down and 2 up an episode",
        ONE_TRAINING,
        "RMM-style (arXiv:2503.21272)",
        "catalogs are private too, and sums over real users may leave for every episode",
    ),
    Strategy(
        "personal merges",
        {"personal.directions": "module", "privacy.policy": CATALOG_PRIVATE},
        ("train", "query.cohort", "train.personal"),
        "P up, K · P down",
        "1, and a fit of (K − 1) · G numbers",
        "FeDecider-style (arXiv:2602.16034)",
        "each domain may be served a merge of its own",
    ),
    *(
        Strategy(
            f"weaving: {schedule}",
            {"weave.schedule": schedule, "privacy.policy": CATALOG_PRIVATE},
            ("train", "train.weave"),
            f"P up, {number}P down and up",
            f"1, and {number.removesuffix(' · ') or 1} of weave.steps",
            "WeaveRec-style (arXiv:2510.26546)" + known_as,
            use,
        )
        for schedule, number, known_as, use in (
            ("all", "(K − 1) · ", "", "a merge is bad where single experts are, and training is cheap"),
            ("sampled", "weave.sources · ", "", "as all, with many domains"),
            ("ring", "weave.sources · ", "", "as sampled, each adapter continued equally often"),
            ("relay", "(K − 1) · ", "; cyclic weight transfer", "an adapter shall see all domains one after another"),
            ("mean", "", "; FedAvg, then local fine-tuning", "one further training at each client is enough"),
        )
    ),
    Strategy(
        "similarity of shared items",
        {"weave.schedule": "similarity"},
        ("query.catalog", "train", "query.similarity", "train.weave"),
        "P and a catalog up, P down and up, n · q numbers up, n · K · q down (n shared items, q ≤ 64, float16)",
        "1, and 1 of weave.steps",
        "FedCIA-style (arXiv:2504.14208)",
        "shops of one catalog whose experts share no space; of one backbone they do, so expect the average",
    ),
    Strategy(
        "fedecider-style",
        {"personal.directions": "module", "personal.universal": True, "privacy.policy": CATALOG_PRIVATE},
        ("train", "query.cohort", "train.personal"),
        "P up, K · P down, K · G numbers up",
        "1, and a fit of (K − 1) · G numbers",
        "the universal form of FeDecider-style (arXiv:2602.16034)",
        "unseen domains shall be served the mean of the personal merges",
    ),
    Strategy(
        "local heads",
        {"head.kind": "local"},
        ("train", "train.head"),
        "P up, a merge down",
        "1, and a head",
        "SASRec (arXiv:1808.09781) over item vectors, as LLM2Rec (arXiv:2506.21579) has them",
        "a domain has enough users of its own; the head never leaves",
    ),
    Strategy(
        "federated head",
        {"head.kind": "federated"},
        ("train", "train.head_round", "train.head"),
        "P up, a merge down, a head up and down in every round",
        "1, head.rounds short ones, and a head",
        "our own: anchored in the text vectors",
        "domains without users enough for a head, or unseen ones",
    ),
    Strategy(
        "augmented histories",
        {"train.augment": "insert=0.3,substitute=0.1"},
        ("train",),
        "P up",
        ONE_TRAINING,
        "CoSeRec (arXiv:2108.06479), -style",
        "short histories, at no further encoding; with any merge or rule; not measured yet",
    ),
    Strategy(
        "auxiliary losses",
        {"train.objectives": "sp=0.1,coserec=0.1"},
        ("train",),
        "P up",
        "1, with up to twice the encodings for each loss",
        "S3-Rec (arXiv:2008.07873) and CoSeRec (arXiv:2108.06479), -style",
        "validation finds a weight that helps; with any merge or rule; not measured yet",
    ),
    Strategy(
        "next titles",
        {"train.objective": "csft"},
        ("train",),
        "P up",
        ONE_TRAINING,
        "CSFT, LLM2Rec-style (arXiv:2506.21579)",
        "the backbone is a decoder with its language-model head; with any merge or rule; not measured yet",
    ),
    Strategy(
        "next titles, then titles on the server",
        {
            "train.objective": "csft",
            "backbone.attention": "both-ways",
            "backbone.pooling": "mean",
            "mntp.steps": 1000,
            "simcse.steps": 1000,
        },
        FROM_CATALOGS,
        CATALOG_UP,
        ONE_TRAINING,
        "LLM2Rec-style (arXiv:2506.21579)",
        "as next titles, where the server has the catalogs and a GPU; not measured yet",
    ),
    Strategy(
        "contrasted heads",
        {"head.kind": "local", "head.contrast": 0.1},
        ("train", "train.head"),
        "P up, a merge down",
        "1, and a head",
        "CoSeRec (arXiv:2108.06479), -style",
        "as local heads, where validation finds a weight that helps; not measured yet",
    ),
)


def strategies() -> tuple[Strategy, ...]:
    """Return all strategies: merging methods, those of OTHERS, rules of rounds."""
    return (
        *(_of_method(name, row) for name, row in METHODS.items()),
        *OTHERS,
        *(_of_rule(name, row) for name, row in RULES.items()),
    )


def strategies_table() -> str:
    """Return all strategies as a Markdown table."""
    rows = [
        (
            strategy.name,
            ", ".join(f"`{key} = {_written(value)}`" for key, value in strategy.settings.items()),
            ", ".join(f"`{message}`" for message in strategy.messages),
            strategy.travels,
            strategy.trainings,
            ", ".join(f"`{policy}`" for policy in policies_of(strategy)),
            "yes" if is_allowed(strategy, BY_USER) else "refused",
            strategy.source,
            strategy.use,
        )
        for strategy in strategies()
    ]
    header = ("strategy", "settings", "messages", "travels", "trainings", "policies", "DP by user", "source", "use")
    return markdown_table(header, rows)


def policies_of(strategy: Strategy) -> Iterator[object]:
    """Yield the policies that an experiment with this strategy may have; one that it names itself is the only one."""
    named = strategy.settings.get("privacy.policy")
    wanted = POLICIES if named is None else (named,)
    return (policy for policy in wanted if is_allowed(strategy, {"privacy.policy": policy}))


def is_allowed(strategy: Strategy, more: Mapping[str, object]) -> bool:
    """Return True if an experiment with this strategy and more settings is valid."""
    method = METHODS.get(str(strategy.settings.get("merge.methods")))
    cohort = COHORT[: method.most_domains if method else None]
    base = {"name": "strategy", "domains.train": ",".join(cohort), "merge.methods": "average"}
    try:
        from_flat({**base, **strategy.settings, **more})
    except ConfigError:
        return False
    return True


def _of_method(name: str, method: Method) -> Strategy:
    messages = FROM_CATALOGS if method.learned else ("train",)
    travels = CATALOG_UP if method.learned else "P up"
    if name in SUMMED_METHODS:
        travels += ", or a masked sum"
    if method.signals:
        travels += ", 2 numbers a module up"
    return Strategy(name, {"merge.methods": name}, messages, travels, ONE_TRAINING, method.source, method.use)


def _of_rule(name: str, rule: Rule) -> Strategy:
    travels = "a round: P down, P up" if rule.trained == "A and B" else "a round: B down, B up"
    if name in SUMMED_RULES:
        travels += ", or a masked sum"
    trainings = "rounds.number, of a share of the budget each"
    return Strategy(f"rounds: {name}", {"rounds.rule": name}, ("train",), travels, trainings, rule.source, rule.what)


def _written(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()  # TOML has true, not True
