"""Random adapters for tests, large enough that each affects a merge, and every merge of a configuration."""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.config import ExperimentConfig, Lora
from fedmerge.domain.catalog import Catalog
from fedmerge.domain.demo import generate_domain
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.lora import attach
from fedmerge.merging.candidate import Candidate, Origin
from fedmerge.merging.methods import METHODS
from fedmerge.seeding import generator
from fedmerge.server.candidates import learn_from_catalogs, merge_candidates, recipe_of

Layout = dict[str, tuple[int, int]]  # module name -> (out, in)


def layout_of(backbone: Backbone, targets: tuple[str, ...] = ("query", "value", "intermediate.dense")) -> Layout:
    """Return the shapes of the linear layers whose names end with one of the targets."""
    layers = dict(backbone.model.named_modules())
    return {name: tuple(layers[name].weight.shape) for name in layers if name.endswith(targets)}


def random_adapter(layout: Layout, rank: int, scaling: float, seed: int) -> Adapter:
    """Draw normal factors whose update has entries of about scaling / √in."""
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
    """Draw adapters of three domains with different ranks and scalings, not in alphabetical order."""
    settings = {"toys": (3, 2.0), "books": (1, 0.5), "tents": (4, 1.25)}
    return {
        name: random_adapter(layout, rank, scaling, seed)
        for seed, (name, (rank, scaling)) in enumerate(settings.items())
    }


def as_many_as(method: str, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first adapters or folders, as many as a method merges."""
    return dict(list(adapters.items())[: METHODS[method].most_domains])


def save_with_peft(model: PreTrainedModel, folder: Path, seed: int, **settings: Any) -> Path:
    """Let peft save an adapter with strong random factors."""
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def merges_of(
    backbone: Backbone | None,
    adapters: Mapping[str, Adapter],
    catalogs: Mapping[str, Catalog],
    config: ExperimentConfig,
    progress: Callable[[str], None] = lambda line: None,
    **more: Any,
) -> list[Candidate]:
    """Make every merge of a configuration in this process, as the server of a run does."""
    recipe = recipe_of(config)
    learn = None if recipe.at_clients else learn_from_catalogs(backbone, adapters, catalogs, config.text, progress)
    hashes = {domain: adapter_sha256(adapters[domain]) for domain in adapters}
    origin = Origin(hashes, backbone.record if backbone else None, config.privacy.policy)
    return merge_candidates(adapters, recipe.variants(), origin, recipe, progress, learn=learn, **more)


class Lent(Mapping[str, Adapter]):
    """Makes an adapter whenever one is asked for, as if from disk, and knows how many of them somebody still holds."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Adapter]) -> None:
        self.names, self.make = names, make
        self.held: list[weakref.ref[torch.Tensor]] = []  # one tensor of each
        self.times = self.most = 0

    def __getitem__(self, name: str) -> Adapter:
        modules = {
            module: replace(factors, lora_A=factors.lora_A.clone(), lora_B=factors.lora_B.clone())
            for module, factors in self.make(name).modules.items()
        }
        self.held.append(weakref.ref(next(iter(modules.values())).lora_B))
        self.held = [tensor for tensor in self.held if tensor() is not None]
        self.times, self.most = self.times + 1, max(self.most, len(self.held))
        return Adapter(modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


NAME_PARTS = ("proj", "enc", "a", "b", "0", "1", "layers", "p+j", "pro", "a|b", "(x)")


class Tree(torch.nn.Module):
    """Linear layers, embeddings or other modules at the end of dotted names."""

    def __init__(self, leaves: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()
        for name, leaf in leaves.items():
            *parents, last = name.split(".")
            at: torch.nn.Module = self
            for parent in parents:
                if not hasattr(at, parent):
                    at.add_module(parent, torch.nn.Module())
                at = cast(torch.nn.Module, getattr(at, parent))
            at.add_module(last, leaf)


def random_tree(rng: np.random.Generator) -> Tree:
    """Draw a model with 4 to 8 linear layers whose names share their last parts."""
    names: list[str] = []
    while len(names) < int(rng.integers(4, 9)):
        name = ".".join(str(part) for part in rng.choice(NAME_PARTS, rng.integers(1, 5)))
        if not any(f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.") for other in names):
            names.append(name)
    with torch.random.fork_rng():
        torch.manual_seed(int(rng.integers(1 << 30)))
        return Tree({name: torch.nn.Linear(int(rng.integers(3, 7)), int(rng.integers(3, 7))) for name in names})


def saved_by_peft(model: torch.nn.Module, folder: Path, seed: int, **settings: Any) -> Path:
    """Let peft save an adapter whose trained values are all random."""
    peft = get_peft_model(copy.deepcopy(cast(PreTrainedModel, model)), LoraConfig(**settings))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or ".modules_to_save." in name or (parameter.requires_grad and name.endswith("bias")):
                shift = 1.0 if "magnitude" in name else 0.0
                parameter.copy_(shift + 0.3 * torch.randn(parameter.shape, generator=rng))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # saved embeddings, no configuration of a base model
        peft.save_pretrained(str(folder))
    return folder


def touched(model: torch.nn.Module, folder: Path) -> set[str]:
    """Return the modules that peft gives a LoRA when it loads a folder."""
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    found = (name for name, module in loaded.named_modules() if hasattr(module, "lora_A"))
    return {name.removeprefix("base_model.model.") for name in found}


def weights_with(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights after peft has loaded an adapter, without a warning, and merged it into them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
        merged = cast(Any, loaded).merge_and_unload()
    return {name: tensor.double() for name, tensor in merged.state_dict().items()}


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a model in float64."""
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


@contextmanager
def attached_lora(backbone: Backbone, lora: Lora) -> Iterator[PeftModel]:
    """A LoRA on the backbone with noise on all factors: with B = 0 the gradients of A would all be 0."""
    attached = attach(backbone, lora.target_modules, lora.rank, lora.alpha, 0)
    with torch.no_grad():
        for index, parameter in enumerate(trained(attached)):
            noise = np.asarray(generator(0, "test", index).standard_normal(tuple(parameter.shape)))
            parameter.add_(0.1 * torch.from_numpy(noise).float())
    try:
        yield attached
    finally:
        attached.unload()


def trained(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def three_catalogs() -> dict[str, Catalog]:
    """The catalogs of three small demo domains: books, tents, toys."""
    shops = {"books": "books", "tents": "camping", "toys": "toys"}
    return {name: generate_domain(shop, num_users=1, num_items=20).catalog for name, shop in shops.items()}
