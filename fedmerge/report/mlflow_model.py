"""The served merge as a model of MLflow, which loads it with sentence-transformers alone.

MLflow's own ``save_model`` needs sentence-transformers where a model is logged; the folder that it writes is a model
folder with two files around it, so it is written here.
"""

import logging
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from fedmerge.config import ATTRIBUTES, load_config
from fedmerge.errors import FedMergeError
from fedmerge.files import write_text
from fedmerge.report.run.model_card import sections_of_adapter
from fedmerge.runs.checkpoints import merge_folder
from fedmerge.runs.reading import RunDetails

MODEL_DATA = "model.sentence_transformer"  # where mlflow.sentence_transformers looks for it
LARGEST_BYTES = 1 << 31  # of weights; larger models are exported when they are wanted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedMerge:
    """The merge that a run serves.

    Attributes:
        folder: its PEFT folder.
        label: its name, which is the strategy of its tracked run.
        config: settings file of the run.
    """

    folder: Path
    label: str
    config: Path


def served_merge(run: RunDetails) -> ServedMerge | None:
    """Return the merge that a run serves; None if it served none."""
    label = run.summary.served
    if label is None:
        return None
    return ServedMerge(merge_folder(run.summary.folder, label), label, run.summary.folder / "config.toml")


def write_mlflow_model(merge: ServedMerge, folder: Path) -> bool:
    """Write the folder of a model with the flavours ``sentence_transformers`` and ``python_function``.

    Args:
        merge: what is written.
        folder: to create.

    Returns:
        False, with a line in the log, where the backbone is not on this machine or too large.
    """
    from mlflow import pyfunc  # noqa: PLC0415  # an optional package
    from mlflow.models import Model, ModelSignature  # noqa: PLC0415  # as above
    from mlflow.types.schema import ColSpec, Schema, TensorSpec  # noqa: PLC0415  # as above

    from fedmerge.encoder.adapted import load_adapted  # noqa: PLC0415  # transformers, which a report does without
    from fedmerge.encoder.export.folder import export_model, provenance_of  # noqa: PLC0415  # likewise

    try:
        config = load_config(merge.config)
        backbone, adapter = load_adapted(merge.folder, config)
        size = sum(parameter.nbytes for parameter in backbone.model.parameters())
        if size > LARGEST_BYTES:
            logger.warning(
                "tracking: %s has %.1f GB and is not logged as a model; write it with fedmerge export %s OUT",
                *(backbone.name, size / 1e9, merge.folder),
            )
            return False
        export_model(
            backbone,
            adapter,
            folder / MODEL_DATA,
            config.text,
            provenance_of(merge.folder),
            template=config.domains.attributes or ATTRIBUTES,
            sections=sections_of_adapter(merge.folder),
        )
    except FedMergeError as error:
        shutil.rmtree(folder, ignore_errors=True)
        logger.warning("tracking: the served merge is not logged as a model: %s", error)
        return False
    vectors = TensorSpec(np.dtype("float32"), (-1, backbone.width))
    model = Model(signature=ModelSignature(Schema([ColSpec("string")]), Schema([vectors])))
    pyfunc.add_to_model(model, loader_module="mlflow.sentence_transformers", data=MODEL_DATA)
    versions = {name: _version(name) for name in ("mlflow-skinny", "pandas", "sentence-transformers", "torch")}
    model.add_flavor(
        "sentence_transformers", sentence_transformers_version=versions["sentence-transformers"], code=None
    )
    model.save(str(folder / "MLmodel"))
    needed = "".join(f"{name}=={found}\n" if found else f"{name}\n" for name, found in versions.items())
    write_text(folder / "requirements.txt", needed)
    return True


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
