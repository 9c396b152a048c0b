"""compose.yaml: every command is one of fedmerge's, paths and ports agree, and what it prepares can be started."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmerge import __version__
from fedmerge.cli import make_parser
from fedmerge.config import load_config
from fedmerge.deploy.clients import list_clients
from fedmerge.deploy.folder import read_deployment
from fedmerge.installation import find_config
from fedmerge.organisation.folder import approved_apps, private_key, read_bundle, read_client
from fedmerge.serving.http.server import read_key

REPOSITORY = Path(__file__).resolve().parents[2]
SHOPS = ("beauty", "books")
COMPOSE = yaml.safe_load((REPOSITORY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
KEYS = {"image", "init", "build", "depends_on", "volumes", "command", "healthcheck", "restart", "network_mode"}
KEYS |= {"environment", "ports"}


def arguments_of(service: str) -> list[str]:
    command = SERVICES[service]["command"]
    return shlex.split(command) if isinstance(command, str) else list(command)


def commands_of(service: str) -> Iterator[list[str]]:
    """Yield the arguments of every call of fedmerge, in a loop over shops for each shop."""
    arguments = arguments_of(service)
    lines = arguments[2].replace("$$", "$").splitlines() if arguments[0] == "sh" else [shlex.join(arguments)]
    for line in lines:
        if called := re.search(r"\bfedmerge (.*)", line):
            for shop in SHOPS if "$shop" in line else ("",):
                yield shlex.split(called[1].replace("$shop", shop))


def options_of(service: str) -> list[Any]:
    """Return the options of its commands; wrong usage ends the test with SystemExit."""
    return [make_parser().parse_args(arguments) for arguments in commands_of(service)]


def test_services_and_volumes_are_those_that_are_used() -> None:
    assert set(SERVICES) == {"prepare", "operator", *SHOPS, "run", "serving"}
    mounted = {volume.partition(":")[0] for service in SERVICES.values() for volume in service["volumes"]}
    assert mounted == set(COMPOSE["volumes"])
    for name, service in SERVICES.items():
        assert service.keys() <= KEYS
        assert set(service.get("depends_on", {})) < set(SERVICES) - {name}
    healthy = {
        name
        for service in SERVICES.values()
        for name, on in service.get("depends_on", {}).items()
        if "healthy" in on["condition"]
    }
    assert {name for name, service in SERVICES.items() if "healthcheck" in service} == healthy
    assert SERVICES["run"]["network_mode"] == "service:operator"


@pytest.mark.parametrize("service", SERVICES)
def test_every_command_is_understood_and_its_paths_are_mounted(service: str) -> None:
    assert options_of(service)
    mounts = [volume.split(":")[1] for volume in SERVICES[service]["volumes"]]
    text = re.sub(r"#.*", "", " ".join(arguments_of(service)))
    paths = {path for path in re.findall(r"(?<![\w.$}*/])/[\w$][\w$./-]*", text) if not path.startswith("/dev/")}
    for path in paths:
        for shop in SHOPS:
            assert any(f"{path.replace('$$shop', shop)}/".startswith(f"{mount}/") for mount in mounts), path


def test_a_shop_sees_neither_the_operators_files_nor_another_shops() -> None:
    for shop in SHOPS:
        assert SERVICES[shop]["volumes"] == [f"{shop}:/{shop}"]
    assert SERVICES["operator"]["volumes"] == ["operator:/operator"]
    assert SERVICES["serving"]["volumes"] == ["beauty:/beauty", "sent:/sent:ro"]


def test_hosts_ports_and_names_agree() -> None:
    (deployment,) = [options for options in options_of("prepare") if hasattr(options, "superlink_port")]
    assert deployment.hosts == ["operator"]  # the service's name, by which the shops reach it
    assert f"https://localhost:{deployment.port}/health" in SERVICES["operator"]["healthcheck"]["test"]
    (start,) = options_of("operator")
    assert start.folder == deployment.folder
    assert SERVICES["run"]["environment"]["FLWR_HOME"] == f"{deployment.folder}/flower"
    (run,) = options_of("run")
    assert run.federation == deployment.name
    config = load_config(find_config(run.config), run.overrides)
    assert (config.domains.train, config.domains.unseen) == (SHOPS, ())
    (serving,) = options_of("serving")
    assert f"/{config.run_id} " in f"{serving.adapter} "
    assert SERVICES["serving"]["ports"] == [f"127.0.0.1:{serving.port}:{serving.port}"]
    assert serving.host == "0.0.0.0"
    assert serving.api_key_file is not None


def test_the_image_is_of_this_version_and_has_what_the_commands_need() -> None:
    dockerfile = SERVICES["prepare"]["build"]["dockerfile_inline"]
    assert {service["image"] for service in SERVICES.values()} == {f"fedmerge:{__version__}"}
    assert set(re.findall(r"fedmerge-[\d.]+-py3-none-any\.whl", dockerfile)) == {
        f"fedmerge-{__version__}-py3-none-any.whl"
    }
    (copied,) = re.findall(r"^COPY (\S+) ", dockerfile, re.MULTILINE)
    assert (REPOSITORY / copied).is_file()
    assert "[minilm,serve]" in dockerfile
    assert all(program in dockerfile for program in ("nginx", "curl"))
    (owned,) = re.findall(r"--owner=fedmerge (.*)", dockerfile)
    assert owned.split() == [f"/{name}" for name in COMPOSE["volumes"]]


@pytest.mark.federation
def test_what_is_prepared_can_be_started(tmp_path: Path) -> None:
    """Run the script of the service prepare as a plain process, its volumes as folders."""
    (tmp_path / "fedmerge").write_text(f'#!/bin/sh\nexec {sys.executable} -m fedmerge.cli "$@"\n')
    (tmp_path / "fedmerge").chmod(0o755)
    *shell, script = arguments_of("prepare")
    for name in ("operator", *SHOPS, "$$shop"):
        script = re.sub(rf"(?<=[ ])/{re.escape(name)}(?=[/ \n])", f"{tmp_path}/{name}", script)
    for name in ("operator", *SHOPS):
        (tmp_path / name).mkdir()
    (tmp_path / "books" / "of an interrupted attempt").mkdir()
    for _ in range(2):  # the second time there is nothing to do
        subprocess.run(
            [*shell, script.replace("$$", "$")],
            cwd=REPOSITORY,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
    deployment = read_deployment(tmp_path / "operator" / "federation")
    assert [client.name for client in list_clients(deployment)] == list(SHOPS)
    for shop in SHOPS:
        client, bundle = read_client(tmp_path / shop / "client"), read_bundle(tmp_path / shop / "bundle")
        assert client.domain == tmp_path / shop / shop
        assert (bundle.address, bundle.app) == (deployment.address, *approved_apps(client.folder))
        assert private_key(client)
    assert len(read_key(tmp_path / "beauty" / "api-key")) == 32
