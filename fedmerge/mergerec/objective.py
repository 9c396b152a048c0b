"""The objective of MergeRec and AdaMerging: settings, loss terms, and their weighted sum, the loss.

Most terms are means over pseudo-users and live here; "similarity" compares items, see
:mod:`fedmerge.mergerec.similarity`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from fedmerge.config import MergeRec, teacher_problem
from fedmerge.errors import ConfigError
from fedmerge.mergerec.contrast import adaptive_contrast
from fedmerge.mergerec.vectors import TASK_VECTORS
from fedmerge.merging.methods import METHODS
from fedmerge.merging.parameters import Parameter, check_parameter

_KEYS = MergeRec()
STUDIED: dict[str, Parameter] = {  # settings that no experiment file has: no study found a better value
    "rec_weight": Parameter(1.0, low=0.0),
    "rec_temperature": Parameter(1.0, above=0.0),
    "kd_weight": Parameter(1000.0, low=0.0),
    "similarity_weight": Parameter(10.0, low=0.0),
    "temperature": Parameter(0.05, above=0.0),
    "refresh_every": Parameter(None, low=1),
    "balance_domains": Parameter(True),
    "select_every": Parameter(None, low=1),
    "prior_weight": Parameter(0.0, low=0.0),
}


@dataclass(frozen=True, slots=True)
class MergeRecSettings:
    """Settings of learned coefficients.

    Defaults are those of ``fedmerge.config.MergeRec``; bounds are in ``METHODS["mergerec"]`` and STUDIED.

    Attributes:
        granularity: "domain": one coefficient per domain; "layer": one per domain and group of the stack.
        initialisation: the vectors that the coefficients multiply, a key of INITIALISATIONS.
        initial_coefficient: initial value of every coefficient; None: 1/√K for the task vectors of K domains (the sum
            of K orthogonal updates of equal norm then has that norm), 1 for rows (the method's own merge).
        loss: a key of LOSSES.
        teacher: "expert": L_kd distils the expert's scores; "contrastive": those of
            :func:`fedmerge.mergerec.contrast.adaptive_contrast` with the other experts' average. Other terms have the
            expert.
        rec_weight: factor on the term of the loss that is neither distillation nor similarity.
        rec_temperature: divisor of the logits in "rec", "entropy" and "self".
        kd_weight: factor on L_kd.
        similarity_weight: factor on the mean squared difference from the experts' mean item similarity.
        temperature: T of L_kd.
        kd_top_k: L_kd compares only the teacher's top-k items; None: all (paper).
        learning_rate: constant learning rate of Adam.
        steps: optimisation steps.
        batch_size: pseudo-users per step, over all domains.
        pseudo_users: a kind of ``fedmerge.mergerec.pseudo_users``.
        num_pseudo_users: pseudo-users per domain; None: those of the kind, see
            :func:`fedmerge.mergerec.pseudo_users.pseudo_domain`.
        refresh_every: steps after which the student's item vectors are encoded again; None: never (paper).
        balance_domains: draw all domains equally often; False: in proportion to their pseudo-users (paper).
        select_every: choose the step on held-out pseudo-users, validated every n steps; None: the last step (paper).
        domains_per_step: number of domains whose coefficients a step learns, drawn for every step; None, or at least K:
            all, in memory (paper). Then the cost of a step and the memory for adapters do not depend on K.
        prior_weight: weight of the mean squared distance from the initial coefficients; 0: none (paper).
        clamp: clamp coefficients to [0, 1] (AdaMerging).
        seed: seed of all draws.

    Raises:
        ConfigError: a value is out of bounds, the loss does not have the teacher, or rows are to be sampled.
    """

    granularity: Literal["domain", "layer"] = "layer"
    initialisation: Literal["task-vectors", "ties", "pcb", "localize-and-stitch"] = "task-vectors"
    initial_coefficient: float | None = _KEYS.initial_coefficient
    loss: str = _KEYS.loss
    teacher: str = _KEYS.teacher
    rec_weight: float = 1.0
    rec_temperature: float = 1.0
    kd_weight: float = 1000.0
    similarity_weight: float = 10.0
    temperature: float = 0.05
    kd_top_k: int | None = _KEYS.kd_top_k
    learning_rate: float = _KEYS.learning_rate
    steps: int = _KEYS.steps
    batch_size: int = 16
    pseudo_users: str = _KEYS.pseudo_users
    num_pseudo_users: int | None = None
    domains_per_step: int | None = _KEYS.domains_per_step
    refresh_every: int | None = None
    balance_domains: bool = True
    select_every: int | None = None
    prior_weight: float = 0.0
    clamp: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, parameter in (METHODS["mergerec"].parameters | STUDIED).items():
            check_parameter(f"mergerec: {name}", parameter, getattr(self, name))
        if problem := teacher_problem(self.teacher, self.loss):
            raise ConfigError(f"mergerec: {problem}")
        if self.domains_per_step is not None and self.initialisation != TASK_VECTORS:
            raise ConfigError(
                f"mergerec: domains_per_step = {self.domains_per_step} samples adapters, but initialisation = "
                f"{self.initialisation!r} computes rows of all domains together; set it to {TASK_VECTORS!r}, or "
                "domains_per_step to None"
            )

    def samples(self, num_domains: int) -> bool:
        """Return True if a step learns the coefficients of only some of K domains."""
        return self.domains_per_step is not None and self.domains_per_step < num_domains

    @property
    def terms_of_users(self) -> tuple[str, ...]:
        """The terms of the loss that are means over pseudo-users."""
        return tuple(name for name in LOSSES[self.loss] if name in TERMS)

    @property
    def compares_items(self) -> bool:
        """True if the loss has the term "similarity", which needs the catalogs of all domains in one place."""
        return SIMILARITY in LOSSES[self.loss]

    @property
    def reconstructions(self) -> tuple[str, ...]:
        """Parts that are reconstructed from a paper, or taken from it in another setting; for the provenance."""
        contrasts = self.pseudo_users == "contrastive-adaptive" or self.teacher == "contrastive"
        used = {"Taesar-style (arXiv:2602.22743)": contrasts, "FedCIA-style (arXiv:2504.14208)": self.compares_items}
        return tuple(name for name, applies in used.items() if applies)

    @property
    def start(self) -> float | None:
        """Initial coefficient; None: 1/√K, see :func:`fedmerge.mergerec.coefficients.start_coefficients`."""
        rows = None if self.initialisation == TASK_VECTORS else 1.0
        return rows if self.initial_coefficient is None else self.initial_coefficient


PAPER = MergeRecSettings(  # arXiv:2601.01753, written out so that no default can change it
    granularity="domain",
    initialisation="task-vectors",
    initial_coefficient=0.2,  # 1 for rows
    loss="rec+kd",
    teacher="expert",
    rec_weight=1.0,
    rec_temperature=1.0,
    kd_weight=1000.0,
    similarity_weight=10.0,
    temperature=0.05,
    kd_top_k=None,
    learning_rate=1e-3,
    steps=500,
    batch_size=16,
    pseudo_users="one-item",
    num_pseudo_users=None,
    domains_per_step=None,
    refresh_every=None,
    balance_domains=False,
    select_every=None,
    prior_weight=0.0,
    clamp=False,
)
ADAMERGING = replace(  # arXiv:2310.02575, with pseudo-users in place of unlabelled test data
    PAPER, initial_coefficient=0.3, loss="entropy", learning_rate=1e-3, steps=500, clamp=True
)


def first_choice(z: torch.Tensor, S: torch.Tensor, settings: MergeRecSettings) -> torch.Tensor:
    """L_rec = CE(z / τ, argmax S), τ = rec_temperature: the expert's first choice is the label."""
    return F.cross_entropy(z / settings.rec_temperature, S.argmax(dim=1), reduction="none")


def distillation(z: torch.Tensor, S: torch.Tensor, settings: MergeRecSettings) -> torch.Tensor:
    """L_kd = T² · KL(softmax(S/T) ‖ softmax(z/T)); with kd_top_k over the teacher's top-k items, renormalised."""
    temperature, top = settings.temperature, settings.kd_top_k
    if top is not None and top < S.shape[1]:
        S, chosen = S.topk(top, dim=1)
        z = z.gather(1, chosen)
    student, teacher = F.log_softmax(z / temperature, dim=1), F.log_softmax(S / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1) * temperature**2


def squared_error(z: torch.Tensor, S: torch.Tensor, settings: MergeRecSettings) -> torch.Tensor:
    """Mean over the items of (z - S)²."""
    return (z - S).square().mean(dim=1)


def entropy(z: torch.Tensor, S: torch.Tensor, settings: MergeRecSettings) -> torch.Tensor:
    """Entropy of softmax(z / τ), without a teacher (AdaMerging)."""
    logs = F.log_softmax(z / settings.rec_temperature, dim=1)
    return -(logs.exp() * logs).sum(dim=1)


def own_choice(z: torch.Tensor, S: torch.Tensor, settings: MergeRecSettings) -> torch.Tensor:
    """CE(z / τ, argmax z): the merged model's own first choice is the label."""
    return F.cross_entropy(z / settings.rec_temperature, z.argmax(dim=1), reduction="none")


Term = Callable[[torch.Tensor, torch.Tensor, MergeRecSettings], torch.Tensor]
"""(student logits z (n, N), teacher logits S (n, N), settings) -> (n,)."""
TERMS: dict[str, Term] = {
    "rec": first_choice,
    "kd": distillation,
    "mse": squared_error,
    "entropy": entropy,
    "self": own_choice,
}
SIMILARITY = "similarity"
LOSSES: dict[str, tuple[str, ...]] = {  # those of arXiv:2601.01753 and its code, and two FedCIA-style ones
    "rec+kd": ("rec", "kd"),
    "rec": ("rec",),
    "kd": ("kd",),
    "mse": ("mse",),
    "entropy": ("entropy",),
    "entropy+kd": ("entropy", "kd"),
    "self": ("self",),
    "self+kd": ("self", "kd"),
    SIMILARITY: (SIMILARITY,),
    f"{SIMILARITY}+kd": (SIMILARITY, "kd"),
}


def weighted_total(terms: Mapping[str, torch.Tensor], settings: MergeRecSettings) -> torch.Tensor:
    """Return the loss, Σ weight · term: kd_weight and similarity_weight for the terms so named, else rec_weight."""
    weights = {"kd": settings.kd_weight, SIMILARITY: settings.similarity_weight}
    return torch.stack([term * weights.get(name, settings.rec_weight) for name, term in terms.items()]).sum()


def batch_terms(
    users: torch.Tensor,
    teacher_users: torch.Tensor,
    drawn_domains: np.ndarray,
    teachers: list[torch.Tensor],
    students: list[torch.Tensor],
    settings: MergeRecSettings,
    amateur_users: torch.Tensor | None = None,
    amateurs: Sequence[torch.Tensor] = (),
) -> dict[str, torch.Tensor]:
    """Compute the terms of pseudo-users on a batch of several domains; each is scored on its own catalog only.

    Args:
        users: (n, d) vectors of the pseudo-users under the merged model, differentiable.
        teacher_users: (n, d) their vectors under their own experts.
        drawn_domains: (n,) the domain of each.
        teachers: per domain E_k, (N_k, d).
        students: per domain Ê_k, (N_k, d).
        settings: loss and temperatures.
        amateur_users: (n, d) their vectors under the average of the other experts, for a contrastive teacher of "kd";
            None: the expert is the teacher.
        amateurs: per domain the item vectors under that average, (N_k, d), in that case.

    Returns:
        Term of the loss -> mean over the batch, a scalar. Logits exist for the batch only: n × N_k, never N_k × N_k.
    """
    sums = {name: users.new_zeros(()) for name in settings.terms_of_users}
    for domain in np.unique(drawn_domains):
        rows = torch.as_tensor(np.flatnonzero(drawn_domains == domain), device=users.device)
        z = users[rows] @ students[domain].T  # (n_k, N_k)
        S = taught = teacher_users[rows] @ teachers[domain].T  # (n_k, N_k)
        if amateur_users is not None:
            taught = adaptive_contrast(S, amateur_users[rows] @ amateurs[domain].T)
        sums = {
            name: value + TERMS[name](z, taught if name == "kd" else S, settings).sum() for name, value in sums.items()
        }
    return {name: value / len(users) for name, value in sums.items()}
