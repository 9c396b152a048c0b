"""The federated head of a run: an adapter over the item space, with provenance, in ``head/``."""

from pathlib import Path

from fedmerge.adapter import Adapter
from fedmerge.encoder.peft.folder import write_adapter
from fedmerge.errors import FedMergeError
from fedmerge.evaluation.sums import VARIANTS
from fedmerge.federated.head import Weights
from fedmerge.files import read_sealed, seal, whole_folder, write_json
from fedmerge.merging.candidate import Candidate, Provenance
from fedmerge.runs.verified import read_verified

HEAD_FOLDER, FUSION_FILE = "head", "fusion.json"


def write_federated_head(run_dir: Path, head: Candidate, backbone_name: str) -> None:
    """Write the federated head and its provenance.

    Raises:
        RunDirError: the folder cannot be written.
    """
    with whole_folder(run_dir / HEAD_FOLDER) as folder:
        write_adapter(head.adapter, folder, backbone_name)
        write_json(folder / "provenance.json", seal(head.provenance.to_dict()))


def read_federated_head(run_dir: Path) -> Adapter | None:
    """Return the federated head; None if the run has none, or it is damaged."""
    try:
        provenance = Provenance.from_dict(read_sealed(run_dir / HEAD_FOLDER / "provenance.json") or {})
        adapter, sha256 = read_verified(run_dir / HEAD_FOLDER)
        return adapter if sha256 == provenance.sha256 else None
    except (FedMergeError, OSError, LookupError, TypeError, AttributeError):
        return None


def write_fusion(run_dir: Path, weights: Weights) -> None:
    """Write the weights of the head's fusion for domains that do not choose their own.

    Raises:
        RunDirError: the file cannot be written.
    """
    record = {str(variant): list(of_variant) for variant, of_variant in weights.items()}
    write_json(run_dir / HEAD_FOLDER / FUSION_FILE, seal(record))


def read_fusion(run_dir: Path) -> Weights | None:
    """Return the weights of the head's fusion for domains that do not choose their own; None without a head.

    Raises:
        RunDirError: the file is damaged.
    """
    found = read_sealed(run_dir / HEAD_FOLDER / FUSION_FILE)
    return None if found is None else {variant: tuple(found[variant]) for variant in VARIANTS}
