"""Open what a notebook works on: a backbone and domain folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedmerge.errors import ConfigError, DomainError

if TYPE_CHECKING:
    from fedmerge.client.local_domain import LocalDomain
    from fedmerge.config import Section as AnySection
    from fedmerge.encoder.backbone import Backbone

Section = TypeVar("Section", bound="AnySection")
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def load_backbone(
    source: str = MINILM, pooling: str = "mean", device: str = "auto", precision: str = "auto"
) -> Backbone:
    """Load a frozen text encoder from a Hugging Face id or a folder.

    Args:
        source: hub id or folder.
        pooling: ``mean``, ``cls`` or ``last-token``.
        device: ``auto``, ``cpu`` or a CUDA device.
        precision: ``auto``, ``float32`` or ``bfloat16``.

    Raises:
        BackboneError: the files are missing or damaged.
    """
    from fedmerge.device import resolve_compute
    from fedmerge.encoder import backbone

    return backbone.load_backbone(source, pooling, resolve_compute(device, precision))


def load_domains(
    root: str | Path = "demo",
    names: Sequence[str] | None = None,
    *,
    backbone: Backbone,
    cache_dir: str | Path | None = None,
    **text: Any,
) -> dict[str, LocalDomain]:
    """Open domain folders for training and evaluation in this process.

    Args:
        root: a folder of domain folders, or ``demo`` for the bundled synthetic domains.
        names: the domains to open; None opens all.
        backbone: the encoder whose tokens are used.
        cache_dir: where the demo and token tables are cached; None is ``~/.cache/fedmerge`` and no token cache.
        text: settings of ``[text]``: max_attribute_tokens, max_items, max_tokens.

    Returns:
        Domain name -> domain.

    Raises:
        DomainError: no such domain, or damaged files.
    """
    from fedmerge.client.local_domain import open_domain
    from fedmerge.config import ExperimentConfig, Text
    from fedmerge.domain.demo import domains_root

    folder = domains_root(str(root), str(cache_dir or ExperimentConfig().cache_dir))
    found = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
    wanted = found if names is None else list(names)
    if unknown := [name for name in wanted if name not in found]:
        raise DomainError(
            f"{folder}: no domain {', '.join(unknown)}; it holds {', '.join(found) or 'no domain folder'}. "
            "Give the name of a folder with a manifest.json."
        )
    settings, cache = section_of(Text, text), None if cache_dir is None else Path(cache_dir)
    return {name: open_domain(folder / name, backbone, settings, cache) for name in wanted}


def section_of(section: type[Section], values: Mapping[str, Any]) -> Section:
    """Build a section of the configuration.

    Raises:
        ConfigError: every problem at once.
    """
    from pydantic import ValidationError

    from fedmerge.config.files import describe_problem

    try:
        return section(**values)
    except ValidationError as error:
        problems = "\n".join(f"  {describe_problem(problem)}" for problem in error.errors(include_url=False))
        names = ", ".join(section.model_fields)
        raise ConfigError(f"settings of {section.__name__}:\n{problems}\nThere are: {names}.") from error
