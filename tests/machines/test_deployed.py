"""Commands for a federation on separate machines, as far as they work without one: refusals and messages."""

import json
import re
from pathlib import Path

import pytest

from fedmerge.cli import main
from fedmerge.deploy.folder import create_deployment
from fedmerge.files import append_line
from sim.machines import runs as deployed
from sim.machines.runs import JOURNAL, find_connection, list_submitted

REPOSITORY = Path(__file__).resolve().parents[2]
UNUSED = 9  # nobody listens there


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The operator's folder of a federation that is not running."""
    made = create_deployment(tmp_path / "operator", "prod", ["localhost"], 8443, UNUSED)
    monkeypatch.setenv("FLWR_HOME", str(made.flower_home))
    return made.folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that fails; return its standard error."""
    assert main(list(arguments)) == 1
    return capsys.readouterr().err


def test_an_unknown_federation_is_named(
    operator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = refusal(capsys, "runs", "--federation", "test")
    assert re.search(rf"{operator}/flower/config\.toml: .*'test'.*: prod\..* FLWR_HOME=", result)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "nowhere"))
    result = refusal(capsys, "stop", "x", "--federation", "prod")
    assert f"{tmp_path}/nowhere/config.toml: " in result
    assert "export FLWR_HOME=DIR/flower" in result


def test_a_connection_knows_whether_the_operators_folder_is_here(operator: Path, tmp_path: Path) -> None:
    assert find_connection("prod").operator == operator
    remote = tmp_path / "laptop"
    (operator / "operator").rename(remote)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(remote / "flower"))
        assert find_connection("prod").operator is None


@pytest.mark.long
def test_a_superlink_that_does_not_answer_is_reported_with_the_command_that_starts_it(
    operator: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = refusal(capsys, "runs", "--federation", "prod")
    assert result.startswith("fedmerge: prod: ")
    assert f"fedmerge deploy start {operator}" in result


def test_an_existing_or_missing_run_is_refused_before_anything_is_sent(
    operator: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(REPOSITORY / "configs" / "tiny.toml"), "--federation", "prod", "--set", "run_id=x"]
    (operator / "runs" / "x").mkdir()
    result = refusal(capsys, *arguments)
    assert f"{operator}/runs/x" in result
    assert "fedmerge run --resume x --federation prod" in result
    result = refusal(capsys, "run", "--resume", "y", "--federation", "prod")
    assert "fedmerge: run y: " in result
    assert f"{operator}/runs/y" in result
    result = refusal(capsys, "run", "--federation", "prod")
    assert result.startswith("fedmerge: run: ")


class Flower:
    """Answers of Flower's commands."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.status = "running"

    def __call__(self, command: list[str], variables: dict[str, str]) -> dict[str, object]:
        self.asked.append(command[1:])
        if command[1] == "run":
            return {"success": True, "run-id": "77"}
        if command[1] == "stop":
            return {"success": True}
        run = {
            "run-id": "77",
            "status": self.status,
            "status-details": "why",
            "pending-at": "2026-01-02 03:04:05Z",
            "elapsed": 12.0,
            "network-traffic": {"inbound-bytes": 2**21},
        }
        return {"success": True, "runs": [run]}


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Flower:
    made = Flower()
    monkeypatch.setattr(deployed, "ask_flower", made)
    return made


def test_a_run_is_stopped_by_the_name_of_its_folder(
    operator: Path, flower: Flower, capsys: pytest.CaptureFixture[str]
) -> None:
    append_line(operator / "flower" / JOURNAL, {"run": "mine", "flower": "77"})
    assert [(run.run, run.status, run.received_bytes) for run in list_submitted(find_connection("prod"))] == [
        ("mine", "running", 2**21)
    ]
    assert main(["runs", "--federation", "prod"]) == 0
    assert "mine  running  12 s  2.0 MiB received  2026-01-02 03:04:05Z  77" in capsys.readouterr().out
    assert main(["stop", "mine", "--federation", "prod"]) == 0
    assert flower.asked[-1][:3] == ["stop", "77", "prod"]
    assert re.search(r"run mine\b.* 77\b", capsys.readouterr().out)
    flower.status = "finished:failed"
    assert re.search(r"run 77.*\(finished:failed\)", refusal(capsys, "stop", "77", "--federation", "prod"))
    result = refusal(capsys, "stop", "other", "--federation", "prod")
    assert re.search(r"run other.* prod\b.*fedmerge runs --federation prod", result)


def test_paths_are_sent_as_they_are_written_and_the_exit_code_is_that_of_the_run(
    operator: Path, flower: Flower, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[str] = []

    def log(command: list[str], variables: dict[str, str], num_seen: int, on_line: object) -> int:
        flower.status = "finished:failed"
        return num_seen

    def asked(command: list[str], variables: dict[str, str]) -> dict[str, object]:
        if command[1] == "run":
            sent.append(Path(command[-1]).read_text())
        return flower(command, variables)

    monkeypatch.setattr(deployed, "pass_on_log", log)
    monkeypatch.setattr(deployed, "ask_flower", asked)
    arguments = ["run", str(REPOSITORY / "configs" / "tiny.toml"), "--federation", "prod", "--set", "run_id=x"]
    assert main(arguments) == 1
    result = capsys.readouterr()
    assert re.search(r"run x\b.* 77\b.* prod$", result.out, re.MULTILINE)
    assert "finished:failed why" in result.err
    assert "fedmerge run --resume x --federation prod" in result.err
    assert 'cache_dir = "~/.cache/fedmerge"' in sent[0]
    assert 'output_dir = "runs"' in sent[0]
    assert json.loads((operator / "flower" / JOURNAL).read_text())["run"] == "x"

    (operator / "runs" / "x").mkdir()
    (operator / "runs" / "x" / "config.toml").write_text(sent[0])
    (operator / "runs" / "x" / "DONE").touch()
    assert main(["run", "--resume", "x", "--federation", "prod"]) == 0
    assert str(operator / "runs" / "x") in capsys.readouterr().out


def test_ctrl_c_leaves_the_run_running(
    operator: Path, flower: Flower, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(deployed, "pass_on_log", interrupted)
    arguments = ["run", str(REPOSITORY / "configs" / "tiny.toml"), "--federation", "prod", "--set", "run_id=x"]
    assert main(arguments) == 130
    result = capsys.readouterr().err
    assert re.search(r"run x\b.* 77\b.*fedmerge stop x --federation prod", result)
    assert not [command for command in flower.asked if command[0] == "stop"]
