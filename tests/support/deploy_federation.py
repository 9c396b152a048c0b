"""A federation on machines of :mod:`deploy_hosts`: an operator with SuperLink and nginx, organisations with clients.

The operator works from the checkout; organisations have only the wheel.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbones import tiny_bert
from deploy_hosts import Host, Network, free_port, processes_of, wait_for
from wheels import Installed, build_wheel, install_wheel

from fedmerge.domain.demo import write_demo

EXPERIMENT = """
name = "trial"

[domains]
train = "beauty,books"
unseen = ""

[text]
max_attribute_tokens = 24
max_items = 3
max_tokens = 96

[lora]
rank = 2
alpha = 4

[train]
learning_rate = 0.03
batch_size = 32
max_steps = {steps}
validate_every_steps = 5

[merge]
methods = "average,mergerec"

[mergerec]
steps = 3

[runtime]
device = "cpu"
precision = "float32"
threads_per_client = 1
server_threads = 1
"""
FEDMERGE = (sys.executable, "-m", "fedmerge.cli")
NO_CHECKOUT = {"PYTHONPATH": ""}


def allow_exact_sums(folder: Path) -> None:
    """Accept runs with exact metric sums: of 80 users, suppressed ones would all be withheld."""
    policy = folder / "policy.toml"
    policy.write_text(policy.read_text().replace('metrics = "none"', 'metrics = "exact"'))


@dataclass
class Federation:
    """The federation on the machines.

    Attributes:
        network: the machines: first the operator's, then one per organisation.
        domains: domain of each organisation, in the order of their machines.
        operators_command: the process of `fedmerge deploy start`.
        installed: the organisations' fedmerge.
    """

    network: Network
    domains: tuple[str, ...] = ("beauty", "books")
    operators_command: "subprocess.Popen[bytes] | None" = None
    installed: Installed | None = None

    @property
    def operator(self) -> Host:
        """Return the operator's machine."""
        return self.network.hosts[0]

    @property
    def organisations(self) -> dict[str, Host]:
        """Return domain -> machine."""
        return dict(zip(self.domains, self.network.hosts[1:], strict=True))

    @property
    def deployment(self) -> Path:
        """Return the operator's folder."""
        return self.network.home(self.operator) / "deployment"

    @property
    def shared(self) -> Path:
        """Return the folder of domains, backbone and experiment file, as if each machine had its own copy."""
        return self.network.folder

    def prepare(self, steps: int = 10) -> None:
        """Write data and the operator's folder, install the wheel, create every organisation's key and bundle."""
        self.installed = install_wheel(build_wheel(self.shared / "wheel"), self.shared / "organisations")
        write_demo(self.shared / "domains", num_domains=8, num_users=80, num_items=40)
        tiny_bert(self.shared / "backbone")
        experiment = EXPERIMENT.format(steps=steps) + f'\n[backbone]\nsource = "{self.shared / "backbone"}"\n'
        (self.shared / "experiment.toml").write_text(experiment)
        ports = ["--port", str(free_port()), "--superlink-port", str(free_port())]
        self.fedmerge("deploy", "init", self.deployment, "--host", self.operator.address, *ports)
        for domain, host in self.organisations.items():
            folder = self.client_folder(domain)
            data: list[str | Path] = [
                "--domain",
                self.shared / "domains" / domain,
                "--backbone",
                self.shared / "backbone",
            ]
            self.client(host, "init", folder, "--name", domain, *data)
            allow_exact_sums(folder)
            key: list[str | Path] = ["--public-key", folder / "key.pub", "--domain", domain]
            self.fedmerge("deploy", "add-client", self.deployment, domain, *key)
            self.client(host, "approve", folder, "--bundle", self.bundle(domain))

    def fedmerge(self, *arguments: str | Path, fails: bool = False) -> str:
        """Run a command of the operator; return its output."""
        done = self.network.run(self.operator, *FEDMERGE, *arguments, more=self.operators_variables())
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    def operators_variables(self) -> dict[str, str]:
        """Return the environment variables that the operator exports."""
        return {"FLWR_HOME": str(self.deployment / "flower")}

    def start_operator(self) -> None:
        """Start SuperLink and nginx; return when clients can connect."""
        log = self.network.home(self.operator) / "operator.log"
        before = log.read_text().count("proxy: clients reach") if log.exists() else 0
        process = self.network.start(
            self.operator, log.name, *FEDMERGE, "deploy", "start", self.deployment, more=self.operators_variables()
        )
        wait_for(f"{log}", lambda: process.poll() is not None or log.read_text().count("proxy: clients") > before)
        assert process.poll() is None, log.read_text()
        self.operators_command = process

    def restart_operator(self) -> None:
        """Wait until `fedmerge deploy start` and its processes have ended, then start it again."""
        assert self.operators_command is not None
        assert self.operators_command.wait(timeout=60) == 1
        assert not processes_of(self.network.mark, "flwr-serverapp")
        self.start_operator()

    def client(self, host: Host, *arguments: str | Path) -> str:
        """Run a command of an organisation; return its output."""
        done = self.network.run(host, *self.organisations_command, "client", *arguments, more=NO_CHECKOUT)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def client_folder(self, domain: str) -> Path:
        """Return an organisation's client folder."""
        return self.network.home(self.organisations[domain]) / "client"

    def bundle(self, domain: str) -> Path:
        """Return an organisation's bundle."""
        return self.deployment / "clients" / domain

    def start_client(self, domain: str) -> "subprocess.Popen[bytes]":
        """Start an organisation's client with its supervisor."""
        command: list[str | Path] = ["client", "start", self.client_folder(domain), "--bundle", self.bundle(domain)]
        program = self.organisations_command
        return self.network.start(self.organisations[domain], "client.log", *program, *command, more=NO_CHECKOUT)

    @property
    def organisations_command(self) -> tuple[str, ...]:
        """Return the program ``fedmerge`` of the wheel."""
        assert self.installed is not None
        return (self.installed.python, "-m", "fedmerge.cli")

    @property
    def address(self) -> str:
        """Return the address for clients."""
        told = (self.deployment / "clients" / self.domains[0] / "federation.toml").read_text()
        found = re.search(r'address = "([^"]+)"', told)
        assert found, told
        return found.group(1)

    def states(self) -> dict[str, str]:
        """Return domain -> state of its client according to the SuperLink."""
        done = self.network.run(self.operator, *FEDMERGE, "deploy", "status", self.deployment, "--json")
        told: dict[str, Any] = json.loads(done.stdout)
        return {client["name"]: client["state"] for client in told["clients"]}

    def wait_for_clients(self) -> None:
        """Wait until all clients are online."""
        wait_for("all clients are online", lambda: set(self.states().values()) == {"online"})

    def settings(self, run_id: str) -> list[str]:
        """Return the arguments of `fedmerge run` for one run."""
        return [str(self.shared / "experiment.toml"), "--set", f"run_id={run_id}"]

    def run_folder(self, run_id: str) -> Path:
        """Return the folder of a run."""
        return self.deployment / "runs" / run_id

    def log(self, domain: str, name: str = "client.log") -> str:
        """Return the log of an organisation's client."""
        return (self.network.home(self.organisations[domain]) / name).read_text()


def make_key(path: Path) -> None:
    """Write a key pair that is not registered anywhere."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(path)], check=True)
