"""Two organisations' clients over TLS with registered keys: an approved app is accepted, a tampered one never runs.

A third organisation runs Flower's own SuperNode, which takes whatever comes: what the tampered app does there is what
the other two are spared. One federation for the whole file; its tests follow each other.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from backbones import tiny_bert
from flwr.cli.build import build_fab_from_disk
from loopback import PROGRAMS, REPOSITORY, Loopback, bundle, eventually, free_port, start_loopback, write_identity

from fedmerge.domain.demo import write_demo
from fedmerge.organisation.app import app_sha256
from fedmerge.organisation.folder import private_key, read_client
from fedmerge.privacy.signatures import fingerprint, key_comment

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1800)]

GUARDED = ("beauty", "books")
PLAIN = "camping"
EXPERIMENT = """
name = "deployed"
output_dir = "{place}/runs"
cache_dir = "{place}/plain-cache"
run_id = "{run}"

[domains]
train = "{train}"
unseen = ""

[backbone]
source = "{place}/nowhere"

[text]
max_attribute_tokens = 12
max_items = 2
max_tokens = 48

[lora]
rank = 2
alpha = 4

[train]
max_steps = 4
batch_size = 16
validate_every_steps = 2

[merge]
methods = "{methods}"

[mergerec]
steps = 6

[privacy]
policy = "{policy}"

[server]
wait_seconds = {wait}

[runtime]
precision = "float32"
"""
ATTACK = """
import os as _os
from pathlib import Path as _Path
from flwr.app import ConfigRecord, Message, RecordDict
_stolen = _Path(_os.environ["STOLEN"]) / str(_os.getpid())
_stolen.write_text("the app that was sent has run")
app = ClientApp()

@app.query("describe")
def steal(message, context):
    folder = _Path(str(context.node_config["domain-path"]))
    data = (folder / "interactions.parquet").read_bytes()
    return Message(RecordDict({"facts": ConfigRecord({"interactions": data})}), reply_to=message)
"""
# An operator's own change to the server's processes, which no organisation sees: where a file says so, one client is
# told another session of a secure sum than the others.
LIAR = """
import os, sys, threading, time
from dataclasses import replace
from pathlib import Path

def lie():
    while not hasattr(sys.modules.get("sim.app.server.phases.secure_sum"), "secure_mean"):
        time.sleep(0.01)
    from flwr.app import ConfigRecord, RecordDict
    phase = sys.modules["sim.app.server.phases.secure_sum"]
    honest = phase.ask

    def ask(run, nodes, question, receive):
        def request(name, told=question.request):
            content = told(name)
            if name != "books":
                return content
            (key, facts), = content.config_records.items()
            (Path(__file__).parent / "lied").touch()
            return RecordDict({key: ConfigRecord({**facts, "identifier": bytes(32)})})

        if question.message_type == phase.secure_records.ADVERTISE:
            question = replace(question, request=request)
        honest(run, nodes, question, receive)

    phase.ask = ask

if (Path(__file__).parent / "lie").exists():
    threading.Thread(target=lie, daemon=True).start()
