"""Open what a notebook works on: a backbone and domain folders, imported or not."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedmerge.errors import ConfigError, DomainError

if TYPE_CHECKING:
    from fedmerge.client.local_domain import LocalDomain
    from fedmerge.config import Section as AnySection
    from fedmerge.domain.importers.events import ImportReport
    from fedmerge.encoder.backbone import Backbone

logger = logging.getLogger(__name__)
Section = TypeVar("Section", bound="AnySection")
Made = TypeVar("Made")
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def load_backbone(
    source: str = MINILM, pooling: str = "auto", device: str = "auto", precision: str = "auto", **conventions: Any
) -> Backbone:
    """Load a frozen text encoder from a Hugging Face id or a folder.

    Args:
        source: hub id or folder.
        pooling: ``auto`` (from the model's own files), ``mean``, ``mean-text``, ``cls`` or ``last``.
        device: ``auto``, ``cpu`` or a CUDA device.
        precision: ``auto``, ``float32`` or ``bfloat16``.
        conventions: other settings of ``[backbone]``, such as family, history_prompt or dimension.

    Raises:
        BackboneError: the files are missing or damaged, or the conventions contradict the model.
        ConfigError: unknown settings or values.
    """
    from fedmerge.config import BackboneSection
    from fedmerge.device import resolve_compute
    from fedmerge.encoder.backbone import open_backbone

    section = section_of(BackboneSection, {"source": source, "pooling": pooling, **conventions})
    return open_backbone(section, resolve_compute(device, precision))


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
        text: settings of ``[text]``: max_attribute_tokens, max_items, max_tokens, order.

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


def import_table(
    interactions: str | Path | Any,
    catalog: str | Path | Any | None,
    root: str | Path,
    *,
    columns: Mapping[str, Any] | None = None,
    time_formats: Sequence[str] = (),
    interactions_file: Mapping[str, Any] | None = None,
    catalog_file: Mapping[str, Any] | None = None,
    **settings: Any,
) -> ImportReport:
    """Import interactions and a catalog as the domain folder ``root/name``, as ``fedmerge data import table`` does.

    Args:
        interactions: a file of any format that the command reads, a folder of Parquet parts, or a data frame (pandas,
            polars, pyarrow, DuckDB); one row per interaction.
        catalog: the same with one row per item; None takes items and texts from the interactions.
        root: folder of domain folders.
        columns: names of the columns: ``user``, ``item``, ``time``, ``rating``, ``catalog_item``, and either ``texts``
            (a list, an entry ``colour=4`` reads at most 4 tokens) or ``title``, ``brand`` and ``category``.
        time_formats: as ``--time-format``; none recognises the format.
        interactions_file: what is said about a text file instead of recognised: ``delimiter``, ``encoding``,
            ``column_names``.
        catalog_file: the same of the catalog.
        settings: ``name`` (required for data frames), ``overwrite``, ``public_catalog``, ``k_core``,
            ``keep_all_items``, ``catalog_source``, ``min_rating``, ``max_bad_share``, ``progress``.

    Returns:
        The report: the manifest, the bad rows of each file by reason, and how many rows were left out for what. What
        the command warns of is logged as a warning.

    Raises:
        DomainError: an unreadable table, a missing column, too many bad rows, no rows left, or a folder that may not be
            written.
        ConfigError: an unknown keyword, a value out of range, or no name for a data frame.
    """
    from fedmerge.domain.importers.events import ImportSettings
    from fedmerge.domain.importers.reading.table import FileOptions
    from fedmerge.domain.importers.table import Columns, Reading
    from fedmerge.domain.importers.table import import_table as import_any
    from fedmerge.report.domains import import_warnings

    report = import_any(
        _source("interactions", interactions),
        None if catalog is None else _source("catalog", catalog),
        Path(root),
        _made(Columns, "columns", columns or {}),
        _made(ImportSettings, "settings", settings),
        Reading(
            _made(FileOptions, "interactions_file", interactions_file or {}),
            _made(FileOptions, "catalog_file", catalog_file or {}),
            tuple(time_formats),
        ),
    )
    for warning in import_warnings(report):
        logger.warning("%s: %s", report.manifest.name, warning)
    return report


def _source(name: str, value: Any) -> Any:
    """Return a path or a data frame; raise ConfigError for anything else."""
    from fedmerge.domain.importers.reading.frames import is_frame

    if isinstance(value, str | os.PathLike):
        return Path(value)
    if is_frame(value):
        return value
    raise ConfigError(
        f"import_table: {name} is a {type(value).__name__}, expected a path or a data frame. Convert it (polars: "
        "LazyFrame.collect(); lists and dicts: pandas.DataFrame(…))."
    )


def _made(kind: type[Made], name: str, values: Mapping[str, Any]) -> Made:
    """Build a frozen dataclass; lists become tuples."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]  # not bound to dataclasses
    if unknown := sorted(values.keys() - set(known)):
        raise ConfigError(f"import_table: {name} has no {', '.join(unknown)}. There are: {', '.join(known)}.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


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
