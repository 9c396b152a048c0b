"""Contradictions between privacy settings of several sections: secure sums, transport, differential privacy.

Every function yields one line for each contradiction: the keys, what was found, and the remedy.
"""

from collections.abc import Iterator

from fedmerge.config.merging import (
    LEARNED_METHODS,
    MIN_SUMMED,
    SIGNAL_METHODS,
    SUMMED_METHODS,
    SUMMED_RULES,
    Merge,
    MergeRec,
    ThroughClients,
)
from fedmerge.config.privacy import DP, Privacy
from fedmerge.config.running import Admission
from fedmerge.config.training import USERS_OBJECTIVES, Rounds, Train


def transport_problems(privacy: Privacy, rounds: Rounds) -> Iterator[str]:
    """Yield a compressed transport of adapters that are not merged once."""
    if privacy.transport != "float32" and (rounds.rule is not None or privacy.hides_adapters):
        yield (
            f"privacy.transport = '{privacy.transport}' is for experts that are trained once and merged; set it to "
            "'float32' with rounds.rule and with privacy.policy = 'aggregate-only'"
        )


def signal_problems(merge: Merge, rounds: Rounds, privacy: Privacy, dp: DP) -> Iterator[str]:
    """Yield training signals that rounds do not have, or that would leave where other numbers about users stay."""
    if rounds.rule in SIGNAL_METHODS:
        yield (
            f"rounds.rule is {rounds.rule}, which weighs by the training signals of whole trainings; set rounds.rule = "
            f"'none' and name {rounds.rule} in merge.methods"
        )
    asked = sorted(SIGNAL_METHODS & {*merge.methods}) if rounds.rule is None else []
    if not asked:
        return
    sent = f"merge.methods holds {asked[0]}, for which clients send training signals, computed from users without noise"
    if dp.mode in ("user", "domain-local"):
        yield f"{sent}, but dp.mode = '{dp.mode}' promises a bound; leave {asked[0]} out, or set dp.mode = 'none'"
    if privacy.metrics != "exact":
        yield (
            f"{sent}, but privacy.metrics = '{privacy.metrics}' holds exact numbers back; leave {asked[0]} out, or set "
            "privacy.metrics = 'exact'"
        )


def aggregate_only_problems(
    privacy: Privacy, merge: Merge, rounds: Rounds, num_domains: int, until: str
) -> Iterator[str]:
    """Yield work of the server that needs single adapters, which a secure sum hides.

    Args:
        privacy, merge, rounds: the sections.
        num_domains: training clients.
        until: the last phase of the run.
    """
    if not privacy.hides_adapters:
        return
    hidden = "privacy.policy = 'aggregate-only' shows the server no single adapter"
    rule = rounds.rule
    if rule is None:
        if needing := [method for method in merge.methods if method not in SUMMED_METHODS]:
            yield (
                f"merge.methods holds {needing[0]}, which needs every single adapter, but {hidden}; use one of "
                f"{', '.join(SUMMED_METHODS)}, or set privacy.policy = 'adapter'"
            )
        if until == "train":
            yield f"until = 'train' ends with the experts on the server's disk, but {hidden}; set 'report'"
    elif rule not in SUMMED_RULES:
        why = "lays the factors side by side, which shows every block" if rule == "flora" else "needs every single one"
        yield (
            f"rounds.rule is {rule}, which {why}, but {hidden}; use one of {', '.join(SUMMED_RULES)}, or set "
            "privacy.policy = 'adapter'"
        )
    drawn = num_domains if rule is None else rounds.clients_a_round(num_domains)
    if drawn < MIN_SUMMED:
        yield (
            f"privacy.policy = 'aggregate-only' with {drawn} clients in a sum: with fewer than {MIN_SUMMED} one client "
            "reads another's adapter off the sum; name more domains, or raise rounds.fraction"
        )
    if rule is not None and rounds.weights == "users" and drawn == MIN_SUMMED:
        yield (
            f"rounds.weights = 'users' with {drawn} clients in a sum and privacy.policy = 'aggregate-only': unequal "
            "weights of three count as fewer than three clients; set rounds.weights = 'equal', or name more domains"
        )
    threshold = privacy.threshold
    if threshold is not None and not drawn // 2 < threshold <= drawn:
        yield (
            f"privacy.threshold = {threshold} with {drawn} clients in a sum: expected {drawn // 2 + 1} to {drawn}, "
            "more than half of them and at most all; change it, or write 'none'"
        )


