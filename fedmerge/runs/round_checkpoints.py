"""A federation of rounds on disk: the state after each round, and what has arrived of the one that goes on.

rounds/members.json           who takes part
rounds/drawn.json             of the round that goes on: its number, and who was drawn
rounds/<number>/<domain>/     what a client sent, a PEFT folder with training.json; removed once the round is aggregated
rounds/<number>.safetensors   the state after a round, for going on; that of the last round alone is kept
rounds/<number>.json          how it was aggregated and what it cost; kept of every round
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.encoder.peft_folder import read_adapter, write_adapter
from fedmerge.errors import FedMergeError, RunDirError
from fedmerge.federated.rounds import GlobalState, state_of, state_tensors
from fedmerge.files import read_json, whole_folder, write_bytes, write_json

ROUNDS = "rounds"


def keep_members(run_dir: Path, domains: Sequence[str]) -> None:
    """Fix who takes part.

    Raises:
        RunDirError: it cannot be written.
    """
    try:
        (run_dir / ROUNDS).mkdir(exist_ok=True)
    except OSError as error:
        raise RunDirError(f"{run_dir / ROUNDS} cannot be made ({error.strerror}). Check the permissions.") from error
    write_json(run_dir / ROUNDS / "members.json", list(domains))


def members_of(run_dir: Path) -> list[str]:
    """Who takes part, once that is fixed."""
    members: list[str] = read_json(run_dir / ROUNDS / "members.json") or []
    return members


def keep_draw(run_dir: Path, number: int, domains: Sequence[str]) -> None:
    """Fix who takes part in a round before anybody is asked."""
    write_json(run_dir / ROUNDS / "drawn.json", {"round": number, "domains": list(domains)})


def kept_draw(run_dir: Path, number: int) -> list[str]:
    """Who was drawn for a round; nobody where it has not begun."""
    drawn = read_json(run_dir / ROUNDS / "drawn.json") or {}
    return list(drawn["domains"]) if drawn.get("round") == number else []


def keep_reply(
    run_dir: Path, number: int, domain: str, adapter: Adapter, report: Mapping[str, Any], backbone_name: str
) -> None:
    """Write what a client sent in a round.

    Raises:
        RunDirError: it cannot be written.
    """
    with whole_folder(run_dir / ROUNDS / str(number) / domain) as folder:
        write_adapter(adapter, folder, backbone_name)
        write_json(folder / "training.json", {**report, "sha256": adapter_sha256(adapter)})


def kept_replies(run_dir: Path, number: int) -> dict[str, tuple[Adapter, dict[str, Any]]]:
    """What is there and whole of a round: domain -> adapter and report."""
    found = {}
    for folder in sorted((run_dir / ROUNDS / str(number)).glob("[!.]*")):
        try:
            adapter, report = read_adapter(folder), read_json(folder / "training.json")
            if adapter_sha256(adapter) == report["sha256"]:
                found[folder.name] = (adapter, report)
        except (FedMergeError, OSError, LookupError, TypeError):
            continue
    return found


def keep_state(
    run_dir: Path,
    state: GlobalState,
    reports: Mapping[str, Mapping[str, Any]],
    seconds: float,
    secure_sum: Mapping[str, Any] | None = None,
) -> None:
    """Write the state after a round with what it took; then what it was made of, and the state before it, may go.

    Args:
        run_dir: the run.
        state: after the round.
        reports: domain -> how its training went.
        seconds: of the server.
        secure_sum: how the sum was made, where the server saw nothing else.

    Raises:
        RunDirError: it cannot be written.
    """
    folder, number = run_dir / ROUNDS, state.num_rounds
    tensors, record = state_tensors(state)
    told = {"aggregation": record["report"], "clients": reports, "seconds": seconds}
    write_json(folder / f"{number}.json", told if secure_sum is None else {**told, "secure_sum": secure_sum})
    write_bytes(folder / f"{number}.safetensors", save(tensors, {"record": json.dumps(record)}))
    shutil.rmtree(folder / str(number), ignore_errors=True)
    (folder / f"{number - 1}.safetensors").unlink(missing_ok=True)


def kept_state(run_dir: Path) -> GlobalState | None:
    """The state after the last round that was aggregated, if it is there and whole."""
    files = {int(file.stem): file for file in (run_dir / ROUNDS).glob("*.safetensors") if file.stem.isdigit()}
    for _, file in sorted(files.items(), reverse=True):
        try:
            with safe_open(file, framework="pt") as opened:
                record = json.loads(opened.metadata()["record"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
            return state_of(tensors, record)
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, FedMergeError):
            continue
    return None


def round_records(run_dir: Path) -> list[dict[str, Any]]:
    """How each round was aggregated, in order."""
    files = [file for file in (run_dir / ROUNDS).glob("*.json") if file.stem.isdigit()]
    return [read_json(file) for file in sorted(files, key=lambda file: int(file.stem))]