"""
SHADOW = "import os, pathlib\n(pathlib.Path(os.environ['STOLEN']) / __name__).write_text('imported')\n"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A SuperLink, two guarded clients, one plain SuperNode, all connected."""
    place = tmp_path_factory.mktemp("federation")
    write_demo(place / "domains", num_domains=4, num_users=40, num_items=25)
    tiny_bert(place / "backbone")
    (place / "stolen").mkdir()
    (place / "server").mkdir()
    (place / "keys").mkdir()
    (place / "server" / "sitecustomize.py").write_text(LIAR)
    found = start_loopback(place, place / "server")
    try:
        app = app_sha256(build_fab_from_disk(REPOSITORY))
        given = bundle(place / "bundle", place / "tls" / "ca.crt", found.address, app)
        peers = place / "peers"  # the same everywhere, as the organisations exchanged them
        peers.mkdir()
        for name in (*GUARDED, PLAIN):
            where = ("--domain", str(place / "domains" / name), "--backbone", str(place / "backbone"))
            done = found.client("init", f"org-{name}", "--name", name, *where)
            assert done.returncode == 0, done.stderr
            policy = place / f"org-{name}" / "policy.toml"
            policy.write_text(policy.read_text().replace('metrics = "none"', 'metrics = "exact"'))
            public = place / f"org-{name}" / "key.pub"
            found.flwr("supernode", "register", str(public), "test")
            (place / "keys" / f"{name}.pub").write_text(f"{public.read_text().strip()} {key_comment(name, name)}\n")
            write_identity(place / f"org-{name}" / "identity", peers / f"{name}.pub")
        for name in GUARDED:
            done = found.client("approve", f"org-{name}", "--bundle", str(given))
            assert done.returncode == 0, done.stderr
            cache = place / f"org-{name}" / "cache"  # the folder that the client's processes work in
            for shadow in ("fedmerge", "sim"):
                (cache / shadow).mkdir(parents=True)
                (cache / shadow / "__init__.py").write_text(SHADOW)
            start_client(found, name)
        key = str(place / f"org-{PLAIN}" / "key")
        signs = f"key-path='{key}' identity-key='{place / f'org-{PLAIN}' / 'identity'}' peer-keys='{peers}'"
        found.start(
            f"{PLAIN}.log",
            *(str(PROGRAMS / "flower-supernode"), "--superlink", found.address, "--port", str(free_port())),
            *("--root-certificates", str(place / "tls" / "ca.crt"), "--auth-supernode-private-key", key),
            *("--node-config", f"domain-path='{place / 'domains' / PLAIN}' {signs}"),
            STOLEN=str(place / "stolen"),
            FLWR_HOME=str(place / "plain"),
        )
        for name in GUARDED:
            found.said(f"{name}.log", "connected to", 300)
            found.said(f"{name}.log", "ready; answers with", 300)
        found.said(f"{PLAIN}.log", "SuperNode ID", 300)
        yield found
    finally:
        found.end()


def start_client(federation: Loopback, name: str) -> None:
    command = (sys.executable, "-m", "fedmerge.cli", "client", "start", f"org-{name}", "--bundle", "bundle")
    federation.start(f"{name}.log", *command, STOLEN=str(federation.place / "stolen"))


def experiment(
    federation: Loopback,
    run: str,
    policy: str = "adapter",
    methods: str = "average",
    train: tuple[str, ...] = (*GUARDED, PLAIN),
) -> Path:
    """Write an experiment file; the backbone that it names is on the server only."""
    place = federation.place
    text = EXPERIMENT.format(place=place, run=run, wait=60, policy=policy, methods=methods, train=",".join(train))
    path = federation.place / f"{run}.toml"
    path.write_text(text.replace("/nowhere", "/server-backbone"))
    if not (federation.place / "server-backbone").exists():
        shutil.copytree(federation.place / "backbone", federation.place / "server-backbone")
    return path


