"""The non-public parts of Flower: only two files import them, and these tests name what an upgrade of Flower breaks."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
INTERNALS = ("sim/flower_internals.py", "sim/app/flower_internals.py")
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}


def flower_imports(path: Path) -> list[tuple[str, str]]:
    """Return (module, name) of everything that a file imports from Flower."""
    found = []
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text if "flwr" in text else "")):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "flwr":
            found += [(str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "flwr"]
    return found


USED = sorted({pair for file in INTERNALS for pair in flower_imports(REPOSITORY / file)})


def test_nothing_else_imports_them() -> None:
    files = [path for room in ("fedmerge", "sim") for path in (REPOSITORY / room).rglob("*.py")]
    assert len(files) > 100
    others = {
        (path.relative_to(REPOSITORY).as_posix(), module)
        for path in files
        for module, _ in flower_imports(path)
        if module not in PUBLIC and path.relative_to(REPOSITORY).as_posix() not in INTERNALS
    }
    assert not others
    assert not {module for module, _ in USED} & PUBLIC


@pytest.mark.parametrize(("module", "name"), USED, ids=lambda text: text)
def test_each_is_where_it_is_expected(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def from_flower(name: str) -> Any:
    module = next(module for module, imported in USED if imported == name)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("name", "method", "arguments"),
    [
        ("build_fab_from_disk", "", ("app",)),
        ("recorddict_to_proto", "", ("recorddict",)),
        ("recorddict_from_proto", "", ("recorddict_proto",)),
        ("_register_nodes", "", ("num_nodes", "state_factory")),
        ("LinkStateFactory", "", ("database", "federation_manager", "objectstore_factory")),
        ("Run", "create_empty", ("run_id",)),
        ("InMemoryGrid", "", ("state_factory",)),
        ("InMemoryGrid", "set_run", ("self", "run")),
        ("InMemoryGrid", "get_node_ids", ("self",)),
        ("pull_task_input", "", ("client",)),
        ("push_message", "", ("client", "message", "context")),
        ("push_task_output", "", ("client", "context", "sub_status", "details")),
        ("public_key_to_bytes", "", ("public_key",)),
        ("NodeAuthHttpInterceptor", "", ("private_key", "public_key")),
        ("RuntimeVersionHttpInterceptor", "", ("component_name",)),
        ("RuntimeTokenHttpInterceptor", "", ("token",)),
        ("SuperExecAuthHttpInterceptor", "", ("master_secret", "protected_methods")),
        ("FleetHttpClient", "from_server_address", ("server_address", "insecure", "root_certificates", "interceptors")),
        (
            "ControlHttpClient",
            "from_server_address",
            ("server_address", "insecure", "root_certificates", "interceptors", "retry_invoker"),
        ),
        (
            "RuntimeHttpClient",
            "from_server_address",
            ("server_address", "insecure", "root_certificates", "interceptors", "retry_invoker"),
        ),
        ("make_simple_http_retry_invoker", "", ()),
    ],
)
def test_the_signatures_are_those_relied_on(name: str, method: str, arguments: tuple[str, ...]) -> None:
    found = from_flower(name)
    taken = inspect.signature(getattr(found, method) if method else found)
    assert tuple(taken.parameters)[: len(arguments)] == arguments
    needed = [
        parameter.name
        for parameter in list(taken.parameters.values())[len(arguments) :]
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    assert not needed


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("TaskType", ("CLIENT_APP", "AGENT_APP")),
        ("SubStatus", ("COMPLETED",)),
        ("ErrorCode", ("CLIENT_APP_CRASHED",)),
        ("RuntimeHttpClient", ("AcquireTask", "SendTaskHeartbeat")),
        ("FleetHttpClient", ("ActivateNode", "DeactivateNode")),
        ("ControlHttpClient", ("RegisterNode",)),
        ("FlowerError", ("from_json",)),
    ],
)
def test_the_members_are_those_relied_on(name: str, values: tuple[str, ...]) -> None:
    assert all(hasattr(from_flower(name), value) for value in values)