def dp_problems(
    dp: DP,
    train: Train,
    rounds: Rounds,
    merge: Merge,
    mergerec: MergeRec,
    through_clients: ThroughClients,
    privacy: Privacy,
    admission: Admission,
) -> Iterator[str]:
    """Yield settings that the noise of a mode does not cover."""
    own_users = privacy.learns_through_clients and through_clients.users == "own-users"
    learned = {*merge.methods} & LEARNED_METHODS
    if dp.mode == "user":
        yield from _by_user_problems(train, rounds, own_users and bool(learned), through_clients)
        noised = own_users
    else:
        noised = dp.mode == "domain-local" and privacy.learns_through_clients
    if noised and learned and admission.rollback:
        yield (
            f"dp.mode = '{dp.mode}' with admission.rollback: a second merge would be learned through the clients, for "
            "which the noise is not chosen; set admission.rollback = false"
        )
    from_pseudo_users = "mergerec" in learned and not own_users
    if noised and dp.mode == "domain-local" and from_pseudo_users and mergerec.pseudo_users == "centroid":
        yield (
            "dp.mode = 'domain-local' with mergerec.pseudo_users = 'centroid': the number of pseudo-users that it "
            "makes would leave without noise; set mergerec.pseudo_users = 'subset' or 'one-item'"
        )
    if dp.mode.startswith("domain") and rounds.rule is not None:
        yield (
            f"dp.mode = '{dp.mode}' covers a single merge, but rounds.rule is {rounds.rule}; set rounds.rule = 'none', "
            "or dp.mode = 'user'"
        )
    if dp.mode == "domain-central":
        yield from _central_problems(merge, privacy, admission)


def _by_user_problems(
    train: Train, rounds: Rounds, learned_on_own_users: bool, through_clients: ThroughClients
) -> Iterator[str]:
    if train.objective == "csft":
        yield (
            "dp.mode = 'user' with train.objective = 'csft': gradients of single users are made for vectors alone, so "
            "the loss of tokens could not be clipped by user; set train.objective = 'infonce', or dp.mode = "
            "'domain-local'"
        )
    elif train.negatives == "in-batch":
        yield (
            "dp.mode = 'user', but train.negatives = 'in-batch': a user's loss then depends on the other users of the "
            "step, and clipping by user bounds nothing; set train.negatives = 'catalog'"
        )
    if others := [name for name in train.objective_weights if name in USERS_OBJECTIVES]:
        yield (
            f"dp.mode = 'user', but train.objectives has {', '.join(others)}: such a loss of a user depends on the "
            "other users of the step, and clipping by user bounds nothing; leave it out, or augment the user's own "
            "history with train.augment"
        )
    if train.max_steps is None or train.max_epochs or train.max_minutes:
        yield (
            "dp.mode = 'user' needs the number of steps beforehand, since the noise is chosen for it; set "
            "train.max_steps and leave train.max_epochs and train.max_minutes at 'none'"
        )
    elif rounds.rule is not None and train.max_steps < rounds.number:
        yield (
            f"dp.mode = 'user' with rounds.number = {rounds.number}, but train.max_steps = {train.max_steps}: every "
            "round makes at least one step, and the noise is chosen for train.max_steps in all; lower rounds.number, "
            "or raise train.max_steps"
        )
    if learned_on_own_users and through_clients.mode == "local-steps":
        yield (
            "dp.mode = 'user' with through_clients.users = 'own-users' and mode = 'local-steps': the change that "
            "several steps make cannot be clipped by user; set through_clients.mode = 'exact', or dp.mode = "
            "'domain-local'"
        )


def _central_problems(merge: Merge, privacy: Privacy, admission: Admission) -> Iterator[str]:
    if privacy.hides_adapters:
        yield (
            "dp.mode = 'domain-central' with privacy.policy = 'aggregate-only': the server would clip every single "
            "adapter, which the policy hides from it; set dp.mode = 'domain-local' or 'user', or another policy"
        )
    gate = [key for key in ("leave_one_out", "rollback") if getattr(admission, key)]
    gate += ["action = 'exclude'"] if admission.action == "exclude" else []
    if gate:
        yield (
            f"dp.mode = 'domain-central' with admission.{gate[0]}: merges without noise would go to the clients, or "
            "one domain would decide which others are in the sum; leave it out, or set dp.mode = 'domain-local'"
        )
    if merge.methods != ("average",):
        yield (
            "dp.mode = 'domain-central' adds noise to the sum of all updates, so merge.methods can only be "
            f"'average', found {', '.join(merge.methods)}; set merge.methods = 'average', or dp.mode = "
            "'domain-local', after which any method may follow"
        )
