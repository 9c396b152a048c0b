"""``fedmerge init``: write an experiment for a folder of domains."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import add_overrides

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.planning.plan import Plan


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    init = commands.add_parser(
        "init",
        help="write a commented experiment for a folder of domains",
        description="Write an experiment for the domains in a folder, with as many training steps as this machine "
        "makes in the given time, by a measurement of some seconds.",
    )
    init.add_argument("root", type=Path, metavar="DIR", help="folder of domain folders")
    init.add_argument(
        "--out", type=Path, default=Path("experiment.toml"), metavar="FILE", help="default: experiment.toml"
    )
    init.add_argument("--minutes", type=_minutes, default=60.0, help="time of the run on this machine (default: 60)")
    init.add_argument("--unseen", default="", metavar="A,B", help="domains that must not train")
    add_overrides(init)
    init.set_defaults(command=_init)


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected minutes above 0")
    return value


def _init(options: argparse.Namespace) -> int:
    import os

    from fedmerge.config import DEMO_ROOT, read_overrides, with_absolute_paths
    from fedmerge.domain.demo import domains_root
    from fedmerge.errors import RunDirError
    from fedmerge.files import write_text
    from fedmerge.planning.plan import draft, make_plan, plan_toml, read_facts

    if options.out.exists():
        raise RunDirError(f"{options.out}: exists already. Give --out another name, or delete it.")
    overrides = read_overrides(options.overrides)
    root = domains_root(DEMO_ROOT, "~/.cache/fedmerge") if str(options.root) == DEMO_ROOT else options.root
    facts = read_facts(root)
    unseen = [name for name in options.unseen.split(",") if name]
    config, given = draft(root, facts, unseen, len(os.sched_getaffinity(0)), overrides)

    from sim.checks import check_simulation

    check_simulation(with_absolute_paths(config, Path.cwd()))
    print("measuring this machine on a few texts, training steps and users …", flush=True)

    from fedmerge.bench.ranking import backbone_of
    from fedmerge.client.local_domain import open_domain
    from fedmerge.planning.pace import measure_pace

    typical = sorted(config.domains.train, key=lambda name: facts[name].num_trained)[len(config.domains.train) // 2]
    domain = open_domain(root / typical, backbone_of(config.backbone, config.runtime), config.text)
    plan = make_plan(config, given, facts, measure_pace(domain, config), options.minutes)
    heading = [
        f"An experiment for the domains in {options.root}, written by fedmerge init.",
        f"  fedmerge run {options.out}",
        "Settings that are not here have their defaults: docs/config.md.",
        f"Estimate for the machine where it was written, by a measurement on {typical}:",
        f"  {_estimate(plan)}",
    ]
    write_text(options.out, plan_toml(plan, heading))
    for name, of in facts.items():
        role = "trains" if name in config.domains.train else "unseen"
        print(f"  {name}: {role}, {of.manifest.num_users} users, {of.manifest.num_items} items")
    print(f"estimate: {_estimate(plan)}")
    if not plan.within:
        print(
            f"this is more than {options.minutes:g} minutes, though training has the fewest steps: give more "
            "--minutes, or let the file have fewer users or head.kind = 'none'"
        )
    print(f"{options.out}: written; run it with: fedmerge run {options.out}")
    return 0


def _estimate(plan: "Plan") -> str:
    parts = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in plan.seconds.items())
    return f"about {_duration(sum(plan.seconds.values()))} ({parts})"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
