"""Sections about a run: evaluation, the server, the gate in front of the merge, compute, and simulations."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedmerge.config.section import DOMAIN_NAME, Section, twice

Tracking = Literal["tensorboard", "mlflow"]

Baseline = Literal["popularity", "last-item", "item-knn", "sasrec"]


class Evaluation(Section):
    """Full-ranking evaluation on the clients' own users."""

    validation_users: int | None = Field(
        500,
        ge=1,
        description="Users a domain for selecting variants, by the mean NDCG@10 over training domains; 'none' for all.",
    )
    test_users: int | None = Field(None, ge=1, description="Users a domain for the final table; 'none' for all.")
    baselines: tuple[Baseline, ...] = Field(
        ("popularity", "last-item"),
        description="Reference rows on test. item-knn takes seconds a domain, sasrec minutes, both on the client.",
    )
    sasrec_max_minutes: float | None = Field(
        10.0,
        gt=0,
        description="Wall-clock limit on training the sasrec baseline; a row that reaches it depends on the machine's "
        "speed.",
    )
    fallback: bool = Field(
        True, description="Selection between the served merge and its own expert for each training domain."
    )

    @model_validator(mode="after")
    def _baselines_once(self) -> "Evaluation":
        if names := twice(self.baselines):
            raise ValueError(f"baselines names {names} more than once; name each baseline once")
        return self


class Server(Section):
    """Time limits of the server, and its folders."""

    catalogs: str | None = Field(
        None,
        description="Folder of domain folders that hold at least manifest and catalog; 'none': clients send their "
        "catalogs, if the policy lets them.",
    )
    client_keys: str | None = Field(
        None,
        description="Folder of the clients' public keys, NAME.pub, as fedmerge deploy add-client writes it. Answers "
        "must be signed with one of them, by the domain it is registered for. 'none': on a federation of machines "
        "the folder keys of the operator's folder; in a simulation signatures are checked, but not whose they are.",
    )
    wait_seconds: float = Field(30.0, gt=0, description="Time to wait for all clients to connect.")
    min_train_clients: int = Field(
        2, ge=1, description="Training clients that must keep working; with fewer the run fails."
    )
    messages_at_once: int = Field(
        64, ge=1, description="Clients asked at the same time; at least as many as can work at the same time."
    )
    return_seconds: float = Field(
        180.0,
        ge=0,
        description="Time in each phase for a lost client (process, machine or network) to come back and be asked "
        "again; 0: it is excluded at once.",
    )
    timeout_seconds: float = Field(
        7200.0, gt=0, description="Time limit of one training or evaluation; slower clients are excluded."
    )


class Admission(Section):
    """The gate in front of the merge, explained in [admission.md](reference/privacy/admission.md)."""

    action: Literal["flag", "exclude"] | None = Field(
        "flag", description="Consequence for an expert that fails a check; 'none': nothing is checked."
    )
    probe_items: int | None = Field(
        None,
        ge=20,
        description="Items of its own catalog that an expert must still tell apart and find by title; the server then "
        "asks for catalogs. 'none': no probe.",
    )
    leave_one_out: bool = Field(
        False,
        description="Averages without each domain in turn, evaluated on the validation users of the others. Takes "
        "domains² evaluations.",
    )
    rollback: bool = Field(
        False,
        description="Rescue of domains that the served merge drops below their own expert: the best merge without the "
        "domains that failed a check is served, otherwise those domains serve their own experts.",
    )

    @model_validator(mode="after")
    def _of_a_gate(self) -> "Admission":
        asked = [key for key in ("probe_items", "leave_one_out", "rollback") if getattr(self, key)]
        if self.action is None and asked:
            raise ValueError(f"action is 'none', but {', '.join(asked)} is set; set action = 'flag', or leave it out")
        return self


def _gpus(value: object) -> object:
    number = value
    if isinstance(value, str) and value != "auto":
        try:
            number = float(value)
        except ValueError:
            number = -1
    if isinstance(number, int | float) and not (0 <= number <= 1 or (number > 1 and float(number).is_integer())):
        raise ValueError("expected 'auto', a share of a GPU from 0 to 1, or a whole number of them")
    return number


class Runtime(Section):
    """Compute on each side."""

    threads_per_client: int = Field(
        1, ge=1, description="PyTorch threads of a client; also its CPUs in the simulation."
    )
    server_threads: int = Field(2, ge=1, description="PyTorch threads of the server.")
    gpus_per_client: Annotated[Annotated[float, Field(ge=0)] | Literal["auto"], BeforeValidator(_gpus)] = Field(
        "auto",
        description="GPUs that the simulation gives a client: a share, say 0.25, or whole ones; auto: one where "
        "PyTorch sees any and `device` is not cpu. With a whole one, the clients of a GPU share a process and a "
        "backbone.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Device of PyTorch; auto: a GPU where PyTorch sees one, else the CPU.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of matrix products; auto: bfloat16 where the processor multiplies it natively."
    )


class Simulation(Section):
    """Audits and poisoned trainings, in simulations alone ([admission.md](reference/privacy/admission.md))."""

    attacker: str | None = Field(
        None,
        pattern=DOMAIN_NAME,
        description="Training domain that poisons its own training on purpose; its data must be synthetic. 'none': "
        "nobody.",
    )
    attack: Literal["flipped-labels", "promoted-items", "scaled-update"] = Field(
        "flipped-labels",
        description="Kind of poisoning: targets i become N - 1 - i; or one of a few items; or the expert is trained "
        "well and multiplied.",
    )
    attack_strength: float = Field(
        1.0, gt=0, le=1000, description="Share of the targets that are poisoned, or the factor on the update."
    )
    held_out_users: float = Field(
        0.0, ge=0, le=0.9, description="Share of the users left out of training: the non-members of an audit."
    )
    canaries: int = Field(
        0, ge=0, le=10000, description="Planted users with random items, trained on; as many are held out to compare."
    )

    @model_validator(mode="after")
    def _possible(self) -> "Simulation":
        most = {"flipped-labels": 1.0, "promoted-items": 0.95}.get(self.attack, 1000.0)
        if self.attacker is not None and self.attack_strength > most:
            raise ValueError(
                f"attack_strength = {self.attack_strength:g}: for {self.attack} it is a share of the targets, at most "
                f"{most:g}" + ("; with all of them promoted no other item is left to rank below" * (most == 0.95))
            )
        return self

    @property
    def audited(self) -> bool:
        """True if users are left out of training or planted, so that the run can be audited."""
        return bool(self.held_out_users or self.canaries)

    def attack_record(self) -> dict[str, object]:
        """Return the attack as the keys of caches have it."""
        return {"domain": self.attacker, "kind": self.attack, "strength": self.attack_strength, "on_real_data": False}

    def audit_record(self) -> dict[str, object]:
        """Return the settings of an audit as the keys of caches have them."""
        return {"held_out_users": self.held_out_users, "canaries": self.canaries}
