"""The Helm chart: its command, versions and values; rendered by Helm and checked where Helm is installed."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from run_folders import output, refusal

from fedmerge import __version__
from fedmerge.cli import make_parser
from fedmerge.config import load_config
from fedmerge.deploy.kubernetes import CHART
from fedmerge.installation import find_config
from fedmerge.storage.addresses import address_problem

HELM = shutil.which("helm")
OPERATOR = {"operator": {"enabled": True, "hosts": ["fl.example.org", "10.1.2.3"], "ingress": {"enabled": True}}}
CLIENT: dict[str, dict[str, Any]] = {
    "client": {
        "enabled": True,
        "domain": "north",
        "secret": "north-client",
        "bundle": "north-bundle",
        "dataClaim": "shops",
        "storageSecret": "s3",
    }
}
SIMULATION = {
    "simulation": {
        "enabled": True,
        "experiment": find_config("tiny").read_text(),
        "dataClaim": "shops",
        "address": "s3://bucket/runs/first",
    }
}
needs_helm = pytest.mark.skipif(HELM is None, reason="no helm on PATH")


def schema() -> Any:
    return json.loads((CHART / "values.schema.json").read_text())


def defaults() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return found


def merged(*more: dict[str, Any]) -> dict[str, Any]:
    """Return the default values with others over them, as Helm does it."""
    values = defaults()
    for layer in more:
        for part, changed in layer.items():
            for key, value in changed.items():
                old = values[part].get(key)
                values[part][key] = {**old, **value} if isinstance(value, dict) and isinstance(old, dict) else value
    return values


def render(tmp_path: Path, *more: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the manifests of a release called ``it``."""
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(merged(*more)))
    command = [str(HELM), "template", "it", str(CHART), "--values", str(tmp_path / "values.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def one(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def parsed(words: list[str]) -> Any:
    assert words[0] == "fedmerge"
    return make_parser().parse_args(words[1:])


def mounts_of(container: dict[str, Any]) -> dict[str, bool]:
    """Return path -> whether it is read-only."""
    return {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["apiVersion"], chart["version"], chart["appVersion"]) == ("v2", __version__, __version__)


def test_the_command_writes_the_chart_and_its_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "helm install" in output(capsys, "deploy", "chart", "--out", tmp_path / "chart")
    assert (tmp_path / "chart" / "values.yaml").read_text() == (CHART / "values.yaml").read_text()
    dockerfile = (tmp_path / "chart" / "image" / "Dockerfile").read_text()
    assert f"COPY constraints.txt fedmerge-{__version__}-py3-none-any.whl /fedmerge/" in dockerfile
    assert re.findall(r"^(?:FROM|USER) (\S+)", dockerfile, re.MULTILINE) == ["python:3.11-slim", "fedmerge"]
    assert "torch==" in (tmp_path / "chart" / "image" / "constraints.txt").read_text()
    assert "not an empty folder" in refusal(capsys, "deploy", "chart", "--out", tmp_path / "chart")


def test_every_value_is_in_the_schema_and_only_sound_ones_pass() -> None:
    Draft7Validator.check_schema(schema())
    check = Draft7Validator(schema())
    for values in (defaults(), merged(OPERATOR), merged(CLIENT), merged(SIMULATION)):
        assert list(check.iter_errors(values)) == []
    wrong: tuple[dict[str, Any], ...] = (
        {"operator": {"enabled": True}},  # no host
        {"client": {"enabled": True, "domain": "north", "secret": "a"}},  # no bundle
        {"client": {**CLIENT["client"], "domain": "../north"}},
        {"client": {**CLIENT["client"], "replicas": 2}},
        {"simulation": {**SIMULATION["simulation"], "address": "s3://id:key@bucket/x"}},
        {"simulation": {**SIMULATION["simulation"], "address": 's3://bucket/x"; rm -r /'}},
        {"simulation": {**SIMULATION["simulation"], "runId": "a b"}},
    )
    for values in wrong:
        assert list(check.iter_errors(merged(values))), values
    assert address_problem(str(SIMULATION["simulation"]["address"])) == ""


@needs_helm
def test_the_operators_server(tmp_path: Path) -> None:
    manifests = render(tmp_path, OPERATOR)
    assert sorted(manifest["kind"] for manifest in manifests) == ["Ingress", "NetworkPolicy", "Service", "StatefulSet"]
    pod = one(manifests, "StatefulSet")["spec"]["template"]["spec"]
    (prepare,), (server,) = pod["initContainers"], pod["containers"]
    shell = shlex.split(prepare["command"][2])
    init = parsed(shell[shell.index("fedmerge") :])
    start = parsed(server["command"])
    assert start.folder == init.folder
    assert init.hosts == ["fl.example.org", "10.1.2.3", "it"]  # the last: the service's name in the cluster
    assert f"test -e {init.folder}/deployment.toml" in prepare["command"][2]
    assert server["ports"] == [{"name": "https", "containerPort": init.port}]
    assert {entry["name"]: entry["value"] for entry in server["env"]}["FLWR_HOME"] == f"{init.folder}/flower"
    assert one(manifests, "Service")["spec"]["ports"] == [{"name": "https", "port": init.port, "targetPort": "https"}]
    (rule,) = one(manifests, "NetworkPolicy")["spec"]["ingress"]
    assert rule["ports"] == [{"port": "https", "protocol": "TCP"}]
    ingress = one(manifests, "Ingress")
    assert ingress["metadata"]["annotations"] == {"nginx.ingress.kubernetes.io/ssl-passthrough": "true"}
    assert "tls" not in ingress["spec"]  # the pod's nginx ends TLS: it needs the operator's certificate


@needs_helm
def test_an_organisations_client(tmp_path: Path) -> None:
    manifests = render(tmp_path, CLIENT)
    assert sorted(manifest["kind"] for manifest in manifests) == ["NetworkPolicy", "Service", "StatefulSet"]
    pod = one(manifests, "StatefulSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    start = parsed(container["command"])
    mounts = mounts_of(container)
    assert mounts["/data/north"] is True  # private data, read alone
    assert mounts[str(start.bundle)] is True
    assert mounts[str(start.folder)] is False  # cache and disclosed
    secrets = {Path(path).name for path, read_only in mounts.items() if read_only and Path(path).parent == start.folder}
    assert secrets == {"key", "key.pub", "client.toml", "policy.toml", "approved.txt"}
    assert "ports" not in container
    policy = one(manifests, "NetworkPolicy")["spec"]
    assert (policy["policyTypes"], policy.get("ingress")) == (["Ingress"], None)
    assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
    for manifest in manifests:
        assert "operator" not in json.dumps(manifest)


@needs_helm
def test_a_simulation_on_ray(tmp_path: Path) -> None:
    manifests = render(tmp_path, SIMULATION)
    job, settings = one(manifests, "RayJob")["spec"], one(manifests, "ConfigMap")["data"]
    assert settings["experiment.toml"] == SIMULATION["simulation"]["experiment"]
    (tmp_path / "experiment.toml").write_text(settings["experiment.toml"])
    _, _, script = shlex.split(job["entrypoint"])
    run, push = (parsed(shlex.split(command)) for command in script.split(" && "))
    config = load_config(tmp_path / "experiment.toml", run.overrides)
    assert f"{config.output_dir}/{config.run_id}" == push.folder
    assert push.address == SIMULATION["simulation"]["address"]
    cluster = job["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    images = set()
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        assert mounts_of(container)[config.domains.root] is True
        assert mounts_of(container)["/scratch"] is False
        images.add(container["image"])
    assert images == {f"fedmerge:{__version__}"}  # Ray's nodes need one Ray


@needs_helm
@pytest.mark.parametrize("values", [OPERATOR, CLIENT, SIMULATION], ids=["operator", "client", "simulation"])
def test_pods_have_no_rights_and_the_standard_schema_holds(tmp_path: Path, values: dict[str, Any]) -> None:
    manifests = render(tmp_path, values)
    pods = [manifest["spec"]["template"]["spec"] for manifest in manifests if manifest["kind"] == "StatefulSet"]
    for manifest in manifests:
        if manifest["kind"] == "RayJob":
            cluster = manifest["spec"]["rayClusterSpec"]
            groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
            pods += [group["template"]["spec"] for group in groups]
    assert pods
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    validate = pytest.importorskip("kubernetes_validate").validate
    standard = [manifest for manifest in manifests if manifest["kind"] != "RayJob"]
    standard += [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "it"}, "spec": pod} for pod in pods]
    for manifest in standard:
        validate(manifest, "1.32", strict=True)


@needs_helm
def test_exactly_one_part_a_release(tmp_path: Path) -> None:
    both = merged(OPERATOR, CLIENT)
    for values, said in ((defaults(), "found the parts: none"), (both, "found the parts: operator, client")):
        (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
        command = [str(HELM), "template", "it", str(CHART), "--values", str(tmp_path / "values.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert said in done.stderr
