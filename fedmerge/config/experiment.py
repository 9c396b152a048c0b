"""The configuration of one experiment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedmerge.config.contradictions.heads import head_problems
from fedmerge.config.contradictions.language_models import language_model_problems, stages_asked
from fedmerge.config.contradictions.personal import personal_problems
from fedmerge.config.contradictions.privacy import (
    aggregate_only_problems,
    dp_problems,
    signal_problems,
    transport_problems,
)
from fedmerge.config.contradictions.rmm import rmm_problems
from fedmerge.config.contradictions.runs import (
    address_problems,
    admission_problems,
    group_problems,
    learning_problems,
    pair_problems,
    rounds_problems,
    run_problems,
    simulation_problems,
)
from fedmerge.config.contradictions.weaving import weave_problems
from fedmerge.config.head import Head
from fedmerge.config.merging import (
    LEARNED_METHODS,
    SEARCHED_METHODS,
    SIGNAL_METHODS,
    AdaMerging,
    Livar,
    Merge,
    MergeRec,
    Rmm,
    ThroughClients,
)
from fedmerge.config.model import BackboneSection, Domains, Lora, Text
from fedmerge.config.personal import Personal
from fedmerge.config.privacy import DP, Privacy
from fedmerge.config.running import Admission, Evaluation, Runtime, Server, Simulation, Tracking
from fedmerge.config.section import Section
from fedmerge.config.training import CSFT, Mntp, Rounds, Simcse, Train, Weave


class ExperimentConfig(Section):
    """Everything that defines one experiment."""

    name: str = Field(
        "demo", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="First part of the run folder's name."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of all randomness.")
    run_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Name of the run folder; 'none': name, time and a random part.",
    )
    resume: bool = Field(False, description="Resumption of the run that run_id names.")
    until: Literal["report", "train"] = Field(
        "report", description="Last phase of the run; train: the run ends when the experts are on disk."
    )
    output_dir: str = Field("runs", min_length=1, description="Folder for run folders.")
    cache_dir: str = Field(
        "~/.cache/fedmerge",
        min_length=1,
        description="Folder on each client's own disk: its experts, the demo domains.",
    )
    tracking: Tracking | None = Field(
        None, description="Viewer for which the run folder gets a copy of curves, scores and settings."
    )
    domains: Domains = Domains()
    backbone: BackboneSection = BackboneSection()
    text: Text = Text()
    lora: Lora = Lora()
    train: Train = Train()
    rounds: Rounds = Rounds()
    merge: Merge = Merge()
    livar: Livar = Livar()
    mergerec: MergeRec = MergeRec()
    adamerging: AdaMerging = AdaMerging()
    rmm: Rmm = Rmm()
    mntp: Mntp = Mntp()
    simcse: Simcse = Simcse()
    through_clients: ThroughClients = ThroughClients()
    head: Head = Head()
    personal: Personal = Personal()
    weave: Weave = Weave()
    evaluation: Evaluation = Evaluation()
    server: Server = Server()
    privacy: Privacy = Privacy()
    admission: Admission = Admission()
    dp: DP = DP()
    runtime: Runtime = Runtime()
    simulation: Simulation = Simulation()

    @property
    def methods_from_catalogs(self) -> tuple[str, ...]:
        """The merging methods, or the rule of rounds, that read the catalogs on the server."""
        if self.privacy.learns_through_clients:
            return ()
        methods = self.merge.methods if self.until == "report" else ()
        if self.rounds.rule is not None:
            methods = (self.rounds.rule,)
        searched = SEARCHED_METHODS if self.rmm.reward == "pseudo-users" else frozenset()
        return tuple(method for method in methods if method in LEARNED_METHODS | searched)

    @property
    def refines_merges(self) -> bool:
        """True if the server trains its merges on titles of the catalogs."""
        return self.until == "report" and bool(stages_asked(self.mntp, self.simcse))

    @property
    def asks_for_decoder(self) -> str:
        """The settings that need a decoder, for messages; empty if none does."""
        return CSFT if self.train.objective == "csft" else stages_asked(self.mntp, self.simcse)

    @property
    def shares_similarity(self) -> bool:
        """True if clients send similarity factors of the items that two catalogs share."""
        return self.weave.schedule == "similarity"

    @property
    def sends_signals(self) -> bool:
        """True if clients send their training signals, for a merge that weighs by them."""
        return self.rounds.rule is None and bool(SIGNAL_METHODS & {*self.merge.methods})

    @property
    def cohort_learns_on(self) -> Literal["pseudo-users", "own-users"]:
        """Users that the clients of a cohort learn on: pseudo-users only where a learned merge needs them."""
        learned = LEARNED_METHODS & {*self.merge.methods}
        return self.through_clients.users if learned else "own-users"

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        problems = [
            *address_problems(self.output_dir, self.cache_dir, self.server),
            *run_problems(self.resume, self.run_id, self.domains, self.server),
            *rounds_problems(self.rounds, self.lora, self.domains),
            *pair_problems(self.merge, self.rounds, self.domains),
            *learning_problems(
                self.merge,
                self.mergerec,
                self.rounds,
                self.through_clients,
                self.server,
                self.privacy,
                len(self.domains.train),
            ),
            *group_problems(self.merge, self.mergerec, self.rounds, self.head, self.privacy, self.dp, self.admission),
            *signal_problems(self.merge, self.rounds, self.privacy, self.dp),
            *transport_problems(self.privacy, self.rounds),
            *aggregate_only_problems(self.privacy, self.merge, self.rounds, len(self.domains.train), self.until),
            *admission_problems(self.admission, self.rounds, self.privacy, self.server),
            *head_problems(self.head, self.rounds, self.privacy, self.dp, self.until, len(self.domains.train)),
            *personal_problems(self.personal, self.privacy, self.dp, self.rounds, len(self.domains.train)),
            *rmm_problems(self.rmm, self.merge, self.rounds, self.privacy, self.dp, self.server),
            *weave_problems(self.weave, self.privacy, self.dp, self.rounds, self.server, len(self.domains.train)),
            *language_model_problems(self.train, self.mntp, self.simcse, self.backbone, self.privacy, self.server),
            *simulation_problems(self.simulation, self.domains, self.dp),
            *dp_problems(
                self.dp,
                self.train,
                self.rounds,
                self.merge,
                self.mergerec,
                self.through_clients,
                self.privacy,
                self.admission,
            ),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self
