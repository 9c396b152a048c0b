"""Faults in a federation of several machines: each kind of process is killed at each phase, and a cable is cut.

Each case is one run of a tiny experiment on three machines (network namespaces). When the phase is reached, the process
is killed with kill -9, or the cable is pulled out for a minute. The SuperLink is started again as systemd would do;
clients have supervisors of their own; a failed run is resumed once. The table shows how each run ended, the time from
the fault to the end of the phase, and how many trainings restarted from the first step instead of resuming.

    python benchmarks/federation/bench_faults.py [--only superlink:train client:test …]

A case takes about two minutes on an idle machine with two cores, all cases about half an hour.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from deploy_federation import FEDMERGE, Federation
from deploy_hosts import has_nginx, kill, network, processes_of, wait_for, why_no_namespaces, workers_of

CUT_SECONDS = 60.0
MOST_SECONDS = 900.0
PHASES = {  # texts in the run's log that mark the beginning and the end of a phase
    "gather": ("waiting for 2 nodes", "2 nodes are connected"),
    "train": ("training: ", "evaluating on valid"),
    "validate": ("evaluating on valid", "selected on validation"),
    "test": ("Test is read next", "done in"),
}
PROGRAMS = {
    "superlink": "flower-superlink",
    "serverapp": "flwr-serverapp",
    "supernode": "flower-supernode",
    "client": "sim.machines.executor",
}


@dataclass(frozen=True)
class Outcome:
    """Outcome of a case.

    Attributes:
        first: end of the run in which the fault happened: ``completed`` or ``failed``.
        resumed: True if it was resumed and then completed.
        recovery_seconds: from the fault to the end of its phase.
        restarted: trainings that started again from the first step.
    """

    first: str
    resumed: bool
    recovery_seconds: float
    restarted: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cases = [f"{what}:{phase}" for what in [*PROGRAMS, "cable"] for phase in PHASES]
    parser.add_argument("--only", nargs="+", default=cases, choices=cases, metavar="WHAT:PHASE")
    options = parser.parse_args()
    if why := why_no_namespaces() or ("" if has_nginx() else "nginx is not installed"):
        print(f"nothing is measured: {why}")
        return
    print("| killed | phase | the run | resumed | seconds to the end of the phase | restarted trainings |")
    print("|---|---|---|---|---|---|")
    for number, case in enumerate(options.only):
        what, _, phase = case.partition(":")
        with (
            tempfile.TemporaryDirectory(prefix="fedmerge-") as folder,
            network(Path(folder), ["operator", "north", "south"], in_namespaces=True) as machines,
        ):
            found = measure(Federation(machines), what, phase, f"case-{number}")
        resumed = "yes" if found.resumed else "-"
        print(f"| {what} | {phase} | {found.first} | {resumed} | {found.recovery_seconds:.0f} | {found.restarted} |")


def measure(federation: Federation, what: str, phase: str, run_id: str) -> Outcome:
    """Run one case in a federation of its own."""
    federation.prepare(steps=20)
    federation.start_operator()
    for domain in federation.domains:
        federation.start_client(domain)
    federation.wait_for_clients()
    machines, run = federation.network, federation.run_folder(run_id)
    arguments = [*FEDMERGE, "run", *federation.settings(run_id), "--federation", "prod"]
    more = federation.operators_variables()
    following = machines.start(federation.operator, "run.log", *arguments, more=more)

    def says(text: str) -> bool:
        log = run / "run.log"
        return log.exists() and text in log.read_text()

    begins, ends = PHASES[phase]
    wait_for(begins, lambda: says(begins), MOST_SECONDS)
    fault = time.monotonic()
    _break(federation, what)
    code = following.wait(timeout=MOST_SECONDS)
    if code:
        federation.wait_for_clients()
        federation.fedmerge("run", "--resume", run_id, "--federation", "prod")
    assert (run / "DONE").exists()
    assert not json.loads((run / "clients.json").read_text())["excluded"]
    trained = [federation.log(domain).count(": start, validation") for domain in federation.domains]
    ended = _when(run / "run.log", ends, time.monotonic() - fault)
    return Outcome("failed" if code else "completed", bool(code), ended, sum(max(0, times - 1) for times in trained))


def _break(federation: Federation, what: str) -> None:
    """Cause the fault, and do what a supervisor does about it."""
    machines = federation.network
    if what == "cable":
        host = federation.organisations[federation.domains[0]]
        machines.pull_out(host)
        time.sleep(CUT_SECONDS)
        machines.pull_out(host, out=False)
        return
    wait_for(what, lambda: kill(_victims(machines.mark, what)) > 0, MOST_SECONDS)
    if what == "superlink":
        federation.restart_operator()


def _victims(mark: str, what: str) -> list[int]:
    """Return one living process of this kind, or none."""
    return (workers_of(mark) if what == "client" else processes_of(mark, PROGRAMS[what]))[:1]


def _when(log: Path, text: str, otherwise: float) -> float:
    """Return the seconds from ``otherwise`` seconds ago to the last line with this text; without one, ``otherwise``."""
    stamped = [line for line in log.read_text().splitlines() if text in line]
    if not stamped:
        return otherwise
    hours, minutes, seconds = (int(part) for part in stamped[-1][:8].split(":"))
    now = time.localtime()
    ago = ((now.tm_hour - hours) * 60 + now.tm_min - minutes) * 60 + now.tm_sec - seconds
    return otherwise - ago % 86400


if __name__ == "__main__":
    main()
