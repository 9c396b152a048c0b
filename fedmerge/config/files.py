"""Experiments as TOML files, and as the flat scalars of Flower's run configuration.

An experiment file is TOML with one table per section. A list is a comma-separated string and an absent value is
``"none"``; Python sees tuples and None.
"""

import difflib
import json
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fedmerge.config.experiment import ExperimentConfig
from fedmerge.config.merging import LEFT_TO_PRESET, PRESET_KEYS
from fedmerge.config.model import DEMO_ROOT
from fedmerge.config.removed import REMOVED
from fedmerge.errors import ConfigError
from fedmerge.installation import shipped_configs
from fedmerge.storage.addresses import is_address

Scalar = str | int | float | bool
DEMO = "demo"  # name of the bundled experiment
LEFT_TO_DEMO = "as in configs/demo.toml"  # value of a key that the bundled experiment decides, in pyproject.toml


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment file.

    Args:
        path: TOML file, or None for the defaults.
        overrides: ``key=value`` pairs with dotted keys, values as in TOML (quotes may be left out).

    Raises:
        ConfigError: every problem at once.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = flatten(tomllib.loads(path.read_text(encoding="utf-8-sig")))
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}). Give the path of an experiment file."
            ) from error
        except (ValueError, RecursionError) as error:  # broken TOML, bytes that are not UTF-8, endless nesting
            raise ConfigError(f"{path}: not valid TOML: {error}.") from error
    return from_flat(values | read_overrides(overrides), where=str(path) if path else "settings")


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return dotted key -> value of the arguments of ``--set``.

    Raises:
        ConfigError: an argument without ``=``.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override!r}: expected key=value, for example --set train.max_steps=100.")
        values[key.strip()] = _toml_value(text.strip())
    return values


def from_flat(flat: Mapping[str, Any], where: str = "run config") -> ExperimentConfig:
    """Build the experiment from dotted keys, as Flower hands them over.

    Raises:
        ConfigError: every problem at once.
    """
    flat = _resolve_demo(flat)
    nested: dict[str, Any] = {}
    known = set(to_flat(ExperimentConfig()))
    problems = []
    for key, value in flat.items():
        if key in ExperimentConfig.model_fields and key not in known:
            problems.append(f"{key}: found {value!r}, but this is a section; write [{key}] and its keys below")
            continue
        if key in REMOVED:
            problems.append(f"{key}: removed; {REMOVED[key]}")
            continue
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            problems.append(
                f"{key}: unknown key; " + (f"did you mean {close[0]}?" if close else "docs/config.md lists all keys")
            )
            continue
        section, dot, field = key.rpartition(".")
        (nested.setdefault(section, {}) if dot else nested)[field] = value
    try:
        config = ExperimentConfig.model_validate(nested)
    except ValidationError as error:
        described = (describe_problem(problem) for problem in error.errors(include_url=False))
        problems += [line for text in described for line in text.splitlines()]
    if problems:
        raise ConfigError(
            f"{where}: {len(problems)} problem{'s' * (len(problems) > 1)}\n" + "\n".join(f"  {p}" for p in problems)
        )
    return config


def to_flat(config: ExperimentConfig) -> dict[str, Scalar]:
    """Return the experiment as dotted keys and scalars; :func:`from_flat` reverses it. Presets are resolved."""
    return {key: _to_scalar(value) for key, value in flatten(config.model_dump()).items()}


def declared() -> dict[str, Scalar]:
    """Return every key with the value that pyproject.toml declares to Flower.

    Flower hands over each key, also those that nobody gave. So a key that a preset decides is declared as "preset";
    otherwise its default would count as given. A key that configs/demo.toml changes is declared as left to it, since
    ``flwr run .`` alone is the demo, and with an experiment file it is that experiment.
    """
    values = to_flat(ExperimentConfig()) | {f"mergerec.{key}": LEFT_TO_PRESET for key in PRESET_KEYS}
    return values | {key: LEFT_TO_DEMO for key, value in _demo().items() if value != values[key]}


def _demo() -> dict[str, Any]:
    """Return the dotted keys of configs/demo.toml."""
    return flatten(tomllib.loads(shipped_configs()[DEMO].read_text(encoding="utf-8")))


def _resolve_demo(flat: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give keys that are left to the demo its values in the demo, and elsewhere their defaults."""
    given = {key: value for key, value in flat.items() if value != LEFT_TO_DEMO}
    if len(given) == len(flat) or (given.get("name"), given.get("domains.root")) != (DEMO, DEMO_ROOT):
        return given
    return given | {key: value for key, value in _demo().items() if key not in given}


def to_toml(config: ExperimentConfig) -> str:
    """Return the whole experiment as a TOML file."""
    return flat_to_toml(to_flat(config))


def flat_to_toml(flat: Mapping[str, Scalar], prefix: str = "") -> str:
    """Return dotted keys as TOML tables, in order.

    Args:
        flat: dotted key -> value; the keys of a section stand together.
        prefix: of the tables' names, with its dot.
    """
    lines: list[str] = []
    for key, value in flat.items():
        section, dot, field = key.rpartition(".")
        if dot and f"[{prefix}{section}]" not in lines:
            lines += ["", f"[{prefix}{section}]"]
        lines.append(f"{field} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def with_absolute_paths(config: ExperimentConfig, start: Path) -> ExperimentConfig:
    """Resolve relative paths against ``start``; ``demo``, addresses and hub ids stay as they are."""

    def absolute(path: str) -> str:
        return str((start / Path(path).expanduser()).resolve())

    source = config.backbone.source
    is_folder = source.startswith((".", "~", "/")) or (start / source).is_dir()
    root = config.domains.root
    return config.model_copy(
        update={
            "output_dir": absolute(config.output_dir),
            "cache_dir": absolute(config.cache_dir),
            "domains": config.domains.model_copy(
                update={"root": root if root == DEMO_ROOT or is_address(root) else absolute(root)}
            ),
            "backbone": config.backbone.model_copy(update={"source": absolute(source) if is_folder else source}),
            "server": config.server.model_copy(
                update={
                    "catalogs": config.server.catalogs and absolute(config.server.catalogs),
                    "client_keys": config.server.client_keys and absolute(config.server.client_keys),
                }
            ),
        }
    )


def _to_scalar(value: Any) -> Scalar:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return typing.cast(Scalar, value)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def describe_problem(problem: Any) -> str:
    """Describe one of pydantic's problems: where, what, and the value that was found."""
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    found = "" if isinstance(problem["input"], (Mapping, BaseModel)) else f" (found {problem['input']!r})"
    return f"{where}: {message}{found}" if where else f"{message}"
