"""``fedmerge privacy``: audit a run, list what left its clients, and plan the noise of a training."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_overrides, add_runs_folder

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.client.audit.attacks import Audited
    from fedmerge.config import ExperimentConfig


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    privacy = commands.add_parser("privacy", help="measure how much a run reveals about users").add_subparsers(
        required=True, metavar="ACTION"
    )
    audit = privacy.add_parser("audit", help="attack a run's adapters, at a client or in a simulation")
    audit.add_argument("run", metavar="RUN", help="run folder, or the beginning of a run id")
    audit.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME",
        help="domain to audit; can be repeated (default: all training domains)",
    )
    audit.add_argument(
        "--shadows", type=int, default=8, help="shadow trainings on random halves of the users (default: 8)"
    )
    audit.add_argument("--json", action="store_true", help="machine-readable output")
    add_runs_folder(audit)
    add_overrides(audit)
    audit.set_defaults(command=_audit)
    ledger = privacy.add_parser("ledger", help="list what left each client, and the ε that bounds it")
    ledger.add_argument("run", metavar="RUN", help="run folder, or the beginning of a run id")
    ledger.add_argument("--json", action="store_true", help="machine-readable output")
    add_runs_folder(ledger)
    ledger.set_defaults(command=_ledger)
    _add_plan(privacy)


def _add_plan(privacy: "Commands") -> None:
    plan = privacy.add_parser("plan", help="compute the noise for an ε, or the ε of a noise, before a training by user")
    plan.add_argument("--users", type=positive_int, required=True, metavar="U", help="users that a domain trains on")
    plan.add_argument("--batch", type=positive_int, required=True, metavar="B", help="train.batch_size")
    plan.add_argument("--steps", type=positive_int, required=True, metavar="N", help="train.max_steps")
    plan.add_argument("--delta", type=positive_float, required=True, metavar="D", help="dp.delta")
    given = plan.add_mutually_exclusive_group(required=True)
    given.add_argument("--epsilon", type=positive_float, metavar="E", help="dp.epsilon; prints the noise multiplier")
    given.add_argument(
        "--noise-multiplier", type=positive_float, metavar="Z", help="dp.noise_multiplier; prints the epsilon"
    )
    plan.add_argument(
        "--metric-sums",
        type=int,
        default=0,
        choices=range(10),
        metavar="N",
        help="noised metric sums: 2 in a run, 3 with the leave-one-out gate (default: 0)",
    )
    plan.add_argument(
        "--metrics-noise", type=positive_float, default=4.0, metavar="Z", help="privacy.metrics_noise (default: 4)"
    )
    plan.add_argument("--accountant", choices=("prv", "rdp"), default="prv", help="dp.accountant (default: prv)")
    plan.add_argument("--json", action="store_true", help="machine-readable output")
    plan.set_defaults(command=_plan)


def positive_int(text: str) -> int:
    """Return a whole number above 0."""
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number above 0")
    return number


def positive_float(text: str) -> float:
    """Return a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number above 0")
    return number


def _ledger(options: argparse.Namespace) -> int:
    from fedmerge.files import read_record
    from fedmerge.privacy.dp.statement import PRIVACY_FILE
    from fedmerge.report.ledger_text import ledger_text
    from fedmerge.runs.exposure import read_exposure
    from fedmerge.runs.reading import find_run

    folder = find_run(options.run, options.dir)
    exposed, statement = read_exposure(folder), read_record(folder / PRIVACY_FILE)
    if options.json:
        record = {"run": folder.name, "replies": [asdict(of) for of in exposed], "privacy": statement or None}
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        print(ledger_text(folder.name, exposed, statement), end="")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from fedmerge.privacy.dp.planning import plan_text, plan_training

    plan = plan_training(
        options.users,
        options.batch,
        options.steps,
        options.delta,
        epsilon=options.epsilon,
        noise_multiplier=options.noise_multiplier,
        metric_sums=options.metric_sums,
        metrics_noise=options.metrics_noise,
        accountant=options.accountant,
    )
    print(json.dumps(asdict(plan), indent=2) if options.json else plan_text(plan), end="\n" if options.json else "")
    return 0


