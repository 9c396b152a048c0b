"""An adapter from disk with the backbone that it belongs to, both checked; and the two as one encoder."""

import copy
from dataclasses import replace
from pathlib import Path

import torch

from fedmerge.adapter import Adapter
from fedmerge.config import ExperimentConfig
from fedmerge.device import resolve_compute
from fedmerge.encoder.adapter_records import adapter_record
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.lora import applied
from fedmerge.encoder.peft_folder import read_verified
from fedmerge.errors import LayoutMismatchError

NO_ADAPTER = "none"  # in place of a folder: the backbone alone


def load_adapted(source: str | Path, config: ExperimentConfig) -> tuple[Backbone, Adapter | None]:
    """An adapter and the backbone of a configuration.

    Args:
        source: a PEFT folder, or ``"none"`` for the backbone alone.
        config: backbone and runtime are read.

    Raises:
        LayoutMismatchError: as :func:`read_verified`, or an adapter of another backbone.
        BackboneError: as :func:`fedmerge.encoder.backbone.load_backbone`.
    """
    adapter = None if str(source) == NO_ADAPTER else read_verified(Path(source))
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    backbone = load_backbone(config.backbone.source, config.backbone.pooling, compute, config.backbone.weights_sha256)
    if adapter is not None:
        check_backbone(f"adapter {source}", backbone, adapter_record(Path(source)).backbone_sha256)
    return backbone, adapter


def check_backbone(where: str, backbone: Backbone, expected_sha256: str | None) -> None:
    """Refuse a backbone with other files than those an adapter was made on; None is not known, and passes.

    Raises:
        LayoutMismatchError: with both hashes.
    """
    if expected_sha256 is not None and expected_sha256 != backbone.sha256:
        raise LayoutMismatchError(
            f"{where}: made on a backbone with hash {expected_sha256[:12]}, but {backbone.name} here has "
            f"{backbone.sha256[:12]}. Set backbone.source to the backbone of its run. (Early versions hashed other "
            "files: to use an adapter unchecked, copy its two adapter_* files into a folder of their own.)"
        )


def folded(backbone: Backbone, adapter: Adapter | None) -> Backbone:
    """An encoder with the weights W + Δ, to keep; ``lora.applied`` is for a while.

    Only the matrices that the adapter updates take memory again; the backbone is left as it was.

    Raises:
        LayoutMismatchError: a module that the backbone does not have, or of another shape.
    """
    if adapter is None:
        return backbone
    shared = {id(tensor): tensor for tensor in (*backbone.model.parameters(), *backbone.model.buffers())}
    model = copy.deepcopy(backbone.model, shared)
    theirs, ours = dict(backbone.model.named_modules()), dict(model.named_modules())
    with applied(backbone, adapter):
        for name in adapter.modules:
            weight = theirs[name].weight
            ours[name].weight = torch.nn.Parameter(weight.data, requires_grad=False)
    return replace(backbone, model=model)
