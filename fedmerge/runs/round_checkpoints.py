"""Checkpoints of training in rounds: the state after the last round, and the replies of the current one.

Rounds of adapters lie in ``rounds``, those of the federated head in ``head-rounds``:

rounds/members.json           domains that take part
rounds/drawn.json             number of the current round and its sampled domains
rounds/<number>/<domain>/     a client's reply, a PEFT folder with training.json; removed after aggregation
rounds/<number>.safetensors   state after a round, to resume from; only that of the last round stays
rounds/<number>.json          how the round was aggregated and what it cost; stays for every round
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.encoder.peft.folder import read_adapter, write_adapter
from fedmerge.errors import FedMergeError, RunDirError
from fedmerge.federated.rounds import GlobalState, state_of, state_tensors
from fedmerge.files import read_sealed, seal, whole_folder, write_bytes, write_json

ROUNDS, HEAD_ROUNDS = "rounds", "head-rounds"


def write_members(run_dir: Path, domains: Sequence[str], rounds: str = ROUNDS) -> None:
    """Record the domains that take part.

    Raises:
        RunDirError: the file cannot be written.
    """
    try:
        (run_dir / rounds).mkdir(exist_ok=True)
    except OSError as error:
        raise RunDirError(f"{run_dir / rounds}: cannot be created ({error.strerror}). Check permissions.") from error
    write_json(run_dir / rounds / "members.json", seal({"domains": list(domains)}))


def read_members(run_dir: Path, rounds: str = ROUNDS) -> list[str]:
    """Return the domains that take part; empty before they are recorded."""
    return list((read_sealed(run_dir / rounds / "members.json") or {"domains": []})["domains"])


def write_sample(run_dir: Path, number: int, domains: Sequence[str], rounds: str = ROUNDS) -> None:
    """Record the sampled domains of a round, before any client is asked."""
    write_json(run_dir / rounds / "drawn.json", seal({"round": number, "domains": list(domains)}))


def read_sample(run_dir: Path, number: int, rounds: str = ROUNDS) -> list[str]:
    """Return the sampled domains of a round; empty if it has not started."""
    drawn = read_sealed(run_dir / rounds / "drawn.json") or {}
    return list(drawn["domains"]) if drawn.get("round") == number else []


def write_reply(
    run_dir: Path,
    number: int,
    domain: str,
    adapter: Adapter,
    report: Mapping[str, Any],
    backbone_name: str,
    rounds: str = ROUNDS,
) -> None:
    """Write the reply of a client in a round: its adapter and training report.

    Raises:
        RunDirError: the folder cannot be written.
    """
    with whole_folder(run_dir / rounds / str(number) / domain) as folder:
        write_adapter(adapter, folder, backbone_name)
        write_json(folder / "training.json", seal({**report, "sha256": adapter_sha256(adapter)}))


def read_replies(run_dir: Path, number: int, rounds: str = ROUNDS) -> dict[str, tuple[Adapter, dict[str, Any]]]:
    """Return domain -> adapter and report of a round's replies; damaged ones are skipped."""
    found = {}
    for folder in sorted((run_dir / rounds / str(number)).glob("[!.]*")):
        try:
            adapter, report = read_adapter(folder), read_sealed(folder / "training.json") or {}
            if adapter_sha256(adapter) == report["sha256"]:
                found[folder.name] = (adapter, report)
        except (FedMergeError, OSError, LookupError, TypeError):
            continue
    return found


def write_state(
    run_dir: Path,
    state: GlobalState,
    reports: Mapping[str, Mapping[str, Any]],
    seconds: float,
    secure_sum: Mapping[str, Any] | None = None,
    rounds: str = ROUNDS,
) -> None:
    """Write the state and the record of a round, then remove its replies and the state before it.

    Args:
        run_dir: run folder.
        state: state after the round.
        reports: domain -> training report.
        seconds: server time of the round.
        secure_sum: record of the secure sum; None if the server saw the replies.
        rounds: name of the folder.

    Raises:
        RunDirError: a file cannot be written.
    """
    folder, number = run_dir / rounds, state.num_rounds
    tensors, record = state_tensors(state)
    entry = {"aggregation": record["report"], "clients": reports, "seconds": seconds}
    entry = entry if secure_sum is None else {**entry, "secure_sum": secure_sum}
    write_json(folder / f"{number}.json", seal(entry))
    text = json.dumps(record)
    write_bytes(
        folder / f"{number}.safetensors", save(tensors, {"record": text, "sha256": _state_sha256(text, tensors)})
    )
    shutil.rmtree(folder / str(number), ignore_errors=True)
    (folder / f"{number - 1}.safetensors").unlink(missing_ok=True)


def read_state(run_dir: Path, rounds: str = ROUNDS) -> GlobalState | None:
    """Return the state after the last aggregated round; None if there is no intact one."""
    files = {int(file.stem): file for file in (run_dir / rounds).glob("*.safetensors") if file.stem.isdigit()}
    for _, file in sorted(files.items(), reverse=True):
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
            if metadata["sha256"] == _state_sha256(metadata["record"], tensors):
                return state_of(tensors, json.loads(metadata["record"]))
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, FedMergeError):
            continue
    return None


def round_records(run_dir: Path, rounds: str = ROUNDS) -> list[dict[str, Any]]:
    """Return the record of each aggregated round, in order."""
    files = [file for file in (run_dir / rounds).glob("*.json") if file.stem.isdigit()]
    return [read_sealed(file) or {} for file in sorted(files, key=lambda file: int(file.stem))]


def _state_sha256(record: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(record.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
