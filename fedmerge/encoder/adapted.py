"""Load an adapter together with its backbone, check both, and combine them into one encoder."""

import copy
from dataclasses import replace
from pathlib import Path

import torch

from fedmerge.adapter import Adapter
from fedmerge.config import ExperimentConfig
from fedmerge.device import resolve_compute
from fedmerge.encoder.adapter_records import adapter_record
from fedmerge.encoder.backbone import Backbone, open_backbone
from fedmerge.encoder.loading.quantised import QuantisedLinear, use_weight
from fedmerge.encoder.lora import applied
from fedmerge.encoder.peft.folder import read_verified
from fedmerge.errors import LayoutMismatchError

NO_ADAPTER = "none"  # instead of a folder: the backbone alone


def load_adapted(source: str | Path, config: ExperimentConfig) -> tuple[Backbone, Adapter | None]:
    """Load an adapter and the backbone of a configuration.

    Args:
        source: a PEFT folder, or ``"none"`` for the backbone alone.
        config: only ``backbone`` and ``runtime`` are used.

    Raises:
        LayoutMismatchError: as in :func:`read_verified`, or the adapter belongs to another backbone.
        BackboneError: as in :func:`fedmerge.encoder.backbone.open_backbone`.
    """
    adapter = None if str(source) == NO_ADAPTER else read_verified(Path(source))
    compute = resolve_compute(config.runtime.device, config.runtime.precision)
    backbone = open_backbone(config.backbone, compute)
    if adapter is not None:
        check_backbone(f"adapter {source}", backbone, adapter_record(Path(source)).backbone_sha256)
    return backbone, adapter


def check_backbone(where: str, backbone: Backbone, expected_sha256: str | None) -> None:
    """Raise if a backbone is not the one that an adapter was made on; an unknown hash (None) passes.

    Raises:
        LayoutMismatchError: gives both hashes.
    """
    if expected_sha256 is not None and expected_sha256 != backbone.sha256:
        raise LayoutMismatchError(
            f"{where}: made on a backbone with hash {expected_sha256[:12]}, but {backbone.name} here has hash "
            f"{backbone.sha256[:12]}. Set backbone.source to the backbone of its run. To use an adapter unchecked, "
            "copy its two adapter_* files into an empty folder."
        )


def folded(backbone: Backbone, adapter: Adapter | None) -> Backbone:
    """Return a new encoder with the weights W + Δ; to apply an adapter temporarily use ``lora.applied``.

    Only the matrices that the adapter updates are copied. The backbone is unchanged.

    Raises:
        LayoutMismatchError: the backbone lacks a module, or has it with another shape.
    """
    if adapter is None:
        return backbone
    shared = {id(tensor): tensor for tensor in (*backbone.model.parameters(), *backbone.model.buffers())}
    model = copy.deepcopy(backbone.model, shared)
    theirs, ours = dict(backbone.model.named_modules()), dict(model.named_modules())
    with applied(backbone, adapter):
        for name in adapter.modules:
            weight = theirs[name].weight.data
            if isinstance(layer := ours[name], QuantisedLinear):
                use_weight(layer, weight)
            else:
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return replace(backbone, model=model)