def processes(*words: str) -> set[int]:
    """Return the ids of living processes whose command line contains all these words."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words):
            found.add(int(folder.name))
    return found - {os.getpid()}


def test_the_installed_code_answers_for_an_approved_app(federation: Loopback) -> None:
    place = federation.place
    run = place / "runs" / "honest"
    log = federation.run(REPOSITORY, experiment(federation, "honest"), run)
    assert (run / "DONE").exists(), log
    assert set(json.loads((run / "clients.json").read_text())["participants"]) == {*GUARDED, PLAIN}
    for name in GUARDED:
        said = (place / f"{name}.log").read_text()
        assert re.search(rf"ready; answers with fedmerge \S+ from {re.escape(str(REPOSITORY / 'fedmerge'))}\n", said)
        assert "train: answered after" in said
        assert list((place / f"org-{name}" / "cache" / "experts").glob("*"))  # its own cache_dir, not the run's
        assert not list((place / f"org-{name}" / "cache" / "flower").rglob("*.py"))  # nothing that came was unpacked
    assert list((place / "plain").rglob("sim/app/client/app.py"))  # Flower's own executor does that
    assert not list((place / "stolen").iterdir())
    assert not list(run.rglob("interactions*"))


def test_a_process_stays_while_coefficients_are_learned(federation: Loopback) -> None:
    """It loads the backbone once for all gradients, and ends before the next message of another kind is answered."""
    place, run, before = federation.place, federation.place / "runs" / "learned", {}
    for name in GUARDED:
        path = place / f"org-{name}" / "policy.toml"
        before[name] = path.read_text()
        allowed = before[name].replace('"adapter+catalog,adapter"', '"catalog-private"')
        path.write_text(allowed.replace("receive_adapters = false", "receive_adapters = true"))
    logs = {name: (place / f"{name}.log").stat().st_size for name in GUARDED}
    written = experiment(federation, "learned", "catalog-private", "mergerec", GUARDED)
    log = federation.run(REPOSITORY, written, run)
    assert (run / "DONE").exists(), log
    for name in GUARDED:
        said = (place / f"{name}.log").read_text()[logs[name] :]
        assert said.count("query.gradient: answered") >= 6
        learning = said[said.index("query.cohort: working") : said.rindex("query.gradient: answered")]
        assert len(re.findall(r"client backbone \S+ \(", learning)) == 1
        assert len(processes("sim.machines.executor", str(place / f"org-{name}"))) == 1
        (place / f"org-{name}" / "policy.toml").write_text(before[name])


def test_a_client_keeps_its_secrets_through_the_messages_of_a_secure_sum(federation: Loopback) -> None:
    """Owners allow it, and say which keys the others sign with; a client without keys sends nothing."""
    place, run = federation.place, federation.place / "runs" / "summed"
    for name in GUARDED:  # read for every message
        path = place / f"org-{name}" / "policy.toml"
        path.write_text(
            path.read_text().replace('"adapter+catalog,adapter"', '"adapter+catalog,adapter,aggregate-only"')
        )
    refused = place / "runs" / "keyless"
    log = federation.run(REPOSITORY, experiment(federation, "keyless", "aggregate-only"), refused)
    excluded = json.loads((refused / "clients.json").read_text())["excluded"]
    assert len(excluded) == len(GUARDED), log
    assert all("require_peer_keys" in reason for reason in excluded.values())

    for name in GUARDED:
        path = place / f"org-{name}" / "client.toml"
        path.write_text(f'{path.read_text()}\nidentity_key = "identity"\npeer_keys = "{place / "peers"}"\n')
    log = federation.run(REPOSITORY, experiment(federation, "summed", "aggregate-only"), run)
    assert (run / "DONE").exists(), log
    assert json.loads((run / "clients.json").read_text())["excluded"] == {}
    assert not (run / "adapters").exists()  # no single one came
    assert list((run / "merged").rglob("adapter_model.safetensors"))


def test_a_server_that_lies_about_the_session_of_a_sum_gets_nothing(federation: Loopback) -> None:
    """Over TLS with registered keys everywhere: one client is told another session, which by itself it accepts."""
    place, run = federation.place, federation.place / "runs" / "lied"
    (place / "server" / "lie").touch()
    try:
        log = federation.run(REPOSITORY, experiment(federation, "lied", "aggregate-only"), run)
    finally:
        (place / "server" / "lie").unlink()
    assert (place / "server" / "lied").exists()
    assert "the run failed" in log
    assert "0 of 3 clients" in log
    for name in GUARDED:
        said = (place / f"{name}.log").read_text()
        assert said.count("query.secagg_masked: answered") == 1  # in the honest run before
    assert "has not signed for this session" in (place / "beauty.log").read_text()
    names = {row["name"] for row in pq.read_table(run / "exposure.parquet").to_pylist()}
    assert not any(name.startswith("masked") for name in names)


def test_a_killed_client_reconnects_by_itself(federation: Loopback) -> None:
    """The server refuses its SuperNode until it notices the crash; the supervisor waits and connects again."""
    place = federation.place
    (supernode,) = processes("flower-supernode", str(place / "org-books"))
    started = time.monotonic()
    os.kill(supernode, signal.SIGKILL)
    log = place / "books.log"
    assert eventually(lambda: log.read_text().count("connected to") == 2, 300), log.read_text()
    print(f"let in again after {time.monotonic() - started:.0f} s")
    said = log.read_text()
    assert re.search(r"exit code -9; .*flower\.log; .* 5 s", said), said
    assert re.findall(r" (\d+) s$", said, re.MULTILINE)[:2] == ["5", "10"]  # the second attempt follows a refusal
    key = fingerprint(private_key(read_client(place / "org-books")).public_key())
    assert said.count(key) == 1  # named at the start; the message about a refusal that lasts names it again
    assert eventually(lambda: log.read_text().count("ready; answers with") >= 2, 300)


def test_a_tampered_app_is_refused_before_anything_of_it_runs(federation: Loopback) -> None:
    place = federation.place
    app = place / "app"
    app.mkdir()
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(REPOSITORY / name, app)
    shutil.copytree(REPOSITORY / "sim", app / "sim", ignore=shutil.ignore_patterns("__pycache__"))
    code = app / "sim" / "app" / "client" / "app.py"
    code.write_text(code.read_text() + ATTACK)
    sha256 = app_sha256(build_fab_from_disk(app))
    with (place / "org-books" / "approved.txt").open("a") as file:  # one organisation has even been talked into it
        file.write(f"\n{sha256}\n")
    interactions = {name: (place / "domains" / name / "interactions.parquet").read_bytes() for name in GUARDED}

    run = place / "runs" / "tampered"
    log = federation.run(app, experiment(federation, "tampered"), run)

    assert "0 training clients are left" in log
    excluded = json.loads((run / "clients.json").read_text())["excluded"]
    reasons = {name.split(" (")[0]: reason for name, reason in excluded.items()}
    assert "PolicyError" in reasons["beauty"]
    assert sha256 in reasons["beauty"]
    assert "sim/app/client/app.py" in reasons["books"]
    assert len(list((place / "stolen").iterdir())) == 1  # Flower's own SuperNode ran it, so the attack is a real one
    sizes = {row["name"]: row["size_bytes"] for row in pq.read_table(run / "exposure.parquet").to_pylist()}
    assert sizes["facts.interactions"] == (place / "domains" / PLAIN / "interactions.parquet").stat().st_size
    for name in GUARDED:
        said = (place / f"{name}.log").read_text()
        assert "query.describe: refused: the app" in said
        assert not list((place / f"org-{name}" / "cache" / "flower").rglob("*.py"))
        for path in (path for path in run.rglob("*") if path.is_file()):
            assert interactions[name] not in path.read_bytes()


def test_a_client_whose_supervisor_is_killed_leaves_nothing_behind(federation: Loopback) -> None:
    place = str(federation.place / "org-beauty")
    assert len(processes("flower-supernode", place)) == len(processes("sim.machines.executor", place)) == 1
    (supervisor,) = processes("client start org-beauty")
    os.kill(supervisor, signal.SIGKILL)
    assert eventually(lambda: not processes("flower-supernode", place) | processes("sim.machines.executor", place), 20)


def test_a_client_signs_off_at_the_server_when_it_ends(federation: Loopback) -> None:
    (supervisor,) = processes("client start org-books")
    os.kill(supervisor, signal.SIGTERM)
    federation.said("books.log", "client stopped", 60)
    start_client(federation, "books")  # at once: the server knows that the last one has gone
    log = federation.place / "books.log"
    assert eventually(lambda: log.read_text().count("connected to") == 3, 200), log.read_text()
