"""Keys of earlier versions, and their replacements."""

_STUDY = "delete the line; {}. Other values: benchmarks/studies/mergerec/study_mergerec.py"
_SASREC = "delete the line; the sasrec baseline trains with fixed settings (fedmerge/sequence/model.py)"
_EVALUATED = "delete the line; variants are selected by ndcg@10, and results hold all metrics"
_ADAMERGING = "delete the line; the published value is always used"

REMOVED: dict[str, str] = {
    "mergerec.rec_weight": _STUDY.format("the factor is always 1"),
    "mergerec.rec_temperature": _STUDY.format("the temperature is always 1"),
    "mergerec.kd_weight": _STUDY.format("the factor is always 1000, as published"),
    "mergerec.temperature": _STUDY.format("the temperature is always 0.05, as published"),
    "mergerec.refresh_every": _STUDY.format("the items are encoded once, as published"),
    "mergerec.balance_domains": _STUDY.format("domains are drawn equally often, except with preset = 'paper'"),
    "mergerec.select_every": _STUDY.format("the last step is taken, as published"),
    "mergerec.try_steps": "delete the line; set mergerec.steps, or look at single steps with "
    "benchmarks/studies/mergerec/study_mergerec.py",
    "mergerec.batch_size": _STUDY.format("a step has 16 pseudo-users, as published"),
    "mergerec.initialisation": _STUDY.format("the coefficients multiply the experts' updates, as published"),
    "mergerec.num_pseudo_users": _STUDY.format("1000 with subset and centroid, else as many as items"),
    "mergerec.prior_weight": _STUDY.format("there is no prior, as published"),
    "adamerging.initial_coefficient": _ADAMERGING,
    "adamerging.learning_rate": _ADAMERGING,
    "adamerging.batch_size": _ADAMERGING,
    "through_clients.negatives": "delete the line; 64 items are drawn in each step",
    "through_clients.temperature": "delete the line; the temperature is always 0.05",
    "sasrec.hidden_size": _SASREC,
    "sasrec.layers": _SASREC,
    "sasrec.heads": _SASREC,
    "sasrec.dropout": _SASREC,
    "sasrec.max_length": _SASREC,
    "sasrec.learning_rate": _SASREC,
    "sasrec.batch_size": _SASREC,
    "sasrec.max_epochs": _SASREC,
    "sasrec.validation_users": _SASREC,
    "sasrec.patience": _SASREC,
    "sasrec.max_minutes": "write evaluation.sasrec_max_minutes",
    "train.temperature": "delete the line; the temperature is always 0.05",
    "train.patience": "delete the line; five validations without a better NDCG@10 end the training. To train longer, "
    "raise train.validate_every_steps",
    "evaluation.selection_metric": _EVALUATED,
    "privacy.transport_density": "delete the line; top-k sends a tenth of each factor's entries. Other shares: "
    "benchmarks/privacy/bench_privacy.py transport",
    "privacy.value_range": "delete the line; the range of a secure sum follows from lora and dp",
    "server.describe_timeout_seconds": "delete the line; clients have 600 seconds to open their domain",
    "server.train_timeout_seconds": "write server.timeout_seconds, which covers training and evaluation",
    "server.evaluate_timeout_seconds": "write server.timeout_seconds, which covers training and evaluation",
    "attack.domain": "write simulation.attacker",
    "attack.kind": "write simulation.attack",
    "attack.strength": "write simulation.attack_strength",
    "attack.on_real_data": "delete the line; only synthetic data can be poisoned",
    "audit.held_out_users": "write simulation.held_out_users",
    "audit.canaries": "write simulation.canaries",
}