def _audit(options: argparse.Namespace) -> int:
    from fedmerge.config import load_config
    from fedmerge.errors import ConfigError
    from fedmerge.files import write_json, write_text
    from fedmerge.runs.folder import CONFIG_FILE
    from fedmerge.runs.reading import find_run

    folder = find_run(options.run, options.dir)
    config = load_config(folder / CONFIG_FILE, options.overrides)
    names = options.domain or list(config.domains.train)
    if strange := sorted({*names} - {*config.domains.train}):
        raise ConfigError(
            f"--domain {', '.join(strange)}: not a training domain of the run; expected one of "
            f"{', '.join(config.domains.train)}."
        )
    if options.shadows < 0:
        raise ConfigError(f"--shadows {options.shadows}: expected 0 or more; 0 skips the attack with shadows.")

    import torch

    from fedmerge.client.audit.attacks import audit_domain
    from fedmerge.report.audit_text import audit_text

    torch.set_num_threads(config.runtime.threads_per_client)
    found = {
        name: audit_domain(audited, options.shadows, lambda line: print(line, file=sys.stderr))
        for name, audited in _opened(folder, config, names)
    }
    audit = {"run": folder.name, "dp": config.dp.model_dump(), "domains": found}
    text = audit_text(audit)
    write_json(folder / "privacy-audit.json", audit)
    write_text(folder / "privacy-audit.txt", text)
    print(json.dumps(audit, indent=2) if options.json else text.rstrip())
    return 0


def _opened(folder: Path, config: "ExperimentConfig", names: Sequence[str]) -> Iterator[tuple[str, "Audited"]]:
    """Yield each domain with its expert, the served merge, the other experts and what it continued of them."""
    from fedmerge.client.audit.attacks import Audited
    from fedmerge.client.audit.similarity import factors_for
    from fedmerge.client.local_domain import open_domain
    from fedmerge.client.training.settings import training_settings
    from fedmerge.domain.demo import domain_folder
    from fedmerge.encoder.adapted import NO_ADAPTER, load_adapted
    from fedmerge.encoder.peft.folder import read_verified
    from fedmerge.errors import RunDirError
    from fedmerge.mergerec.vectors import TASK_VECTORS
    from fedmerge.runs.checkpoints import read_weave, stored_factors, stored_woven
    from fedmerge.runs.reading import describe_run

    run = describe_run(folder)
    served = run.choice.get("served")
    merges = [merge for merge in run.merges if merge.provenance.label == served]
    if not merges and not run.experts:
        raise RunDirError(f"{folder}: found no expert and no served merge; expected a finished run.")
    merged = read_verified(merges[0].folder) if merges else None
    experts = {name: read_verified(folder / "adapters" / name) for name in sorted(run.experts)}
    coefficients = None  # of a merge that is a weighted sum of all experts
    if merges and merges[0].provenance.privacy is None:
        weights, parameters = merges[0].provenance.coefficients, merges[0].provenance.parameters or {}
        if weights and weights.keys() == experts.keys():
            is_sum = parameters.get("initialisation", TASK_VECTORS) == TASK_VECTORS
            coefficients = weights if is_sum else None
    backbone, _ = load_adapted(NO_ADAPTER, config)
    continued, sent = stored_woven(folder, read_weave(folder) or {}), stored_factors(folder)
    for name in names:
        domain = open_domain(domain_folder(config.domains.root, name, config.cache_dir), backbone, config.text)
        own = {each.source: continued[each] for each in continued if each.target == name}
        settings, factors = training_settings(config), factors_for(name, sent)
        yield name, Audited(domain, settings, experts.get(name), merged, experts, coefficients, own, factors)
