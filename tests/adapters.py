"""Random adapters for tests: strong enough that every one of them matters."""

import torch

from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import Adapter, LoraModule

Layout = dict[str, tuple[int, int]]  # module name -> (out, in)


def layout_of(backbone: Backbone, targets: tuple[str, ...] = ("query", "value", "intermediate.dense")) -> Layout:
    """The linear layers whose names end with one of the targets."""
    layers = dict(backbone.model.named_modules())
    return {name: tuple(layers[name].weight.shape) for name in layers if name.endswith(targets)}


def random_adapter(layout: Layout, rank: int, scaling: float, seed: int) -> Adapter:
    """Normal factors whose update has entries of about scaling / √in."""
    rng = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: LoraModule(
                torch.randn(rank, width_in, generator=rng) / width_in**0.5,
                torch.randn(width_out, rank, generator=rng) / rank**0.5,
                scaling,
            )
            for name, (width_out, width_in) in layout.items()
        }
    )


def random_adapters(layout: Layout) -> dict[str, Adapter]:
    """Three domains of unequal rank and scaling, not in alphabetical order."""
    settings = {"toys": (3, 2.0), "books": (1, 0.5), "tents": (4, 1.25)}
    return {
        name: random_adapter(layout, rank, scaling, seed)
        for seed, (name, (rank, scaling)) in enumerate(settings.items())
    }
