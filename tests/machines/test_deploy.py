"""A federation on three machines with their own addresses: TLS, registered keys, nginx, Flower's deployment engine.

Machines are network namespaces where they are permitted, otherwise processes on the loopback (then what needs addresses
of their own is not asked). One federation stands for all tests of this file.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from deploy_federation import FEDMERGE, NO_CHECKOUT, Federation, allow_exact_sums, make_key
from deploy_hosts import PROGRAMS, has_nginx, kill, network, processes_of, wait_for, why_no_namespaces, workers_of
from run_folders import hash_results

from fedmerge.config import load_config
from fedmerge.deploy.certificates import new_authority
from sim.local.in_process import run_in_process

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not has_nginx(), reason="nginx is not installed: apt-get install nginx"),
]

NAMES = ["operator", "north", "south"]
REQUEST = """
import http.client, json, ssl, sys
host, port, certificate, key, authority = sys.argv[1:6]
context = ssl.create_default_context(cafile=authority)
if certificate:
    context.load_cert_chain(certificate, key)
answers = {}
for path in sys.argv[6:]:
    connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=20)
    connection.request("POST", path, body=b"", headers={"content-type": "application/x-protobuf"})
    answers[path] = connection.getresponse().status
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Operator and two organisations, all connected."""
    with network(tmp_path_factory.mktemp("hosts"), NAMES, in_namespaces=not why_no_namespaces()) as machines:
        made = Federation(machines)
        made.prepare()
        made.start_operator()
        for domain in made.domains:
            made.start_client(domain)
        made.wait_for_clients()
        yield made


@pytest.fixture(scope="module")
def finished(federation: Federation) -> Path:
    """Folder of a finished run on the machines."""
    output = federation.fedmerge("run", *federation.settings("whole"), "--federation", "prod")
    folder = federation.run_folder("whole")
    assert f"run folder: {folder}" in output
    assert f"2 keys in {federation.deployment / 'keys'}" in output  # names are bound to keys without a setting
    return folder


def test_a_run_on_machines_equals_its_simulation_to_the_byte(federation: Federation, finished: Path) -> None:
    there = federation.shared / "simulated"
    own = [f"output_dir={there}", f"cache_dir={there / 'cache'}", f"domains.root={federation.shared / 'domains'}"]
    experiment, *settings = federation.settings("whole")
    run_in_process(load_config(Path(experiment), [*settings[1:], *own]))  # Flower's simulation, but for Ray
    assert len(hash_results(finished)) > 12
    assert hash_results(finished) == hash_results(there / "whole")


def test_what_left_the_organisations_is_in_the_ledger_and_the_operator_sees_the_run(
    federation: Federation, finished: Path
) -> None:
    rows = pq.read_table(finished / "exposure.parquet").to_pylist()
    assert {(row["domain"], row["signed_by"]) for row in rows} == {(domain, domain) for domain in federation.domains}
    assert {row["message"] for row in rows} == {"query.describe", "query.catalog", "train", "evaluate"}
    (listed,) = json.loads(federation.fedmerge("runs", "--federation", "prod", "--json"))
    assert (listed["run"], listed["status"]) == ("whole", "finished:completed")
    status = federation.fedmerge("deploy", "status", federation.deployment)
    assert ": running\n  beauty: online since " in status
    assert "last run: whole, done" in status


def test_whoever_is_not_registered_or_not_encrypted_is_refused(federation: Federation, tmp_path: Path) -> None:
    (tmp_path / "other.crt").write_bytes(new_authority("prod").certificate)
    make_key(tmp_path / "stranger")
    host = federation.organisations["beauty"]
    address, authority = federation.address, federation.deployment / "clients" / "beauty" / "ca.crt"
    registered: list[str | Path] = ["--auth-supernode-private-key", federation.client_folder("beauty") / "key"]
    attempts: dict[str, tuple[list[str | Path], str]] = {
        "unregistered key": (
            ["--root-certificates", authority, "--auth-supernode-private-key", tmp_path / "stranger"],
            r"Failed to initialize the connection|\[code: \d+\]",
        ),
        "no key": (["--root-certificates", authority], r"Failed to initialize the connection|\[code: \d+\]"),
        "wrong authority": (["--root-certificates", tmp_path / "other.crt", *registered], r"certificate verify failed"),
        "plain HTTP": (["--insecure"], r"Connection attempt failed|Failed to initialize the connection"),
    }
    processes = {}
    for number, (name, (arguments, _)) in enumerate(attempts.items()):
        command = [PROGRAMS / "flower-supernode", "--superlink", address, "--port", str(9200 + number), *arguments]
        processes[name] = federation.network.start(host, f"{name}.log", *command)
    for name, process in processes.items():

        def said(name: str = name) -> bool:
            return bool(re.search(attempts[name][1], federation.log("beauty", f"{name}.log")))

        wait_for(name, said, 300)
        if name == "plain HTTP":
            process.terminate()  # it would retry for ever
        assert process.wait(timeout=60) != 0
        assert "SuperNode ID" not in federation.log("beauty", f"{name}.log")
    assert set(federation.states().values()) == {"online"}


def test_a_key_that_was_withdrawn_never_comes_back_and_leaves_nothing(federation: Federation, tmp_path: Path) -> None:
    make_key(tmp_path / "guest")
    key: list[str | Path] = ["guest", "--public-key", tmp_path / "guest.pub"]
    before = sorted(federation.deployment.rglob("*guest*"))
    assert "its key is registered" in federation.fedmerge("deploy", "add-client", federation.deployment, *key)
    federation.fedmerge("deploy", "remove-client", federation.deployment, "guest")
    result = federation.fedmerge("deploy", "add-client", federation.deployment, *key, fails=True)
    assert f"fedmerge deploy remove-client {federation.deployment} guest" in result
    assert sorted(federation.deployment.rglob("*guest*")) == before == []
    assert set(federation.states()) == {"beauty", "books"}
    # a refused key that is still in the folder, for example from an older version, keeps nobody else out
    (federation.deployment / "keys" / "guest.pub").write_bytes((tmp_path / "guest.pub").read_bytes())
    make_key(tmp_path / "host")
    other: list[str | Path] = ["host", "--public-key", tmp_path / "host.pub"]
    result = federation.fedmerge("deploy", "add-client", federation.deployment, *other)
    assert "warning: guest: Flower refuses to register" in result
    assert "its key is registered" in result
    for name in ("guest", "host"):
        federation.fedmerge("deploy", "remove-client", federation.deployment, name)
    assert set(federation.states().values()) == {"online"}


def test_a_registered_organisation_cannot_claim_the_domain_of_another(federation: Federation) -> None:
    """The guest has a key, an approved app and a copy of the data of beauty; its key is bound to its own name."""
    organisation, bundle = federation.organisations["books"], federation.bundle("guest")
    folder = federation.network.home(organisation) / "impostor"
    data: list[str | Path] = [
        *("--domain", federation.shared / "domains" / "beauty"),
        *("--backbone", federation.shared / "backbone"),
    ]
    federation.client(organisation, "init", folder, "--name", "guest", *data)
    allow_exact_sums(folder)
    key: list[str | Path] = ["guest", "--public-key", folder / "key.pub"]
    assert "may sign for domain guest" in federation.fedmerge("deploy", "add-client", federation.deployment, *key)
    federation.client(organisation, "approve", folder, "--bundle", bundle)
    command: list[str | Path] = ["client", "start", folder, "--bundle", bundle]
    program = federation.organisations_command
    process = federation.network.start(organisation, "impostor.log", *program, *command, more=NO_CHECKOUT)
    try:
        federation.wait_for_clients()
        settings = [*federation.settings("impostor"), "until=train"]
        federation.fedmerge("run", *settings, "--federation", "prod")
        clients = json.loads((federation.run_folder("impostor") / "clients.json").read_text())
        ((name, reason),) = clients["excluded"].items()
        assert name.startswith("beauty (node ")
        assert "its key (guest) is registered for 'guest' only" in reason
        assert set(clients["participants"]) == {"beauty", "books"}
    finally:
        process.terminate()
        process.wait(timeout=60)
        federation.fedmerge("deploy", "remove-client", federation.deployment, "guest")
    assert set(federation.states()) == {"beauty", "books"}


def test_an_organisation_reaches_nothing_but_fleet(federation: Federation) -> None:
    organisation = federation.organisations["books"]
    operators = federation.deployment / "operator"
    paths = {
        "/v1/fleet/pull-messages": "let through",
        "/v1/control/list-runs": "control",
        "/v1/control/start-run": "control",
        "/v1/fleet/../control/list-runs": "control",
        "/v1/fleet/%2e%2e/control/list-runs": "control",
        "/v1/control%2flist-runs": "control",
        "//v1//control/list-runs": "control",
        "/v1/control/../fleet/pull-messages": "nothing",
        "/v1/runtime/acquire-task": "nothing",
        "/V1/CONTROL/list-runs": "nothing",
        "/docs": "nothing",
    }

    def answers(certificate: str | Path, key: str | Path) -> dict[str, int]:
        host, _, port = federation.address.rpartition(":")
        arguments = [host, port, certificate, key, operators / "ca.crt", *paths]
        done = federation.network.run(organisation, sys.executable, "-c", REQUEST, *arguments)
        found: dict[str, int] = json.loads(done.stdout)
        return found

    expected = {"let through": 415, "control": 403, "nothing": 404}  # 415: the SuperLink itself dislikes the request
    assert answers("", "") == {path: expected[kind] for path, kind in paths.items()}
    opened = answers(operators / "operator.crt", operators / "operator.key")
    assert opened["/v1/control/list-runs"] == opened["/v1/control/start-run"] == 415
    assert opened["/v1/runtime/acquire-task"] == 404
    server = federation.deployment / "server"
    assert set(answers(server / "server.crt", server / "server.key").values()) == {400}
    assert ' 403 "POST /v1/control/start-run"' in (federation.deployment / "state/nginx/refused.log").read_text()
    if organisation.namespace:  # the SuperLink itself listens on its own machine's loopback alone
        port = re.search(r"superlink_port = (\d+)", (federation.deployment / "deployment.toml").read_text())
        probe = (
            f"import socket; socket.create_connection(('{federation.operator.address}', {port and port.group(1)}), 5)"
        )
        done = federation.network.run(organisation, sys.executable, "-c", probe)
        assert "ConnectionRefusedError" in done.stdout


def test_the_operator_works_from_another_machine_with_the_certificate(federation: Federation, tmp_path: Path) -> None:
    machine = federation.organisations["books"]
    if not machine.namespace:
        pytest.skip(f"needs machines of their own: {why_no_namespaces()}")
    folder = federation.network.home(machine) / "operator"
    shutil.copytree(federation.deployment / "operator", folder)
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin") or ""
    own = ["-g", "user root;"]  # of the test, which is root
    federation.network.start(machine, "door.log", nginx, "-p", folder, "-c", "nginx.conf", *own)
    time.sleep(1.0)
    more = {"FLWR_HOME": str(folder / "flower")}
    done = federation.network.run(machine, *FEDMERGE, "runs", "--federation", "prod", "--json", more=more)
    assert done.returncode == 0, done.stdout
    assert isinstance(json.loads(done.stdout), list)


def test_killed_client_and_superlink_lose_nothing(federation: Federation, finished: Path) -> None:
    """A client's process is killed during training, and the SuperLink after the first expert; then --resume."""
    mark, run = federation.network.mark, federation.run_folder("killed")
    changes = ["seed=1"]  # other experts than those that the clients keep
    arguments = ["run", *federation.settings("killed"), *changes, "--federation", "prod"]
    following = federation.network.start(
        federation.operator, "killed.log", *FEDMERGE, *arguments, more=federation.operators_variables()
    )
    log = federation.network.home(federation.operator) / "killed.log"

    wait_for("training", lambda: "training: " in log.read_text(), 300)
    wait_for("a client at work", lambda: kill(workers_of(mark)[:1]) > 0, 300)
    wait_for("a client is asked again", lambda: "is back and is asked again" in log.read_text(), 300)
    wait_for("an expert", lambda: "expert received" in log.read_text(), 300)
    kill(processes_of(mark, "flower-superlink"))
    federation.restart_operator()
    assert following.wait(timeout=300) == 1
    assert "the run did not finish: finished:failed" in log.read_text()
    assert "fedmerge: resume with: fedmerge run --resume killed --federation prod" in log.read_text()

    arrived = {file.parent.name for file in run.glob("adapters/[!.]*/training.json")}
    federation.wait_for_clients()
    output = federation.fedmerge("run", "--resume", "killed", "--federation", "prod")
    assert f"training: already on disk: {', '.join(sorted(arrived))}" in output
    assert (run / "DONE").exists()
    assert not json.loads((run / "clients.json").read_text())["excluded"]
